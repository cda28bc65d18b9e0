"""CLIP in one file: it learns, it reads from left to right, and it is all there."""

import ast
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import clip
from clip.simple_tokenizer import SimpleTokenizer

FILE = Path(__file__).resolve().parent.parent / "examples" / "nano_clip.py"


def load():
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("nano_clip", FILE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


nano_clip = load()


@pytest.fixture(scope="module")
def trained():
    return nano_clip.train(60)


def test_a_short_run_learns_more_than_chance(trained):
    for pairs in (nano_clip.TRAINED, nano_clip.HELD_OUT):
        right, colour, _ = nano_clip.ask(trained, pairs, times=10)  # shapes take longer
        for share, chance in ((right, 1 / 80), (colour, 1 / 10)):  # five standard deviations
            assert share > chance + 5 * math.sqrt(chance * (1 - chance) / (10 * len(pairs))), (right, colour)


def test_a_run_can_be_repeated():
    first, second = (nano_clip.train(2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_held_out_pairs_are_in_no_batch_though_their_colours_and_shapes_are():
    pairs = set(nano_clip.TRAINED) | set(nano_clip.HELD_OUT)
    assert len(pairs) == len(nano_clip.TRAINED) + len(nano_clip.HELD_OUT) == 80
    for place in (0, 1):
        assert {pair[place] for pair in nano_clip.TRAINED} == {pair[place] for pair in nano_clip.HELD_OUT}
    _, tokens = nano_clip.batch(np.random.default_rng(0))
    tokenizer = SimpleTokenizer()
    captions = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert any("yellow circle" in caption for caption in captions)
    for colour, shape in nano_clip.HELD_OUT:
        assert not any(f"{colour} {shape}" in caption for caption in captions)


def test_a_batch_has_no_caption_twice():
    _, tokens = nano_clip.batch(np.random.default_rng(0))
    assert len(tokens.unique(dim=0)) == len(tokens) == len(nano_clip.TRAINED)


def test_every_sentence_fits_into_the_context_and_every_id_into_the_vocabulary():
    texts = [sentence.format(*pair) for sentence in nano_clip.SENTENCES for pair in nano_clip.PAIRS]
    assert max(clip.count_tokens(texts)) <= nano_clip.L
    assert clip.tokenize(texts).max() == nano_clip.V - 1


def test_a_later_token_does_not_change_what_is_known_of_earlier_ones():
    tower = nano_clip.TextTower().eval()
    one, other = clip.tokenize(["a red circle", "a red square"], context_length=nano_clip.L)
    with torch.no_grad():
        a, b = tower.tokens(torch.stack([one, other]))
    torch.testing.assert_close(a[:3], b[:3])  # start, a, red
    assert not torch.allclose(a[3], b[3])


def test_every_patch_reaches_the_features_of_a_picture():
    tower = nano_clip.ImageTower()
    images = torch.rand(1, 3, nano_clip.R, nano_clip.R, requires_grad=True)
    tower(images).square().sum().backward()
    assert (images.grad.abs().amax(dim=1) > 0).all()


def test_the_loss_is_worked_by_hand():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    rows = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    columns = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert nano_clip.clip_loss(logits).item() == pytest.approx((rows + columns) / 2)


def test_the_matrix_is_drawn_with_a_cell_for_each_picture_and_caption(trained):
    sheet = nano_clip.draw_matrix(trained, nano_clip.HELD_OUT[:3], side=10, left=20)
    assert sheet.size == (20 + 3 * 10, 10 + 3 * 10)


def test_nothing_of_ours_is_imported_but_the_tokenizer():
    ours = []
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            ours += [alias.name for alias in node.names if alias.name.split(".")[0] == "clip"]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "clip":
            ours += [f"{node.module}.{alias.name}" for alias in node.names]
    assert ours == ["clip.tokenize"]
