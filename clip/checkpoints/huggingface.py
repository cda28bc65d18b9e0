"""Hugging Face's folders: a CLIPModel's weights under other names, and its sizes in config.json. ViTs only.

Source: huggingface/transformers, models/clip (modeling_clip.py, configuration_clip.py).

    OpenAI                                 Hugging Face
    visual.conv1, visual.ln_pre, ...       vision_model.embeddings.patch_embedding, .pre_layrnorm (so spelled), ...
    visual.proj  (D, E)                    visual_projection.weight  (E, D), the transpose
    transformer.resblocks.i.attn
      .in_proj_weight  (3D, D)             text_model.encoder.layers.i.self_attn.{q,k,v}_proj.weight, three of (D, D)
    a file of sizes? none                  config.json: also heads, activation, the end token's id
    preprocessing? one                     preprocessor_config.json

The tables below say it in full and serve both directions. Older files also hold `position_ids`, which count from zero.
A folder may hold one tower alone: with its projection; without, as the text encoders of image generators are, and then
the identity stands in for it; and, since transformers 5, without the tower's name before its entries.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from ..config import ACTIVATIONS, MAX_LAYERS, CLIPConfig, tower_alone
from .mapped_file import CheckpointError
from .safetensors import write_safetensors

CONFIG = "config.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the older place and the newer
PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
ENTRIES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TOWERS = {
    "text": ("transformer.resblocks.", "text_model."),
    "image": ("visual.transformer.resblocks.", "vision_model."),
}
BARE = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "final_layer_norm.")  # without tower's name
MODEL_TYPES = ("clip", "clip_text_model", "clip_vision_model")
LAYER_NORM_EPS = 1e-5
END_TOKEN = 49_407  # of CLIP's tokenizer
MAX_WIDTH = 1 << 14  # of a tower whose projection is missing

# The fields of a CLIPConfig in the sections of config.json, with what transformers takes where a section is silent
SIZES = {
    "text": {
        "context_length": ("max_position_embeddings", 77),
        "vocab_size": ("vocab_size", 49_408),
        "transformer_width": ("hidden_size", 512),
        "transformer_heads": ("num_attention_heads", 8),
        "transformer_layers": ("num_hidden_layers", 12),
        "transformer_mlp_width": ("intermediate_size", 2048),
    },
    "vision": {
        "image_resolution": ("image_size", 224),
        "vision_layers": ("num_hidden_layers", 12),
        "vision_width": ("hidden_size", 768),
        "vision_patch_size": ("patch_size", 32),
        "vision_heads": ("num_attention_heads", 12),
        "vision_mlp_width": ("intermediate_size", 3072),
    },
}


# -- weights ----------------------------------------------------------------------------------------------------------


def is_huggingface(names: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file's entries have Hugging Face's names of a CLIP or of one of its towers."""
    return any(
        name.endswith(("embeddings.patch_embedding.weight", "embeddings.token_embedding.weight")) for name in names
    )


def tower_of(name: str) -> str | None:
    """The tower, "image" or "text", that an entry of Hugging Face's belongs to; None if its name does not show."""
    if name.startswith(("vision_model.", "visual_projection.")):
        return "image"
    return "text" if name.startswith(("text_model.", "text_projection.")) else None


def from_huggingface(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under OpenAI's names; entries of other names keep them.

    Raises
    ------
    CheckpointError
        If one of a block's three projections is missing or of another shape than the others.
    """
    left = {name: tensor for name, tensor in _with_prefix(tensors).items() if not name.endswith(".position_ids")}
    state_dict = {}
    layers = {tower: _count(left, f"{prefix}encoder.layers.") for tower, (_, prefix) in TOWERS.items()}
    for ours, theirs in _table(layers):
        found = [left.pop(name) for name in theirs if name in left]
        if len(found) == len(theirs):
            state_dict[ours] = found[0] if len(theirs) == 1 else _joined(theirs, found)
        elif found:
            raise CheckpointError(f"expected {', '.join(theirs)} together, found {len(found)} of them")
    for ours in PROJECTIONS:
        if ours in state_dict and state_dict[ours].dim() == 2:  # otherwise it is no projection, as will be found out
            state_dict[ours] = state_dict[ours].T
    return _with_projection({**state_dict, **left})


def to_huggingface(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a ViT under Hugging Face's names."""
    tensors = {}
    layers = {tower: _count(state_dict, resblocks) for tower, (resblocks, _) in TOWERS.items()}
    for ours, theirs in _table(layers):
        tensor = state_dict[ours]
        parts = tensor.chunk(3) if len(theirs) == 3 else [tensor.T if ours in PROJECTIONS else tensor]
        tensors.update(zip(theirs, parts, strict=True))
    return tensors


def _table(layers: Mapping[str, int]) -> list[tuple[str, tuple[str, ...]]]:
    """OpenAI's names of a model of so many layers, and what stands for each: one entry, or three to be stacked."""
    table = [(ours, (theirs,)) for ours, theirs in ({"logit_scale": "logit_scale"} | PROJECTIONS | ENTRIES).items()]
    for tower, (resblocks, prefix) in TOWERS.items():
        for i in range(layers[tower]):
            block, layer = f"{resblocks}{i}.", f"{prefix}encoder.layers.{i}."
            for kind in ("weight", "bias"):
                thirds = tuple(f"{layer}self_attn.{letter}_proj.{kind}" for letter in "qkv")
                table.append((f"{block}attn.in_proj_{kind}", thirds))
                table += [(f"{block}{ours}.{kind}", (f"{layer}{theirs}.{kind}",)) for ours, theirs in BLOCK.items()]
    return table


def _count(names: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many numbered children stand under a prefix."""
    found = len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
    if found > MAX_LAYERS:
        raise CheckpointError(f"expected at most {MAX_LAYERS} layers named {prefix}*, found {found}")
    return found


def _joined(names: tuple[str, ...], parts: list[torch.Tensor]) -> torch.Tensor:
    """Three matrices or vectors on top of one another."""
    if len({part.shape for part in parts}) > 1 or parts[0].dim() == 0:
        raise CheckpointError(f"expected {', '.join(names)} of one shape, got {[tuple(part.shape) for part in parts]}")
    return torch.cat(parts)


def _with_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put the tower's name before the entries where a file of one tower has left it out."""
    bare = [name for name in tensors if name.startswith("embeddings.")]
    if not bare:
        return dict(tensors)
    prefix = "vision_model." if "embeddings.patch_embedding.weight" in tensors else "text_model."
    return {name if tower_of(name) else prefix + name: tensor for name, tensor in tensors.items()}


def _with_projection(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a file of one tower may lack: the temperature, and the projection, for which the identity stands."""
    tower = tower_alone(state_dict)
    if tower is None:
        return state_dict
    # Nobody knows the temperature: whoever asks for logits all the same is to see that.
    state_dict.setdefault("logit_scale", torch.tensor(torch.nan))
    projection, norm = ("text_projection", "ln_final") if tower == "text" else ("visual.proj", "visual.ln_post")
    if projection not in state_dict and f"{norm}.weight" in state_dict:
        weight = state_dict[f"{norm}.weight"]
        if weight.numel() > MAX_WIDTH:
            raise CheckpointError(f"expected a tower of at most {MAX_WIDTH} channels, got {weight.numel()}")
        warnings.warn(
            f"the file holds {'a' if tower == 'text' else 'an'} {tower} tower without its projection into the joint "
            "space: what it embeds is the tower's own, and cannot be compared with what the other tower embeds",
            stacklevel=6,  # where clip.load was called
        )
        state_dict[projection] = torch.eye(weight.numel(), dtype=weight.dtype, device=weight.device)
    return state_dict


def write_huggingface(folder: Path, config: CLIPConfig, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write into an empty folder what `transformers.CLIPModel.from_pretrained` reads.

    Raises
    ------
    ValueError
        If the model is a ResNet.
    """
    sizes = config_json(config, state_dict["logit_scale"].dtype)
    for name, content in ((CONFIG, sizes), (PREPROCESSORS[0], preprocessor_json(config))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    with (folder / "model.safetensors").open("xb") as file:
        write_safetensors(file, to_huggingface(state_dict), {"format": "pt"})


# -- config.json ------------------------------------------------------------------------------------------------------


def fields_of(config: Mapping[str, object], preprocessor: Mapping[str, object], tower: str | None) -> dict[str, object]:
    """The fields of a :class:`CLIPConfig` that a folder's JSON files tell.

    Parameters
    ----------
    config : mapping
        Of config.json: of the whole model, or of one tower.
    preprocessor : mapping
        Of preprocessor_config.json; empty if there is none, and then nothing is said of preprocessing.
    tower : str, optional
        "image" or "text", if the weights are of this tower alone.

    Raises
    ------
    CheckpointError
        If it describes what our model does not compute.
    """
    if config.get("model_type", "clip") not in MODEL_TYPES:
        raise CheckpointError(
            f"this is no plain CLIP: its config.json says model_type {str(config['model_type'])[:50]!r}, expected one "
            f"of {', '.join(MODEL_TYPES)}"
        )
    sections = {
        name: _section(config, name) for name, of in (("text", "text"), ("vision", "image")) if tower in (None, of)
    }
    fields: dict[str, object] = {}
    for name, section in sections.items():
        fields |= {field: section.get(key, default) for field, (key, default) in SIZES[name].items()}
        if section.get("layer_norm_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
            raise CheckpointError(
                f"its config.json says layer_norm_eps {str(section['layer_norm_eps'])[:20]}; CLIP has {LAYER_NORM_EPS}"
            )
    activations = {str(section.get("hidden_act", "quick_gelu")) for section in sections.values()}
    if len(activations) > 1 or not activations <= set(ACTIVATIONS):
        raise CheckpointError(
            f"its config.json says hidden_act {' and '.join(sorted(activations))[:50]}; expected one of {ACTIVATIONS}, "
            "in both towers the same"
        )
    fields["activation"] = activations.pop()
    if "text" in sections:
        _check_end_token(sections["text"].get("eos_token_id", END_TOKEN), fields["vocab_size"])
    return fields | _preprocessing(preprocessor, fields.get("image_resolution"))


def _section(config: Mapping[str, object], name: str) -> dict[str, object]:
    """What config.json says of a tower: in sections, the older of which goes before the newer; or all of it."""
    if not any(f"{section}_config" in config for section in ("text", "vision")):
        found = config
    else:
        found = config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"its config.json needs an object as {name}_config, got {str(found)[:50]!r}")
    return found


def _check_end_token(end: object, vocab_size: object) -> None:
    """Refuse another end token than ours: texts are read out at the highest id, which 2 stands for in older files."""
    last = vocab_size - 1 if isinstance(vocab_size, int) else None
    if end not in (2, last) and not (end == END_TOKEN and last is not None and last > END_TOKEN):
        raise CheckpointError(
            f"its config.json says that texts end with eos_token_id {str(end)[:20]}; of a vocabulary of "
            f"{str(vocab_size)[:20]} CLIP's end token is the last"
        )


def _preprocessing(preprocessor: Mapping[str, object], side: object) -> dict[str, object]:
    """The fields that preprocessor_config.json tells; no `image_resize` if our preprocessing cannot do as it says."""
    if not preprocessor:
        return {}
    square = {"height": side, "width": side}
    size, crop = preprocessor.get("size", 224), preprocessor.get("crop_size", 224)
    cropped = preprocessor.get("do_center_crop", True)
    found: dict[str, object] = {}
    if preprocessor.get("do_normalize", True):
        found = {
            "image_mean": preprocessor.get("image_mean", CLIPConfig.image_mean),
            "image_std": preprocessor.get("image_std", CLIPConfig.image_std),
        }
    if not (preprocessor.get("do_resize", True) and preprocessor.get("resample", 3) == 3):  # 3 is bicubic
        return found
    if size in (side, {"shortest_edge": side}) and cropped and crop in (side, square):
        found["image_resize"] = "shortest"
    elif size == square and (not cropped or crop in (side, square)):
        found["image_resize"] = "squash"
    return found


def config_json(config: CLIPConfig, dtype: torch.dtype) -> dict[str, object]:
    """What config.json says of a model, for :func:`transformers.CLIPModel.from_pretrained`.

    Raises
    ------
    ValueError
        If the model is a ResNet.
    """
    if not config.is_vit:
        raise ValueError("Hugging Face's CLIP has no ResNet: this model can be written for openai and open_clip only")
    shared = {
        "hidden_act": config.activation,
        "layer_norm_eps": LAYER_NORM_EPS,
        "projection_dim": config.embed_dim,
    }
    text, image = ({key: getattr(config, field) for field, (key, _) in SIZES[name].items()} for name in SIZES)
    ends = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "text_config": {"model_type": "clip_text_model", **text, **shared, **ends},
        "vision_config": {"model_type": "clip_vision_model", **image, **shared},
    }


def preprocessor_json(config: CLIPConfig) -> dict[str, object]:
    """What preprocessor_config.json says of a model's preprocessing."""
    side = config.image_resolution
    square = {"height": side, "width": side}
    squash = config.image_resize == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
