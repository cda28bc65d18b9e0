"""The floors of docs/architecture.md, held against the imports in the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "clip"
FLOORS = [
    {"layers", "attention", "simple_tokenizer", "preprocess", "config", "positions"},
    {"transformer", "resnet"},
    {"vit"},
    {"model"},
    {"checkpoints", "towers"},
    {"dual_encoder"},
    {"optimize"},
    {"clip"},
    {"tasks", "training"},
    {"app"},
]
NARROWER = {  # where the table allows less than all floors below
    "transformer": {"layers", "attention"},
    "resnet": {"layers", "attention"},
    "model": {"config", "layers", "attention", "transformer", "resnet", "vit"},
    "checkpoints": {"config"},
    "towers": {"config", "layers", "attention", "transformer", "resnet", "vit", "model"},
    "dual_encoder": {"preprocess", "model", "towers"},
    "clip": {
        "config",
        "model",
        "checkpoints",
        "optimize",
        "dual_encoder",
        "positions",
        "preprocess",
        "simple_tokenizer",
    },
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def room(path):
    """The module, or the folder it stands in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path):
    """The rooms of ours that a file imports from, anywhere in it."""
    package = ["clip", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = [alias.name for alias in node.names if alias.name != "__version__"]  # from .. import model
            names = [".".join([*base, node.module])] if node.module else [".".join([*base, name]) for name in whole]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "clip" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = room(path)
    floor = next(i for i, rooms in enumerate(FLOORS) if own in rooms)
    below = set().union(*FLOORS[:floor])
    if own == "training":
        below.add("tasks")
    allowed = NARROWER.get(own, below) | ({own} if path.parent != PACKAGE else set())
    assert set(imported_rooms(path)) <= allowed


def test_every_room_stands_on_a_floor():
    assert {room(path) for path in MODULES} == set().union(*FLOORS)
