"""Hugging Face's folders, read and written, against transformers itself."""

import json

import pytest
import safetensors.torch
import torch
from conftest import filled, load_with_odd_values
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

import clip
from clip.checkpoints import CheckpointError, read_checkpoint
from clip.checkpoints.huggingface import config_json, from_huggingface, preprocessor_json, to_huggingface
from clip.model import config_of

# Every axis another size; the heads are not those that the widths suggest
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 11,
    "bos_token_id": 29,
    "eos_token_id": 30,
    "hidden_act": "gelu",
}
VISION = {
    "hidden_size": 20,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 26,  # three patches, and two pixels that nobody looks at
    "patch_size": 8,
    "hidden_act": "gelu",
}
PREPROCESSOR = {"size": {"shortest_edge": 26}, "crop_size": {"height": 26, "width": 26}, "resample": 3}
TOKENS = torch.tensor([[29, 4, 7, 30, 0, 0, 0, 0, 0, 0, 0], [29, 30, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
IMAGES = torch.randn(3, 3, 26, 26, generator=torch.Generator().manual_seed(1))
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)).eval()
    for parameter in model.parameters():  # biases and norms are drawn as constants
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(theirs, tmp_path):
    """What transformers writes, with the file of its preprocessing."""
    return written(theirs, tmp_path / "folder")


def written(model, folder, preprocessor=PREPROCESSOR, **options):
    model.save_pretrained(folder, **options)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def change(path, **changes):
    """Change entries of a JSON file, those that are None away; a__b is the entry b of the object a."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *objects, key = name.split("__")
        target = content
        for part in objects:
            target = target[part]
        if value is None:
            target.pop(key)
        else:
            target[key] = value
    path.write_text(json.dumps(content))


@torch.no_grad()
def assert_equal(model, theirs):
    logits = model(IMAGES, TOKENS)[0]
    expected = theirs(input_ids=TOKENS, pixel_values=IMAGES).logits_per_image
    torch.testing.assert_close(logits, expected, **ROUNDING)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_theirs_gives_their_logits(folder, theirs):
    model, preprocess = clip.load(folder, device="cpu")
    assert_equal(model, theirs)
    assert preprocess.transforms[0].size == 26


def test_the_weights_can_be_named_instead_of_the_folder(folder, theirs):
    assert_equal(clip.load(folder / "model.safetensors", device="cpu")[0], theirs)


def test_several_files_are_one_model(theirs, tmp_path):
    folder = written(theirs, tmp_path / "sharded", max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_equal(clip.load(folder, device="cpu")[0], theirs)


def four_style(theirs, folder):
    """What transformers 4 wrote: a pickle, with the numbers of the positions in it, and more words in config.json."""
    weights = theirs.state_dict() | {
        "text_model.embeddings.position_ids": torch.arange(11)[None],
        "vision_model.embeddings.position_ids": torch.arange(10)[None],
    }
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    config = {
        "model_type": "clip",
        "projection_dim": 12,
        "text_config": {"model_type": "clip_text_model", "eos_token_id": 2},
        "text_config_dict": {**TEXT, "eos_token_id": 2},
        "vision_config": {"model_type": "clip_vision_model"},
        "vision_config_dict": VISION,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 26, "crop_size": 26}))
    return folder


def test_a_folder_of_transformers_4_is_read_the_same(theirs, tmp_path):
    assert_equal(clip.load(four_style(theirs, tmp_path / "four"), device="cpu")[0], theirs)


def test_a_pickle_in_several_files_is_read(theirs, tmp_path):
    folder = four_style(theirs, tmp_path / "four")
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    halves = {"a.bin": dict(list(weights.items())[:30]), "b.bin": dict(list(weights.items())[30:])}
    for name, half in halves.items():
        torch.save(half, folder / name)
    index = {"weight_map": {key: name for name, half in halves.items() for key in half}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_equal(clip.load(folder, device="cpu")[0], theirs)


@pytest.mark.parametrize("scale", [torch.tensor(1.5), torch.tensor([1.5])], ids=["number", "list of one"])
def test_the_temperature_may_be_a_list_of_one(folder, scale):
    path = folder / "model.safetensors"
    safetensors.torch.save_file({**safetensors.torch.load_file(path), "logit_scale": scale}, path)
    model, _ = clip.load(folder, device="cpu")
    assert model.logit_scale.shape == ()
    assert model.logit_scale == 1.5


def test_one_tower_of_a_folder_leaves_the_other_in_the_file(folder, theirs):
    _, weights = read_checkpoint(folder, "image")
    assert all(name.startswith("visual.") or name == "logit_scale" for name in weights)
    model, _ = clip.load(folder, device="cpu", tower="text")
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(TOKENS), theirs.get_text_features(input_ids=TOKENS).pooler_output, **ROUNDING
        )


# -- files of one tower -----------------------------------------------------------------------------------------------

ONE_TOWER = [CLIPTextModelWithProjection, CLIPVisionModelWithProjection, CLIPTextModel, CLIPVisionModel]


@pytest.mark.parametrize("prefixed", [True, False], ids=["4.x names", "5.x names"])
@pytest.mark.parametrize("kind", ONE_TOWER)
@pytest.mark.filterwarnings("ignore:.*without its projection")
def test_a_file_of_one_tower_gives_what_it_gives_there(theirs, tmp_path, kind, prefixed):
    tower = "text" if "Text" in kind.__name__ else "image"
    torch.manual_seed(0)
    peer = kind(theirs.config.text_config if tower == "text" else theirs.config.vision_config).eval()
    folder = written(peer, tmp_path / "one")
    if prefixed and "Projection" not in kind.__name__:
        path, prefix = folder / "model.safetensors", "text_model." if tower == "text" else "vision_model."
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    model, _ = clip.load(folder, device="cpu", tower=tower)
    with torch.no_grad():
        out = peer(input_ids=TOKENS) if tower == "text" else peer(pixel_values=IMAGES)
        expected = out[0] if "Projection" in kind.__name__ else out.pooler_output
        found = model.encode_text(TOKENS) if tower == "text" else model.encode_image(IMAGES)
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert model.logit_scale.isnan()  # nobody knows


def test_a_tower_without_projection_is_told_of(theirs, tmp_path):
    CLIPTextModel(theirs.config.text_config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="a text tower without its projection"):
        clip.load(tmp_path, device="cpu", tower="text")


@pytest.mark.parametrize("tower", [None, "image"])
def test_a_file_of_one_tower_is_not_taken_for_more(theirs, tmp_path, tower):
    CLIPTextModelWithProjection(theirs.config.text_config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match='holds the text tower only: load it with tower="text"'):
        clip.load(tmp_path, device="cpu", tower=tower)


# -- preprocessing ----------------------------------------------------------------------------------------------------


def test_mean_deviation_and_squashing_are_taken_from_the_folder(theirs, tmp_path):
    square = {"height": 26, "width": 26}
    preprocessor = {
        "size": square,
        "do_center_crop": False,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.1, 0.2, 0.3],
    }
    folder = written(theirs, tmp_path / "folder", preprocessor)
    model, preprocess = clip.load(folder, device="cpu")
    assert preprocess.transforms[0].size == (26, 26)
    assert (preprocess.transforms[-1].mean, preprocess.transforms[-1].std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    clip.save(model, tmp_path / "ours.safetensors")
    assert repr(clip.load(tmp_path / "ours.safetensors", device="cpu")[1]) == repr(preprocess)


def test_the_newer_place_of_the_preprocessing_is_found(folder):
    (folder / "preprocessor_config.json").unlink()
    inner = PREPROCESSOR | {"image_mean": [0.5, 0.5, 0.5]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert read_checkpoint(folder)[0].image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("said", "unsaid"),
    [
        (None, "image_mean, image_std, image_resize"),
        ({"do_normalize": False, "size": 26, "crop_size": 26}, "image_mean, image_std"),
        (PREPROCESSOR | {"resample": 2}, "image_resize"),
        (PREPROCESSOR | {"size": {"shortest_edge": 30}}, "image_resize"),
        (PREPROCESSOR | {"do_center_crop": False}, "image_resize"),
    ],
)
def test_a_preprocessing_that_is_not_known_or_not_ours_is_warned_of_until_somebody_says_it(folder, said, unsaid):
    if said is None:
        (folder / "preprocessor_config.json").unlink()
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.warns(UserWarning, match=f"does not say its model's {unsaid}, "):
        config, _ = read_checkpoint(folder)
    known = {name: getattr(config, name) for name in unsaid.split(", ")}
    assert clip.load(folder, device="cpu", config=known)[0].image_mean == config.image_mean
    read_checkpoint(folder, "text")  # it has nothing to do with pictures


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, "no plain CLIP: its config.json says model_type 'siglip'"),
        ({"model_type": ["clip"]}, "says model_type"),
        ({"text_config__hidden_act": "gelu_new", "vision_config__hidden_act": "gelu_new"}, "hidden_act gelu_new"),
        ({"text_config__hidden_act": "quick_gelu"}, "hidden_act gelu and quick_gelu"),
        ({"vision_config__layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
        ({"text_config__eos_token_id": 3}, "end with eos_token_id 3; of a vocabulary of 31"),
        ({"text_config__eos_token_id": 49407}, "eos_token_id 49407; of a vocabulary of 31 CLIP's"),
        ({"text_config__eos_token_id": [30]}, "end with eos_token_id"),
        ({"vision_config__hidden_size": 10**9}, "says vision_width 1000000000, the shapes of its weights say 20"),
        ({"vision_config__num_hidden_layers": 10**9}, "says vision_layers 1000000000"),
        ({"vision_config__image_size": 34}, "says image_resolution 32, the shapes of its weights say 24"),
        ({"vision_config__image_size": "26"}, "image_resolution must be a positive integer"),
        ({"vision_config__image_size": [26, 26]}, "image_resolution must be a positive integer"),
        ({"vision_config__num_attention_heads": 3}, "20 does not divide into 3 heads"),
        ({"vision_config__num_attention_heads": None}, "20 does not divide into 12 heads"),
        ({"text_config__num_attention_heads": True, "text_config__hidden_size": 17}, "transformer_width 17"),
        ({"text_config": 7}, "needs an object as text_config"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder, changes, message):
    change(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(folder)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b'{"a": ' * 5000])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_what_is_no_json_object_is_refused_by_its_name(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(folder)


def test_a_json_file_that_fills_the_memory_is_not_read(folder):
    (folder / "config.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(CheckpointError, match=r"config\.json: 5242880 bytes, far more"):
        read_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:.* does not say its model's")
def test_whatever_stands_in_the_json_files_is_read_or_refused(folder):
    for file in ("config.json", "preprocessor_config.json"):
        load_with_odd_values(
            folder, file, lambda content: [content, *(value for value in content.values() if isinstance(value, dict))]
        )
    read_checkpoint(folder)


def test_weights_without_their_config_are_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"names are Hugging Face's, but config\.json"):
        read_checkpoint(folder / "model.safetensors")


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors", "sub\\model.safetensors"]
)
def test_an_index_cannot_point_outside_the_folder(theirs, tmp_path, shard):
    folder = written(theirs, tmp_path / "sharded", max_shard_size="10KB")
    change(folder / "model.safetensors.index.json", weight_map__logit_scale=shard)
    with pytest.raises(CheckpointError, match=r"index\.json: names a file outside the folder|found a folder"):
        read_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"logit_scale": 3}, "text"])
def test_an_index_without_names_is_refused(theirs, tmp_path, weight_map):
    folder = written(theirs, tmp_path / "sharded", max_shard_size="10KB")
    change(folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(CheckpointError, match="expected the names of files"):
        read_checkpoint(folder)


def test_a_missing_and_a_cut_file_of_several_are_named(theirs, tmp_path):
    folder = written(theirs, tmp_path / "sharded", max_shard_size="10KB")
    second = sorted(folder.glob("model-*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{second.name}: .*(truncated|damaged)"):
        read_checkpoint(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name}: no such file"):
        read_checkpoint(folder)


def test_a_file_that_does_not_hold_what_the_index_says_is_refused(theirs, tmp_path):
    folder = written(theirs, tmp_path / "sharded", max_shard_size="10KB")
    change(folder / "model.safetensors.index.json", weight_map__logit_scale=None)
    with pytest.raises(CheckpointError, match="does not hold the tensors that"):
        read_checkpoint(folder)


def test_a_block_without_one_of_its_three_projections_is_refused(theirs):
    weights = theirs.state_dict()
    del weights["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.bias.* together, found 2 of them"):
        from_huggingface(weights)


def test_code_in_a_pickle_is_not_run(theirs, tmp_path):
    folder = four_style(theirs, tmp_path / "four")
    torch.save(theirs.text_model.final_layer_norm, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither imported nor called"):
        read_checkpoint(folder)


# -- writing ----------------------------------------------------------------------------------------------------------

OURS = dict(
    embed_dim=12,
    image_resolution=26,
    vision_layers=3,
    vision_width=20,
    vision_patch_size=8,
    context_length=11,
    vocab_size=31,
    transformer_width=16,
    transformer_heads=2,
    transformer_layers=2,
    vision_heads=5,
    vision_mlp_width=50,
    transformer_mlp_width=24,
)


def write(model, folder):
    config, weights = config_of(model), to_huggingface(model.state_dict())
    folder.mkdir()
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config_json(config, torch.float32)))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_json(config)))
    return folder


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_reads_what_we_write_with_our_logits(tmp_path, activation):
    model = filled(OURS | {"activation": activation})
    peer, info = CLIPModel.from_pretrained(write(model, tmp_path / "ours"), output_loading_info=True)
    assert not any(info.values())
    assert_equal(model, peer.eval())


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_what_we_write_we_read_bit_by_bit(tmp_path, resize):
    model = filled(OURS | {"activation": "gelu", "image_resize": resize, "image_std": (0.5, 0.25, 0.75)})
    config, weights = read_checkpoint(write(model, tmp_path / "ours"))
    assert config == config_of(model)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_what_they_wrote_comes_back_under_their_names_bit_by_bit(theirs):
    weights = theirs.state_dict()
    back = to_huggingface(from_huggingface(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_a_resnet_cannot_be_one_of_theirs():
    resnet = clip.config.RELEASED["RN50"]
    with pytest.raises(ValueError, match="has no ResNet"):
        config_json(resnet, torch.float32)


@pytest.mark.slow
def test_a_full_size_model_has_the_names_of_the_released_folder_and_its_logits(tmp_path):
    """openai/clip-vit-base-patch32 has 398 entries."""
    model = filled(vars(clip.config.RELEASED["ViT-B/32"]))
    folder = write(model, tmp_path / "ours")
    peer = CLIPModel.from_pretrained(folder).eval()
    assert len(peer.state_dict()) == 398
    image, tokens = (
        torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),
        clip.tokenize(["a cat", "a"]),
    )
    with torch.no_grad():
        expected = peer(input_ids=tokens.long(), pixel_values=image).logits_per_image
        torch.testing.assert_close(model(image, tokens)[0], expected, rtol=1e-4, atol=1e-3)
