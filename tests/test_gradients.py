"""A batch embedded in chunks has the large batch's gradient, and blocks recomputed have the same one."""

import copy

import pytest
import torch
from conftest import TINY, filled

import clip
from clip.model import CLIP
from clip.training.gradients import backward, checkpoint_blocks, frozen_statistics
from clip.training.loss import LOSSES


@pytest.fixture
def batch():
    images = torch.randn(7, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return images, captions(7), torch.tensor([0, 1, 2, 3, 1, 0, 4])


def captions(count):
    return clip.tokenize([f"picture {'x' * i} of a very long series" for i in range(count)])


def gradients(model, *args, **kwargs):
    """The loss, and every parameter's gradient by name."""
    model.zero_grad()
    value = backward(model, *args, **kwargs)
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=rtol, atol=rtol * gradient.abs().max().item() + 1e-9)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_chunks_have_the_large_batch_s_gradient(chunk, loss, batch):
    model = filled(TINY["vit"]).double().train()
    batch = (batch[0].double(), *batch[1:])
    whole, expected = gradients(model, *batch, loss)
    value, actual = gradients(model, *batch, loss, chunk)
    assert value.item() == pytest.approx(whole.item(), rel=1e-12)
    assert_same(actual, expected)


def test_summing_the_gradients_of_small_batches_is_something_else(batch):
    model = filled(TINY["vit"]).train()
    whole, _ = gradients(model, *batch, LOSSES["clip"])
    parts = zip(*(part.split(3) for part in batch), strict=True)
    alone = sum(len(part[0]) * gradients(model, *part, LOSSES["clip"])[0] for part in parts) / 7
    assert alone < whole - 0.5


def test_a_frozen_tower_gets_no_gradient_in_chunks_either(batch):
    model = filled(TINY["vit"]).train()
    model.visual.requires_grad_(False)
    _, expected = gradients(model, *batch, LOSSES["clip"])
    _, actual = gradients(model, *batch, LOSSES["clip"], 3)
    assert not any(name.startswith("visual.") for name in actual)
    assert_same(actual, expected, rtol=1e-4)


def resnet_and_batch():
    torch.manual_seed(0)
    model = CLIP(**TINY["rn"]).train()
    return model, torch.randn(6, 3, 64, 64), captions(6), torch.arange(6)


def test_running_statistics_move_once_a_chunk_and_not_twice():
    model, *batch = resnet_and_batch()
    backward(model, *batch, LOSSES["clip"], 2)
    assert model.visual.bn1.num_batches_tracked == 3


@pytest.mark.parametrize("kind", ["vit", "rn"])
def test_recomputed_blocks_have_the_same_gradients_names_and_statistics(kind, batch):
    if kind == "vit":
        model = filled(TINY["vit"]).train()
    else:
        model, *batch = resnet_and_batch()
    recomputing = copy.deepcopy(model)
    checkpoint_blocks(recomputing)
    _, expected = gradients(model, *batch, LOSSES["clip"])
    _, actual = gradients(recomputing, *batch, LOSSES["clip"])
    assert_same(actual, expected)
    for (name, entry), (other, expected_entry) in zip(
        recomputing.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(entry, expected_entry)


def test_recomputed_blocks_keep_less_for_the_backward_pass(batch):
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.encode_image(batch[0])
        return sum(sizes)

    model = filled(TINY["vit"]).train()
    plain = kept(model)
    checkpoint_blocks(model)
    assert kept(model) < plain / 3


def test_captions_stay_trimmed_when_blocks_are_recomputed(tiny_vit):
    checkpoint_blocks(tiny_vit)
    assert tiny_vit.transformer.is_causal


def test_frozen_statistics_thaw_even_after_an_error(tiny):
    with pytest.raises(KeyError), frozen_statistics(tiny):
        raise KeyError
    assert all(module.momentum == 0.1 for module in tiny.modules() if isinstance(module, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("chunk", [None, 3])
def test_bfloat16_products_leave_gradients_in_float32_and_near(chunk, batch):
    model = filled(TINY["vit"]).train()
    _, expected = gradients(model, *batch, LOSSES["clip"])
    _, actual = gradients(model, *batch, LOSSES["clip"], chunk, torch.bfloat16)
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    a, b = (torch.cat([g[name].flatten() for name in expected]) for g in (actual, expected))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98
