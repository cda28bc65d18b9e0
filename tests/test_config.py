import dataclasses
import json

import pytest
import torch
from conftest import TINY

import clip
from clip.config import ACTIVATIONS, HEAD_DIM, RELEASED, UNSEEN, CLIPConfig
from clip.model import CLIP, config_of
from clip.preprocess import CLIP_MEAN, CLIP_STD, Preprocess


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


OTHERS = {  # what the nine released models do not vary
    "activation": "gelu",
    "transformer_heads": 8,
    "vision_heads": 1,
    "vision_mlp_width": 100,
    "transformer_mlp_width": 30,
    "image_mean": (0.5, 0.4, 0.3),
    "image_std": (0.1, 0.2, 0.3),
    "image_resize": "squash",
}


def test_what_others_vary_is_read_back_from_a_model_and_survives_json():
    config = CLIPConfig(**TINY["vit"] | OTHERS)
    assert config_of(CLIP(**vars(config))) == config
    assert CLIPConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_what_is_not_given_is_as_in_the_released_models():
    # the fields that a file had before there were others to read
    fields = [field.name for field in dataclasses.fields(CLIPConfig)][:11]
    for config in RELEASED.values():
        old = {name: vars(config)[name] for name in fields}
        assert CLIPConfig(**old) == config
        assert CLIPConfig(**old | {"transformer_heads": None}) == config
        assert config.transformer_mlp_width == 4 * config.transformer_width
        assert config.vision_mlp_width == (4 * config.vision_width if config.is_vit else None)
        assert config.vision_heads * HEAD_DIM == config.vision_width * (1 if config.is_vit else 32)


def test_the_words_of_a_configuration_are_those_of_the_layers_and_the_preprocessing():
    assert set(ACTIVATIONS) == set(clip.layers.ACTIVATIONS)
    assert (CLIPConfig.image_mean, CLIPConfig.image_std) == (CLIP_MEAN, CLIP_STD)
    for resize, size in (("shortest", 8), ("squash", (8, 8))):
        CLIPConfig(**TINY["vit"] | {"image_resize": resize})
        assert Preprocess(8, resize=resize).transforms[0].size == size
    with pytest.raises(ValueError, match='"shortest" or "squash", got \'longest\''):
        Preprocess(8, resize="longest")


def test_what_shapes_do_not_show_changes_no_shape():
    shapes = [
        {name: entry.shape for name, entry in CLIP(**TINY["vit"] | changes).state_dict().items()}
        for changes in ({}, {name: OTHERS[name] for name in UNSEEN})
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "expected an activation among"),
        ({"activation": ["gelu"]}, "expected an activation among"),
        ({"vision_heads": 5}, "vision_width 128 does not divide into 5 heads"),
        ({"vision_heads": 0}, "vision_heads must be a positive integer, got 0"),
        ({"embed_dim": [3]}, "embed_dim must be a positive integer"),
        ({"embed_dim": None}, "embed_dim must be a positive integer"),
        ({"transformer_mlp_width": 2.5}, "transformer_mlp_width must be a positive integer"),
        ({"image_resize": "longest"}, "image_resize must be one of"),
        ({"image_mean": (0.5, 0.5)}, "image_mean must be three numbers"),
        ({"image_mean": (0.5, 0.5, float("nan"))}, "image_mean must be three numbers"),
        ({"image_std": (0.5, 0.5, 0)}, "image_std must be three numbers"),
        ({"image_std": 0.5}, "image_std must be three numbers"),
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


def test_a_resnet_has_no_perceptrons():
    with pytest.raises(ValueError, match="a ResNet has no vision_mlp_width"):
        CLIPConfig(**TINY["rn"] | {"vision_mlp_width": 100})


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
