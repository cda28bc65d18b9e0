import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, filled
from torch import nn

from clip.resnet import AttentionPool2d, Bottleneck, ModifiedResNet

R, W, E = 64, 16, 24


@pytest.fixture
def tower():
    return filled(TINY["rn"]).visual


@pytest.fixture
def images():
    return torch.randn(2, 3, R, R, generator=torch.Generator().manual_seed(0))


def test_sizes_and_channels_at_each_stage(tower, images):
    shapes = {}
    for name in ("avgpool", "layer1", "layer2", "layer3", "layer4"):
        tower.get_submodule(name).register_forward_hook(lambda _, a, out, name=name: shapes.update({name: out.shape}))
    assert tower(images).shape == (2, E)
    assert shapes == {
        "avgpool": (2, W, R // 4, R // 4),
        "layer1": (2, 4 * W, R // 4, R // 4),
        "layer2": (2, 8 * W, R // 8, R // 8),
        "layer3": (2, 16 * W, R // 16, R // 16),
        "layer4": (2, 32 * W, R // 32, R // 32),
    }


def test_no_convolution_but_the_first_has_a_stride(tower):
    strides = [module.stride for module in tower.modules() if isinstance(module, nn.Conv2d)]
    assert strides[0] == (2, 2)
    assert set(strides[1:]) == {(1, 1)}


def test_children_keep_the_released_names(tower):
    stem = ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "bn3", "relu3", "avgpool"]
    assert [name for name, _ in tower.named_children()] == [*stem, "layer1", "layer2", "layer3", "layer4", "attnpool"]
    block = ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "avgpool", "conv3", "bn3", "relu3", "downsample"]
    assert [name for name, _ in tower.layer2[0].named_children()] == block
    assert list(tower.layer2[0].downsample._modules) == ["-1", "0", "1"]
    assert [name for name, _ in tower.attnpool.named_children()] == ["k_proj", "q_proj", "v_proj", "c_proj"]


def test_a_block_whose_last_norm_is_zero_is_its_shortcut():
    block = Bottleneck(32, 8).eval()
    nn.init.zeros_(block.bn3.weight)
    x = torch.rand(2, 32, 5, 7)
    assert torch.equal(block(x), x)
    assert Bottleneck(32, 8, stride=2).eval()(x[..., :4, :6]).shape == (2, 32, 2, 3)


def test_attention_pooling_is_pytorchs_attention_asked_by_the_mean():
    torch.manual_seed(0)
    pool = AttentionPool2d(3, 20, 5, 7)
    x = torch.randn(2, 20, 3, 3)
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    expected, _ = F.multi_head_attention_forward(
        tokens[:1],
        tokens,
        tokens,
        embed_dim_to_check=20,
        num_heads=5,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )
    torch.testing.assert_close(pool(x), expected[0])


def test_pooling_without_output_size_keeps_the_channels():
    assert AttentionPool2d(2, 12, 3)(torch.randn(5, 12, 2, 2)).shape == (5, 12)


def test_without_the_pool_the_feature_map_comes_out(tower, images):
    tower.attnpool = nn.Identity()
    assert tower(images).shape == (2, 32 * W, R // 32, R // 32)


def test_a_picture_that_is_not_square_needs_only_other_positions(tower):
    tower.attnpool.positional_embedding = nn.Parameter(torch.randn(2 * 3 + 1, 32 * W))
    assert tower(torch.randn(2, 3, 64, 96)).shape == (2, E)


def test_training_moves_the_running_statistics_and_evaluation_does_not(tower, images):
    before = tower.bn1.running_mean.clone()
    tower.eval()(images)
    assert torch.equal(tower.bn1.running_mean, before)
    tower.train()(images)
    assert not torch.equal(tower.bn1.running_mean, before)
    assert tower.bn1.num_batches_tracked == 1


def test_the_width_is_that_of_the_stem():
    tower = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=7, heads=4, input_resolution=32, width=8)
    assert tower.conv1.out_channels == 4
    assert tower.attnpool.k_proj.in_features == 32 * 8
