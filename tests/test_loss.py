"""The losses: cases worked by hand, limits, invariances, and gradients by finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from clip.training.loss import LOSSES, clip_loss, clip_scale_, multi_positive_loss, soft_target_loss

DISTINCT = torch.arange(5)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, generator=generator, dtype=torch.double), torch.randn(
        5, 3, generator=generator, dtype=torch.double
    )


SCALE = torch.tensor(2.0, dtype=torch.double)


def test_two_pairs_worked_by_hand():
    # Pictures at 0° and 90°, captions at 0° and 60°: cosines [[1, ½], [0, √3/2]], scale 2.
    images = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    texts = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    rows = -math.log(math.exp(2) / (math.exp(2) + math.exp(1))) - math.log(math.exp(3**0.5) / (1 + math.exp(3**0.5)))
    columns = -math.log(math.exp(2) / (math.exp(2) + 1)) - math.log(math.exp(3**0.5) / (math.exp(1) + math.exp(3**0.5)))
    loss = clip_loss(images, texts, torch.tensor(2.0), torch.arange(2))
    assert loss.item() == pytest.approx((rows / 2 + columns / 2) / 2, rel=1e-6)


def test_a_model_that_tells_nothing_apart_has_the_logarithm_of_the_batch():
    same = torch.ones(7, 4)
    assert clip_loss(same, same, torch.tensor(14.0), torch.arange(7)).item() == pytest.approx(math.log(7))
    assert multi_positive_loss(same, same, torch.tensor(14.0), torch.arange(7)).item() == pytest.approx(math.log(7))


def test_perfect_pairs_at_a_large_scale_cost_nothing():
    eye = torch.eye(6)
    assert clip_loss(eye, eye, torch.tensor(100.0), torch.arange(6)).item() < 1e-6


def test_one_positive_each_is_the_plain_loss(features):
    assert multi_positive_loss(*features, SCALE, DISTINCT).item() == pytest.approx(
        clip_loss(*features, SCALE, DISTINCT).item(), rel=1e-12
    )


def test_a_duplicate_is_punished_by_the_plain_loss_alone():
    # Two pairs of one picture and one caption, and a third far away: nobody could do better than this.
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    identities = torch.tensor([8, 8, 9])
    scale = torch.tensor(50.0)
    assert clip_loss(features, features, scale, identities).item() == pytest.approx(2 / 3 * math.log(2))
    assert multi_positive_loss(features, features, scale, identities).item() == pytest.approx(0, abs=1e-6)


def test_several_positives_worked_by_hand():
    # Cosines of pictures (rows) and captions: 1 on and between pairs 0 and 1, 0 with pair 2, 1 of pair 2 with itself.
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    e = math.e
    expected = (-2 * math.log(2 * e / (2 * e + 1)) - math.log(e / (e + 2))) / 3
    loss = multi_positive_loss(features, features, torch.tensor(1.0), torch.tensor([4, 4, 5]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_one_thing_costs_nothing(features):
    assert multi_positive_loss(*features, SCALE, torch.zeros(5, dtype=torch.long)).item() == pytest.approx(0, abs=1e-12)


def test_soft_targets_worked_by_hand():
    # One dimension, so every product is a number: I = (1, 0), T = (2, 0), temperature ½, so a scale of 2.
    # logits of captions [[2, 0], [0, 0]] / ½; targets softmax of [[(1 + 4) / 2, 0], [0, 0]] · ½.
    images, texts = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [0.0]])
    t = math.exp(1.25) / (math.exp(1.25) + 1)
    p = math.exp(4) / (math.exp(4) + 1)
    captions = [-(t * math.log(p) + (1 - t) * math.log(1 - p)), math.log(2)]
    pictures = [-(t * math.log(p) + 0.5 * math.log(1 - p)), -(1 - t + 0.5) * math.log(0.5)]  # targetsᵀ: sums are not 1
    loss = soft_target_loss(images, texts, torch.tensor(2.0), torch.arange(2))
    assert loss.item() == pytest.approx(sum(captions + pictures) / 4, rel=1e-6)


def test_soft_targets_are_one_hot_for_one_picture_with_two_unlike_captions():
    # LayerNorm at E = 256 gives rows of length 16. The picture is the same, the captions are orthogonal.
    picture = F.layer_norm(torch.randn(256, generator=torch.Generator().manual_seed(1)), (256,))
    texts = F.layer_norm(torch.randn(2, 256, generator=torch.Generator().manual_seed(2)), (256,))
    images = torch.stack([picture, picture])
    targets = ((images @ images.T + texts @ texts.T) / 2).softmax(dim=-1)
    assert torch.allclose(targets, torch.eye(2), atol=1e-6)
    expected = clip_loss(images / 16, texts / 16, torch.tensor(256.0), torch.arange(2))
    assert soft_target_loss(images, texts, torch.tensor(1.0), torch.arange(2)).item() == pytest.approx(
        expected.item(), rel=1e-3
    )


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_are_those_of_finite_differences(loss, features):
    identities = torch.tensor([0, 1, 0, 2, 1])
    inputs = (*(f.clone().requires_grad_() for f in features), SCALE.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: loss(*x, identities), inputs, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_order_of_the_batch_does_not_matter(loss, features):
    identities, order = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([3, 0, 4, 1, 2])
    shuffled = loss(features[0][order], features[1][order], SCALE, identities[order])
    assert shuffled.item() == pytest.approx(loss(*features, SCALE, identities).item(), rel=1e-12)


@pytest.mark.parametrize("loss", [clip_loss, multi_positive_loss])
def test_lengths_of_features_and_the_two_sides_do_not_matter(loss, features):
    images, texts = features
    expected = loss(images, texts, SCALE, DISTINCT).item()
    assert loss(images * torch.rand(5, 1).double().add(0.1), texts * 7, SCALE, DISTINCT).item() == pytest.approx(
        expected
    )
    assert loss(texts, images, SCALE, DISTINCT).item() == pytest.approx(expected)


def test_half_precision_features_are_compared_in_float32():
    features = torch.eye(4, dtype=torch.bfloat16)
    assert clip_loss(features, features, torch.tensor(100.0), torch.arange(4)).dtype == torch.float32


def test_the_scale_is_capped_and_otherwise_left_alone():
    large, small = torch.nn.Parameter(torch.tensor(5.0)), torch.nn.Parameter(torch.tensor(2.0))
    clip_scale_(large)
    clip_scale_(small)
    assert large.exp().item() == pytest.approx(100)
    assert small.item() == 2.0
