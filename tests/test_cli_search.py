"""`clip index` and `clip search`, as a person or a pipe sees them."""

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
from clip.app import index as index_command
from clip.app import search as search_command
from clip.app.cli import main
from clip.preprocess import open_image
from clip.tasks import encode
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
    assert out == "x: 5 different pictures; 5 embedded, 1 copied or moved, 0 unchanged, 0 dropped\n"
    assert err == ""
    (folder / "one").mkdir()
    shutil.copy(folder / "photos/a.png", folder / "one")
    assert main(["index", "one", "-o", "y", "--model", "model.safetensors", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("y: 1 different picture; ")
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


@pytest.mark.parametrize("form", [[], ["--json"], ["--recall"], ["--grid", "matches.png"]])
def test_an_index_of_nothing_is_said_to_be_empty(folder, capsys, form):
    (folder / "nothing").mkdir()
    assert main(["index", "nothing", "-o", "photos.clipindex", "--model", "model.safetensors", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("photos.clipindex: 0 different pictures; ")
    assert search("a dog", *form) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "clip search: photos.clipindex: the index is empty; clip index fills it\n"
    assert not Path("matches.png").exists()


@pytest.mark.usefixtures("index")
def test_only_the_tower_that_embeds_the_queries_is_loaded(monkeypatch, capsys):
    towers = []
    load = search_command.load_model
    monkeypatch.setattr(
        search_command, "load_model", lambda options, tower: (towers.append(tower), load(options, tower=tower))[1]
    )
    for arguments in (
        ["a dog", "a cat", "--less", "snow"],
        ["--image", "photos/a.png", "--more", "photos/b.png"],
        ["a dog", "--image", "photos/a.png"],
        ["a dog", "--more", "photos/a.png"],
    ):
        assert search(*arguments) == 0
    assert towers == ["text", "image", None, None]


@pytest.mark.usefixtures("index")
def test_a_typing_error_costs_no_model_and_makes_no_index(folder, capsys, monkeypatch):
    for module in (index_command, search_command):
        monkeypatch.setattr(module, "load_model", lambda *arguments, **options: pytest.fail("a model was loaded"))
    model = ["--model", "model.safetensors"]
    for arguments, message in (
        (["index", "photo", "-o", "new", *model], "photo: there is no such folder"),
        (["index", "photos/a.png", "-o", "new", *model], "a.png: there is no such folder"),
        (["index", "-o", "new", *model], "at least one folder"),
        (["search", "a dog", "--index", "new", *model], "new: there is no index"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
        assert not (folder / "new").exists()


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "0"], "argument --top: expected a positive number, got '0'"),
        (["--top", "-3"], "argument --top: expected a positive number, got '-3'"),
        (["--grid", "matches.xyz"], "argument --grid: expected a name ending in .jpeg"),
        (["--weight", "much"], "argument --weight"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        search("a dog", *arguments)
    assert message in capsys.readouterr().err


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
    assert "finite" in says("search", "a dog", "--less", "snow", "--weight", "nan", *here)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install clip-from-scratch[search]" in says("search", "a dog", *here, "--backend", "faiss-ivf")


@pytest.mark.usefixtures("index")
def test_without_matplotlib_the_grid_names_the_extra_before_the_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(search_command, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
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
def test_names_that_are_no_text_or_would_move_the_cursor_are_escaped(folder, capsys):
    name = os.fsencode("photos/") + b"caf\xe9\n\x1b[2J\x9b.png"
    os.rename("photos/c.png", name)
    shutil.copy("photos/a.png", "photos/a\tb.png")
    Path("photos/no\rpicture.png").write_text("no picture")
    assert main(["index", "-o", "photos.clipindex", "--device", "cpu"]) == 1
    bad, _ = capsys.readouterr().err.splitlines()
    assert rf"{folder}/photos/no\rpicture.png: empty, or not in" in bad

    query, image = r"photos/caf\udce9\n\x1b[2J\udc9b.png", os.fsdecode(name)
    assert search("--image", image, "--top", 5, "--grid", "matches.png") == 0
    title, _, first, *others = capsys.readouterr().out.splitlines()
    assert title == query
    assert first == f"     1   1.000  {query}"
    assert any(r"photos/a\tb.png  (and photos/a.png, photos/z.png)" in line for line in others)
    assert len(others) == 5
    os.remove(name)  # its name takes its place in the picture
    assert search("a\x85dog", "--grid", "matches.png") == 0
    assert capsys.readouterr().out.startswith(r"a\x85dog")
    assert search("a dog", "--json") == 0
    assert rb"caf\udce9" in capsys.readouterr().out.encode()


def test_a_draft_reaches_the_reader(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(encode, "open_image", lambda path, draft: asked.append(draft) or open_image(path, draft))
    assert main(["index", "photos", "-o", "z", "--draft", "--model", "model.safetensors", "--device", "cpu"]) == 0
    assert set(asked) == {2 * clip.load("model.safetensors", "cpu")[0].visual.input_resolution}
