"""`clip index` and `clip search`, as a person or a pipe sees them."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, filled
from PIL import Image

import clip
from clip.app.cli import main
from clip.tasks.retrieval import Index, Query


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, another, and a folder of five pictures, one of them twice."""
    folder = tmp_path_factory.mktemp("search")
    clip.save(filled(TINY["vit"]), folder / "model.safetensors")
    clip.save(filled(TINY["vit"], salt="other"), folder / "other.safetensors")
    (folder / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in "abcde":
        pixels = torch.randint(0, 256, (5, 6, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).resize((60, 50), Image.Resampling.NEAREST).save(folder / f"photos/{name}.png")
    shutil.copy(folder / "photos/a.png", folder / "photos/z.png")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The same, as the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def index(folder, capsys):
    assert main(["index", "photos", "-o", "photos.clipindex", "--model", "model.safetensors", "--device", "cpu"]) == 0
    capsys.readouterr()
    return folder / "photos.clipindex"


def search(*arguments):
    return main(["search", "--index", "photos.clipindex", "--device", "cpu", *map(str, arguments)])


def test_the_first_run_embeds_and_the_next_needs_no_arguments(folder, capsys):
    assert main(["index", "photos", "-o", "x", "--model", "model.safetensors", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == "x: 5 different pictures; 5 embedded, 1 copies or moved, 0 unchanged, 0 dropped\n"
    assert err == ""
    (folder / "photos/b.png").unlink()
    assert main(["index", "-o", "x", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "index": "x",
        "model": str(folder / "model.safetensors"),  # so that a search may start from anywhere
        "pictures": 4,
        "embedded": 0,
        "recognised": 0,
        "unchanged": 5,
        "dropped": 1,
        "errors": {},
    }


def test_bad_files_stand_at_the_end_and_in_the_exit_code(folder, capsys):
    (folder / "photos/bad.png").write_text("no picture")
    for _ in range(2):
        assert main(["index", "photos", "-o", "x", "--model", "model.safetensors", "--device", "cpu"]) == 1
        out, err = capsys.readouterr()
        assert out.startswith("x: 5 different pictures")
        path, count = err.splitlines()
        assert path.startswith(f"clip index: {folder / 'photos/bad.png'}: empty, or not in a picture format")
        assert count == "clip index: 1 could not be read"


@pytest.mark.usefixtures("index")
def test_json_says_what_the_library_says(folder, capsys):
    model, preprocess = clip.load(folder / "model.safetensors", device="cpu")
    queries = [
        Query([(1, start), (0.3, Path("photos/b.png")), (-0.3, "snow")]) for start in ("a dog", Path("photos/c.png"))
    ]
    expected = Index.open(folder / "photos.clipindex", model, preprocess).search(*queries, top=2)

    terms = ["--more", "photos/b.png", "--less", "snow", "--weight", "0.3"]
    assert search("a dog", "--image", "photos/c.png", *terms, "--top", 2, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in lines] == [
        "a dog + 0.3 photos/b.png - 0.3 snow",
        "photos/c.png + 0.3 photos/b.png - 0.3 snow",
    ]
    for line, matches in zip(lines, expected, strict=True):
        assert [match["rank"] for match in line["matches"]] == [1, 2]
        assert [match["path"] for match in line["matches"]] == [match.path for match in matches]
        assert [match["copies"] for match in line["matches"]] == [list(match.copies) for match in matches]
        cosines = [match.cosine for match in matches]
        assert [match["cosine"] for match in line["matches"]] == pytest.approx(cosines, abs=1e-5)


@pytest.mark.usefixtures("index")
def test_the_table_ranks_paths_short_where_they_can_be(folder, capsys):
    assert search("--image", folder / "photos/a.png", "--top", 2) == 0
    query, header, first, second, *rest = capsys.readouterr().out.splitlines()
    assert query == str(folder / "photos/a.png")
    assert header.split() == ["rank", "cosine", "picture"]
    assert first == "     1   1.000  photos/a.png  (and photos/z.png)"
    assert second.split()[0] == "2"
    assert rest == [""]


@pytest.mark.usefixtures("index")
def test_recall_is_told_on_request(capsys):
    assert search("a dog", "a cat", "--backend", "faiss-hnsw", "--recall", "--json") == 0
    assert [json.loads(line)["recall"] for line in capsys.readouterr().out.splitlines()] == [1, 1]
    assert search("a dog", "--backend", "faiss-flat", "--recall") == 0
    assert "recall  1.000 of the 5 nearest, found by faiss-flat" in capsys.readouterr().out


@pytest.mark.usefixtures("index")
def test_the_grid_shows_each_match(folder, monkeypatch):
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file: (figures.append(self), savefig(self, file)))
    (folder / "photos/b.png").unlink()  # not in the index's knowledge yet
    assert search("price in $ and $", "--grid", "one.png") == 0
    assert search("a dog", "a cat", "--image", "photos/a.png", "--grid", "three.png", "--top", 4) == 0

    one, three = figures
    assert [part.get_suptitle() for part in one.subfigs] == ["price in $ and $"]
    assert [part.get_suptitle() for part in three.subfigs] == ["a dog", "a cat", "photos/a.png"]
    titles = [[axes.get_title() for axes in part.axes] for part in (*one.subfigs, *three.subfigs)]
    assert [len(row) for row in titles] == [6, 4, 4, 4]  # two rows of three, the last one empty
    assert titles[0].count("") == 1
    assert titles[3][0] == "1.000"
    names = [text.get_text() for axes in one.axes for text in axes.texts]
    assert names == ["b.png"]
    with Image.open("one.png") as picture:
        assert picture.width > picture.height


@pytest.mark.usefixtures("index")
def test_errors_are_one_sentence(folder, capsys, monkeypatch):
    def says(*arguments):
        assert main([*map(str, arguments), "--device", "cpu"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    here = ["--index", "photos.clipindex"]
    assert "what to look for?" in says("search", *here)
    assert "there is no index; make one: clip index FOLDER -o none" in says("search", "a dog", "--index", "none")
    assert "there is something else" in says("search", "a dog", "--index", "photos")
    assert "use the model that made it" in says("search", "a dog", *here, "--model", "other.safetensors")
    assert "use the model that made it" in says("index", "-o", "photos.clipindex", "--model", "other.safetensors")
    assert "no such folder" in says("index", "nowhere", "-o", "photos.clipindex")
    assert "at least one folder" in says("index", "-o", "new.clipindex", "--model", "model.safetensors")
    assert "none.png: No such file" in says("search", "--image", "none.png", *here)
    assert "cancel each other" in says("search", "a dog", "--less", "a dog", "--weight", 1, *here)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install clip-from-scratch[search]" in says("search", "a dog", *here, "--backend", "faiss-ivf")


@pytest.mark.usefixtures("index")
def test_without_matplotlib_the_grid_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert search("a dog", "--grid", "x.png") == 2
    assert "--grid needs matplotlib: pip install clip-from-scratch[search]" in capsys.readouterr().err


def test_stopped_by_hand_it_says_how_to_go_on(folder, capsys, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "update", stop)
    assert main(["index", "photos", "-o", "x", "--model", "model.safetensors", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "clip index: stopped; the same command goes on\n"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
@pytest.mark.usefixtures("index")
def test_names_that_are_no_text_can_be_printed(folder, monkeypatch):
    os.rename("photos/c.png", os.fsencode("photos/") + b"caf\xe9.png")
    for arguments in (["index", "-o", "photos.clipindex"], ["search", "a dog", "--index", "photos.clipindex"]):
        for form in ([], ["--json"]):
            out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
            monkeypatch.setattr(sys, "stdout", out)
            assert main([*arguments, *form, "--device", "cpu"]) == 0
            out.flush()
    assert rb"caf\udce9.png" in out.buffer.getvalue()
