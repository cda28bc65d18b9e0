"""Learning fast is learning the same: loss and gradients of the plain step, whatever else the step is asked for."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, filled
from torch.overrides import TorchFunctionMode

import clip
from clip.model import CLIP, ResidualAttentionBlock
from clip.training import fast
from clip.training.data import Batch
from clip.training.fast import FastBlock, PooledBlock, fast_blocks
from clip.training.gradients import backward, checkpoint_blocks
from clip.training.loss import LOSSES
from clip.training.options import TrainingOptions
from clip.training.trainer import Trainer

COUNT = 9


@pytest.fixture(autouse=True)
def convolutions_everywhere(monkeypatch):
    """Test the same paths on every processor."""
    monkeypatch.setattr(fast, "_ONEDNN_LEADS", True)


def batch_for(model):
    torch.manual_seed(0)
    side = model.visual.input_resolution
    captions = [f"picture {'x' * i} of a very long series" for i in range(COUNT)]
    return torch.randn(COUNT, 3, side, side), clip.tokenize(captions), torch.tensor([0, 1, 2, 3, 1, 0, 4, 5, 6])


def plain_step(model, autocast=None):
    """The loss and the gradients as a reader of the paper would compute them."""
    images, tokens, identities = batch_for(model)
    images = images.to(model.dtype)
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        features = model.encode_image(images), model.encode_text(tokens)
    value = LOSSES["clip"](
        *(f.to(torch.promote_types(f.dtype, torch.float32)) for f in features), model.logit_scale.exp(), identities
    )
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fast_step(model, chunk=None, autocast=None):
    images, tokens, identities = batch_for(model)
    model.zero_grad()
    value = backward(model, images.to(model.dtype), tokens, identities, LOSSES["clip"], chunk, autocast)
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance=1e-5):
    """Losses and every gradient equal, by the length of the gradient."""
    (value, gradients), (expected_value, expected_gradients) = actual, expected
    assert value.item() == pytest.approx(expected_value.item(), rel=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name


class Recorded(TorchFunctionMode):
    """Writes down what an operation was given, each time that it is called inside the context."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.calls = operation, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is self.operation:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def rows_of_perceptrons(model):
    """How many positions of a sequence go into each perceptron, by the name of its block."""
    images, tokens, _ = batch_for(model)
    widths = {block.mlp.c_fc.weight: name for name, block in model.named_modules() if hasattr(block, "mlp")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_ONEDNN_LEADS", False)
        with Recorded(F.linear) as recorded, fast_blocks(model, tokens):
            model.encode_image(images)
            model.encode_text(tokens)
    return {widths[weight]: len(x) for x, weight, _ in recorded.calls if weight in widths}


# -- the whole step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_those_of_the_plain_step(dtype, chunk, recompute):
    model = filled(TINY["vit"]).to(dtype).train()
    expected = plain_step(model)
    if recompute:
        checkpoint_blocks(model)
    assert_same(fast_step(model, chunk), expected, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_a_resnet_learns_the_same(recompute):
    torch.manual_seed(0)
    model = CLIP(**TINY["rn"]).double().train()
    expected = plain_step(model)
    if recompute:
        checkpoint_blocks(model)
    assert_same(fast_step(model), expected, 1e-10)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("tower", ["visual", "text"])
def test_a_frozen_tower_gets_no_gradient_and_the_other_the_same(tower, activation):
    model = filled(TINY["vit"] | {"activation": activation}).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "logit_scale" or name.startswith("visual.") != (tower == "visual"))
    assert_same(fast_step(model), plain_step(model))


@pytest.mark.parametrize("chunk", [None, 4])
def test_bfloat16_is_no_further_from_float32_than_in_the_plain_step(chunk):
    model = filled(TINY["vit"]).train()
    _, exact = plain_step(model)

    def error(gradients):
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        return sum((gradients[name] - exact[name]).square().sum() for name in exact).sqrt()

    plain, actual = plain_step(model, torch.bfloat16), fast_step(model, chunk, torch.bfloat16)
    assert actual[0].item() == pytest.approx(plain[0].item(), rel=1e-2)
    assert error(actual[1]) < 1.1 * error(plain[1])


def test_the_trainer_s_step_is_fast_and_the_plain_one(tmp_path):
    model = filled(TINY["vit"])
    images, tokens, identities = batch_for(model)
    batch = Batch(images, tokens, identities, [""] * COUNT, [""] * COUNT, [])
    loss, gradients = plain_step(model)
    run = Trainer(model, [batch], TrainingOptions(out=str(tmp_path), batch_size=COUNT, steps=1))
    with Recorded(F.conv2d) as recorded:
        row = run.update(batch)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    length = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert row["gradient_norm"] == pytest.approx(length.item(), rel=1e-5)
    assert any(weight.shape[2:] == (1, 1) for _, weight, _ in [args for args in recorded.calls if len(args) == 3])


# -- the last block ---------------------------------------------------------------------------------------------------


def test_the_last_blocks_compute_one_token_and_the_others_all():
    model = filled(TINY["vit"])
    rows = rows_of_perceptrons(model)
    assert rows == {
        "visual.transformer.resblocks.0": 10,
        "visual.transformer.resblocks.1": 10,
        "visual.transformer.resblocks.2": 1,
        "transformer.resblocks.0": 16,  # trimmed as ever
        "transformer.resblocks.1": 1,
    }


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize(
    "place",
    [
        "visual.transformer",
        "visual.transformer.resblocks",
        "visual.transformer.resblocks.2",
        "visual.transformer.resblocks.2.mlp.c_fc",
        "transformer.resblocks.1.ln_2",
        "ln_final",
    ],
)
def test_whoever_listens_hears_every_position(kind, place):
    model = filled(TINY["vit"]).train()
    heard = []

    def listen(module, *values):
        """Keep the output, or the input where there is none yet."""
        tensor = values[-1][0] if isinstance(values[-1], tuple) else values[-1]
        heard.append((tensor.detach().clone(), tensor.stride()))

    getattr(model.get_submodule(place), f"register_{kind}_hook")(listen)
    expected = plain_step(model)
    assert_same(fast_step(model), expected)
    (before, _), (after, strides) = heard
    assert (after - before).norm() <= 1e-5 * before.norm()
    assert 0 not in strides  # not one position, repeated


def test_a_hook_on_one_tower_leaves_the_other_fast():
    model = filled(TINY["vit"])
    model.ln_final.register_forward_hook(lambda module, inputs, output: None)
    rows = rows_of_perceptrons(model)
    assert rows["transformer.resblocks.1"] == 16
    assert rows["visual.transformer.resblocks.2"] == 1


class Mixing(torch.nn.Module):
    """A perceptron of somebody else, which lets the tokens see each other."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x).cumsum(0).flip(0)


def own_perceptron(block):
    block.mlp = Mixing(block.mlp)


def own_method(block):
    block.forward = lambda x: ResidualAttentionBlock.forward(block, x).flip(0)


def own_mask_for_each_head(block):
    block.attn_mask = torch.randn(COUNT * block.attn.num_heads, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", [own_perceptron, own_method, own_mask_for_each_head])
def test_a_last_block_that_is_not_ours_computes_what_it_does(change):
    model = filled(TINY["vit"]).train()
    change(model.visual.transformer.resblocks[-1])
    assert_same(fast_step(model), plain_step(model))


@pytest.mark.parametrize("kind", ["none", "numbers", "looks"])
def test_a_replaced_mask_is_obeyed(kind):
    model = filled(TINY["vit"]).train()
    numbers = torch.randn(77, 77, generator=torch.Generator().manual_seed(0))
    masks = {"none": None, "numbers": numbers, "looks": (numbers > 0).fill_diagonal_(False)}
    model.transformer.resblocks[-1].attn_mask = masks[kind]
    rows = rows_of_perceptrons(model)
    assert (rows["transformer.resblocks.0"], rows["transformer.resblocks.1"]) == (77, 1)  # nothing trimmed, one asks
    assert_same(fast_step(model), plain_step(model))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_afterwards(fails):
    model = filled(TINY["vit"])
    before = list(model.named_modules())
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(KeyError))
        with fast_blocks(model, batch_for(model)[1]):
            assert [type(block) for block in model.transformer.resblocks] == [FastBlock, PooledBlock]
            if fails:
                raise KeyError
    assert list(model.named_modules()) == before


# -- the blocks -------------------------------------------------------------------------------------------------------


def kept(compute):
    """How many numbers are kept for the backward pass."""
    tensors = {}

    def keep(tensor):
        tensors[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(tensors.values())


def test_a_fast_block_keeps_a_tensor_less_than_the_plain_one(tiny_vit):
    plain = tiny_vit.visual.transformer.resblocks[0]
    x = torch.randn(10, COUNT, 128, requires_grad=True)
    assert kept(lambda: plain(x)) - kept(lambda: FastBlock(plain)(x)) >= 10 * COUNT * 4 * 128


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7, 24), (16, 4, 24), (3, 7, 24), (5, 1, 24), (5, 0, 24)])
def test_a_linear_layer_is_the_same_in_every_shape(shape, bias):
    torch.manual_seed(0)
    x, layer = torch.randn(shape, requires_grad=True), torch.nn.Linear(24, 11, bias)
    entries = (x, *layer.parameters())
    towards = torch.randn(*shape[:-1], 11)
    with Recorded(F.conv2d) as recorded:
        actual = fast._linear(x, layer.weight, layer.bias)
    expected = layer(x)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(y, entries, towards) for y in (actual, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert bool(recorded.calls) == (min(shape[:2]) >= 4)


def test_a_linear_layer_takes_tokens_in_any_order_in_memory():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 11), torch.randn(7, 5, 24).transpose(0, 1)
    torch.testing.assert_close(fast._linear(x, layer.weight, layer.bias), layer(x))


def test_a_linear_layer_stays_one_under_autocast():
    layer = torch.nn.Linear(24, 11)
    with Recorded(F.conv2d) as recorded, torch.autocast("cpu", torch.bfloat16):
        assert fast._linear(torch.randn(5, 7, 24), layer.weight, layer.bias).dtype == torch.bfloat16
    assert not recorded.calls


def test_attention_is_in_float32_under_autocast(tiny_vit):
    with Recorded(F.scaled_dot_product_attention) as recorded:
        fast_step(tiny_vit, autocast=torch.bfloat16)
    assert {tensor.dtype for q, k, v in recorded.calls for tensor in (q, k, v)} == {torch.float32}
    assert len(recorded.calls) == 5
