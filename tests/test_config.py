import dataclasses
import json

import pytest
import torch
from conftest import TINY

from clip.config import RELEASED, CLIPConfig
from clip.model import CLIP


@pytest.mark.parametrize("kind", ["vit", "rn"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_sizes_are_read_back_from_a_state_dict(kind, activation):
    config = CLIPConfig(**TINY[kind] | {"transformer_width": 128, "transformer_heads": 2, "activation": activation})
    model = CLIP(**vars(config))
    assert CLIPConfig.from_state_dict(model.state_dict(), activation) == config


def test_a_configuration_survives_json():
    for config in RELEASED.values():
        assert CLIPConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_heads_of_the_released_models_are_those_of_the_paper():
    # CLIP Tables 19 and 20; the ResNets' are of the attention pool
    heads = [config.vision_heads for config in RELEASED.values()]
    assert heads == [32, 32, 40, 48, 64, 12, 12, 16, 16]
    assert [config.transformer_heads for config in RELEASED.values()] == [8, 8, 10, 12, 16, 8, 8, 12, 12]


def test_a_resnets_heads_share_its_features_not_its_stem():
    # 32 · 33 = 1056 channels: 16 heads of 66, as in the released code
    assert CLIPConfig(**TINY["rn"] | {"vision_width": 33}).vision_heads == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be a positive integer, got 0"),
        ({"vision_width": 96.0}, "vision_width must be a positive integer, got 96.0"),
        ({"vision_layers": (3, 4, 6)}, "four stages"),
        ({"vision_patch_size": None}, "needs vision_patch_size"),
        ({"image_resolution": 8}, "smaller than patches of 16 pixels"),
        ({"transformer_heads": 7}, "64 does not divide into 7 heads"),
        ({"vision_width": 193}, "193 does not divide into 3 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**TINY["vit"] | change)


def test_a_file_made_to_fill_the_memory_is_refused_before_any_model_is_built():
    weights = {f"transformer.resblocks.{i}.x": torch.zeros(1) for i in range(1001)}
    model = CLIP(**TINY["vit"])
    with pytest.raises(ValueError, match="at most 1000 layers"):
        CLIPConfig.from_state_dict(model.state_dict() | weights)
    with pytest.raises(ValueError, match="image_resolution"):
        CLIPConfig.from_state_dict(model.state_dict() | {"visual.positional_embedding": torch.zeros(0, 128)})


def test_another_networks_state_dict_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no 'visual\.attnpool\.positional_embedding' among its 1 entries"):
        CLIPConfig.from_state_dict({"fc.weight": torch.zeros(2, 2)})
    flat = {"visual.class_embedding": torch.zeros(3), "visual.conv1.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match="has 4 dimensions, got shape"):
        CLIPConfig.from_state_dict(flat)
