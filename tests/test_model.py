import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, TINY, filled, golden_inputs
from peer import as_transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import clip
from clip.attention import causal_mask
from clip.config import RELEASED, CLIPConfig
from clip.model import CLIP, assemble, build_model, config_of, convert_weights

# Totals of the released models: OpenAI's notebooks and open_clip's model profile
PARAMETERS = {
    "RN50": (102_007_137, 489),
    "RN101": (119_688_033, 795),
    "RN50x4": (178_300_601, 669),
    "RN50x16": (290_979_217, 921),
    "RN50x64": (623_258_305, 1353),
    "ViT-B/32": (151_277_313, 302),
    "ViT-B/16": (149_620_737, 302),
    "ViT-L/14": (427_616_513, 446),
    "ViT-L/14@336px": (427_944_193, 446),
}
CAPTIONS = ["a dog", "a photograph of a very small dog asleep under a table in the garden", ""]


@pytest.fixture
def images(tiny):
    size = tiny.visual.input_resolution
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def symmetric_loss(logits_per_image, logits_per_text):
    labels = torch.arange(len(logits_per_image))
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def relative(got, want):
    """The largest difference, in units of the largest value."""
    want = torch.as_tensor(want)
    return ((got - want).abs().max() / want.abs().max()).item()


# -- equal to the original --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_tiny_models_equal_the_original_in_every_value_and_gradient(name):
    golden = GOLDEN[name]
    model = filled(golden["config"], golden["salt"])
    images, tokens = golden_inputs(name)

    assert relative(model.encode_image(images), golden["image_features"]["values"]) < 1e-4
    assert relative(model.encode_text(tokens), golden["text_features"]["values"]) < 1e-4
    logits_per_image, logits_per_text = model(images, tokens)
    assert relative(logits_per_image, golden["logits_per_image"]["values"]) < 1e-4
    assert torch.equal(logits_per_text, logits_per_image.T)

    loss = symmetric_loss(logits_per_image, logits_per_text)
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-3)
    loss.backward()
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert list(norms) == list(golden["grad_norms"])  # the order of registration too
    # A key's bias moves all scores of a query alike, so its true gradient is zero and what is seen is rounding.
    assert norms == pytest.approx(golden["grad_norms"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_full_models_equal_the_fingerprints_of_the_original(name):
    golden = GOLDEN[name]
    model = filled(golden["config"], golden["salt"])
    images, tokens = golden_inputs(name)
    with torch.no_grad():
        found = {"image_features": model.encode_image(images), "text_features": model.encode_text(tokens)}
        logits = model(images, tokens)[0]
    for kind, features in found.items():
        want = golden[kind]
        assert list(features.shape) == want["shape"]
        assert relative(features.flatten()[:16], want["head"]) < 1e-4
        assert features.norm().item() == pytest.approx(want["norm"], rel=1e-4)
        assert features.std().item() == pytest.approx(want["std"], rel=1e-4)
        assert features.mean().item() == pytest.approx(want["mean"], abs=1e-4 * want["std"])
    assert relative(logits, golden["logits_per_image"]["values"]) < 1e-4


def test_logits_features_and_gradients_equal_transformers(tiny_vit):
    peer = as_transformers(copy.deepcopy(tiny_vit))
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenize(CAPTIONS)
    theirs = peer(input_ids=tokens.long(), pixel_values=images)
    ours = tiny_vit(images, tokens)[0]
    assert relative(ours, theirs.logits_per_image.detach()) < 1e-4

    symmetric_loss(ours, ours.T).backward()
    symmetric_loss(theirs.logits_per_image, theirs.logits_per_text).backward()
    pairs = [
        (tiny_vit.token_embedding.weight, peer.text_model.embeddings.token_embedding.weight),
        (tiny_vit.visual.conv1.weight, peer.vision_model.embeddings.patch_embedding.weight),
        (tiny_vit.logit_scale, peer.logit_scale),
    ]
    for our_parameter, their_parameter in pairs:
        assert relative(our_parameter.grad, their_parameter.grad) < 1e-4


@pytest.mark.parametrize("name", list(RELEASED))
def test_parameters_and_entries_of_the_released_models(name):
    with torch.device("meta"):
        model = CLIP(**vars(RELEASED[name]))
    assert (sum(parameter.numel() for parameter in model.parameters()), len(model.state_dict())) == PARAMETERS[name]


def test_no_released_model_is_missing():
    assert list(RELEASED) == list(PARAMETERS) == clip.available_models()[:9]


def test_a_new_model_has_the_statistics_of_the_released_initialisation():
    torch.manual_seed(0)
    sizes = TINY["rn"] | {"transformer_width": 256, "transformer_layers": 3}
    model = CLIP(**sizes)
    block, pool, width = model.transformer.resblocks[1], model.visual.attnpool, 256
    residual = width**-0.5 * (2 * 3) ** -0.5
    deviations = {
        model.token_embedding.weight: 0.02,
        model.positional_embedding: 0.01,
        block.attn.in_proj_weight: width**-0.5,
        block.attn.out_proj.weight: residual,
        block.mlp.c_fc.weight: (2 * width) ** -0.5,
        block.mlp.c_proj.weight: residual,
        model.text_projection: width**-0.5,
        pool.q_proj.weight: (16 * 32) ** -0.5,
        pool.c_proj.weight: (16 * 32) ** -0.5,
    }
    for parameter, deviation in deviations.items():
        assert parameter.std().item() == pytest.approx(deviation, rel=0.05)
        assert abs(parameter.mean().item()) < deviation / 10
    assert not model.visual.layer2[1].bn3.weight.any()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


# -- the text tower reads no further than it must ---------------------------------------------------------------------


def positions_computed(model, tokens):
    """How many positions the text transformer sees."""
    lengths = []
    with model.transformer.register_forward_hook(lambda _, arguments, out: lengths.append(len(out))):
        model.encode_text(tokens)
    return lengths[0]


def in_full(model, tokens):
    """The text features as the released code computes them, all positions of all texts."""
    x = model.token_embedding(tokens) + model.positional_embedding
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection


def test_positions_after_the_longest_captions_end_are_not_computed(tiny_vit):
    for caption, length in {"": 8, "one two three four five six": 8, "1234567": 16, "1 2 " * 37: 77}.items():
        tokens = clip.tokenize(caption)
        assert positions_computed(tiny_vit, tokens) == length
        torch.testing.assert_close(tiny_vit.encode_text(tokens), in_full(tiny_vit, tokens), rtol=1e-4, atol=1e-4)


def test_a_caption_gets_the_same_features_in_any_company(tiny_vit):
    together = tiny_vit.encode_text(clip.tokenize(CAPTIONS))
    alone = torch.cat([tiny_vit.encode_text(clip.tokenize(caption)) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_tokens_after_the_first_end_token_change_nothing(tiny_vit):
    tokens = clip.tokenize(["a dog"])
    noisy = tokens.clone()
    noisy[0, 4:] = torch.randint(0, 49408, (73,), generator=torch.Generator().manual_seed(0))
    noisy[0, 20] = 49407
    torch.testing.assert_close(tiny_vit.encode_text(noisy), tiny_vit.encode_text(tokens))


def test_gradients_are_those_of_the_full_length(tiny_vit):
    twin = copy.deepcopy(tiny_vit)
    tokens = clip.tokenize(CAPTIONS)
    tiny_vit.encode_text(tokens).square().sum().backward()
    in_full(twin, tokens).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in tiny_vit.named_parameters() if parameter.grad is not None}
    assert "token_embedding.weight" in gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, twin.get_parameter(name).grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", [None, torch.zeros(77, 77)])
def test_a_tower_whose_mask_was_changed_reads_everything(tiny_vit, mask):
    tokens = clip.tokenize(CAPTIONS)
    before = tiny_vit.encode_text(tokens)
    tiny_vit.transformer.resblocks[1].attn_mask = mask
    assert positions_computed(tiny_vit, tokens) == 77
    torch.testing.assert_close(tiny_vit.encode_text(tokens), in_full(tiny_vit, tokens))
    assert not torch.allclose(tiny_vit.encode_text(tokens), before, atol=1e-3)


def test_a_replaced_tower_gets_everything(tiny_vit):
    tokens = clip.tokenize(CAPTIONS)
    tiny_vit.transformer = nn.Identity()
    assert positions_computed(tiny_vit, tokens) == 77


def test_shorter_contexts_are_read_as_they_are(tiny_vit):
    tokens = clip.tokenize("a dog", context_length=5)
    torch.testing.assert_close(tiny_vit.encode_text(tokens), tiny_vit.encode_text(clip.tokenize("a dog")))


@pytest.mark.parametrize("shape", [(1, 78), (77,), (1, 2, 77)])
def test_tokens_of_another_shape_are_refused(tiny_vit, shape):
    with pytest.raises(ValueError, match=r"expected token ids of shape \(N, up to 77\), got"):
        tiny_vit.encode_text(torch.zeros(shape, dtype=torch.int))


def test_no_texts_and_no_pictures_give_no_features(tiny_vit):
    assert tiny_vit.encode_text(clip.tokenize([])).shape == (0, 24)
    assert tiny_vit.encode_image(torch.zeros(0, 3, 48, 48)).shape == (0, 24)


@pytest.mark.parametrize("kind", ["traced", "exported", "compiled"])
def test_graphs_recorded_with_a_short_caption_serve_a_long_one(tiny_vit, kind):
    short, long = clip.tokenize(["a dog", "a cat"]), clip.tokenize(CAPTIONS[:2])

    class TextTower(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = tiny_vit

        def forward(self, text):
            return self.clip.encode_text(text)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated
        warnings.simplefilter("ignore", UserWarning)  # torch 2.6 exports the mask as a constant, and says so
        if kind == "traced":
            recorded = torch.jit.trace(TextTower(), (short,))
        elif kind == "exported":
            recorded = torch.export.export(TextTower(), (short,)).module()
        else:
            recorded = torch.compile(TextTower(), backend="eager", fullgraph=True)
        recorded(short)
        torch.testing.assert_close(recorded(long), tiny_vit.encode_text(long), rtol=1e-4, atol=1e-4)


def test_texts_can_be_mapped_over_though_no_length_can_be_read_then(tiny_vit):
    tokens = clip.tokenize(CAPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch maps its attention in a loop, and says so
        mapped = torch.func.vmap(lambda row: tiny_vit.encode_text(row[None])[0])(tokens)
    torch.testing.assert_close(mapped, tiny_vit.encode_text(tokens), rtol=1e-4, atol=1e-4)


def test_shapes_can_be_propagated_without_values(tiny_vit):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        features = tiny_vit.encode_text(mode.from_tensor(clip.tokenize(CAPTIONS)))
    assert features.shape == (3, 24)


# -- what clients do with a model -------------------------------------------------------------------------------------


def test_logits_are_scaled_cosines(tiny, images):
    tokens = clip.tokenize(CAPTIONS)
    logits_per_image, _ = tiny(images, tokens)
    i, t = tiny.encode_image(images)[0], tiny.encode_text(tokens)[2]
    cosine = (i @ t / (i.norm() * t.norm())).item()
    assert logits_per_image[0, 2].item() == pytest.approx(cosine * tiny.logit_scale.exp().item(), rel=1e-4)


def test_gradients_reach_the_picture(tiny, images):
    images.requires_grad_()
    tiny(images, clip.tokenize(CAPTIONS))[0][0, 0].backward()
    assert images.grad[0].abs().sum() > 0
    assert not images.grad[1:].any()  # pictures of a batch do not mix


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_share_nothing(tiny, images, copied):
    twin = copied(tiny)
    tokens = clip.tokenize(CAPTIONS)
    assert torch.equal(twin(images, tokens)[0], tiny(images, tokens)[0])
    with torch.no_grad():
        twin.logit_scale.zero_()
    assert tiny.logit_scale.item() > 2


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.05), (torch.float64, 1e-4)])
def test_whole_models_run_in_other_precisions(tiny, images, dtype, error):
    tokens = clip.tokenize(CAPTIONS)
    features = F.normalize(tiny.encode_image(images), dim=-1), F.normalize(tiny.encode_text(tokens), dim=-1)
    tiny.to(dtype)
    assert tiny.dtype == dtype
    for before, after in zip(features, (tiny.encode_image(images), tiny.encode_text(tokens)), strict=True):
        assert after.dtype == dtype
        assert (F.normalize(after.float(), dim=-1) - before).abs().max() < error


def test_half_and_back_to_float_and_training_modes(tiny, images):
    tiny.half().float()
    assert {parameter.dtype for parameter in tiny.parameters()} == {torch.float32}
    assert tiny.train().training
    assert tiny.visual.training
    tiny(images, clip.tokenize(CAPTIONS))[0].sum().backward()


def test_gradients_are_those_of_finite_differences(tiny_vit):
    tiny_vit.double()
    images = torch.randn(2, 3, 48, 48, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenize(CAPTIONS[:2])

    def loss(scale, projection):
        parameters = {"logit_scale": scale, "visual.proj": projection}
        return symmetric_loss(*torch.func.functional_call(tiny_vit, parameters, (images, tokens)))

    inputs = (tiny_vit.logit_scale.detach().requires_grad_(), tiny_vit.visual.proj.detach()[:].requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


# -- precisions and state dicts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convert_weights_changes_what_enters_matrix_products_and_nothing_else(tiny, dtype):
    convert_weights(tiny, dtype)
    for name, parameter in tiny.named_parameters():
        in_float32 = any(part in name for part in ("ln_", "bn", "downsample.1.", "embedding", "logit_scale"))
        assert parameter.dtype == (torch.float32 if in_float32 else dtype), name


def test_convert_weights_takes_any_module():
    module = nn.Sequential(nn.Conv1d(2, 2, 1), nn.MultiheadAttention(4, 2, kdim=3, vdim=5), nn.LayerNorm(2))
    convert_weights(module)
    assert module[0].weight.dtype == module[1].k_proj_weight.dtype == module[1].out_proj.bias.dtype == torch.float16
    assert module[2].weight.dtype == torch.float32


def test_build_model_gives_the_model_back_in_half_precision_and_leaves_the_state_dict_alone(tiny, images):
    state_dict = tiny.state_dict()
    sizes = {"input_resolution": 48, "context_length": 77, "vocab_size": 49408}
    extra = {name: torch.tensor(size) for name, size in sizes.items()}
    given = {**state_dict, **extra}
    # 64 wide, and so one head where the tiny model has four: shapes cannot tell
    tiny.transformer.resblocks.apply(lambda module: setattr(module, "num_heads", 1) or setattr(module, "head_dim", 64))
    model = build_model(given)
    assert not model.training
    assert model.dtype == torch.float16
    assert all(given[key] is value for key, value in {**state_dict, **extra}.items())
    for name, entry in model.state_dict().items():
        assert torch.equal(entry, state_dict[name].to(entry.dtype)), name
        assert entry.data_ptr() != state_dict[name].data_ptr()


def test_assemble_draws_no_random_numbers_and_lets_go_of_the_weights(tiny):
    config = CLIPConfig(**TINY["vit" if hasattr(tiny.visual, "class_embedding") else "rn"])
    weights = tiny.state_dict()
    before = torch.random.get_rng_state()
    model = assemble(config, dict(weights), torch.float32, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(entry, weights[name]) for name, entry in model.state_dict().items())
    emptied = dict(weights)
    assemble(config, emptied, torch.float32, "cpu")
    assert emptied == {}


def test_entries_that_do_not_fit_are_listed(tiny_vit):
    weights = tiny_vit.state_dict()
    del weights["visual.ln_pre.bias"]
    weights["surplus"] = torch.zeros(1)
    weights["logit_scale"] = torch.zeros(3)
    with pytest.raises(
        RuntimeError,
        match=r"1 missing: visual.ln_pre.bias; 1 unexpected: surplus; "
        r"1 of another shape: logit_scale \(expected \(\), got \(3,\)\)",
    ):
        build_model(weights)


def test_the_sizes_of_a_model_are_read_off_it(tiny):
    config = CLIPConfig(**TINY["vit" if hasattr(tiny.visual, "class_embedding") else "rn"])
    assert config_of(tiny) == config
    assert config_of(CLIP(**vars(config) | {"activation": "gelu"})).activation == "gelu"
    tiny.transformer.resblocks[0].mlp.gelu = nn.ReLU()
    with pytest.raises(ValueError, match="expected the same activation"):
        config_of(tiny)


def test_a_resolution_between_two_grids_is_kept():
    for kind, resolution in (("vit", 50), ("rn", 80)):
        config = CLIPConfig(**TINY[kind] | {"image_resolution": resolution})
        assert config_of(CLIP(**vars(config))) == config
    model = CLIP(**TINY["vit"])
    model.visual.positional_embedding = nn.Parameter(torch.zeros(5 * 5 + 1, 128))  # grown, input_resolution forgotten
    assert config_of(model).image_resolution == 80


def test_sizes_that_no_configuration_describes_are_refused(tiny_vit):
    tiny_vit.visual.transformer.resblocks[2].mlp.gelu = nn.GELU()
    with pytest.raises(ValueError, match="same activation in all blocks"):
        config_of(tiny_vit)
    tiny_vit.visual.transformer.resblocks[2].mlp.gelu = clip.model.QuickGELU()
    tiny_vit.visual.transformer.resblocks[1].attn.num_heads = 4
    with pytest.raises(ValueError, match="one number of heads in all blocks"):
        config_of(tiny_vit)


def test_the_mask_is_the_causal_one_and_each_text_block_has_it(tiny):
    assert torch.equal(tiny.build_attention_mask(), causal_mask(77))
    assert all(torch.equal(block.attn_mask, causal_mask(77)) for block in tiny.transformer.resblocks)
    if hasattr(tiny.visual, "transformer"):
        assert all(block.attn_mask is None for block in tiny.visual.transformer.resblocks)
