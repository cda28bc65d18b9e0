import math

import pytest
import torch
from torch import nn

import clip
from clip.tasks.scores import NEUTRAL

TEN = 10.0  # exp(logit_scale)


class Compass(nn.Module):
    """A model one can check by eye: texts and pictures are directions in the plane, in degrees."""

    directions = {"east": 0, "northeast": 45, "north": 90, "west": 180, "south": 270}  # noqa: RUF012
    context_length = 77

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(TEN)))

    def encode_text(self, tokens):
        texts = [clip.clip._tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
        angles = torch.tensor([math.radians(self.directions[text]) for text in texts])
        lengths = torch.arange(1.0, len(texts) + 1)[:, None]  # which must not matter
        return lengths * torch.stack([angles.cos(), angles.sin()], dim=1)

    def encode_image(self, images):
        return images.flatten(1)[:, :2] * self.logit_scale.exp()


def heading(*degrees):
    angles = torch.tensor([math.radians(angle) for angle in degrees])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-5)


def test_similarity_is_the_cosine_of_the_angle_between():
    close(
        clip.similarity(Compass(), heading(0, 45), ["east", "north", "west"]),
        [[1.0, 0.0, -1.0], [math.sqrt(0.5), math.sqrt(0.5), -math.sqrt(0.5)]],
    )


def test_similarity_takes_texts_as_they_are_also_twice():
    scores = clip.similarity(Compass(), heading(30), ["north", "east", "north"])
    close(scores, [[0.5, math.sqrt(0.75), 0.5]])


def test_classify_by_hand():
    shares = clip.classify(Compass(), heading(0), ["east", "north"], "{}")
    close(shares, [[sigmoid(TEN), 1 - sigmoid(TEN)]])


def test_classify_is_the_classifier_used_once():
    model, labels, images = Compass(), ["east", "north", "west"], heading(10, 200)
    expected = clip.ZeroShotClassifier(model, labels, "{}")(images).probabilities
    assert torch.equal(clip.classify(model, images, labels, "{}"), expected)


def test_multilabel_by_hand():
    # towards the label, as far from it as the neutral text is, and away from it
    shares = clip.multilabel(Compass(), heading(0, 45, 90), ["east"], "{}", neutral="north")
    close(shares, [[sigmoid(TEN)], [0.5], [sigmoid(-TEN)]])


def test_multilabel_is_a_softmax_over_the_label_and_the_neutral_text_alone():
    model, images = Compass(), heading(20, 77, 140)
    shares = clip.multilabel(model, images, ["east", "west"], "{}", neutral="north")
    for column, label in enumerate(["east", "west"]):
        pair = clip.classify(model, images, [label, "north"], "{}")
        torch.testing.assert_close(shares[:, column], pair[:, 0])


def test_one_more_label_changes_what_classify_says_and_not_what_multilabel_says():
    model, images, few, many = Compass(), heading(20, 77), ["east", "west"], ["east", "west", "northeast"]
    alone, together = (clip.multilabel(model, images, labels, "{}", neutral="north") for labels in (few, many))
    assert torch.equal(alone, together[:, :2])
    alone, together = (clip.classify(model, images, labels, "{}") for labels in (few, many))
    assert (together[:, :2] < alone).all()


def test_classify_shares_one_among_labels_that_fit_and_multilabel_does_not():
    model, image, labels = Compass(), heading(45), ["east", "northeast", "north"]
    assert clip.classify(model, image, labels, "{}").sum().item() == pytest.approx(1)
    assert (clip.multilabel(model, image, labels, "{}", neutral="west") > 0.99).all()
    assert (clip.multilabel(model, heading(250), labels, "{}", neutral="south") < 0.01).all()


def test_several_neutral_texts_are_averaged():
    several = clip.multilabel(Compass(), heading(0), ["west"], "{}", neutral=["east", "north"])
    close(several, [[sigmoid(TEN * (-1 - math.sqrt(0.5)))]])


def test_templates_and_the_neutral_text_have_defaults_that_say_the_same_sentence(monkeypatch):
    sentences = {"a photo of {}.".replace("{}", "west"): 180, NEUTRAL: 90}
    monkeypatch.setattr(Compass, "directions", {text.replace(".", " ."): angle for text, angle in sentences.items()})
    close(clip.multilabel(Compass(), heading(180), ["west"]), [[sigmoid(TEN)]])


def test_scores_are_float32_without_gradients_in_any_precision(tiny):
    size = tiny.visual.input_resolution
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    reference = clip.similarity(tiny, images, ["a dog", "a cat"])
    tiny.bfloat16()
    for score in (clip.similarity, clip.classify, clip.multilabel):
        scores = score(tiny, images, ["a dog", "a cat"])
        assert scores.shape == (3, 2)
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
    assert (clip.similarity(tiny, images, ["a dog", "a cat"]) - reference).abs().max() < 0.05


@pytest.mark.parametrize("score", [clip.classify, clip.multilabel])
def test_mistakes_are_named(score):
    with pytest.raises(ValueError, match="labels must differ"):
        score(Compass(), heading(0), ["east", "east"])
    with pytest.raises(ValueError, match="at least one label"):
        score(Compass(), heading(0), [])
    with pytest.raises(RuntimeError, match="context length of 77"):
        score(Compass(), heading(0), ["north " * 80])
