import math

import pytest
import torch
import torch.nn.functional as F

import clip
from clip.tasks.zero_shot import NONE_OF_THESE, NONE_PROMPTS, Classification, Match, ZeroShotClassifier

LABELS = ["a dog", "a cat", "a red bicycle"]


@pytest.fixture
def images(tiny):
    size = tiny.visual.input_resolution
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


class Compass(torch.nn.Module):
    """A model one can check by eye: texts and pictures are directions in the plane."""

    directions = {"north": 90, "north-east": 45, "east": 0, "west": 180}  # noqa: RUF012
    context_length = 77
    logit_scale = torch.tensor(math.log(10))

    def encode_text(self, tokens):
        texts = [clip.clip._tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
        angles = [math.radians(self.directions[text]) for text in texts]
        return torch.tensor(  # longer texts, longer vectors
            [[len(text) * math.cos(a), len(text) * math.sin(a)] for text, a in zip(texts, angles, strict=True)]
        )

    def encode_image(self, images):
        return images.flatten(1)[:, :2]


def test_one_template_equals_the_whole_forward_pass(tiny, images):
    answer = ZeroShotClassifier(tiny, LABELS)(images)
    logits, _ = tiny(images, clip.tokenize([f"a photo of {label}." for label in LABELS]))
    torch.testing.assert_close(answer.probabilities, logits.softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer.cosines * tiny.logit_scale.exp(), logits, rtol=1e-4, atol=1e-4)


def test_cosines_and_probabilities_by_hand():
    answer = ZeroShotClassifier(Compass(), ["north", "east"], "{}")(torch.tensor([[0.0, 7.0]]))
    assert torch.allclose(answer.cosines, torch.tensor([[1.0, 0.0]]), atol=1e-6)
    sure = math.exp(10) / (math.exp(10) + 1)
    assert torch.allclose(answer.probabilities, torch.tensor([[sure, 1 - sure]]), atol=1e-6)


def test_an_ensemble_is_the_direction_of_the_mean_of_unit_vectors():
    # north and east average to north-east, however long the vectors were
    compass = Compass()
    compass.directions = {"go north": 90, "go east": 0, "then north": 90, "then east": 0}
    compass.directions |= {"go up": 90, "then up": 0}
    classifier = ZeroShotClassifier(compass, ["north", "east", "up"], ["go {}", "then {}"])
    half = math.sqrt(0.5)
    assert torch.allclose(classifier.weights, torch.tensor([[0, 1, half], [1, 0, half]]), atol=1e-6)


def test_an_ensemble_of_one_sentence_said_twice_is_that_sentence(tiny):
    once = ZeroShotClassifier(tiny, LABELS, "a photo of {}.")
    twice = ZeroShotClassifier(tiny, LABELS, ["a photo of {}."] * 2)
    torch.testing.assert_close(once.weights, twice.weights)


def test_cosines_do_not_depend_on_the_other_labels_and_probabilities_do(tiny, images):
    few, many = ZeroShotClassifier(tiny, LABELS[:2])(images), ZeroShotClassifier(tiny, LABELS)(images)
    torch.testing.assert_close(few.cosines, many.cosines[:, :2], rtol=1e-4, atol=1e-5)
    assert (many.probabilities[:, :2] < few.probabilities).all()


def test_labels_may_come_in_any_order(tiny, images):
    there, back = ZeroShotClassifier(tiny, LABELS)(images), ZeroShotClassifier(tiny, LABELS[::-1])(images)
    torch.testing.assert_close(there.probabilities, back.probabilities.flip(-1), rtol=1e-4, atol=1e-5)


def test_none_of_these_is_one_more_label_that_wins_when_nothing_else_fits():
    compass = Compass()
    classifier = ZeroShotClassifier(compass, ["north", "east"], "{}", none_prompts=["west"])
    assert classifier.labels == ("north", "east", NONE_OF_THESE)
    westward, northward = classifier(torch.tensor([[-1.0, 0.1], [0.0, 1.0]])).top(1)
    assert westward[0].label == NONE_OF_THESE
    assert northward[0].label == "north"


def test_the_prompts_for_none_of_these_have_no_place_for_a_label():
    assert not any("{}" in prompt for prompt in NONE_PROMPTS)


def test_top_lists_the_best_first_and_all_if_there_are_fewer():
    scores = torch.tensor([[0.2, 0.5, 0.3]])
    answer = Classification(("a", "b", "c"), scores - 0.5, scores)
    [best] = answer.top(2)
    assert [match.label for match in best] == ["b", "c"]
    assert best[0] == Match("b", 0.5, 0.0)
    assert len(answer.top(9)[0]) == 3
    with pytest.raises(ValueError, match="at least 1, got 0"):
        answer.top(0)


def test_rows_sum_to_one_and_the_classifier_is_built_once(tiny, images, monkeypatch):
    classifier = ZeroShotClassifier(tiny, LABELS)
    monkeypatch.setattr(tiny, "encode_text", None)
    assert torch.allclose(classifier(images).probabilities.sum(-1), torch.ones(4))
    assert torch.allclose(classifier.weights.norm(dim=0), torch.ones(3))


def test_sentences_are_encoded_in_batches_of_any_size(tiny):
    whole = ZeroShotClassifier(tiny, LABELS, ["{}", "a {}"])
    small = ZeroShotClassifier(tiny, LABELS, ["{}", "a {}"], batch_size=4)
    torch.testing.assert_close(whole.weights, small.weights, rtol=1e-4, atol=1e-5)


def test_a_model_in_half_precision_gives_float32_answers(tiny, images):
    reference = ZeroShotClassifier(tiny, LABELS)(images)
    tiny.bfloat16()
    answer = ZeroShotClassifier(tiny, LABELS)(images)
    assert answer.cosines.dtype == answer.probabilities.dtype == torch.float32
    assert (answer.cosines - reference.cosines).abs().max() < 0.05


def test_braces_in_labels_and_templates_are_plain_text(tiny):
    odd = ZeroShotClassifier(tiny, ["{x}"], "{a} {}")
    plain = F.normalize(tiny.encode_text(clip.tokenize("{a} {x}")), dim=-1)
    torch.testing.assert_close(odd.weights.T, plain.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "at least one label"),
        ("a dog", {}, "expected a list"),
        (["a dog", "a dog"], {}, "labels must differ"),
        (["a dog"], {"templates": "a photo"}, "needs {} where the label goes"),
        (["a dog"], {"templates": []}, "needs {} where the label goes"),
        ([NONE_OF_THESE], {"none_prompts": NONE_PROMPTS}, "already among the labels"),
    ],
)
def test_mistakes_are_named(tiny_vit, labels, options, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(tiny_vit, labels, **options)


def test_a_label_that_is_too_long_is_an_error(tiny_vit):
    with pytest.raises(RuntimeError, match="context length of 77"):
        ZeroShotClassifier(tiny_vit, ["dog " * 80])
