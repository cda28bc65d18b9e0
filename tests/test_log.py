"""A run's log can be cut back and drawn, and says what is missing where a package is."""

import sys

import pytest
from PIL import Image

from clip.training.log import RunLog, draw_curves, read_log


def write(path, rows, events=False):
    with RunLog(path, events) as log:
        for row in rows:
            log.write(row)
    return log


def step(number):
    return {"step": number, "loss": 3 / number, "chance": 3.0, "scale": 14.0, "gradient_norm": 1.0, "lr": 1e-3}


def test_rows_come_back_bit_by_bit(tmp_path):
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-17}]
    write(tmp_path / "log.jsonl", rows)
    assert read_log(tmp_path / "log.jsonl") == rows


def test_a_log_is_continued_and_cut_back(tmp_path):
    path = tmp_path / "log.jsonl"
    size = write(path, [step(1), step(2)]).size
    log = write(path, [step(3)])
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]
    log.cut(size)
    assert [row["step"] for row in read_log(path)] == [1, 2]


def test_a_line_that_was_not_finished_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [step(1)])
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in read_log(path)] == [1]


def test_a_log_that_nobody_writes_to_leaves_no_file(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.cut(0)
    assert log.size == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "evaluations",
    [[], [{"step": 5, "validation_loss": 2.0, "text_to_picture_R@1": 0.5}], [{"step": 5, "drawn_things": 0.1}]],
)
def test_curves_are_a_picture(tmp_path, evaluations):
    write(tmp_path / "log.jsonl", [*map(step, range(1, 9)), *evaluations])
    draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def test_an_evaluation_changes_the_picture(tmp_path):
    pictures = []
    for evaluations in ([], [{"step": 5, "validation_loss": 2.0}], [{"step": 5, "drawn_things": 0.1}]):
        log = tmp_path / f"{len(pictures)}.jsonl"
        write(log, [*map(step, range(1, 9)), *evaluations])
        draw_curves(log, log.with_suffix(".png"))
        pictures.append(log.with_suffix(".png").read_bytes())
    assert len(set(pictures)) == 3


def test_events_are_written_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "log.jsonl", [step(1), step(2)], events=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]


def test_steps_done_again_after_a_cut_stand_once_in_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path / "log.jsonl")
    write(log.path, [step(1)], events=True)
    size = log.size
    write(log.path, [step(2), step(3)], events=True)
    log.cut(size)
    write(log.path, [step(2), step(3)], events=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    write(tmp_path / "log.jsonl", [step(1)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install clip-from-scratch\[train\]"):
        draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard: pip install clip-from-scratch\[train\]"):
        write(tmp_path / "log.jsonl", [], events=True)
