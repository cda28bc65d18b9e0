import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import TINY, filled
from PIL import Image

import clip
from clip.app.cli import main

LABELS = ["a dog", "a cat", "una bicicletta è rossa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and three pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("classify")
    clip.save(filled(TINY["vit"]), folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, mode in (("red.png", "RGB"), ("grey.jpg", "L")):
        pixels = torch.randint(0, 256, (60, 80, len(mode)), dtype=torch.uint8, generator=generator)
        Image.frombytes(mode, (80, 60), pixels.numpy().tobytes()).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:300])
    return folder


def classify(folder, *pictures, options=()):
    paths = [str(folder / picture) for picture in pictures]
    model = ["--model", str(folder / "model.safetensors"), "--device", "cpu"]
    return main(["classify", *paths, "--labels", *LABELS, *model, *options])


def test_json_says_what_the_library_says(folder, capsys):
    assert classify(folder, "red.png", "grey.jpg", options=["--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["picture"] for line in lines] == [str(folder / "red.png"), str(folder / "grey.jpg")]

    model, preprocess = clip.load(folder / "model.safetensors", device="cpu")
    classifier = clip.ZeroShotClassifier(model, LABELS)
    for line in lines:
        [expected] = classifier(preprocess(Image.open(line["picture"]))[None]).top()
        assert [match["label"] for match in line["matches"]] == [match.label for match in expected]
        for match, want in zip(line["matches"], expected, strict=True):
            assert match["probability"] == pytest.approx(want.probability, abs=1e-5)
            assert match["cosine"] == pytest.approx(want.cosine, abs=1e-5)


def test_the_table_shows_each_label_once_in_order(folder, capsys):
    assert classify(folder, "red.png") == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == str(folder / "red.png")
    assert header.split() == ["label", "probability", "cosine"]
    shares = [float(row.split("%")[0].split()[-1]) for row in rows if "%" in row]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.05)
    assert sum(label in row for label in LABELS for row in rows) == 3


def test_a_bad_picture_is_reported_and_the_rest_go_on(folder, capsys):
    assert classify(folder, "red.png", "broken.png", "nowhere.png", "grey.jpg") == 1
    out, err = capsys.readouterr()
    assert "red.png" in out
    assert "grey.jpg" in out
    assert "broken.png: truncated or damaged" in err
    assert "nowhere.png: No such file" in err
    assert "2 of 4 pictures could not be read" in err


def test_a_picture_of_an_impossible_shape_is_a_bad_picture(folder, capsys):
    Image.new("L", (1, 300_000)).save(folder / "sliver.png")
    assert classify(folder, "red.png", "sliver.png", "grey.jpg") == 1
    out, err = capsys.readouterr()
    assert "red.png" in out
    assert "grey.jpg" in out
    assert "sliver.png: a picture of 1 x 300000 would be resized" in err


def test_a_bad_picture_is_a_line_of_its_own_in_json(folder, capsys):
    assert classify(folder, "broken.png", "red.png", options=["--json"]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert "truncated" in first["error"]
    assert "matches" in second


def test_all_pictures_bad_is_an_answer_too(folder, capsys):
    assert classify(folder, "broken.png") == 1
    assert capsys.readouterr().out == ""


def test_more_pictures_than_a_batch_keep_their_order(folder, capsys):
    names = ["red.png", "grey.jpg", "grey.jpg"] * 15
    assert classify(folder, *names, options=["--json", "--top", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [os.path.basename(line["picture"]) for line in lines] == names
    answers = {line["picture"]: line["matches"][0]["label"] for line in lines}
    assert all(line["matches"][0]["label"] == answers[line["picture"]] for line in lines)
    assert all(len(line["matches"]) == 1 for line in lines)


def test_templates_and_none_reach_the_classifier(folder, capsys):
    classify(folder, "red.png", options=["--json"])
    plain = json.loads(capsys.readouterr().out)
    classify(folder, "red.png", options=["--json", "--template", "{}", "--template", "not {}", "--none"])
    other = json.loads(capsys.readouterr().out)
    assert "none of these" in [match["label"] for match in other["matches"]]
    assert plain["matches"][0]["cosine"] != other["matches"][0]["cosine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "a", "--model", "nowhere.pt"], "nowhere.pt not found"),
        (["--labels", "a", "--model", "MODEL", "--template", "no place"], "needs {} where the label goes"),
        (["--labels", "a", "a", "--model", "MODEL"], "labels must differ"),
        (["--labels", "dog " * 80, "--model", "MODEL"], "context length of 77"),
        (["--labels", "a", "--model", "MODEL", "--device", "gpu"], "got 'gpu'"),
        (["--labels", "a", "--model", "red.png"], "expected a TorchScript archive"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    arguments = [str(folder / "model.safetensors") if argument == "MODEL" else argument for argument in arguments]
    arguments = [str(folder / "red.png") if argument == "red.png" else argument for argument in arguments]
    assert main(["classify", str(folder / "red.png"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("clip classify: ")
    assert out == ""


@pytest.mark.parametrize("arguments", [[], ["classify"], ["classify", "a.png"], ["classify", "a", "--top", "0"]])
def test_a_wrong_call_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: clip" in capsys.readouterr().err


def test_what_is_nobodys_fault_is_one_line_too_and_debug_shows_where(folder, capsys, monkeypatch):
    monkeypatch.setattr("clip.app.classify.ZeroShotClassifier", {}.__getitem__)  # takes one argument, is given more
    assert classify(folder, "red.png") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("clip classify: unexpected TypeError: ")
    with pytest.raises(TypeError):
        classify(folder, "red.png", options=["--debug"])


def test_every_command_has_json_debug_and_a_description(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) {2,}\w", capsys.readouterr().out, re.M)
    assert "classify" in commands
    for command in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "--json" in text
        assert "--debug" in text


def test_help_explains_the_two_numbers(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["classify", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "probability   which of these labels" in text
    assert "cosine        how alike" in text
    assert "ViT-L/14@336px" in text


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"clip-from-scratch {clip.__version__}\n"


def command(folder, *options):
    pictures = [str(folder / "red.png")] * 200
    model = ["--model", str(folder / "model.safetensors"), "--device", "cpu"]
    return [sys.executable, "-m", "clip", "classify", *pictures, "--labels", *LABELS, *model, *options]


def test_a_reader_that_leaves_early_gets_no_traceback(folder):
    process = subprocess.Popen(command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep file names in Unicode")
def test_names_that_are_no_text_are_printed_all_the_same(folder):
    name = os.fsencode(folder) + b"/na\xefve.png"
    shutil.copy(folder / "red.png", name)
    options = ["--labels", "a", "b", "--model", folder / "model.safetensors", "--device", "cpu"]
    strict = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    call = [sys.executable, "-m", "clip", "classify", name, *options]
    done = subprocess.run(call, env=strict, capture_output=True, timeout=60, check=True)
    assert rb"na\udcefve.png" in done.stdout
    assert rb"\u2588" in done.stdout  # the bar beside a probability, where the terminal has no block


def test_an_interrupt_ends_the_command_quietly(folder):
    process = subprocess.Popen(command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130)  # 0 if it was done before the signal came
    assert b"Traceback" not in err
