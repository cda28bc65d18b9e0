"""`clip train` and `clip draw` as they are typed."""

import csv
import dataclasses
import re

import pytest
from PIL import Image

from clip.app.cli import main
from clip.config import CLIPConfig
from clip.training import run
from clip.training.log import read_log
from clip.training.options import TrainingOptions

SMALL = CLIPConfig(16, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(run.MODELS, "small", SMALL)


def drawn(folder, *others):
    return ["train", "drawn", "--model", "small", "--batch-size", "8", "--out", str(folder), *others]


def test_the_help_names_every_option_once(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out.partition("positional arguments")[2]
    for field in dataclasses.fields(TrainingOptions):
        flag = "CAPTIONS" if field.name == "captions" else "--" + field.name.replace("_", "-")
        assert len(re.findall(rf"^  {flag}\b(?!-)", text, re.M)) == 1, flag


def test_what_is_typed_is_what_is_saved(tmp_path, capsys):
    typed = "--steps 2 --lr 0.01 --freeze text --twins --seed 7 --loss multi-positive --max-norm 0 --chunk 4"
    assert main(drawn(tmp_path / "run", *typed.split())) == 0
    saved = TrainingOptions.read(tmp_path / "run")
    assert (saved.steps, saved.lr, saved.freeze, saved.twins, saved.seed) == (2, 0.01, ("text",), True, 7)
    assert (saved.loss, saved.max_norm, saved.chunk, saved.captions) == ("multi-positive", 0.0, 4, ("drawn",))
    assert "clip.load(" in capsys.readouterr().out


def test_it_goes_on_by_the_options_saved_beside_it(tmp_path, capsys):
    assert main(drawn(tmp_path / "run", "--steps", "2")) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0  # already at its end
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl") if "loss" in row] == [1, 2]


def test_a_dry_run_says_what_will_happen_and_writes_nothing(tmp_path, capsys):
    assert main(drawn(tmp_path / "run", "--steps", "500", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert re.search(r"loss +\d\.\d+; guessing costs ln\(8\) = 2\.079", out)
    assert re.search(r"length +500 steps, about \d+ minutes", out)
    assert "drawn_things" in out
    assert not (tmp_path / "run").exists()


def test_one_batch_is_learned_by_heart(tmp_path, capsys):
    assert main(drawn(tmp_path / "run", "--overfit-one-batch", "--lr", "0.003", "--max-norm", "0")) == 0
    assert "learned by heart" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_told_apart_says_what_to_try(tmp_path, capsys):
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        for number in range(8):
            Image.new("RGB", (64, 64), "red").save(tmp_path / f"{number}.png")
            writer.writerow((f"{number}.png", "always the same"))
    command = ["train", str(tmp_path / "captions.csv"), "--model", "small", "--batch-size", "8", "--validation", "0"]
    assert main([*command, "--out", str(tmp_path / "run"), "--overfit-one-batch"]) == 1
    assert "try --loss multi-positive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train"], "say what to learn from"),
        (["train", "nothing.csv"], "nothing.csv"),
        (["train", "drawn", "--steps", "1", "--epochs", "1"], "give one of them"),
        (["train", "drawn", "--batch-size", "1"], "at least 2"),
        (["train", "--resume", "--out", "nowhere"], "no options of a training run"),
    ],
)
def test_what_the_user_can_mend_is_one_line(command, message, capsys):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("clip train: ")
    assert "Traceback" not in error


def test_drawings_come_with_their_captions(tmp_path, capsys):
    folder = tmp_path / "drawings"
    assert main(["draw", "--count", "7", "--size", "48", "-o", str(folder)]) == 0
    with open(folder / "captions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    for row in rows:
        with Image.open(folder / row["image"]) as picture:
            assert picture.size == (48, 48)
    assert main(["draw", "-o", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
