"""Every family of CLIP files, from its own form and back: the published configurations, and the ways files are kept."""

import json

import pytest
import safetensors.torch
import torch
from archive import write_archive
from conftest import filled

import clip
from clip.app.cli import main
from clip.checkpoints import CheckpointError, huggingface, open_clip, read_checkpoint
from clip.config import ARCHIVE_SIZES, UNSEEN, CLIPConfig

B32 = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
B16 = B32 | {"patch_size": 16}
L14 = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
H14 = {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
G14 = {"image_size": 224, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14}
BIGG14 = {"image_size": 224, "layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231, "patch_size": 14}
RN50 = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
SQUASHED = {"interpolation": "bicubic", "resize_mode": "squash"}

# As open_clip's configurations and its list of published weights have them: embed_dim, image tower, width and depth of
# the text tower, QuickGELU?, preprocessing; and in the last two columns what follows: heads, hidden width of the blocks
PUBLISHED = {
    "YFCC15M RN50": (1024, RN50, (512, 12), True, {}, 32, None),
    "LAION-400M B/32": (512, B32, (512, 12), True, {}, 12, 3072),
    "LAION-400M B/16+ 240": (640, B16 | {"image_size": 240, "width": 896}, (640, 12), False, {}, 14, 3584),
    "LAION-2B L/14": (768, L14, (768, 12), False, HALVES, 16, 4096),
    "LAION-2B H/14": (1024, H14, (1024, 24), False, {}, 16, 5120),
    "LAION-2B g/14": (1024, G14, (1024, 24), False, {}, 16, 6144),
    "LAION-2B bigG/14": (1280, BIGG14, (1280, 32), False, {}, 16, 8192),
    "DataComp B/32 256": (512, B32 | {"image_size": 256}, (512, 12), False, {}, 12, 3072),
    "DataComp L/14": (768, L14, (768, 12), False, {}, 16, 4096),
    "CommonPool B/16": (512, B16, (512, 12), False, {}, 12, 3072),
    "MetaCLIP B/16": (512, B16, (512, 12), True, {}, 12, 3072),
    "MetaCLIP bigG/14": (1280, BIGG14, (1280, 32), True, {}, 16, 8192),
    "MetaCLIP altogether H/14": (1024, H14, (1024, 24), False, {}, 16, 5120),
    "DFN-2B L/14": (768, L14, (768, 12), True, {}, 16, 4096),
    "DFN-5B H/14 378": (1024, H14 | {"image_size": 378}, (1024, 24), True, SQUASHED, 16, 5120),
}


def published(name, smaller=1):
    """The content of open_clip_config.json; all widths, but no number of heads, `smaller` times smaller."""
    embed_dim, vision, (width, layers), quick_gelu, preprocess, _, _ = PUBLISHED[name]
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": layers}
    if smaller > 1:
        vision = vision | {"width": vision["width"] // smaller, "head_width": vision.get("head_width", 64) // smaller}
        vision["layers"] = [1, 2, 1, 1] if isinstance(vision["layers"], list) else 2
        text |= {"context_length": 11, "vocab_size": 31, "width": width // smaller, "layers": 3}
    model = {"embed_dim": embed_dim // smaller, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model | ({"quick_gelu": True} if quick_gelu else {}), "preprocess_cfg": preprocess}


def config_of(content):
    """What a file of this content says, with the hidden widths that the shapes of its weights would show."""
    vision, text = content["model_cfg"]["vision_cfg"], content["model_cfg"]["text_cfg"]
    hidden = int(vision["width"] * vision.get("mlp_ratio", 4.0)) if vision.get("patch_size") else None
    return CLIPConfig(**open_clip.fields_of(content), vision_mlp_width=hidden, transformer_mlp_width=4 * text["width"])


# -- the published configurations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_understood_and_written_back_the_same(name):
    config = config_of(published(name))
    *_, quick_gelu, preprocess, heads, hidden = PUBLISHED[name]
    assert (config.vision_heads, config.vision_mlp_width) == (heads, hidden)
    assert config.transformer_heads == config.transformer_width // 64
    assert config.activation == ("quick_gelu" if quick_gelu else "gelu")
    assert config.image_resize == preprocess.get("resize_mode", "shortest")
    assert config.image_mean == tuple(preprocess.get("mean", CLIPConfig.image_mean))

    assert config_of(open_clip.config_json(config)) == config
    if config.is_vit:
        theirs = huggingface.config_json(config, torch.float32), huggingface.preprocessor_json(config)
        fields = huggingface.fields_of(*theirs, None)
        assert CLIPConfig(**fields | {"embed_dim": config.embed_dim}) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_eighth_of_a_published_model_is_read_written_back_and_read_again(name, tmp_path):
    config, folder = config_of(published(name, 8)), tmp_path / "folder"
    model = filled(vars(config))
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(published(name, 8)))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    assert_goes_round(folder, config, model.state_dict(), tmp_path)


# -- the ways in which files are kept ---------------------------------------------------------------------------------

LITTLE = CLIPConfig(
    embed_dim=12,
    image_resolution=24,
    vision_layers=3,
    vision_width=20,
    vision_patch_size=8,
    context_length=11,
    vocab_size=31,
    transformer_width=16,
    transformer_heads=2,
    transformer_layers=2,
    vision_heads=5,
    activation="gelu",
    image_resize="squash",
)
PLAIN = {"transformer_heads": None, "vision_heads": None, "activation": "quick_gelu", "image_resize": "shortest"}
OPENAIS = CLIPConfig(**vars(LITTLE) | PLAIN)  # what shapes alone can say


def of_hugging_face(folder, weights, old=False, pickled=False, shards=1):
    """A folder of transformers' 5, or as its 4 wrote it."""
    tensors = {name: tensor.contiguous() for name, tensor in huggingface.to_huggingface(weights).items()}
    config = huggingface.config_json(LITTLE, torch.float32)
    if old:
        tensors["text_model.embeddings.position_ids"] = torch.arange(11)[None]
        tensors["vision_model.embeddings.position_ids"] = torch.arange(9)[None]
        config["text_config_dict"] = config["text_config"] | {"eos_token_id": 2}
        config["vision_config_dict"] = config["vision_config"]
        config["text_config"] = config["vision_config"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(huggingface.preprocessor_json(LITTLE)))
    save, stem, ending = (
        (torch.save, "pytorch_model", "bin") if pickled else (safetensors.torch.save_file, "model", "safetensors")
    )
    if shards == 1:
        save(tensors, folder / f"{stem}.{ending}")
        return folder
    weight_map = {}
    for i in range(shards):
        shard = f"{stem}-{i + 1:05}-of-{shards:05}.{ending}"
        names = sorted(tensors)[i::shards]
        save({name: tensors[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def of_open_clip(folder, weights, name="open_clip_pytorch_model.bin", save=torch.save):
    """A folder of open_clip."""
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip.config_json(LITTLE)))
    save(weights, folder / name)
    return folder


def custom_text(weights):
    """The names of CustomTextCLIP, and a temperature that is a list of one."""
    names = {name: name if name.startswith(("visual.", "logit_scale")) else f"text.{name}" for name in weights}
    return {names[name]: tensor for name, tensor in weights.items()} | {"logit_scale": weights["logit_scale"][None]}


def saved(path, content):
    torch.save(content, path)
    return path


def archive(folder, weights):
    write_archive(weights, folder / "x.pt", 24, 11, 31, half=False)
    return folder / "x.pt"


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


SIZES = dict(zip(ARCHIVE_SIZES, map(torch.tensor, (24, 11, 31)), strict=True))
FORMS = {  # of files that say all, which model is in them
    "OpenAI, TorchScript": (OPENAIS, archive),
    "OpenAI, state dict": (OPENAIS, lambda folder, weights: saved(folder / "x.pt", weights | SIZES)),
    "Hugging Face": (LITTLE, of_hugging_face),
    "Hugging Face, sharded": (LITTLE, lambda *given: of_hugging_face(*given, shards=3)),
    "Hugging Face 4.x": (LITTLE, lambda *given: of_hugging_face(*given, old=True)),
    "Hugging Face 4.x, bin": (LITTLE, lambda *given: of_hugging_face(*given, old=True, pickled=True)),
    "Hugging Face 4.x, sharded bin": (
        LITTLE,
        lambda *given: of_hugging_face(*given, old=True, pickled=True, shards=3),
    ),
    "open_clip": (LITTLE, of_open_clip),
    "open_clip, safetensors": (
        LITTLE,
        lambda *given: of_open_clip(*given, "open_clip_model.safetensors", safetensors.torch.save_file),
    ),
    "open_clip, older safetensors": (
        LITTLE,
        lambda *given: of_open_clip(*given, "open_clip_pytorch_model.safetensors", safetensors.torch.save_file),
    ),
    "open_clip, CustomTextCLIP": (LITTLE, lambda folder, weights: of_open_clip(folder, custom_text(weights))),
}
BARE = {  # of files of weights alone
    "state dict": lambda weights: weights,
    "training checkpoint": lambda weights: {
        "epoch": 3,
        "name": "run",
        "state_dict": prefixed("module.", weights),
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {"scale": 65536.0},
    },
    "compiled": lambda weights: {"state_dict": prefixed("module._orig_mod.", weights)},
    "CustomTextCLIP": custom_text,
}


def assert_goes_round(source, config, weights, folder, known=None):
    """Reading gives this model; and so does reading what `clip.save` and `clip convert` write of it."""

    def assert_same(path, known=None):
        found, tensors = read_checkpoint(path, known=known)
        assert found == config
        assert tensors.keys() == weights.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in weights.items())

    assert_same(source, known)
    model, _ = clip.load(source, device="cpu", config=known)
    for ending in (".safetensors", ".pt"):
        clip.save(model, folder / f"saved{ending}")
        assert_same(folder / f"saved{ending}")
    said = [part for name, value in (known or {}).items() for part in ("--set", f"{name}={json.dumps(value)}")]
    for form in ("huggingface", "open_clip") if config.is_vit else ("open_clip",):
        assert main(["convert", str(source), str(folder / form), "--to", form, *said]) == 0
        assert_same(folder / form)
    if config == OPENAIS:
        assert main(["convert", str(source), str(folder / "openai.pt"), "--to", "openai"]) == 0
        assert_same(folder / "openai.pt")


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_each_form_is_read_written_back_and_read_again(form, tmp_path):
    config, write = FORMS[form]
    weights = filled(vars(config)).state_dict()
    (tmp_path / "source").mkdir()
    assert_goes_round(write(tmp_path / "source", weights), config, weights, tmp_path)


@pytest.mark.parametrize("form", BARE)
def test_bare_weights_of_each_form_go_round_once_it_is_said_what_they_are(form, tmp_path):
    weights = filled(vars(LITTLE)).state_dict()
    known = {name: getattr(LITTLE, name) for name in UNSEEN}
    assert_goes_round(saved(tmp_path / "x.pt", BARE[form](weights)), LITTLE, weights, tmp_path, known)


def test_the_half_precision_of_openais_archives_comes_back_in_their_own_form(tmp_path):
    weights = filled(vars(OPENAIS)).state_dict()
    write_archive(weights, tmp_path / "x.pt", 24, 11, 31)
    assert main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "y.pt"), "--to", "openai"]) == 0
    before, after = read_checkpoint(tmp_path / "x.pt")[1], read_checkpoint(tmp_path / "y.pt")[1]
    assert {tensor.dtype for tensor in before.values()} == {torch.float16, torch.float32}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)  # and of the same dtype


# -- files of one tower -----------------------------------------------------------------------------------------------

TOWERS = {
    "image": ("vision_model.", "visual_projection.weight", "vision_config"),
    "text": ("text_model.", "text_projection.weight", "text_config"),
}


@pytest.mark.parametrize("projected", [True, False], ids=["with projection", "without"])
@pytest.mark.parametrize("bare", [False, True], ids=["4.x names", "5.x names"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.filterwarnings("ignore:.*without its projection")
def test_a_file_of_one_tower_has_the_weights_of_that_tower(tower, bare, projected, tmp_path):
    prefix, projection, section = TOWERS[tower]
    weights = filled(vars(LITTLE)).state_dict()
    tensors = {
        name.removeprefix(prefix) if bare else name: tensor.contiguous()
        for name, tensor in huggingface.to_huggingface(weights).items()
        if name.startswith(prefix) or (projected and name == projection)
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    described = huggingface.config_json(LITTLE, torch.float32)[section]
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(huggingface.preprocessor_json(LITTLE)))
    config, found = read_checkpoint(tmp_path, tower)
    own = {name for name in weights if name.startswith("visual.") == (tower == "image")} - {"logit_scale"}
    assert found.keys() == own | {"logit_scale"}
    ours = "visual.proj" if tower == "image" else "text_projection"
    assert all(torch.equal(found[name], weights[name]) for name in own - (set() if projected else {ours}))
    kinds = ("vision", "image") if tower == "image" else ("transformer", "context", "vocab")
    for name, value in vars(LITTLE).items():
        if name.startswith(kinds):
            assert getattr(config, name) == value, name
    with pytest.raises(CheckpointError, match=f'holds the {tower} tower only: load it with tower="{tower}"'):
        read_checkpoint(tmp_path)
    assert found["logit_scale"].isnan()  # the file does not say it
    for ending in (".safetensors", ".pt"):
        clip.save(clip.load(tmp_path, device="cpu", tower=tower)[0], tmp_path / f"saved{ending}")
        saved_config, saved_weights = read_checkpoint(tmp_path / f"saved{ending}", tower)
        assert saved_config == config
        assert saved_weights.keys() == found.keys()
        assert all(torch.equal(saved_weights[name], found[name]) for name in found.keys() - {"logit_scale"})
        assert saved_weights["logit_scale"].isnan()
