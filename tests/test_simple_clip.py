"""The recipe Simple CLIP: the published split, the optimiser's groups, the plateau, the best weights, the search."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import clip
from clip.model import VisionTransformer
from clip.preprocess import Preprocess
from clip.training.data import Captioned
from clip.training.loss import soft_target_loss

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "recipes"
sys.path.insert(0, str(FOLDER))  # where the recipe itself finds what it imports
import simple_clip  # noqa: E402

sys.path.remove(str(FOLDER))


@pytest.fixture
def folder(tmp_path):
    """Twenty things in two pictures each, with two captions each; the things 20 and 21 are held out."""
    with open(tmp_path / "captions.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "id"])
        for thing in [21, *range(21)]:
            for studio in "ab":
                Image.new("RGB", (40, 40), (10 * thing, 0, 99)).save(tmp_path / f"{studio}{thing}.png")
                table.writerows([f"{studio}{thing}.png", f"{kind} {thing}", thing] for kind in ("thing", "Number"))
    (tmp_path / "held_out.txt").write_text("20\n21\n")
    return tmp_path


@pytest.fixture
def model(folder, monkeypatch):
    """The recipe's text tower, shorter, beside a small ViT."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(simple_clip, "LAYERS", 1)
    torch.manual_seed(0)
    text_tower, tokenizer = simple_clip.new_text_tower(simple_clip.split(folder, None)[0])
    heads = (simple_clip.ResidualHead(24, 16), simple_clip.ResidualHead(text_tower.output_dim, 16))
    image_tower = VisionTransformer(32, 16, 48, 1, 3, 24)
    return clip.DualEncoder(
        image_tower, text_tower, *heads, logit_scale=0.0, tokenizer=tokenizer, preprocess=Preprocess(32)
    )


def test_the_split_is_the_published_one_and_an_id_is_on_one_side(folder):
    train, valid, test = simple_clip.split(folder, None)
    assert {item.identity for item in valid} == {"0", "17", "15", "1"}  # np.random.seed(42), then choice(20, 4)
    assert {item.identity for item in test} == {"20", "21"}
    assert {item.identity for item in train} == set(map(str, range(20))) - {"0", "17", "15", "1"}
    assert [len(part) for part in (train, valid, test)] == [32, 8, 4]
    assert all(len(item.captions) == 2 for item in train)


def test_every_caption_comes_once_with_its_own_picture(folder, model):
    train, _, _ = simple_clip.split(folder, None)
    pairs = simple_clip.Pairs(train, model)
    assert len(pairs) == 64
    for (item, caption), (image, tokens) in zip(pairs.pairs, pairs, strict=True):
        assert caption in item.captions
        assert torch.equal(image, model.preprocess(item.open()))
        assert torch.equal(tokens, model.tokenizer([caption], simple_clip.LONGEST)[0])
    assert len({(item.source, caption) for item, caption in pairs.pairs}) == 64
    sources = [item.source for item, _ in pairs.pairs]
    assert sources != sorted(sources, key=[item.source for item in train].index)  # not side by side, as in the file


def test_a_word_never_seen_falls_into_pieces_that_were(model):
    row = model.tokenizer.tokenizer.encode("Hinge 7")
    assert row.tokens[0] == "[CLS]"
    assert row.tokens[-1] == "[SEP]"
    assert "[UNK]" not in row.tokens
    assert row.tokens == model.tokenizer.tokenizer.encode("hinge 7").tokens


def test_the_heads_alone_decay_and_every_part_has_its_rate(model):
    optimizer = simple_clip.adamw(model, image_lr=2e-4, text_lr=3e-5)
    of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        expected = {"visual": (2e-4, 0), "text_tower": (3e-5, 0), "logit_scale": (1e-3, 0)}.get(part, (1e-3, 1e-3))
        assert (of[id(parameter)]["lr"], of[id(parameter)]["weight_decay"]) == expected, name


def test_an_epoch_of_validation_changes_nothing_and_one_of_training_learns(folder, model):
    train, _, _ = simple_clip.split(folder, None)
    loader = torch.utils.data.DataLoader(simple_clip.Pairs(train, model), 16)
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    first = simple_clip.valid_epoch(model, soft_target_loss, loader)
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    assert simple_clip.valid_epoch(model, soft_target_loss, loader) == first  # no dropout
    optimizer = simple_clip.adamw(model, 1e-3, 1e-3)
    for _ in range(3):
        simple_clip.train_epoch(model, soft_target_loss, loader, optimizer, "")
    assert simple_clip.valid_epoch(model, soft_target_loss, loader) < first


def test_the_meter_counts_pairs_not_batches():
    meter = simple_clip.Meter()
    meter.update(1.0, 3)
    meter.update(5.0, 1)
    assert meter.mean == 2.0


def test_rates_fall_on_a_plateau_and_the_best_weights_are_kept(folder, model, monkeypatch, tmp_path):
    losses, epochs = iter([3.0, 2.0, 2.5, 2.4, 2.3, 1.0]), []
    monkeypatch.setattr(simple_clip, "train_epoch", lambda *args: epochs.append(args) or 7.0)
    monkeypatch.setattr(simple_clip, "valid_epoch", lambda *args: next(losses))
    saved = []
    monkeypatch.setattr(simple_clip.clip, "save", lambda model, path: saved.append(len(epochs)))
    optimizer = simple_clip.adamw(model, 1e-4, 1e-5)
    train, valid, _ = simple_clip.split(folder, None)
    history = simple_clip.fit(model, soft_target_loss, optimizer, train, valid, 6, tmp_path / "best.safetensors")
    assert saved == [1, 2, 6]
    # two epochs without a lower loss, the third and the fourth, are one more than are forgiven
    assert [row["lr of the heads"] for row in history] == ["1.00e-03"] * 4 + ["8.00e-04"] * 2
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([8e-4, 8e-5, 8e-6, 8e-4])


def test_of_every_id_the_nearest_picture_is_found_once():
    class Eastward(nn.Module):
        logit_scale = torch.zeros(())
        tokenizer = staticmethod(lambda texts, length, truncate: torch.ones(len(texts), 1))

        def encode_text(self, tokens):
            return torch.tensor([[2.0, 0.0]])

    angles = torch.tensor([0.5, 0.1, 0.3, 0.2, 0.4])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    pictures = [Captioned(f"{i}.png", ("",), id, id) for i, id in enumerate(["bee", "bee", "ant", "bee", "cat"])]
    found = simple_clip.find_matches(Eastward(), "east", vectors, pictures, n=2)
    assert [picture.source for picture in found] == ["1.png", "2.png"]
