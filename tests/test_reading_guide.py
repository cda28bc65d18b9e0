"""What the reading guide and the faithfulness page name is there: symbols, modules, tests, defaults."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

import clip
from clip.training.options import TrainingOptions

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs/guide"
PAPERS, FAITHFUL = ((PAGES / name).read_text(encoding="utf-8") for name in ("papers.md", "faithful.md"))
SYMBOL = re.compile(r"\{source\}`(.+?)`")
TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")


def rows(page):
    """The cells of each row of each table; the bars in code and behind a backslash are text."""
    lines = (line for line in page.splitlines() if line.startswith("| ") and not set(line) <= set("|-: "))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def found(path):
    """What a dotted path names: the longest beginning that is a module, and attributes from there on."""
    names = path.split(".")
    for length in range(len(names), 0, -1):
        try:
            module = importlib.import_module(".".join(names[:length]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, names[length:], module)
    raise AttributeError(path)


def modules():
    """The public modules of the package, each a dotted path."""
    folder = Path(clip.__file__).parent
    paths = (file.relative_to(folder).with_suffix("").parts for file in folder.rglob("*.py"))
    return {".".join(("clip", *path)) for path in paths if not path[-1].startswith("_")}


def test_a_path_that_names_nothing_is_noticed():
    assert found("clip.model.CLIP.forward") is clip.model.CLIP.forward
    with pytest.raises(AttributeError):
        found("clip.attention.MultiheadAttention.backwards")
    with pytest.raises(AttributeError):
        found("clip.attentions.MultiheadAttention")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("[gh]*/*.md")), ids=lambda page: page.name)
def test_every_symbol_named_is_there(page):
    for path in SYMBOL.findall(page.read_text(encoding="utf-8")):
        found(path)


def test_every_section_leads_to_a_symbol_or_says_that_there_is_no_code():
    forward = PAPERS[PAPERS.index("## CLIP") : PAPERS.index("## The way back")]
    headings = {"in the source"}
    cells = [row[-1] for row in rows(forward) if row[-1] not in headings]
    assert len(cells) > 60
    assert [cell for cell in cells if not SYMBOL.search(cell) and not cell.startswith("no code")] == []


def test_the_way_back_begins_at_every_public_module():
    named = [row for row in rows(PAPERS[PAPERS.index("## The way back") :]) if row[0] != "module"]
    begins = {SYMBOL.fullmatch(module)[1]: SYMBOL.findall(symbols) for module, symbols, _ in named}
    assert sorted(begins) == sorted(modules())
    for module, symbols in begins.items():
        assert symbols, module
        assert [symbol for symbol in symbols if not symbol.startswith(f"{module}.")] == []


def test_every_row_of_the_comparison_is_held_by_a_test_that_is_there():
    notes = dict(re.findall(r"^\[\^(.+?)\]: (.+)$", FAITHFUL, re.MULTILINE))
    compared = [row for row in rows(FAITHFUL) if row[0] != "point"]
    assert len(compared) > 40
    for row in compared:
        tests = TEST.findall(notes[re.search(r"\[\^(.+)\]$", row[-1])[1]])
        assert tests, row[0]
        for file, name in tests:
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_the_defaults_of_training_are_those_on_the_page():
    options = TrainingOptions()
    said = {row[0]: row[-1] for row in rows(FAITHFUL)}
    assert f"{options.batch_size} pairs and {options.warmup} steps" in said["batch, warm-up"]
    assert f"capped at {options.max_norm:g}" in said["length of the gradient"]
    assert f"decay {options.weight_decay}" in next(row[1] for row in rows(FAITHFUL) if row[0] == "optimiser")
