"""`clip train` and `clip draw` as they are typed."""

import csv
import dataclasses
import re
import sys

import pytest
from PIL import Image

from clip.app.cli import main
from clip.config import CLIPConfig
from clip.training import run
from clip.training.log import read_log
from clip.training.options import TrainingOptions

SMALL = CLIPConfig(16, 64, (1, 1, 1, 1), 16, None, 77, 49408, 32, 1, 1)


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


def typed(value):
    """A value as it is written on the command line."""
    return [] if value is True else list(map(str, value)) if isinstance(value, tuple) else [str(value)]


OTHERWISE = {  # every option, with a value that is not its default
    "out": "elsewhere",
    "images": "pictures",
    "templates": ("a {}.", "the {}."),
    "shares": (1.0, 2.5),
    "validation": 0.25,
    "holdout": "held.txt",
    "zero_shot": "classes",
    "augment": "artwork",
    "twins": True,
    "seed": 7,
    "workers": 2,
    "model": "tiny",
    "init": "openai",
    "freeze": ("text",),
    "thaw": 100,
    "batch_size": 8,
    "chunk": 4,
    "checkpointing": True,
    "precision": "bfloat16",
    "loss": "multi-positive",
    "scale": 20.0,
    "max_scale": 50.0,
    "lr": 0.01,
    "image_lr": 0.02,
    "text_lr": 0.03,
    "warmup": 5,
    "weight_decay": 0.0,
    "max_norm": 0.0,
    "evaluate_every": 10,
    "save_every": 20,
    "tensorboard": True,
    "device": "cpu",
}


@pytest.mark.parametrize("length", [{"epochs": 0.5}, {"steps": 3}, {"minutes": 0.1}])
def test_every_option_can_be_typed(monkeypatch, capsys, length):
    taken = []

    def look(options, resume):
        taken.append(options)
        raise ValueError("seen enough")

    monkeypatch.setattr("clip.app.train.train", look)
    given = OTHERWISE | length
    flags = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), *typed(value))]
    assert main(["train", "a.csv", "drawn", *flags]) == 2
    assert taken == [TrainingOptions(captions=("a.csv", "drawn"), **given)]
    missing = {field.name for field in dataclasses.fields(TrainingOptions)} - given.keys()
    assert missing == {"captions", "epochs", "steps", "minutes"} - length.keys()


def test_answers_go_to_one_stream_and_progress_to_the_other(tmp_path, capsys):
    assert main(drawn(tmp_path / "run", "--steps", "2", "--loss", "multi-positive", "--max-norm", "0")) == 0
    saved = TrainingOptions.read(tmp_path / "run")
    assert (saved.steps, saved.loss, saved.max_norm, saved.captions) == (2, "multi-positive", 0.0, ("drawn",))
    out, err = capsys.readouterr()
    assert "step 2: drawn_things" in out
    assert f'clip.load("{tmp_path}/run/best.safetensors") loads the result' in out
    assert re.search(r"training: 100%.*loss \d\.\d+ of \d\.\d\d", err)
    assert "step/s" not in out


def test_it_goes_on_by_the_options_saved_beside_it(tmp_path, capsys):
    assert main(drawn(tmp_path / "run", "--steps", "2")) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    again = ["train", "--resume", "--out", str(tmp_path / "moved")]
    assert main(again) == 0  # already at its end
    assert [row["step"] for row in read_log(tmp_path / "moved" / "log.jsonl") if "loss" in row] == [1, 2]
    assert main([*again, "--lr", "1"]) == 2  # and not silently by the old learning rate
    assert "give it nothing but --out" in capsys.readouterr().err


def test_a_dry_run_says_what_will_happen_and_writes_nothing(tmp_path, capsys):
    assert main(drawn(tmp_path / "run", "--steps", "500", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert re.search(r"loss +\d\.\d+; guessing costs 2\.079", out)
    assert re.search(r"length +500 steps, about \d+ (seconds|minutes|hours)", out)
    assert "drawn_things" in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_how_many_steps_fit_into_the_minutes(tmp_path, capsys):
    assert main(drawn(tmp_path / "run", "--minutes", "600", "--dry-run")) == 0
    assert re.search(r"length +\d{4,} steps, about 10 hours", capsys.readouterr().out)


def test_one_batch_is_learned_by_heart(tmp_path, capsys):
    assert main(drawn(tmp_path / "run", "--overfit-one-batch", "--lr", "0.003", "--max-norm", "0")) == 0
    out, err = capsys.readouterr()
    first, last = (float(loss) for loss in re.findall(r"loss +(\d+\.\d+) of 2\.08", out)[:: out.count("of 2.08") - 1])
    assert last < 0.05 * 2.08 < first
    assert "learned by heart" in err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_told_apart_says_what_to_try(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clip.app.train.BY_HEART", 40)
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        for number in range(8):
            Image.new("RGB", (64, 64), "red").save(tmp_path / f"{number}.png")
            writer.writerow((f"{number}.png", "always the same"))
    command = ["train", str(tmp_path / "captions.csv"), "--model", "small", "--batch-size", "8", "--validation", "0"]
    assert main([*command, "--out", str(tmp_path / "run"), "--overfit-one-batch"]) == 1
    assert "try --loss multi-positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train"], "say what to learn from"),
        (["train", "nothing.csv"], "nothing.csv"),
        (["train", "drawn", "--steps", "1", "--epochs", "1"], "give one of them"),
        (["train", "drawn", "--batch-size", "1"], "at least 2"),
        (["train", "drawn", "--lr", "0"], "lr must be positive"),
        (["train", "drawn", "--model", "small", "--init", "nowhere.pt"], "nowhere.pt not found"),
        (["train", "drawn", "--model", "large"], "model must be one of"),
        (["train", "--resume", "--out", "nowhere"], "no options of a training run"),
    ],
)
def test_what_the_user_can_mend_is_one_line(command, message, capsys):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("clip train: ")
    assert error.count("\n") == 1


def test_a_missing_extra_is_one_line_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(drawn(tmp_path / "run", "--steps", "2", "--tensorboard")) == 2
    assert "pip install clip-from-scratch[train]" in capsys.readouterr().err


def test_drawings_come_with_their_captions(tmp_path, capsys):
    folder = tmp_path / "drawings"
    assert main(["draw", "--count", "7", "--size", "48", "-o", str(folder)]) == 0
    with open(folder / "captions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    for row in rows:
        with Image.open(folder / row["image"]) as picture:
            assert picture.size == (48, 48)
    out, err = capsys.readouterr()
    assert out == f"7 pictures and captions.csv in {folder}\n"
    assert err == ""  # a bar is for a terminal
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["draw", "-o", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_drawings_follow_from_the_seed(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["draw", "--count", "3", "--size", "32", "--seed", seed, "-o", str(tmp_path / name)]) == 0
    a, b, c = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc")
    assert a == b != c


def test_drawings_can_show_what_training_never_does(tmp_path):
    shown = []
    for others in ([], ["--held-out"]):
        folder = tmp_path / f"drawings{len(shown)}"
        assert main(["draw", "--count", "40", "--size", "16", "-o", str(folder), *others]) == 0
        with open(folder / "captions.csv", newline="") as file:
            shown.append({row["id"] for row in csv.DictReader(file)})
    assert not shown[0] & shown[1]


def test_drawings_are_learned_from_by_the_next_command(tmp_path):
    assert main(["draw", "--count", "30", "--size", "32", "-o", str(tmp_path / "drawings")]) == 0
    command = ["train", str(tmp_path / "drawings" / "captions.csv"), "--model", "small", "--batch-size", "4"]
    assert main([*command, "--validation", "0", "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_a_size_too_small_to_see_anything_leaves_no_folder_behind(tmp_path, capsys):
    assert main(["draw", "--size", "4", "-o", str(tmp_path / "drawings")]) == 2
    assert "at least 16 pixels" in capsys.readouterr().err
    assert not (tmp_path / "drawings").exists()
