"""The model that comes with the package: there without a connection, small, and as good as its card says."""

import csv
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip
from clip.clip import EMBEDDED
from clip.training.evaluation import drawn_abilities

PICTURES = Path(__file__).resolve().parent.parent / "examples" / "pictures"
FLOORS = {"drawn_things": 0.98, "drawn_counting": 0.95, "drawn_places": 0.97, "drawn_colours": 0.97}


@pytest.fixture(scope="module")
def tiny():
    return clip.load("tiny", device="cpu")


def test_it_is_listed_after_the_released_models():
    assert clip.available_models().index("tiny") == 9


def test_it_is_small_and_needs_no_connection(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("somebody wanted a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    clip.load("tiny")
    assert EMBEDDED["tiny"].stat().st_size < 8e6


def test_it_knows_combinations_that_it_was_never_shown(tiny):
    model, preprocess = tiny
    figures = drawn_abilities(preprocess, count=500, seed=2)(model)
    assert all(figures[name] >= floor for name, floor in FLOORS.items()), figures


def test_it_tells_drawings_made_by_hand_apart(tiny):
    model, preprocess = tiny
    with open(PICTURES / "captions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    captions = [row["caption"] for row in rows]
    classifier = clip.ZeroShotClassifier(model, captions, "{}")
    images = torch.stack([preprocess(Image.open(PICTURES / row["image"])) for row in rows])
    chosen = [matches[0].label for matches in classifier(images).top(1)]
    assert sum(map(str.__eq__, chosen, captions)) >= 0.8 * len(captions), dict(zip(captions, chosen, strict=True))


def test_words_that_training_never_met_have_no_embedding(tiny):
    rows = tiny[0].token_embedding.weight
    fish, xylophone = clip.tokenize(["fish", "xylophone"])[:, 1].tolist()
    assert rows[fish].any()
    assert not rows[xylophone].any()


def test_it_is_a_model_like_any_other(tiny, tmp_path):
    model, _ = tiny
    clip.save(model, tmp_path / "mine.safetensors")
    again, preprocess = clip.load(tmp_path / "mine.safetensors", device="cpu")
    assert preprocess.transforms[0].size == 64
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
