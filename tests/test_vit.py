import pytest
import torch
from conftest import TINY, filled
from torch import nn

from clip.vit import VisionTransformer

R, P, D, E = 48, 16, 128, 24


@pytest.fixture
def tower():
    return filled(TINY["vit"]).visual


@pytest.fixture
def images():
    return torch.randn(2, 3, R, R, generator=torch.Generator().manual_seed(0))


def test_patches_are_one_linear_map_of_their_pixels(tower, images):
    # ViT Eq. 1: patch (row 1, column 2) is token 1·3 + 2 of the grid, flattened row by row
    patch = images[0, :, P : 2 * P, 2 * P : 3 * P].flatten()
    token = tower.conv1(images)[0].flatten(1)[:, 1 * 3 + 2]
    torch.testing.assert_close(token, tower.conv1.weight.flatten(1) @ patch, rtol=1e-4, atol=1e-4)


def test_without_positions_the_order_of_the_patches_does_not_matter(tower, images):
    with torch.no_grad():
        tower.positional_embedding.zero_()
    swapped = torch.cat([images[..., 2 * P :], images[..., : 2 * P]], dim=-1)
    torch.testing.assert_close(tower(swapped), tower(images), rtol=1e-4, atol=1e-4)


def test_with_positions_it_does(tower, images):
    assert not torch.allclose(tower(images.flip(-1)), tower(images), atol=1e-2)


def test_without_the_projection_the_class_token_comes_out(tower, images):
    features, projection = tower(images), tower.proj
    tower.proj = None
    assert tower(images).shape == (2, D)
    torch.testing.assert_close(tower(images) @ projection, features)


def test_a_picture_that_is_not_square_needs_only_other_positions(tower):
    tower.positional_embedding = nn.Parameter(torch.randn(2 * 5 + 1, D))
    assert tower(torch.randn(4, 3, 2 * P, 5 * P)).shape == (4, E)


def test_overlapping_patches_need_only_another_stride(tower, images):
    tower.conv1.stride = (8, 8)  # 5 x 5 patches of 16 pixels
    tower.positional_embedding = nn.Parameter(torch.randn(5 * 5 + 1, D))
    assert tower(images).shape == (2, E)


def test_hooks_see_the_layouts_of_the_released_code(tower, images):
    seen = {}
    block = "transformer.resblocks.1"
    for name in ("conv1", "ln_pre", "transformer", block, f"{block}.attn", "ln_post"):
        module = tower.get_submodule(name)
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0].shape, out)}))
    tower(images)
    assert seen["conv1"][1].shape == (2, D, 3, 3)
    assert seen["ln_pre"][1].shape == (2, 10, D)
    assert seen["transformer"][0] == seen[block][1].shape == (10, 2, D)
    assert seen[f"{block}.attn"][0] == (10, 2, D)
    assert seen[f"{block}.attn"][1][1] is None  # (output, no weights)
    assert seen["ln_post"][0] == (2, D)


def test_a_hook_can_read_the_attention_of_the_class_token(tower, images):
    block = tower.transformer.resblocks[2]
    maps = []

    def keep(module, arguments):
        maps.append(module.attn(*[module.ln_1(arguments[0])] * 3, need_weights=True)[1])

    block.register_forward_pre_hook(keep)
    tower(images)
    assert maps[0].shape == (2, 10, 10)
    assert torch.allclose(maps[0].sum(-1), torch.ones(2, 10))


def test_the_embeddings_start_at_the_scale_of_the_released_code():
    torch.manual_seed(0)
    tower = VisionTransformer(224, 16, 256, 1, 4, 128)
    for name in ("class_embedding", "positional_embedding", "proj"):
        assert getattr(tower, name).std().item() == pytest.approx(256**-0.5, rel=0.1)
