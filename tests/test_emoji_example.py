"""The emoji example: names, the choice of held-out concepts, pictures from SVG, and an evaluation with known answers.

Nothing is fetched: where the example would call a package manager, it finds packages made up here.
"""

import csv
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip
from clip.training.data import read_captions

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "emoji"
COLOURS = {"red": "#f00", "green": "#0f0", "blue": "#00f", "yellow": "#ff0", "white": "#fff"}


def load(name):
    """A script of the example as a module."""
    specification = importlib.util.spec_from_file_location(f"emoji_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


prepare, evaluate = load("prepare"), load("evaluate")
NAMES = prepare.english_names(prepare.every_emoji())


def square(colour):
    """An SVG whose left half is painted."""
    rectangle = f'<rect width="18" height="36" fill="{colour}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">{rectangle}</svg>'


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Names


@pytest.mark.parametrize(
    ("shortcode", "english"),
    [
        (":grinning_face:", "grinning face"),
        (":man’s_shoe:", "man's shoe"),
        (":Côte_d’Ivoire:", "cote d'ivoire"),
        (":U.S._Outlying_Islands:", "us outlying islands"),
        (":Bosnia_&_Herzegovina:", "bosnia and herzegovina"),
        (":AB_button_(blood_type):", "ab button blood type"),
        (":ON!_arrow:", "on arrow"),
        (":keycap_#:", "keycap #"),
    ],
)
def test_shortcodes_become_plain_english(shortcode, english):
    assert prepare.plain_english(shortcode) == english


def test_a_concept_has_its_name_first_and_then_its_english_aliases():
    assert NAMES["1f37a"] == ("beer mug", "beer")
    assert NAMES["1f600"] == ("grinning face", "grinning")
    assert NAMES["1f52a"] == ("kitchen knife", "knife")  # not "hocho"
    assert NAMES["1f437"] == ("pig face",)  # "pig" is another picture's name
    assert NAMES["1f416"] == ("pig",)  # not "pig2"
    assert NAMES["1f32d"] == ("hot dog",)  # not "hotdog" once more


def test_a_place_is_called_by_its_flag():
    assert NAMES["1f1ec-1f1ea"] == ("flag of georgia", "georgia")
    assert NAMES["1f1e9-1f1ea"] == ("flag of germany", "germany")  # not "de"
    assert NAMES["1f1f9-1f1f7"] == ("flag of turkiye", "turkiye")  # not the bird
    assert NAMES[prepare.code_points("🏴󠁧󠁢󠁳󠁣󠁴󠁿")] == ("flag of scotland", "scotland")


def test_no_words_belong_to_two_concepts():
    captions = [caption for names in NAMES.values() for caption in names]
    assert len(set(captions)) == len(captions)


def test_captions_are_lower_case_ascii_words():
    captions = [caption for names in NAMES.values() for caption in names]
    assert [c for c in captions if not c.isascii() or c != c.lower() or c != " ".join(c.split()) or ":" in c] == []


def test_skin_tones_are_left_out_and_the_rest_have_different_ids():
    emoji = prepare.every_emoji()
    assert "👋" in emoji
    assert "👋🏽" not in emoji
    assert len({prepare.code_points(character) for character in emoji}) == len(emoji) > 1800


def test_an_id_has_no_variation_selector_and_no_padding():
    assert prepare.code_points("❤️") == prepare.code_points("❤") == "2764"
    assert prepare.code_points("0️⃣") == "30-20e3"


# Held-out concepts


def test_the_held_out_concepts_are_150_whatever_the_order():
    held_out = prepare.held_out_concepts(NAMES)
    assert len(held_out) == 150
    assert held_out == prepare.held_out_concepts(sorted(NAMES, reverse=True))


def test_the_held_out_concepts_stay_the_same_from_one_version_to_the_next():
    held_out = prepare.held_out_concepts(NAMES)
    assert {"1f47b", "1f40a", "1f984"} <= held_out  # ghost, crocodile, unicorn
    assert not {"1f431", "1f355", "2600"} & held_out  # cat face, pizza, sun


def test_a_new_emoji_moves_at_most_one_held_out_concept():
    held_out = prepare.held_out_concepts(NAMES)
    for new in range(200):
        assert len(held_out - prepare.held_out_concepts([*NAMES, f"new {new}"])) <= 1


# Pictures and files


def test_an_svg_is_drawn_on_white():
    picture = prepare.draw_svg(square("#f00"), 24)
    assert (picture.mode, picture.size) == ("RGB", (24, 24))
    assert picture.getpixel((6, 12)) == (255, 0, 0)
    assert picture.getpixel((18, 12)) == (255, 255, 255)


@pytest.fixture
def packages(monkeypatch):
    """Two npm packages in place of the real ones; `packages` counts how often each was fetched."""
    contents = {
        "@twemoji/svg": {f"{id}.svg": square("#f00") for id in ("1f600", "2764", "30-20e3", "1f355")},
        "openmoji": {
            **{f"color/svg/{id}.svg": square("#00f") for id in ("1F600", "2764-FE0F", "0030-FE0F-20E3", "E000")},
            "black/svg/1F355.svg": square("#000"),
            "data/openmoji.json": json.dumps([{"emoji": "😀", "group": "smileys-emotion"}]),
        },
    }
    fetched = []

    def npm(command, folder, advice):
        name = command[-1].rpartition("@")[0]
        fetched.append(name)
        with tarfile.open(Path(folder, "made-up.tgz"), "w:gz") as archive:
            for path, text in contents[name].items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))

    monkeypatch.setattr(prepare, "run", npm)
    return fetched


def test_what_all_studios_draw_becomes_a_data_set(packages, tmp_path, capsys):
    prepare.main(["-o", str(tmp_path), "--size", "16", "--studios", "twemoji", "openmoji"])
    rows = read(tmp_path / "captions.csv")
    assert {row["id"] for row in rows} == {"1f600", "2764", "30-20e3"}  # the pizza is twemoji's alone
    assert rows == read(tmp_path / "twemoji.csv") + read(tmp_path / "openmoji.csv")
    assert {"image": "twemoji/1f600.png", "caption": "grinning", "id": "1f600", "studio": "twemoji"} in rows
    for row in rows:
        with Image.open(tmp_path / row["image"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (16, 16))
            assert picture.getpixel((4, 8)) == ((255, 0, 0) if row["studio"] == "twemoji" else (0, 0, 255))
    concepts = {row["id"]: row for row in read(tmp_path / "concepts.csv")}
    assert concepts["1f600"] == {"id": "1f600", "name": "grinning face", "group": "smileys-emotion", "held_out": "1"}
    assert capsys.readouterr().out.startswith("3 concepts")


def test_training_reads_what_was_written(packages, tmp_path):
    prepare.prepare(tmp_path, 16, ["twemoji", "openmoji"])
    pictures = {item.source: item for item in read_captions(tmp_path / "captions.csv")}
    assert len(pictures) == 6
    for studio in ("twemoji", "openmoji"):
        item = pictures[str(tmp_path / studio / "1f600.png")]
        assert (item.captions, item.identity) == (("grinning face", "grinning"), "1f600")
        assert item.open().size == (16, 16)


def test_names_are_put_into_sentences_on_request(packages, tmp_path):
    folder = ["-o", str(tmp_path), "--size", "16", "--studios", "twemoji"]
    prepare.main([*folder, "--templates", "{}", "an emoji of {}"])
    captions = [row["caption"] for row in read(tmp_path / "captions.csv") if row["id"] == "1f600"]
    assert captions == ["grinning face", "an emoji of grinning face", "grinning", "an emoji of grinning"]
    with pytest.raises(SystemExit):
        prepare.main([*folder, "--templates", "an emoji"])


def test_a_second_run_fetches_nothing_and_draws_only_what_is_missing(packages, tmp_path):
    prepare.prepare(tmp_path, 16, ["twemoji"])
    kept, lost = tmp_path / "twemoji/1f600.png", tmp_path / "twemoji/2764.png"
    kept.write_bytes(prepare.png(Image.new("RGB", (16, 16), "pink")))
    lost.unlink()
    prepare.prepare(tmp_path, 16, ["twemoji"])
    assert packages == ["@twemoji/svg", "openmoji"]
    with Image.open(kept) as picture:
        assert picture.getpixel((4, 8)) == (255, 192, 203)  # pink
    assert lost.exists()
    prepare.prepare(tmp_path, 20, ["twemoji"])
    with Image.open(kept) as picture:
        assert picture.size == (20, 20)
    assert list(tmp_path.rglob("*.partial")) == []


def test_the_font_is_taken_out_of_its_package_once(monkeypatch, tmp_path):
    ran = []

    def debian(command, folder, advice):
        ran.append(command[0])
        if command[0] == "apt-get":
            Path(folder, "made-up.deb").touch()
        else:
            font = Path(folder, "unpacked", "absent", "NotoColorEmoji.ttf")
            font.parent.mkdir(parents=True)
            font.write_text("a font")

    monkeypatch.setattr(prepare, "run", debian)
    monkeypatch.setattr(prepare, "NOTO_FONT", Path("/absent/NotoColorEmoji.ttf"))
    assert prepare.noto_font(tmp_path).read_text() == "a font"
    assert prepare.noto_font(tmp_path).parent == tmp_path
    assert ran == ["apt-get", "dpkg"]


def test_a_missing_package_manager_is_named_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(prepare, "NOTO_FONT", tmp_path / "absent" / "NotoColorEmoji.ttf")
    with pytest.raises(SystemExit, match=r"npm is not installed: install Node\.js"):
        prepare.npm_package(prepare.TWEMOJI, tmp_path)
    with pytest.raises(SystemExit, match=r"apt-get is not installed: .* --studios twemoji openmoji"):
        prepare.noto_font(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_package_manager_is_quoted(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such package')"]
    with pytest.raises(SystemExit, match="failed: do this\nno such package"):
        prepare.run(command, tmp_path, "do this")


# Evaluation


class Painter(torch.nn.Module):
    """A model that sees a picture's mean colour, and takes a colour's name for what `alone` or `in_sentences` says.

    The lengths of its picture vectors mean nothing, as CLIP's do.
    """

    context_length = 77

    def __init__(self, preprocess, alone, in_sentences):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))
        seen = {name: preprocess(Image.new("RGB", (8, 8), colour)).mean((1, 2)) for name, colour in COLOURS.items()}
        token = {name: clip.tokenize(name)[0, 1].item() for name in COLOURS}
        self.alone = {token[name]: seen[colour] for name, colour in alone.items()}
        self.in_sentences = {token[name]: seen[colour] for name, colour in in_sentences.items()}

    def encode_image(self, images):
        return images.mean((2, 3)) * 10 ** torch.arange(len(images))[:, None]

    def encode_text(self, tokens):
        return torch.stack([self.read([token for token in row if token]) for row in tokens.tolist()])

    def read(self, text):
        meaning = self.alone if len(text) == 3 else self.in_sentences
        return next(meaning[token] for token in text if token in meaning)


@pytest.fixture
def painted(tmp_path, monkeypatch):
    """Run the evaluation on a folder of five colours, with a model that takes names for what it is told."""

    def run(alone, *arguments, in_sentences=None, pictures=COLOURS):
        (tmp_path / "noto").mkdir(exist_ok=True)
        rows = [(f"id-{name}", name, "", int(name in ("red", "green"))) for name in COLOURS]
        prepare.write_csv(tmp_path / "concepts.csv", ("id", "name", "group", "held_out"), rows)
        prepare.write_csv(tmp_path / "noto.csv", ("image", "caption", "id", "studio"), [])
        for name, colour in pictures.items():
            Image.new("RGB", (8, 8), colour).save(tmp_path / "noto" / f"id-{name}.png")
        preprocess = clip.preprocess.Preprocess(8)
        model = Painter(preprocess, alone, in_sentences or alone)
        monkeypatch.setattr(clip, "load", lambda name, device: (model, preprocess))
        evaluate.main(["made-up", "--data", str(tmp_path), *arguments])

    return run


RIGHT = {name: name for name in COLOURS}
SWAPPED = RIGHT | {"red": "green", "green": "red"}


def scores(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_model_that_knows_every_name_scores_all(painted, capsys):
    painted(RIGHT, "--json")
    plain, ensemble = scores(capsys)
    assert (plain["studio"], plain["text"], plain["count"]) == ("noto", "name", 5)
    assert ensemble["text"] == "five prompts"
    for result in (plain, ensemble):
        assert [result[key] for key in ("top-1", "top-5", "R@1", "R@5", "R@10")] == [1.0] * 5


def test_two_names_exchanged_cost_two_in_five(painted, capsys):
    painted(SWAPPED, "--json")
    plain, _ = scores(capsys)
    assert [plain[key] for key in ("top-1", "top-5", "R@1", "R@5")] == [0.6, 1.0, 0.6, 1.0]


def test_the_prompts_are_averaged(painted, capsys):
    painted(RIGHT, "--json", in_sentences=SWAPPED)  # one prompt of the five is the name alone
    plain, ensemble = scores(capsys)
    assert (plain["top-1"], ensemble["top-1"]) == (1.0, 0.6)


def test_held_out_concepts_are_asked_about_among_themselves(painted, capsys):
    painted(SWAPPED, "--concepts", "held-out", "--json")
    assert [(r["count"], r["top-1"]) for r in scores(capsys)] == [(2, 0.0), (2, 0.0)]
    painted(SWAPPED, "--concepts", "trained", "--json")
    assert [(r["count"], r["top-1"]) for r in scores(capsys)] == [(3, 1.0), (3, 1.0)]


def test_of_pictures_that_are_the_same_either_name_is_right(painted, capsys):
    painted(SWAPPED, "--json", pictures=COLOURS | {"green": COLOURS["red"]})
    plain, _ = scores(capsys)
    assert (plain["top-1"], plain["R@1"]) == (1.0, 0.8)  # nothing looks like what it takes "red" for


def test_the_table_is_markdown(painted, capsys):
    painted(SWAPPED)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 concepts (all) among themselves; chance is 20.00%"
    assert lines[2] == "| studio | text | top-1 | top-5 | R@1 | R@5 | R@10 |"
    assert lines[4] == "| noto | name | 60.0% | 100.0% | 60.0% | 100.0% | 100.0% |"


def test_a_folder_that_was_not_prepared_is_said_to_be(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["made-up", "--data", str(tmp_path)])
    assert "prepare.py" in capsys.readouterr().err
