"""What a run is told about itself: figures of models whose answers are known beforehand."""

import math

import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import nn

import clip
from clip.model import CLIP
from clip.preprocess import Preprocess
from clip.training.data import Captioned
from clip.training.drawn import ABILITIES, COLOURS, KINDS, Question
from clip.training.evaluation import classification, drawn_abilities, retrieval
from clip.training.loss import LOSSES, clip_loss

NAMES = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


class Colours(nn.Module):
    """Knows three colours: a picture is where its strongest channel is, a text where the colour that it names is."""

    context_length = 77

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.words = {clip.tokenize(name)[0, 1].item(): i for i, name in enumerate(NAMES)}

    def encode_image(self, images):
        return torch.eye(3)[images.mean(dim=(2, 3)).argmax(dim=1)]

    def encode_text(self, tokens):
        named = [[self.words[token] for token in row if token in self.words] for row in tokens.tolist()]
        return torch.stack([torch.eye(3)[places].sum(dim=0) if places else torch.zeros(3) for places in named])


@pytest.fixture
def items(tmp_path):
    """A plain picture of each colour, with two captions."""
    for name, colour in NAMES.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    return [Captioned(str(tmp_path / f"{name}.png"), (f"a {name} wall", f"all {name}"), name, name) for name in NAMES]


def test_a_model_that_knows_everything(items):
    figures = retrieval(items, Preprocess(32), clip_loss, batch_size=8)(Colours())
    assert figures["picture_to_text_R@1"] == figures["text_to_picture_R@1"] == 1
    right = math.exp(10) / (math.exp(10) + 2)  # scale 10; two others at cosine 0
    assert figures["validation_loss"] == pytest.approx(-math.log(right), rel=1e-2)
    assert figures["validation_chance"] == pytest.approx(math.log(3))


def test_a_wrong_caption_counts_in_its_own_direction_only(items):
    wrong = [items[0], Captioned(items[1].source, ("a green wall", "all blue"), "green", "green"), items[2]]
    figures = retrieval(wrong, Preprocess(32), clip_loss, batch_size=8)(Colours())
    assert figures["text_to_picture_R@1"] == pytest.approx(5 / 6)  # "all blue" finds the blue picture
    assert figures["picture_to_text_R@1"] == pytest.approx(2 / 3)  # the blue one is as near to "all blue" as to its own


class Long(Colours):
    """Knows them by vectors of other lengths; the long one of red is also half way to green."""

    red_green_blue = torch.tensor([[9.0, 4.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    def encode_image(self, images):
        return super().encode_image(images) @ self.red_green_blue

    def encode_text(self, tokens):
        return 2 * super().encode_text(tokens)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_loss_sees_lengths_as_training_does_and_recall_does_not(items, loss):
    figures = retrieval(items, Preprocess(32), loss, batch_size=3)(Long())
    expected = loss(Long.red_green_blue, 2 * torch.eye(3), torch.tensor(10.0), torch.arange(3)).item()
    assert figures["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["picture_to_text_R@1"] == figures["text_to_picture_R@1"] == 1


@pytest.mark.parametrize(("copies", "sizes"), [(2, [4]), (4, [4, 4, 4]), (1, [3])])
def test_the_loss_is_over_batches_as_large_as_in_training(items, copies, sizes):
    seen = []

    def loss(images, texts, scale, identities):
        if images.shape == (len(images), 3):  # and not the one column of a model that tells nothing apart
            seen.append(len(images))
        return torch.tensor(float(len(seen)))

    figures = retrieval(items * copies, Preprocess(32), loss, batch_size=4)(Colours())
    assert seen == sizes  # six pictures are one batch of four, and two that are left out
    assert figures["validation_loss"] == sum(range(1, len(sizes) + 1)) / len(sizes)


def test_classes_in_order_are_shuffled_before_they_are_compared(items):
    in_order = [item for item in items for _ in range(4)]
    figures = retrieval(in_order, Preprocess(32), clip_loss, batch_size=4)(Colours())
    assert figures["validation_loss"] < 0.8 * math.log(4)  # ln 4 is what four equal pictures cost


def test_pictures_of_one_identity_may_find_each_other_s_captions(items):
    red, green, blue = items
    others = [Captioned(red.source, ("a green wall",), "red", "other"), green, blue]  # lies, but to a red picture
    apart = [Captioned(red.source, ("a green wall",), "lie", "lie"), green, blue, red]
    one = retrieval([*others, red], Preprocess(32), clip_loss, batch_size=8)(Colours())
    assert one["picture_to_text_R@1"] == pytest.approx(3 / 4)  # both red ones find the truth; the green one is misled
    two = retrieval(apart, Preprocess(32), clip_loss, batch_size=8)(Colours())
    assert two["picture_to_text_R@1"] == pytest.approx(2 / 4)


def test_a_model_is_left_as_it_was(items):
    torch.manual_seed(0)
    model = CLIP(**TINY["rn"]).eval()
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    random_state = torch.get_rng_state()
    retrieval(items, Preprocess(64), clip_loss, batch_size=3)(model)
    drawn_abilities(Preprocess(64), 5)(model)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_pictures_that_cannot_be_read_are_left_out(items, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    torn = Captioned(str(tmp_path / "torn.png"), ("a red door",), "torn", "torn")
    assert retrieval([*items, torn], Preprocess(32), clip_loss, 8)(Colours())["picture_to_text_R@1"] == 1
    with pytest.raises(ValueError, match="no picture can be read"):
        retrieval([torn], Preprocess(32), clip_loss, 8)(Colours())


def test_classes_are_told_apart_by_their_names(items):
    classes = [
        Captioned(item.source, (), "dark_red" if item.identity == "red" else item.identity, "") for item in items
    ]
    assert classification(classes, Preprocess(32), ["a {} wall"])(Colours()) == {"zero_shot_accuracy": 1}
    classes[2] = Captioned(items[2].source, (), "green", "")
    assert classification(classes, Preprocess(32), ["a {} wall"])(Colours())["zero_shot_accuracy"] == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize("ability", ABILITIES)
def test_who_guesses_is_right_as_often_as_chance(ability):
    torch.manual_seed(0)
    model = CLIP(**TINY["rn"]).eval()
    chance = {"things": 1 / (len(KINDS) * len(COLOURS)), "counting": 1 / 5}.get(ability, 1 / 2)
    share = drawn_abilities(Preprocess(64), 200, abilities=[ability])(model)[f"drawn_{ability}"]
    assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / 200)


def test_an_answer_is_the_caption_nearest_to_the_picture(monkeypatch):
    asked = [Question(Image.new("RGB", (32, 32), NAMES[name]), [f"{n} wall" for n in NAMES], 1) for name in NAMES]
    monkeypatch.setattr("clip.training.evaluation.questions", lambda *args: iter(asked))
    figures = drawn_abilities(Preprocess(32), 3, abilities=["things"])(Colours())
    assert figures == {"drawn_things": pytest.approx(1 / 3)}  # green, the second, is always said to be the answer
