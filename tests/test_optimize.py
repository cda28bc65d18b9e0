import copy
import pickle
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, TINY, filled, golden_inputs
from torch import nn

import clip
from clip.attention import MultiheadAttention, causal_mask
from clip.config import CLIPConfig
from clip.model import CLIP, TOWERS, assemble, convert_weights
from clip.optimize import OptimizedCLIP, optimize

module = sys.modules[optimize.__module__]  # clip.optimize is the function
CAPTIONS = ["a dog", "a photograph of a very small dog asleep under a table in the garden", ""]
TOKENS = clip.tokenize(CAPTIONS)


@pytest.fixture(params=["packed", "plain"])
def layers(request, monkeypatch):
    """Both kinds of linear layers, whatever would be faster here."""
    try:
        module._pack(torch.zeros(2, 3))
    except (AttributeError, RuntimeError):
        if request.param == "packed":
            pytest.skip("this PyTorch packs no weights")
    monkeypatch.setattr(module, "_packing_pays", lambda *_: request.param == "packed")


@pytest.fixture
def images(tiny):
    return pictures(tiny)


def pictures(model, n=3):
    side = model.visual.input_resolution
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def features(model):
    """The unit vectors of pictures and texts, in float32."""
    with torch.no_grad():
        both = model.encode_image(pictures(model)), model.encode_text(TOKENS)
    return [F.normalize(found.float(), dim=-1) for found in both]


def assert_equal_features(found, wanted, error=1e-5):
    for one, other in zip(features(found), features(wanted), strict=True):
        assert (one - other).abs().max() < error


# -- equal to the plain model -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_features_and_logits_equal_the_golden_figures_and_the_plain_model(name):
    golden = GOLDEN[name]
    model = filled(golden["config"], golden["salt"])
    images, tokens = golden_inputs(name)
    fast = optimize(model)
    logits_per_image, logits_per_text = fast(images, tokens)
    found = {
        "image_features": fast.encode_image(images),
        "text_features": fast.encode_text(tokens),
        "logits_per_image": logits_per_image,
    }
    for kind, values in found.items():
        wanted = torch.tensor(golden[kind]["values"])
        assert (values - wanted).abs().max() / wanted.abs().max() < 1e-4
    assert torch.equal(logits_per_text, logits_per_image.T)
    assert_equal_features(fast, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_full_models_equal_the_fingerprints_of_the_original(name):
    golden = GOLDEN[name]
    fast = optimize(filled(golden["config"], golden["salt"]))
    images, tokens = golden_inputs(name)
    found = {"image_features": fast.encode_image(images), "text_features": fast.encode_text(tokens)}
    for kind, values in found.items():
        wanted = torch.tensor(golden[kind]["head"])
        assert (values.flatten()[:16] - wanted).abs().max() / wanted.abs().max() < 1e-4
        assert values.norm().item() == pytest.approx(golden[kind]["norm"], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_point_the_same_way(tiny, dtype):
    fast = optimize(tiny, dtype)
    assert fast.dtype == fast.encode_image(pictures(tiny)).dtype == fast.encode_text(TOKENS).dtype == dtype
    for one, other in zip(features(fast), features(tiny), strict=True):
        assert F.cosine_similarity(one, other).min() > 0.999


@pytest.mark.parametrize("halve", [nn.Module.half, lambda model: convert_weights(model, torch.bfloat16) or model])
def test_a_model_in_half_precision_keeps_it(tiny, halve):
    model = halve(copy.deepcopy(tiny))
    fast = optimize(model)
    assert fast.dtype == model.dtype
    assert fast.encode_text(TOKENS).dtype == model.dtype
    assert_equal_features(fast, tiny, error=0.02)
    assert optimize(model, torch.float32).encode_text(TOKENS).dtype == torch.float32


@pytest.mark.usefixtures("layers")
def test_the_embedded_model_points_the_same_way_in_bfloat16():
    model, _ = clip.load("tiny", device="cpu")
    for one, other in zip(features(optimize(model, torch.bfloat16)), features(model), strict=True):
        assert F.cosine_similarity(one, other).min() > 0.999


def test_models_with_the_exact_gelu_are_equal_too():
    torch.manual_seed(0)
    model = CLIP(**TINY["vit"], activation="gelu").eval()
    assert_equal_features(optimize(model), model)


def test_a_resolution_between_two_grids_reads_the_same_patches():
    torch.manual_seed(0)
    model = CLIP(**TINY["vit"] | {"image_resolution": 55}).eval()
    assert_equal_features(optimize(model), model)


def test_a_tower_without_projection_has_none(tiny_vit):
    tiny_vit.visual.proj = None
    assert optimize(tiny_vit).encode_image(pictures(tiny_vit)).shape == (3, 128)
    assert_equal_features(optimize(tiny_vit), tiny_vit)


def test_a_model_in_training_becomes_what_it_is_in_evaluation(tiny):
    fast = optimize(tiny.train())
    assert tiny.training
    assert_equal_features(fast, tiny.eval())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_alone(tiny, tower):
    weights = {
        name: entry
        for name, entry in tiny.state_dict().items()
        if name == "logit_scale" or name.startswith("visual.") == (tower == "image")
    }
    config = CLIPConfig(**TINY["vit" if hasattr(tiny.visual, "class_embedding") else "rn"])
    model = assemble(config, weights, torch.float32, "cpu", tower)
    fast = optimize(model)
    assert isinstance(model, TOWERS[tower])
    if tower == "image":
        torch.testing.assert_close(fast.encode_image(pictures(tiny)), model.encode_image(pictures(tiny)))
        with pytest.raises(RuntimeError, match="text"):
            fast.encode_text(TOKENS)
    else:
        torch.testing.assert_close(fast.encode_text(TOKENS), model.encode_text(TOKENS))
        with pytest.raises(RuntimeError, match=r"picture|image"):
            fast.encode_image(pictures(tiny))


def test_no_texts_and_no_pictures_give_no_features(tiny):
    fast = optimize(tiny)
    assert fast.encode_text(clip.tokenize([])).shape == (0, 24)
    assert fast.encode_image(pictures(tiny, 0)).shape == (0, 24)


def test_inputs_of_other_shapes_are_refused_as_by_the_plain_model(tiny):
    fast = optimize(tiny)
    side = tiny.visual.input_resolution
    sizes = ((side // 2, side // 2), (side, side + 1), (8, 8))
    for shape in ((3, side, side), (2, 1, side, side), (2, 4, side, side), *((2, 3, *size) for size in sizes)):
        messages = []
        for model in (tiny, fast):
            with pytest.raises(ValueError, match="expected pictures") as caught:
                model.encode_image(torch.zeros(shape))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match=r"expected token ids of shape \(N, up to 77\), got \(1, 78\)"):
        fast.encode_text(torch.zeros(1, 78, dtype=torch.int))


# -- the steps, one by one --------------------------------------------------------------------------------------------


def test_a_normalised_convolution_is_a_convolution_worked_by_hand():
    conv, norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0)
    values = {conv.weight: 3.0, norm.running_mean: 5.0, norm.running_var: 4.0, norm.weight: 7.0, norm.bias: 11.0}
    for entry, value in values.items():
        entry.data.fill_(value)
    folded = module._without_norm(conv, norm.eval(), torch.float32)
    x = torch.tensor([[[[0.0, 1.0]]]])  # 7 · (3 x - 5) / √4 + 11
    torch.testing.assert_close(folded(x), torch.tensor([[[[-6.5, 4.0]]]]))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_folded_convolution_equals_the_pair(kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, kernel, padding=kernel // 2, bias=False)
    norm = nn.BatchNorm2d(7)
    norm(torch.randn(4, 7, 3, 3) * 3 + 2)  # statistics
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 6, 4).contiguous(memory_format=torch.channels_last)
    found = module._without_norm(conv, norm.eval(), torch.float32)(x)
    torch.testing.assert_close(found, norm(conv(x)))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("causal", [False, True])
def test_a_lone_query_gets_the_answer_it_gets_among_others(causal):
    torch.manual_seed(0)
    attn = MultiheadAttention(20, 5)
    nn.init.normal_(attn.in_proj_bias)
    x, token = torch.randn(3, 7, 20), torch.tensor([6, 0, 4])
    alone = module._OneQueryAttention(attn.in_proj_weight, attn.in_proj_bias, attn.out_proj, 5, torch.float32)
    seen = torch.arange(7) <= token[:, None] if causal else None
    found = alone(x[range(3), token], x, seen)

    among = x.transpose(0, 1)
    wanted = attn(among, among, among, attn_mask=causal_mask(7) if causal else None)[0]
    torch.testing.assert_close(found, wanted[token, range(3)], rtol=1e-4, atol=1e-5)


def test_the_last_block_computes_one_token_of_each_sequence(tiny_vit):
    fast = optimize(tiny_vit)
    shapes = {}
    for name, tower in {"image": fast.visual, "text": fast}.items():
        first, last = tower.transformer.resblocks[0], tower.transformer.resblocks[-1]
        first.mlp.register_forward_hook(lambda _, __, out, name=name: shapes.setdefault(name, []).append(out.shape))
        last.mlp.register_forward_hook(lambda _, __, out, name=name: shapes.setdefault(name, []).append(out.shape))
    features(fast)
    count = int((TOKENS != 0).sum())  # all tokens of all captions, one behind the other
    assert shapes == {"image": [(3, 10, 128), (3, 128)], "text": [(count, 64), (3, 64)]}


def test_texts_are_read_to_their_ends_and_no_caption_matters_to_another(tiny_vit):
    fast = optimize(tiny_vit)
    lengths = []
    fast.transformer.resblocks[0].register_forward_hook(lambda _, __, out: lengths.append(len(out)))
    together = fast.encode_text(TOKENS)
    alone = torch.cat([fast.encode_text(clip.tokenize(caption)) for caption in CAPTIONS])
    each = [clip.count_tokens(caption)[0] for caption in CAPTIONS]
    assert lengths == [sum(each), *each]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_batch_of_pictures_is_embedded_a_few_at_a_time_and_in_order():
    plain = filled(TINY["rn"])
    fast = optimize(plain)
    counts = []
    fast.visual.layer1.register_forward_hook(lambda _, __, out: counts.append(len(out)))
    images = torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = fast.encode_image(images)
    assert counts == [4, 4, 1]
    torch.testing.assert_close(together, plain.encode_image(images), rtol=1e-4, atol=1e-4)


def test_tokens_after_the_first_end_token_change_nothing(tiny_vit):
    fast = optimize(tiny_vit)
    noisy = clip.tokenize(["a dog"])
    noisy[0, 4:] = torch.randint(0, 49408, (73,), generator=torch.Generator().manual_seed(0))
    noisy[0, 20] = 49407
    torch.testing.assert_close(fast.encode_text(noisy), tiny_vit.encode_text(clip.tokenize("a dog")))


def test_packing_is_used_where_it_is_faster_and_only_there(monkeypatch):
    pays = module._packing_pays.__wrapped__
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "_pack", lambda weight: weight)

    def taking(seconds):
        def linear(*_):
            now[0] += seconds

        return linear

    for packed, plain in ((1, 2), (2, 1), (2, 2)):
        monkeypatch.setattr(module, "_packed_linear", taking(packed))
        monkeypatch.setattr(module.F, "linear", taking(plain))
        assert pays(3, 5, torch.float32) == (packed < plain)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError])
def test_a_pytorch_that_cannot_pack_computes_plainly(tiny, monkeypatch, error):
    def pack(weight):
        raise error

    monkeypatch.setattr(module, "_pack", pack)
    monkeypatch.setattr(module, "_packing_pays", module._packing_pays.__wrapped__)
    assert_equal_features(optimize(tiny), tiny)


# -- what cannot be optimised -----------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A block around a block."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x) + x.roll(1, dims=-1)


def replace_block(model):
    blocks = model.transformer.resblocks
    blocks[0] = Shifted(blocks[0])


def replace_last_block(model):
    blocks = model.visual.transformer.resblocks
    blocks[-1] = Shifted(blocks[-1])


def hook_perceptron(model):
    model.visual.transformer.resblocks[1].mlp.register_forward_hook(lambda module, arguments, out: 2 * out)


def hook_tower(model):
    model.visual.transformer.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))


def replace_mask(model):
    model.transformer.resblocks[1].attn_mask = torch.zeros(77, 77)


def soften_mask(model):
    model.transformer.resblocks[0].attn_mask = causal_mask(77) + torch.eye(77)


def override_method(model):
    block = model.visual.transformer.resblocks[0]
    block.attention = types.MethodType(lambda self, x: 2 * x, block)


def replace_layer(model):
    model.visual.transformer.resblocks[2].mlp.c_fc = nn.Sequential(nn.Linear(128, 512))


def let_patches_overlap(model):
    model.visual.conv1.stride, model.visual.conv1.padding = (8, 8), (4, 4)
    model.visual.positional_embedding = nn.Parameter(torch.randn(37, 128))


def replace_text_norm(model):
    model.ln_final = nn.Sequential(model.ln_final, nn.Tanh())


def replace_text_tower(model):
    model.transformer = Shifted(model.transformer)


VIT_CHANGES = {
    replace_block: "transformer.resblocks.0",
    replace_last_block: "visual.transformer.resblocks.2",
    hook_perceptron: "visual.transformer.resblocks.1",
    hook_tower: "visual",
    replace_mask: "transformer.resblocks.1",
    soften_mask: "transformer.resblocks.0",
    override_method: "visual.transformer.resblocks.0",
    replace_layer: "visual.transformer.resblocks.2",
    let_patches_overlap: "visual",
    replace_text_norm: "transformer",
    replace_text_tower: "transformer",
}


def replace_bottleneck(model):
    model.visual.layer2[1] = Shifted(model.visual.layer2[1])


def forget_statistics(model):
    norm = model.visual.layer3[0].downsample[2]
    norm.running_mean = norm.running_var = None


def give_bias(model):
    model.visual.layer1[0].conv1.bias = nn.Parameter(torch.randn(16))


def hook_pool(model):
    model.visual.attnpool.k_proj.register_forward_hook(lambda module, arguments, out: 2 * out)


def replace_stem(model):
    model.visual.relu2 = nn.GELU()


RESNET_CHANGES = {
    replace_bottleneck: "visual.layer2.1",
    forget_statistics: "visual.layer3.0",
    give_bias: "visual.layer1.0",
    hook_pool: "visual.attnpool",
    replace_stem: "visual",
}


@pytest.mark.parametrize(
    ("kind", "change", "name"),
    [("vit", change, name) for change, name in VIT_CHANGES.items()]
    + [("rn", change, name) for change, name in RESNET_CHANGES.items()],
)
def test_what_is_not_ours_is_left_as_it_was_with_one_warning(kind, change, name):
    torch.manual_seed(0)
    model = filled(TINY[kind])
    plain = optimize(model)
    change(model)
    with pytest.warns(UserWarning, match="copied and not optimised") as caught:
        fast = optimize(model)
    assert [str(warning.message).rpartition(": ")[2] for warning in caught] == [name]
    assert_equal_features(fast, model)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(features(fast), features(plain), strict=True))
    assert isinstance(fast, OptimizedCLIP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        halved = optimize(model, torch.bfloat16)
    for one, other in zip(features(halved), features(model), strict=True):
        assert F.cosine_similarity(one, other).min() > 0.99


def test_several_things_make_one_warning(tiny_vit):
    replace_block(tiny_vit)
    hook_tower(tiny_vit)
    with pytest.warns(UserWarning, match="not optimised") as caught:
        optimize(tiny_vit)
    assert [str(warning.message).rpartition(": ")[2] for warning in caught] == ["visual, transformer.resblocks.0"]


def test_models_of_other_classes_and_hooked_ones_are_copied_whole(tiny):
    class Louder(CLIP):
        def encode_image(self, image):
            return 3 * super().encode_image(image)

    tiny.__class__ = Louder
    with pytest.warns(UserWarning, match="not optimised: the model itself"):
        fast = optimize(tiny)
    assert type(fast) is Louder
    assert torch.equal(fast.encode_image(pictures(tiny)), tiny.encode_image(pictures(tiny)))
    assert fast.logit_scale.data_ptr() != tiny.logit_scale.data_ptr()

    tiny.__class__ = CLIP
    tiny.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="not optimised: the model itself"):
        optimize(tiny)


def test_a_grouped_convolution_of_size_one_is_computed_as_such():
    model = filled(TINY["rn"])
    conv = model.visual.layer1[0].conv1
    conv.groups, conv.weight = 2, nn.Parameter(conv.weight[:, ::2].detach().clone())
    assert_equal_features(optimize(model), model)


# -- a copy for inference ---------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was_and_shares_nothing(tiny):
    before = {name: (entry.data_ptr(), entry.clone()) for name, entry in tiny.state_dict().items()}
    fast = optimize(tiny)
    found = features(fast)
    for name, entry in tiny.state_dict().items():
        assert entry.data_ptr() == before[name][0]
        assert torch.equal(entry, before[name][1])
    assert all(parameter.requires_grad for parameter in tiny.parameters())

    with torch.no_grad():
        for entry in tiny.state_dict().values():
            entry.zero_()
    assert all(torch.equal(one, other) for one, other in zip(features(fast), found, strict=True))


def test_a_copy_answers_to_what_callers_ask(tiny):
    fast = optimize(tiny)
    assert isinstance(fast, CLIP)
    assert not any(part.training for part in fast.modules())
    assert fast.visual.input_resolution == tiny.visual.input_resolution
    assert (fast.context_length, fast.vocab_size, fast.dtype) == (77, 49408, torch.float32)
    assert torch.equal(fast.logit_scale, tiny.logit_scale)
    assert next(fast.parameters()).device == torch.device("cpu")
    assert fast.eval().float().to("cpu") is fast


def test_a_copy_has_no_gradients(tiny, images):
    fast = optimize(tiny)
    logits, _ = fast(images.requires_grad_(), TOKENS)
    assert not logits.requires_grad
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_what_was_left_has_no_gradients_either(tiny_vit):
    replace_block(tiny_vit)
    tiny_vit.transformer.resblocks[0].shift = torch.zeros(64, requires_grad=True)
    tiny_vit.transformer.resblocks[0].forward = lambda x: x + tiny_vit.transformer.resblocks[0].shift
    with pytest.warns(UserWarning, match="not optimised"):
        fast = optimize(tiny_vit)
    assert tiny_vit.encode_text(TOKENS).requires_grad
    assert not fast.encode_text(TOKENS).requires_grad


def test_autocast_changes_nothing(tiny, images):
    fast = optimize(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        found = fast.encode_image(images), fast.encode_text(TOKENS)
    assert torch.equal(found[0], fast.encode_image(images))
    assert torch.equal(found[1], fast.encode_text(TOKENS))


@pytest.mark.parametrize(
    ("deed", "error", "message"),
    [
        (lambda fast: fast.train(), RuntimeError, "train the model it was made from"),
        (lambda fast: fast.half(), RuntimeError, "stays on cpu in torch.float32"),
        (lambda fast: fast.to("meta"), RuntimeError, "stays on cpu in torch.float32"),
        (lambda fast: fast.state_dict(), RuntimeError, "has no state dict"),
        (lambda fast: clip.save(fast, "copy.pt"), ValueError, "save the model it was made from"),
        (pickle.dumps, TypeError, "neither copied nor pickled"),
        (copy.deepcopy, TypeError, "neither copied nor pickled"),
        (lambda fast: optimize(fast, torch.bfloat16), ValueError, "got one that was optimised in torch.float32"),
    ],
)
def test_what_a_copy_cannot_do_it_says(tiny_vit, deed, error, message):
    fast = optimize(tiny_vit)
    with pytest.raises(error, match=message):
        deed(fast)
    assert_equal_features(fast, tiny_vit)


def test_a_copy_is_not_optimised_again(tiny):
    fast = optimize(tiny)
    assert optimize(fast) is optimize(fast, torch.float32) is fast


def test_whole_numbers_are_no_precision(tiny):
    with pytest.raises(ValueError, match=r"floating point type, got torch\.int8"):
        optimize(tiny, torch.int8)


@pytest.mark.requires_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_copies_on_a_gpu_point_the_same_way(tiny, dtype):
    there = copy.deepcopy(tiny).cuda()
    fast = optimize(there, dtype)
    with torch.no_grad():
        found = fast.encode_image(pictures(tiny).cuda()), fast.encode_text(TOKENS.cuda())
    for one, other in zip(found, features(tiny), strict=True):
        assert F.cosine_similarity(one.float().cpu(), other).min() > 0.999
