"""open_clip's files, read and written; against open_clip itself, in a process with an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import filled, load_with_odd_values
from PIL import Image

import clip
from clip.checkpoints import CheckpointError, read_checkpoint
from clip.checkpoints.convert import write_as
from clip.checkpoints.open_clip import TEXT_HEADS, VISION_HEADS, config_json, fields_of
from clip.config import ARCHIVE_SIZES, CLIPConfig
from clip.model import config_of

OURS = dict(
    embed_dim=12,
    image_resolution=26,  # three patches, and two pixels that nobody looks at
    vision_layers=3,
    vision_width=20,
    vision_patch_size=8,
    context_length=11,
    vocab_size=31,
    transformer_width=16,
    transformer_heads=2,
    transformer_layers=2,
    vision_heads=5,
    vision_mlp_width=51,
    transformer_mlp_width=23,
)
RESNET = OURS | {
    "image_resolution": 64,
    "vision_layers": (1, 2, 1, 1),
    "vision_width": 4,
    "vision_patch_size": None,
    "vision_heads": 2,
    "vision_mlp_width": None,
}
MODELS = {
    "gelu": OURS | {"activation": "gelu", "image_mean": (0.5, 0.4, 0.3), "image_std": (0.3, 0.2, 0.1)},
    "quick_gelu, squash": OURS | {"image_resize": "squash"},
    "ResNet": RESNET,
}
TOKENS = torch.tensor([[29, 4, 7, 30, 0, 0, 0, 0, 0, 0, 0], [29, 30, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
DOUBT = "ignore:.* does not say its model's"


def images(resolution):
    return torch.randn(3, 3, resolution, resolution, generator=torch.Generator().manual_seed(1))


def as_folder(model, folder):
    write_as("open_clip", folder, config_of(model), model.state_dict())
    return folder


@pytest.fixture
def folder(tmp_path):
    return as_folder(filled(MODELS["gelu"]), tmp_path / "folder")


# -- against open_clip ------------------------------------------------------------------------------------------------

PEER = """
import json, sys, types
from pathlib import Path
sys.modules["torchvision._meta_registrations"] = types.ModuleType("none")  # torchvision's CPU build has none
import open_clip, torch
from PIL import Image

work = Path(sys.argv[1])
inputs = torch.load(work / "inputs.pt")
picture = Image.open(work / "picture.png")

@torch.no_grad()
def logits(model):
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    image = model.encode_image(inputs["images"][side], normalize=True)
    return model.logit_scale.exp() * image @ model.encode_text(inputs["tokens"], normalize=True).T

for folder in (work / "ours").iterdir():  # ours, read by open_clip
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    torch.save({"logits": logits(model.eval()), "pixels": preprocess(picture)}, work / f"{folder.name}.pt")

text = dict(context_length=11, vocab_size=31, width=16, heads=4, layers=2)
vit = dict(image_size=24, patch_size=8, width=20, head_width=10, layers=3, mlp_ratio=2.47)
resnet = dict(image_size=64, width=4, head_width=32, layers=[1, 2, 1, 1])
for name, kind, vision, extra, scale in (
    ("CLIP", open_clip.CLIP, vit, {}, []),
    ("CustomTextCLIP", open_clip.CustomTextCLIP, vit, {"quick_gelu": True}, [1]),
    ("ResNet", open_clip.CLIP, resnet, {}, []),
):
    torch.manual_seed(0)
    config = dict(embed_dim=12, vision_cfg=vision, text_cfg=text, **extra)
    model = kind(**config, nonscalar_logit_scale=bool(scale)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = work / "theirs" / name
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config["custom_text"] = kind is open_clip.CustomTextCLIP
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(logits(model), work / f"theirs-{name}.pt")
"""


def python_with_open_clip():
    """The interpreter named by OPEN_CLIP_PYTHON, or that of the benchmarks; None if there is neither."""
    ours = Path(__file__).parent.parent / "benchmarks" / ".venv" / "bin" / "python"
    return os.environ.get("OPEN_CLIP_PYTHON") or (ours if ours.exists() else None)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which open_clip has read what we wrote, and written what we are to read."""
    python = python_with_open_clip()
    if python is None:
        pytest.skip("no environment with open_clip: OPEN_CLIP_PYTHON, or python -m benchmarks.setup")
    work = tmp_path_factory.mktemp("open_clip")
    (work / "ours").mkdir()
    for name, config in MODELS.items():
        as_folder(filled(config), work / "ours" / name)
    torch.save({"images": {side: images(side) for side in (24, 26, 64)}, "tokens": TOKENS}, work / "inputs.pt")
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    Image.fromarray(noise).save(work / "picture.png")
    done = subprocess.run([python, "-c", PEER, work], capture_output=True, text=True)
    if "No module named 'open_clip'" in done.stderr:
        pytest.skip(f"open_clip is not installed in the environment of {python}")
    assert done.returncode == 0, done.stderr
    return work


@pytest.mark.parametrize("name", MODELS)
def test_open_clip_reads_what_we_write_with_our_logits_and_pixels(work, name):
    theirs = torch.load(work / f"{name}.pt")
    model, preprocess = clip.load(work / "ours" / name, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            model(images(model.visual.input_resolution), TOKENS)[0], theirs["logits"], **ROUNDING
        )
    torch.testing.assert_close(preprocess(Image.open(work / "picture.png")), theirs["pixels"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP", "ResNet"])
def test_what_open_clip_writes_gives_its_logits(work, name):
    folder = work / "theirs" / name
    for source in (folder, folder / "open_clip_pytorch_model.bin"):
        model, _ = clip.load(source, device="cpu")
        with torch.no_grad():
            logits = model(images(model.visual.input_resolution), TOKENS)[0]
        torch.testing.assert_close(logits, torch.load(work / f"theirs-{name}.pt"), **ROUNDING)


# -- names and forms --------------------------------------------------------------------------------------------------


def test_its_names_are_openais_but_for_the_text_tower_of_one_class(folder, tmp_path):
    weights = read_checkpoint(folder)[1]
    assert weights.keys() == filled(OURS).state_dict().keys()
    prefixes = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
    custom = {f"text.{name}" if name.startswith(prefixes) else name: tensor for name, tensor in weights.items()}
    assert len([name for name in custom if name.startswith("text.")]) == 5 + 12 * 2 + 0
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(custom, folder / "open_clip_pytorch_model.bin")
    found = read_checkpoint(folder)[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    image = read_checkpoint(folder, "image")[1]
    assert {name for name in image if not name.startswith("visual.")} == {"logit_scale"}


def test_a_training_checkpoint_takes_what_its_folder_says(folder):
    weights = {f"module.{name}": tensor for name, tensor in read_checkpoint(folder)[1].items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {}}, folder / "epoch_3.pt")
    assert read_checkpoint(folder / "epoch_3.pt")[0] == CLIPConfig(**MODELS["gelu"])


@pytest.mark.parametrize("name", MODELS)
def test_what_we_write_we_read_bit_by_bit(tmp_path, name):
    model = filled(MODELS[name])
    config, weights = read_checkpoint(as_folder(model, tmp_path / "folder"))
    assert config == config_of(model)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("hidden", "width"), [(8192, 1664), (6144, 1408), (15360, 1792), (51, 20), (1, 49), (3072, 768)]
)
def test_the_ratio_written_gives_the_hidden_width_back(hidden, width):
    config = CLIPConfig(**OURS | {"vision_width": width, "vision_heads": 1, "vision_mlp_width": hidden})
    ratio = config_json(config)["model_cfg"]["vision_cfg"]["mlp_ratio"]
    assert int(width * ratio) == hidden


def test_one_dtype_that_holds_all_weights_is_written(tmp_path):
    model = filled(OURS)
    clip.model.convert_weights(model)
    config, weights = read_checkpoint(as_folder(model, tmp_path / "mixed"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    write_as("open_clip", tmp_path / "half", config, weights)
    assert {tensor.dtype for tensor in read_checkpoint(tmp_path / "half")[1].values()} == {torch.bfloat16}


# -- what a file of bare weights does not say -------------------------------------------------------------------------


def bare(config, path):
    torch.save(filled(config).state_dict(), path)
    return path


def test_bare_weights_are_read_openais_way_with_a_warning_that_says_how_to_settle_it(tmp_path):
    path = bare(OURS, tmp_path / "bare.pt")
    told = "does not say its model's activation, vision_heads, transformer_heads, .*config={'activation': 'quick_gelu'"
    with pytest.warns(UserWarning, match=told):
        config, _ = read_checkpoint(path)
    assert (config.activation, config.vision_heads, config.transformer_heads) == ("quick_gelu", 1, 1)
    known = {"activation": "gelu", "vision_heads": 5, "transformer_heads": 2}
    model, _ = clip.load(path, device="cpu", config=known)  # warnings are errors here
    assert config_of(model) == CLIPConfig(**OURS | known | {"image_resolution": 24})  # shapes show whole patches
    clip.save(model, tmp_path / "said.pt")
    assert config_of(clip.load(tmp_path / "said.pt", device="cpu")[0]) == config_of(model)


def test_a_tower_alone_is_warned_of_its_own_doubts_only(tmp_path):
    path = bare(OURS, tmp_path / "bare.pt")
    with pytest.warns(UserWarning, match="model's activation, transformer_heads, nor"):
        read_checkpoint(path, "text")
    with pytest.warns(UserWarning, match="model's activation, vision_heads, nor"):
        read_checkpoint(path, "image")


def test_the_warning_points_at_the_line_that_loads(tmp_path):
    path = bare(OURS, tmp_path / "bare.pt")
    with pytest.warns(UserWarning, match="does not say") as caught:
        clip.load(path, device="cpu")
    assert [warning.filename for warning in caught] == [__file__]


def test_openais_own_state_dict_says_by_its_three_sizes_whose_it_is(tmp_path):
    model = filled(
        OURS | dict.fromkeys(("vision_heads", "transformer_heads", "vision_mlp_width", "transformer_mlp_width"))
    )
    sizes = {name: torch.tensor(1) for name in ARCHIVE_SIZES}
    torch.save(model.state_dict() | sizes, tmp_path / "theirs.pt")
    assert read_checkpoint(tmp_path / "theirs.pt")[0].activation == "quick_gelu"


def test_heads_of_published_widths_are_known():
    # open_clip's configurations of plain models: width and head_width, width and heads
    vision = [(384, 64), (512, 64), (768, 64), (896, 64), (1024, 64), (1280, 80), (1408, 88), (1664, 104), (1792, 112)]
    assert {width: width // head for width, head in vision} == VISION_HEADS
    assert {width: width // 64 for width in (256, 384, 512, 640, 768, 1024, 1280)} == TEXT_HEADS


def test_a_model_of_h14s_width_gets_its_16_heads_without_being_told(tmp_path):
    sizes = OURS | {"vision_width": 1280, "vision_layers": 1, "transformer_width": 512, "vision_heads": 16}
    path = bare(sizes | {"transformer_heads": 8}, tmp_path / "h.pt")
    with pytest.warns(UserWarning, match="model's activation, nor"):
        config, _ = read_checkpoint(path)
    assert (config.vision_heads, config.transformer_heads) == (16, 8)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"heads": 3}, "expected to be told some of activation, .* got heads"),
        ({"embed_dim": 12}, "got embed_dim"),
        ({"activation": "relu"}, "expected an activation among"),
        ({"vision_heads": 3}, "20 does not divide into 3 heads"),
        ({"image_std": (1, 1, 0)}, "image_std must be three numbers"),
        ({"image_mean": "0.5"}, "image_mean must be three numbers"),
        ({"image_resize": "longest"}, "image_resize must be one of"),
    ],
)
def test_what_the_caller_cannot_know_is_the_callers_mistake(folder, known, message):
    with pytest.raises(ValueError, match=message):
        clip.load(folder, device="cpu", config=known)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quick_gelu": False, "multimodal_cfg": {"width": 3}},
            r"\(CoCa\): its open_clip_config.json says multimodal_cfg",
        ),
        ({"init_logit_bias": -10}, r"\(SigLIP\): .* says init_logit_bias: -10"),
        (
            {"vision_cfg": {"timm_model_name": "convnext_base"}},
            r"\(a timm trunk\): .* says timm_model_name: convnext_base",
        ),
        ({"vision_cfg": {"no_ln_pre": True}}, r"\(CLIPA\)"),
        ({"vision_cfg": {"pool_type": "avg"}}, r"says pool_type: avg"),
        ({"vision_cfg": {"qk_norm": True}}, r"no plain CLIP: .* says qk_norm: True"),
        ({"vision_cfg": {"norm_kwargs": {"eps": 1e-6}}}, r"says norm_kwargs"),
        ({"text_cfg": {"hf_model_name": "xlm-roberta-base"}}, r"\(a text tower of Hugging Face's\)"),
        ({"text_cfg": {"hf_tokenizer_name": "bert-base"}}, r"\(another tokenizer\)"),
        ({"text_cfg": {"pool_type": "last"}}, r"says pool_type: last"),
        ({"text_cfg": {"no_causal_mask": True}}, r"says no_causal_mask"),
        ({"vision_cfg": {"head_width": 0}}, "needs numbers as width and head_width"),
        ({"vision_cfg": {"width": "20"}}, "needs numbers as width and head_width"),
        ({"vision_cfg": {"width": 40}}, "says vision_width 40, the shapes of its weights say 20"),
        ({"vision_cfg": {"layers": [1, 2]}}, "configuration makes no sense"),
        ({"vision_cfg": {"image_size": [26, 30]}}, "image_resolution must be a positive integer"),
        ({"text_cfg": {"heads": 3}}, "16 does not divide into 3 heads"),
        ({"text_cfg": []}, "needs an object as text_cfg"),
        ({"embed_dim": 13}, "says embed_dim 13"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder, changes, message):
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    for name, value in changes.items():
        if isinstance(value, dict) and name in content["model_cfg"]:
            content["model_cfg"][name] |= value
        else:
            content["model_cfg"][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def _objects(content):
    model = content["model_cfg"]
    return content, model, model["vision_cfg"], model["text_cfg"], content["preprocess_cfg"]


@pytest.mark.filterwarnings("ignore:.* does not say its model's")
def test_whatever_stands_in_the_configuration_is_read_or_refused(folder):
    load_with_odd_values(folder, "open_clip_config.json", _objects)
    read_checkpoint(folder)


@pytest.mark.parametrize(
    "cfg", [{"resize_mode": "longest"}, {"interpolation": "bilinear"}], ids=["longest", "bilinear"]
)
def test_a_preprocessing_that_is_not_ours_is_warned_of(folder, cfg):
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "preprocess_cfg": cfg}))
    with pytest.warns(UserWarning, match="does not say its model's image_resize"):
        read_checkpoint(folder)


def test_settings_that_are_switched_off_are_no_obstacle():
    off = {
        "timm_model_name": None,
        "no_ln_pre": False,
        "attentional_pool": False,
        "patch_dropout": 0.5,
        "pool_type": "tok",
    }
    text = {"hf_model_name": "", "pool_type": "argmax", "embed_cls": False}
    assert fields_of({"model_cfg": {"embed_dim": 4, "vision_cfg": off, "text_cfg": text}})["activation"] == "gelu"


FAMILIES = {  # an entry of such a model's file, and the family that is named
    "SigLIP": ({"logit_bias": (), "visual.trunk.pos_embed": (1, 2, 3)}, "a SigLIP, .* 'logit_bias'"),
    "SigLIP of Hugging Face's": ({"vision_model.head.probe": (1, 1, 2)}, r"a SigLIP, .* 'vision_model\.head\.probe'"),
    "SigLIP's patches": ({"vision_model.embeddings.patch_embedding.bias": (4,)}, "a SigLIP, .*patch_embedding"),
    "CoCa": ({"text_decoder.resblocks.0.ln_1.weight": (3,)}, "a CoCa, .* 'text_decoder"),
    "CoCa's pool": ({"visual.attn_pool.query": (3, 4)}, "a CoCa"),
    "CoCa's class token": ({"text.cls_emb": (4,)}, r"a CoCa, .* 'text\.cls_emb'"),
    "EVA's own names": ({"visual.blocks.0.attn.q_bias": (4,)}, r"an EVA-CLIP, .* 'visual\.blocks\.0\.attn\.q_bias'"),
    "EVA01": ({"visual.trunk.blocks.0.attn.q_bias": (4,), "visual.trunk.cls_token": (1,)}, "an EVA-CLIP"),
    "EVA02": ({"visual.trunk.blocks.0.mlp.fc1_g.weight": (3, 4), "visual.trunk.cls_token": (1,)}, "an EVA-CLIP"),
    "timm": ({"visual.trunk.stem.0.weight": (3, 4)}, "a model with an image tower of the library timm"),
    "XLM-RoBERTa": (
        {"text.transformer.embeddings.word_embeddings.weight": (9, 4)},
        "a model with another text tower than CLIP's",
    ),
    "BERT": (
        {"text_model.encoder.layer.0.attention.self.key.bias": (4,)},
        "a model with another text tower than CLIP's",
    ),
    "layer scale": ({"visual.transformer.resblocks.0.ls_1.gamma": (4,)}, "a model with layer scale"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_is_named_with_the_entry_that_gives_it_away(tmp_path, family):
    entries, message = FAMILIES[family]
    path = tmp_path / "other.pt"
    torch.save(filled(OURS).state_dict() | {name: torch.ones(shape) for name, shape in entries.items()}, path)
    with pytest.raises(CheckpointError, match=f"this is {message}.*; it cannot be loaded"):
        read_checkpoint(path)


def test_clipa_is_known_by_the_norm_that_it_lacks(tmp_path):
    weights = filled(OURS).state_dict()
    del weights["visual.ln_pre.weight"], weights["visual.ln_pre.bias"]
    torch.save(weights, tmp_path / "clipa.pt")
    with pytest.raises(CheckpointError, match=r"this is a CLIPA, .* no 'visual\.ln_pre\.weight'"):
        read_checkpoint(tmp_path / "clipa.pt")


@pytest.mark.parametrize("rows", [250_002, 250_100, 901_629])
def test_a_vocabulary_of_many_languages_is_refused(tmp_path, rows):
    weights = filled(OURS).state_dict() | {"token_embedding.weight": torch.zeros(rows, 1)}
    torch.save(weights, tmp_path / "worldwide.pt")
    with pytest.raises(CheckpointError, match=f"many languages, .* the {rows} rows of 'token_embedding.weight'"):
        read_checkpoint(tmp_path / "worldwide.pt")


def test_an_entry_with_and_without_the_prefix_is_refused(tmp_path):
    weights = filled(OURS).state_dict()
    torch.save(weights | {"text.ln_final.bias": weights["ln_final.bias"]}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"two entries for 'ln_final\.bias'"):
        read_checkpoint(tmp_path / "two.pt")
