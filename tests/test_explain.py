import copy
import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, filled
from PIL import Image
from torch import nn

import clip
from clip.model import CLIP, convert_weights
from clip.preprocess import Preprocess
from clip.tasks.encode import encode_texts
from clip.tasks.explain import METHODS, attention_maps, default_method, explain, seen_box, text_tokens, tokens
from clip.training.drawn import draw_scene, sample_scene

CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # row, column
METHODS_OF = {"vit": ["attention", "occlusion"], "rn": ["grad-cam", "occlusion"]}


@pytest.fixture(scope="module")
def embedded():
    return clip.load("tiny", device="cpu")[0]


@pytest.fixture(scope="module")
def color_vit():
    """A ViT whose answer is known: patches of 16 pixels in 64, "red" means red patches and "blue" blue ones.

    Channel 0 of a token says how red its patch is, channel 1 how blue, and 2 that it is a patch. In the second block
    all tokens attend to all others alike; the three channels of what the class token so gathers are the features.
    """
    model = CLIP(3, 64, 2, 64, 16, 77, 49408, 16, 1, 1).eval()
    red = clip.tokenize("red")[0, 1]
    model.encode_text = lambda ids: torch.eye(3)[(ids[:, 1] != red).long()]
    visual = model.visual
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.zero_()
        for norm in (module for module in visual.modules() if isinstance(module, nn.LayerNorm)):
            norm.weight.fill_(1)
        visual.conv1.weight[0] = torch.tensor([0.2, -0.1, -0.1]).view(3, 1, 1) / 256
        visual.conv1.weight[1] = torch.tensor([-0.1, -0.1, 0.2]).view(3, 1, 1) / 256
        visual.positional_embedding[1:, 2] = 1
        attention = visual.transformer.resblocks[1].attn
        attention.in_proj_weight[128:] = torch.eye(64)  # values; queries and keys stay 0
        attention.out_proj.weight.copy_(torch.eye(64))
        visual.proj[:3] = torch.eye(3)
    return model


@cache
def _filled(tower):
    return filled(TINY[tower])


def fresh(tower):
    """A tiny model that a test may change."""
    return copy.deepcopy(_filled(tower))


@pytest.fixture(params=TINY)
def tiny(request):
    return fresh(request.param)


@pytest.fixture
def tiny_vit():
    return fresh("vit")


@pytest.fixture
def tiny_rn():
    return fresh("rn")


def two_squares(red, blue):
    """A grey picture of 80 x 80 with a red and a blue square in corners."""
    picture = Image.new("RGB", (80, 80), (128, 128, 128))
    for color, (row, column) in (("red", red), ("blue", blue)):
        picture.paste(color, (60 * column, 60 * row, 60 * column + 20, 60 * row + 20))
    return picture


def corner_of(heat):
    """Row and column, 0 or 1, of the highest point."""
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return 2 * row // heat.shape[0], 2 * column // heat.shape[1]


def share_in(heat, corner):
    """How much of the map lies in one quarter of the picture."""
    rows, columns = (part.chunk(2)[side] for part, side in zip(map(torch.arange, heat.shape), corner, strict=True))
    return (heat[rows][:, columns].sum() / heat.sum()).item()


# Where it is


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("method", METHODS_OF["vit"])
def test_a_vits_map_lies_on_the_thing_in_the_corner(color_vit, method, corner):
    opposite = (1 - corner[0], 1 - corner[1])
    picture = two_squares(red=corner, blue=opposite)
    for text, where in (("red", corner), ("blue", opposite)):
        heat = explain(color_vit, picture, text, method)
        assert heat.shape == (80, 80)
        assert corner_of(heat) == where
        assert share_in(heat, where) > 0.9


@pytest.mark.parametrize("method", METHODS_OF["rn"])
def test_a_resnets_map_lies_on_the_side_where_the_thing_is(embedded, method):
    rng = random.Random(0)
    found = []
    while len(found) < 20:
        scene = sample_scene(rng, held_out=True)
        if scene.relation not in ("above", "below", "left of", "right of"):
            continue
        picture = draw_scene(scene, rng, 128)
        axis = 0 if scene.relation in ("above", "below") else 1
        for thing, comes_first in zip(scene.things, (True, False), strict=True):
            halves = explain(embedded, picture, str(thing), method).chunk(2, dim=axis)
            here, elsewhere = halves if comes_first == (scene.relation in ("above", "left of")) else reversed(halves)
            found.append(here.sum() > elsewhere.sum() and here.max() == 1)
    assert sum(found) >= 18


@pytest.mark.parametrize("method", METHODS_OF["vit"])
@pytest.mark.parametrize("size", [(160, 64), (37, 101), (64, 64), (400, 300), (20, 23)])
def test_the_map_finds_its_way_back_through_crop_and_resize(color_vit, method, size):
    picture = Image.new("RGB", size, (128, 128, 128))
    left, top, right, _ = seen_box(color_vit, picture)
    patch = (right - left) / 4
    x, y = left + 2.5 * patch, top + 1.5 * patch  # the middle of the patch in row 1, column 2
    picture.paste("red", tuple(round(edge) for edge in (x - patch / 2, y - patch / 2, x + patch / 2, y + patch / 2)))
    options = {"window": 16, "stride": 4} if method == "occlusion" else {}
    heat = explain(color_vit, picture, "red", method, **options)
    assert heat.shape == size[::-1]
    assert heat.max() == 1
    columns, rows = (torch.arange(side) + 0.5 for side in size)
    assert (heat.sum(dim=0) @ columns / heat.sum()).item() == pytest.approx(x, abs=max(1, patch / 8))
    assert (heat.sum(dim=1) @ rows / heat.sum()).item() == pytest.approx(y, abs=max(1, patch / 8))


def test_pixels_that_make_no_whole_patch_are_not_on_the_map(color_vit):
    model = copy.deepcopy(color_vit)
    model.visual.input_resolution = 72  # four patches of 16, and 8 pixels that the convolution leaves out
    picture = Image.new("RGB", (72, 72), (128, 128, 128))
    picture.paste("red", (48, 16, 72, 32))
    heat = explain(model, picture, "red")
    assert (heat[:, 64:] == 0).all()
    assert (heat[24, 56:64] > 0.9).all()


@pytest.mark.parametrize("size", [(150, 64), (61, 200), (301, 99)])
def test_the_box_is_what_preprocessing_keeps_and_the_map_is_0_outside(color_vit, size):
    picture = Image.new("RGB", size, "white")
    left, top, right, bottom = seen_box(color_vit, picture)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    picture.paste("black", (round(left), round(top), round(right), round(bottom)))
    black = Preprocess(64)(Image.new("RGB", (64, 64)))
    assert torch.equal(Preprocess(64)(picture)[:, 2:-2, 2:-2], black[:, 2:-2, 2:-2])  # bicubic reaches over the edge
    assert not torch.equal(Preprocess(64)(picture.resize((size[0] + 9, size[1] + 9))), black)

    picture.paste("red", (0, 0, round((left + right) / 2), size[1]))
    heat = explain(color_vit, picture, "red", "attention")
    rows, columns = (torch.arange(side) + 0.5 for side in heat.shape)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    assert (heat[~inside] == 0).all()
    assert (heat[inside] > 0).any()


@pytest.mark.parametrize("method", METHODS_OF["vit"])
def test_an_array_and_a_tensor_are_pictures_too(color_vit, method):
    picture = two_squares((0, 1), (1, 1)).crop((0, 0, 80, 70))
    heat = explain(color_vit, picture, "red", method)
    array = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(70, 80, 3)
    assert torch.equal(explain(color_vit, array.numpy(), "red", method), heat)
    same = explain(color_vit, array.permute(2, 0, 1) / 255, "red", method)
    torch.testing.assert_close(same, heat, atol=0.05, rtol=0)  # floats are resized without rounding
    with pytest.raises(ValueError, match=r"expected one picture, got a tensor of shape \(2, 3, 8, 8\)"):
        explain(color_vit, torch.zeros(2, 3, 8, 8), "red", method)


# The three methods


def attend_by_hand(visual, image, extra):
    """The tower's features, with `extra` (one (H, L, L) a block) added to its attention weights, and the weights."""
    x = F.conv2d(image, visual.conv1.weight, stride=visual.conv1.stride).flatten(2)[0].T  # (G², D)
    x = torch.cat([visual.class_embedding[None], x]) + visual.positional_embedding
    x = visual.ln_pre(x)
    maps = []
    for block, more in zip(visual.transformer.resblocks, extra, strict=True):
        y, attention = block.ln_1(x), block.attn
        q, k, v = (
            y @ w.T + b for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        )
        heads, weights = [], []
        for head in range(attention.num_heads):
            part = slice(64 * head, 64 * head + 64)
            weights.append((q[:, part] @ k[:, part].T / 8).softmax(dim=-1))
            heads.append((weights[-1] + more[head]) @ v[:, part])
        x = x + torch.cat(heads, dim=1) @ attention.out_proj.weight.T + attention.out_proj.bias
        x = x + block.mlp(block.ln_2(x))
        maps.append(torch.stack(weights))
    return visual.ln_post(x[0]) @ visual.proj, torch.stack(maps)


def test_attention_is_the_papers_rule_with_gradients_taken_by_hand(tiny_vit):
    picture = two_squares((0, 0), (1, 1)).resize((45, 45))  # so that each patch has a pixel in its very middle
    image = Preprocess(48)(picture)[None]
    extra = torch.zeros(3, 2, 10, 10, requires_grad=True)
    features, maps = attend_by_hand(tiny_vit.visual, image, extra)
    logit = tiny_vit.logit_scale.exp() * F.cosine_similarity(features, encode_texts(tiny_vit, ["a cat"])[0], dim=0)
    [gradient] = torch.autograd.grad(logit, extra)
    relevance = torch.eye(10)
    for block in range(3):
        relevance = relevance + (gradient[block] * maps[block]).clamp(min=0).mean(dim=0) @ relevance
    patches = relevance[0, 1:].view(3, 3)

    heat = explain(tiny_vit, picture, "a cat", "attention")
    torch.testing.assert_close(heat[7::15, 7::15], patches / patches.max(), atol=1e-4, rtol=0)


def test_grad_cam_is_the_papers_rule(tiny_rn):
    picture = two_squares((0, 0), (1, 1)).resize((64, 64))
    image = Preprocess(64)(picture)[None]
    maps = []
    hook = tiny_rn.visual.layer4.register_forward_hook(lambda module, args, output: maps.append(output))
    tiny_rn.visual(image)
    hook.remove()
    features = maps[0].detach().requires_grad_()  # (1, C, 2, 2)
    cosine = F.cosine_similarity(tiny_rn.visual.attnpool(features)[0], encode_texts(tiny_rn, ["a cat"])[0], dim=0)
    [gradient] = torch.autograd.grad(cosine, features)
    weights = gradient[0].flatten(1).mean(dim=1)
    grid = torch.tensordot(weights, features[0].detach(), dims=1).clamp(min=0)
    heat = explain(tiny_rn, picture, "a cat", "grad-cam")
    assert grid.max() > 0
    corners = heat[[0, -1]][:, [0, -1]]  # outside of the outermost middles the map is flat
    torch.testing.assert_close(corners, grid / grid.max(), atol=1e-4, rtol=0)


class Brightness(nn.Module):
    """An image tower that sees nothing but how bright one pixel is."""

    input_resolution = 32

    def __init__(self, place):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 1, 1)  # where CLIP reads its dtype
        self.place = place

    def forward(self, x):
        return torch.stack([x[:, 0, self.place[0], self.place[1]], torch.ones(len(x))] + 22 * [torch.zeros(len(x))], 1)


@pytest.mark.parametrize("place", [(0, 0), (13, 21), (31, 3)])
def test_occlusion_counts_the_windows_that_cover_what_matters(place):
    model = fresh("vit")
    model.visual = Brightness(place)
    axis = F.normalize(encode_texts(model, ["light"])[0, :2], dim=0)
    picture = Image.new("RGB", (32, 32))
    picture.putpixel(place[::-1], (255, 255, 255) if axis[0] > 0 else (0, 0, 0))
    if axis[0] <= 0:
        picture = Image.eval(picture, lambda level: 255 - level)
        picture.putpixel(place[::-1], (0, 0, 0))
    heat = explain(model, picture, "light", window=4, stride=1, batch_size=7)
    assert default_method(model) == "occlusion"
    # The share of the 4 x 4 windows over a pixel that also cover the place.
    rows, columns = ((1 - (torch.arange(32) - at).abs() / 4).clamp(min=0) for at in place)
    torch.testing.assert_close(heat, rows[:, None] * columns, atol=1e-4, rtol=0)


def test_where_nothing_speaks_for_the_text_the_map_is_0():
    model = fresh("vit")
    model.visual = Brightness((5, 5))
    model.visual.forward = lambda x: torch.ones(len(x), 24)
    heat = explain(model, Image.new("RGB", (40, 30), "red"), "a cat")
    assert torch.equal(heat, torch.zeros(30, 40))


def test_occlusions_answer_does_not_depend_on_its_batches(embedded):
    picture = two_squares((0, 0), (1, 1))
    maps = [explain(embedded, picture, "a red square", "occlusion", batch_size=size) for size in (7, 1000)]
    torch.testing.assert_close(maps[1], maps[0], atol=1e-3, rtol=0)


def test_the_default_is_made_for_the_tower(color_vit, embedded):
    picture = two_squares((0, 0), (1, 1))
    for model, method in ((color_vit, "attention"), (embedded, "grad-cam")):
        assert default_method(model) == method
        assert torch.equal(explain(model, picture, "red"), explain(model, picture, "red", method))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tower", TINY)
def test_half_precision_shows_the_same_place(tower, dtype):
    picture = two_squares((0, 0), (1, 1))
    for method in METHODS_OF[tower][:1]:
        exact = explain(fresh(tower), picture, "a cat", method)
        model = fresh(tower)
        convert_weights(model, dtype)
        half = explain(model, picture, "a cat", method)
        assert half.dtype == torch.float32
        assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize(
    ("tower", "options", "message"),
    [
        ("vit", {"method": "saliency"}, "expected a method among"),
        ("vit", {"method": "grad-cam"}, "grad-cam needs a ModifiedResNet as the image tower, got VisionTransformer"),
        ("rn", {"method": "attention"}, "attention needs a VisionTransformer as the image tower, got ModifiedResNet"),
        ("vit", {"window": 3}, "window and stride belong to occlusion"),
        ("vit", {"method": "occlusion", "window": 49}, "window <= 48 pixels, got window 49 and stride 6"),
        ("vit", {"method": "occlusion", "window": 4, "stride": 5}, "got window 4 and stride 5"),
        ("vit", {"method": "occlusion", "stride": 0}, "stride 0"),
        ("vit", {"method": "occlusion", "batch_size": 0}, "at least one picture at once, got 0"),
    ],
)
def test_a_wrong_question_gets_a_sentence(tower, options, message):
    with pytest.raises(ValueError, match=message):
        explain(fresh(tower), Image.new("RGB", (50, 50)), "a cat", **options)


@pytest.mark.parametrize("tower", TINY)
def test_an_optimised_copy_is_asked_by_occlusion_and_refuses_the_rest(tower):
    model, picture = fresh(tower), two_squares((0, 0), (1, 1))
    copied = clip.optimize(model)
    assert default_method(copied) == "occlusion"
    heat = explain(model, picture, "a cat", "occlusion")
    torch.testing.assert_close(explain(copied, picture, "a cat"), heat, atol=1e-2, rtol=0)
    inside = METHODS_OF[tower][0]
    for ask in (
        lambda: explain(copied, picture, "a cat", inside),
        lambda: tokens(copied, picture),
        lambda: attention_maps(copied, picture),
        lambda: text_tokens(copied, "a cat"),
    ):
        with pytest.raises(ValueError, match="needs the plain model"):
            ask()


def test_a_tower_that_is_missing_is_named():
    text, image = (clip.load("tiny", "cpu", tower=tower)[0] for tower in ("text", "image"))
    picture = two_squares((0, 0), (1, 1))
    asks = (default_method, seen_box, tokens, attention_maps, explain)
    for ask, arguments in zip(asks, ((), (picture,), (picture,), (picture,), (picture, "a cat")), strict=True):
        for model in (text, clip.optimize(text)):
            with pytest.raises(ValueError, match="expected a model with an image tower, got"):
                ask(model, *arguments)
    with pytest.raises(ValueError, match="text_tokens needs the plain model and its text tower, got ImageTower"):
        text_tokens(image, "a cat")
    with pytest.raises(RuntimeError, match="this model cannot embed texts"):
        explain(image, picture, "a cat")


# Features of single places


def test_the_patches_are_a_vits_last_features_in_their_places(tiny_vit, color_vit):
    picture = Image.effect_noise((48, 48), 80).convert("RGB")
    outputs = []
    hook = tiny_vit.visual.transformer.register_forward_hook(lambda module, args, output: outputs.append(output))
    tiny_vit.encode_image(Preprocess(48)(picture)[None])
    hook.remove()
    grid = tokens(tiny_vit, picture)
    assert grid.shape == (3, 3, 128)
    torch.testing.assert_close(grid.flatten(0, 1), outputs[0][1:, 0])

    red = tokens(color_vit, two_squares(red=(1, 0), blue=(0, 1)))[..., 0]
    assert divmod(int(red.argmax()), 4) == (3, 0)


def test_the_places_of_a_resnet_are_what_its_pool_is_given(tiny_rn):
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    grid = tokens(tiny_rn, picture)
    assert grid.shape == (2, 2, 512)
    torch.testing.assert_close(
        tiny_rn.visual.attnpool(grid.permute(2, 0, 1)[None]), tiny_rn.encode_image(Preprocess(64)(picture)[None])
    )


def test_attention_maps_are_what_the_forward_uses(tiny_vit):
    picture = Image.effect_noise((48, 48), 80).convert("RGB")
    image = Preprocess(48)(picture)[None]
    features, expected = attend_by_hand(tiny_vit.visual, image, torch.zeros(3, 2, 10, 10))
    torch.testing.assert_close(features[None], tiny_vit.encode_image(image), atol=1e-4, rtol=1e-4)

    maps = attention_maps(tiny_vit, picture)
    assert maps.shape == (3, 2, 10, 10)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 2, 10))


def test_asking_for_attention_changes_no_blocks_output(tiny_vit):
    picture = Image.effect_noise((48, 48), 80).convert("RGB")
    outputs = []
    for block in tiny_vit.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    tiny_vit.encode_image(Preprocess(48)(picture)[None])
    attention_maps(tiny_vit, picture)
    assert len(outputs) == 6
    for before, while_asked in zip(outputs[:3], outputs[3:], strict=True):
        torch.testing.assert_close(while_asked, before, atol=1e-5, rtol=1e-5)


def test_a_replaced_attention_is_asked_too(tiny_vit):
    picture = two_squares((0, 0), (1, 1))
    maps, heat = attention_maps(tiny_vit, picture), explain(tiny_vit, picture, "a cat")
    for block in tiny_vit.visual.transformer.resblocks:
        block.attention = lambda x, block=block: block.attn(x, x, x, need_weights=False)[0]
    assert torch.equal(attention_maps(tiny_vit, picture), maps)
    assert torch.equal(explain(tiny_vit, picture, "a cat"), heat)


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(lambda block: lambda x: x, id="asks no attn"),
        pytest.param(lambda block: lambda x: block.attn.out_proj(x), id="asks a part of attn"),
    ],
)
def test_attention_that_cannot_be_seen_is_an_error_and_occlusion_works(tiny_vit, attention):
    picture = two_squares((0, 0), (1, 1))
    block = tiny_vit.visual.transformer.resblocks[1]
    block.attention = attention(block)
    for ask in (lambda: attention_maps(tiny_vit, picture), lambda: explain(tiny_vit, picture, "a cat")):
        with pytest.raises(RuntimeError, match="from each of the 3 blocks of the image tower, got 2"):
            ask()
    assert explain(tiny_vit, picture, "a cat", "occlusion").shape == (80, 80)


def test_weights_that_are_not_the_ones_used_are_an_error(tiny_vit):
    block = tiny_vit.visual.transformer.resblocks[1]
    foreign = nn.MultiheadAttention(128, 2)
    foreign.load_state_dict(block.attn.state_dict())
    picture = two_squares((0, 0), (1, 1))
    maps = attention_maps(tiny_vit, picture)
    block.attn = foreign  # PyTorch's own returns a copy of its weights
    torch.testing.assert_close(attention_maps(tiny_vit, picture), maps)
    with pytest.raises(RuntimeError, match="returns weights it does not use itself"):
        explain(tiny_vit, picture, "a cat")


def test_the_last_text_token_becomes_the_texts_features(tiny):
    text = "a photo of a cat, una bicicletta è rossa"
    features = text_tokens(tiny, text)
    assert features.shape == (*clip.count_tokens(text), 64)
    torch.testing.assert_close(features[-1:] @ tiny.text_projection, tiny.encode_text(clip.tokenize(text)))


def test_a_text_token_knows_only_what_is_before_it(tiny_vit):
    cat, dog = text_tokens(tiny_vit, "a photo of a cat asleep"), text_tokens(tiny_vit, "a photo of a dog")
    torch.testing.assert_close(cat[:5], dog[:5])
    assert not torch.allclose(cat[5], dog[5])


def test_gradients_flow_where_they_are_wanted(tiny):
    picture = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0)).requires_grad_()
    asks = {"tokens": lambda: tokens(tiny, picture), "text": lambda: text_tokens(tiny, "a cat")}
    if default_method(tiny) == "attention":
        asks["maps"] = lambda: attention_maps(tiny, picture).square()  # the sum of a row is 1 and has no gradient
    for name, ask in asks.items():
        source = tiny.token_embedding.weight if name == "text" else picture
        [gradient] = torch.autograd.grad(ask().sum(), source)
        assert gradient.abs().sum() > 0
        with torch.no_grad():
            assert not ask().requires_grad


# Nothing is left behind


def everything_about(model):
    """Hooks, modes, flags, gradients and numbers of a model."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    modes = [module.training for module in model.modules()]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return hooks, modes, flags, {name: entry.clone() for name, entry in model.state_dict().items()}


def assert_same(before, after):
    assert before[:3] == after[:3]
    for name, entry in before[3].items():
        assert torch.equal(entry, after[3][name]), name


def ask_all(model, tower):
    """Every function of the module once."""
    picture = two_squares((0, 0), (1, 1))
    answers = [explain(model, picture, "a cat", method) for method in METHODS_OF[tower]]
    answers += [tokens(model, picture), text_tokens(model, "a cat")]
    if tower == "vit":
        answers.append(attention_maps(model, picture))
    return answers


@pytest.mark.parametrize("tower", TINY)
def test_nothing_is_left_behind_in_a_model_that_is_being_trained(tower):
    model = fresh(tower)
    expected = ask_all(model, tower)
    model.train()
    model.visual.conv1.eval()
    model.visual.conv1.weight.requires_grad_(False)
    before = everything_about(model)
    answers = ask_all(model, tower)
    assert_same(before, everything_about(model))
    for answer, want in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, want)  # it is looked at in evaluation mode


@pytest.mark.parametrize("tower", TINY)
def test_nothing_is_left_behind_after_an_exception(tower, monkeypatch):
    model = fresh(tower).train()
    before = everything_about(model)

    def fail(*args):
        raise KeyboardInterrupt

    last = model.visual.ln_post if tower == "vit" else model.visual.attnpool
    monkeypatch.setattr(last, "forward", fail)
    monkeypatch.setattr(model.ln_final, "forward", fail)
    picture = two_squares((0, 0), (1, 1))
    asks = [lambda: tokens(model, picture), lambda: text_tokens(model, "a cat")]
    asks += [lambda: attention_maps(model, picture)] if tower == "vit" else []
    for ask in asks:
        with pytest.raises(KeyboardInterrupt):
            ask()
    monkeypatch.undo()
    monkeypatch.setattr(last, "forward", fail)
    for method in METHODS_OF[tower]:
        with pytest.raises(KeyboardInterrupt):
            explain(model, picture, "a cat", method)
    monkeypatch.undo()
    assert_same(before, everything_about(model))


@pytest.mark.parametrize("tower", TINY)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_frozen_weights_and_gradients_turned_off_change_no_map(tower, mode):
    model = fresh(tower)
    picture = two_squares((0, 0), (1, 1))
    expected = [explain(model, picture, "a cat", method) for method in METHODS_OF[tower]]
    model.requires_grad_(False)
    with mode():
        for method, want in zip(METHODS_OF[tower], expected, strict=True):
            heat = explain(model, picture, "a cat", method)
            assert not heat.requires_grad
            torch.testing.assert_close(heat, want)


def test_every_method_has_a_tower_here():
    assert {method for methods in METHODS_OF.values() for method in methods} == set(METHODS)


def test_the_model_s_own_mean_is_used():
    picture = Image.new("RGB", (48, 48), (200, 30, 90))
    plain, other = filled(TINY["vit"]), filled(TINY["vit"] | {"image_mean": (0.1, 0.2, 0.3)})
    assert not torch.equal(explain(plain, picture, "a cat", "occlusion"), explain(other, picture, "a cat", "occlusion"))


def test_a_model_that_squashes_pictures_sees_all_of_them():
    picture = Image.effect_noise((96, 48), 80).convert("RGB")
    model = filled(TINY["vit"] | {"image_resize": "squash"})
    assert seen_box(model, picture) == (0, 0, 96, 48)
    square = explain(filled(TINY["vit"]), picture.resize((48, 48), Image.Resampling.BICUBIC), "a cat", "occlusion")
    wide = explain(model, picture, "a cat", "occlusion")
    assert wide.shape == (48, 96)
    torch.testing.assert_close(wide.unflatten(1, (48, 2)).mean(dim=2), square, atol=0.05, rtol=0)
