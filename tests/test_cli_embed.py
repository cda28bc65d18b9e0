import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

import clip
from clip.app.cli import main
from clip.tasks.encode import encode_texts

TEXTS = ["a red fish", "ein Fahrrad ist grün", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, and one that is cut short."""
    folder = tmp_path_factory.mktemp("embed")
    generator = torch.Generator().manual_seed(0)
    for name in ("one.png", "two.png", "drei ä.png"):
        pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "one.png").read_bytes()[:300])
    return folder


def embed(*arguments, out):
    return main(["embed", *map(str, arguments), "-o", str(out), "--model", "tiny", "--device", "cpu"])


def read(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


def test_pictures_become_the_rows_that_the_library_computes(folder, tmp_path, capsys):
    paths = [str(folder / name) for name in ("two.png", "drei ä.png", "one.png")]
    assert embed(*paths, out=tmp_path / "p.npz") == 0
    file = read(tmp_path / "p.npz")
    assert file["names"].tolist() == paths
    assert (file["kind"].item(), file["model"].item()) == ("pictures", "tiny")
    assert file["features"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(file["features"], axis=1), 1, rtol=1e-5)

    model, preprocess = clip.load("tiny", device="cpu")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_image(preprocess.batch(paths)), dim=-1)
    np.testing.assert_allclose(file["features"], expected.numpy(), atol=1e-5)
    assert "3 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["arguments", "file", "stdin"])
def test_texts_come_as_arguments_from_a_file_or_from_a_pipe(tmp_path, monkeypatch, how):
    content = ("\ufeff" + "\r\n\n".join(TEXTS) + "\n").encode()
    (tmp_path / "texts.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    given = {"arguments": ["--text", *TEXTS], "file": ["--texts", tmp_path / "texts.txt"], "stdin": ["--texts", "-"]}
    assert embed(*given[how], out=tmp_path / "t.npz") == 0
    file = read(tmp_path / "t.npz")
    assert file["names"].tolist() == TEXTS
    assert file["kind"].item() == "texts"
    np.testing.assert_allclose(file["features"], encode_texts(clip.load("tiny", "cpu")[0], TEXTS).numpy(), atol=1e-5)


@pytest.mark.parametrize(("arguments", "tower"), [(["one.png"], "image"), (["--text", "a"], "text")])
def test_only_the_tower_that_is_needed_is_loaded(folder, tmp_path, monkeypatch, arguments, tower):
    asked = []
    monkeypatch.setattr(
        "clip.app.command.load", lambda *a, **options: asked.append(options) or clip.load(*a, **options)
    )
    monkeypatch.chdir(folder)
    assert embed(*arguments, out=tmp_path / "x.npz") == 0
    assert asked[0]["tower"] == tower


def test_a_bad_picture_has_no_row_is_told_and_is_not_fatal(folder, tmp_path, capsys):
    paths = [str(folder / name) for name in ("one.png", "broken.png", "nowhere.png", "two.png")]
    assert embed(*paths, "--json", out=tmp_path / "p.npz") == 1
    assert read(tmp_path / "p.npz")["names"].tolist() == [paths[0], paths[3]]
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["shape"][0] == 2
    assert list(answer["errors"]) == [paths[1], paths[2]]
    assert "broken.png: truncated or damaged" in err
    assert "2 of 4 pictures could not be read" in err


def test_nothing_is_written_if_no_picture_can_be_read(folder, tmp_path, capsys):
    (tmp_path / "old.npz").write_bytes(b"old")
    assert embed(folder / "broken.png", out=tmp_path / "old.npz") == 2
    assert "no picture can be read (1 tried)" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.npz", b"old")]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "old.npz").write_bytes(b"old")

    def fail(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    assert embed("--text", "a cat", out=tmp_path / "old.npz") == 2
    assert "old.npz: cannot be written (No space left on device)" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.npz", b"old")]


def test_another_size_is_used_and_its_cost_is_one_line_on_stderr(folder, tmp_path, capsys):
    size = 2 * clip.load("tiny", device="cpu")[0].visual.input_resolution
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert embed(folder / "one.png", "--image-size", size, out=tmp_path / "large.npz") == 0
    err = capsys.readouterr().err
    assert err.startswith("clip embed: the model was trained at")
    assert err.count("\n") == 1
    embed(folder / "one.png", out=tmp_path / "plain.npz")
    large, plain = read(tmp_path / "large.npz")["features"], read(tmp_path / "plain.npz")["features"]
    assert large.shape == plain.shape
    assert not np.allclose(large, plain, atol=1e-3)


@pytest.mark.parametrize(("texts", "said"), [(["a cat"], "1 text, 256"), (["a cat", "a dog"], "2 texts, 256")])
def test_one_is_said_in_the_singular(tmp_path, capsys, texts, said):
    assert embed("--text", *texts, out=tmp_path / "t.npz") == 0
    assert said in capsys.readouterr().out


def test_a_text_that_is_too_long_stops_the_command_unless_it_may_be_cut(tmp_path, capsys):
    assert embed("--text", "dog " * 90, out=tmp_path / "t.npz") == 2
    assert "context length of 77" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert embed("--text", "dog " * 90, "--truncate", out=tmp_path / "t.npz") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of these"),
        (["one.png", "--text", "a"], "expected one of these"),
        (["--texts", "nowhere.txt"], "No such file"),
        (["--texts", "empty.txt"], "there is no text in it"),
        (["--texts", "one.png"], "expected a text in UTF-8"),
        (["--text", "a", "--image-size", "64"], "--image-size is about pictures"),
        (["one.png", "--image-size", "3"], "multiple of"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys, arguments, message):
    (folder / "empty.txt").write_text(" \n\n")
    monkeypatch.chdir(folder)
    assert embed(*arguments, out=tmp_path / "x.npz") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("clip embed: ")
    assert message in err


@pytest.mark.parametrize("out", ["x.npy", "nowhere/x.npz"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(folder, capsys, out):
    assert embed(folder / "one.png", out=out) == 2
    assert "ending in .npz, got" in capsys.readouterr().err


def test_a_draft_reads_less_and_finds_nearly_the_same(tmp_path, capsys):
    photograph = Path(skimage.data_dir) / "retina.jpg"
    assert embed(photograph, out=tmp_path / "exact.npz") == 0
    assert embed(photograph, "--draft", out=tmp_path / "draft.npz") == 0
    exact, draft = (read(tmp_path / name)["features"][0] for name in ("exact.npz", "draft.npz"))
    assert 0.99 < exact @ draft < 1 - 1e-6
