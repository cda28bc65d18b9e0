import pytest
import torch
from torch import nn

from clip.layers import LayerNorm, QuickGELU, activation_layer


def test_layer_norm_of_a_row_by_hand():
    # mean 2, variance (4 + 0 + 4) / 3, so the ends are 2 / sqrt(8/3) = 1.2247 away
    row = LayerNorm(3, eps=0.0)(torch.tensor([[0.0, 2.0, 4.0]]))
    assert torch.allclose(row, torch.tensor([[-(1.5**0.5), 0.0, 1.5**0.5]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float16, torch.float32, torch.float64])
def test_layer_norm_keeps_the_dtype_of_its_input_and_survives_half_precision_overflow(dtype, weights):
    x = torch.tensor([[6e4, -6e4, 6e4, -6e4]], dtype=dtype)  # its squares overflow float16
    y = LayerNorm(4).to(weights)(x)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), torch.tensor([[1.0, -1.0, 1.0, -1.0]]))


@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}])
def test_layer_norm_without_weights_or_bias_is_pytorchs(options):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LayerNorm(7, **options)(x), nn.LayerNorm(7, **options)(x))


def test_layer_norm_is_pytorchs_in_float32():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LayerNorm(7)(x), nn.LayerNorm(7)(x))


def test_quick_gelu_by_hand():
    # x · 1 / (1 + e^-1.702x): 0 at 0, 1/(1+e^-1.702) = 0.84579 at 1, and 1 less at -1
    x = torch.tensor([0.0, 1.0, -1.0])
    assert torch.allclose(QuickGELU()(x), torch.tensor([0.0, 0.8457957, -0.1542042]), atol=1e-6)


def test_quick_gelu_and_gelu_differ_by_at_most_two_hundredths():
    x = torch.linspace(-8, 8, 10001)
    difference = (QuickGELU()(x) - nn.GELU()(x)).abs().max()
    assert 0.015 < difference < 0.0205


def test_activations_are_found_by_name_and_no_other_is():
    assert type(activation_layer("quick_gelu")) is QuickGELU
    assert type(activation_layer("gelu")) is nn.GELU
    with pytest.raises(ValueError, match=r"quick_gelu.*got 'relu'"):
        activation_layer("relu")
