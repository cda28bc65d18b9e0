"""open_clip's files: OpenAI's names, and in open_clip_config.json what shapes do not show.

Source: mlfoundations/open_clip (model.py, factory.py, transform.py).

Its class CLIP has the very entries of OpenAI's. In the class CustomTextCLIP the text tower's stand under `text.`:

    text_projection, token_embedding.weight, transformer.resblocks.0. ...  ↔  text.text_projection, ...

`logit_scale` may be a number or a list of one. Beside the weights a folder holds

    {"model_cfg": {"embed_dim": 512, "quick_gelu": true,
                   "vision_cfg": {"layers": 12, "width": 768, "patch_size": 32, "image_size": 224, ...},
                   "text_cfg": {"context_length": 77, "width": 512, "heads": 8, "layers": 12, ...}},
     "preprocess_cfg": {"mean": [...], "std": [...], "interpolation": "bicubic", "resize_mode": "shortest"}}

A weights file alone does not say the activation: GELU is open_clip's own, QuickGELU that of OpenAI's weights and of a
few others (MetaCLIP, DFN). Nor does it say the heads, but of the published widths they are known.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..config import CLIPConfig
from .mapped_file import CheckpointError
from .safetensors import write_safetensors

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG = "open_clip_config.json"

# Heads by width, of the towers of every published model that is a plain CLIP. From H/14 on they are wider than 64.
VISION_HEADS = {384: 6, 512: 8, 768: 12, 896: 14, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
TEXT_HEADS = {256: 4, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 20}

# What the sections may hold, with the only value it may have, or None where any value is read or does not matter
MODEL = {
    "embed_dim": None,
    "vision_cfg": None,
    "text_cfg": None,
    "quick_gelu": None,
    "custom_text": None,
    "init_logit_scale": None,
    "nonscalar_logit_scale": None,
    "output_dict": None,
}
TOWER = {
    "width": None,
    "layers": None,
    "mlp_ratio": None,
    "output_tokens": None,
    "final_ln_after_pool": False,
    "ls_init_value": None,  # gives itself away by its weights
}
VISION = TOWER | {
    "image_size": None,
    "patch_size": None,
    "head_width": None,
    "patch_dropout": None,  # in training alone
    "attn_pooler_queries": None,
    "attn_pooler_heads": None,
    "pool_type": "tok",
    "pos_embed_type": "learnable",
}
TEXT = TOWER | {
    "context_length": None,
    "vocab_size": None,
    "heads": None,
    "pad_id": None,
    "eos_id": None,
    "pool_type": "argmax",
    "proj_type": "linear",
}
FAMILIES = {
    "multimodal_cfg": "CoCa",
    "attentional_pool": "CoCa",
    "embed_cls": "CoCa",
    "init_logit_bias": "SigLIP",
    "timm_model_name": "a timm trunk",
    "hf_model_name": "a text tower of Hugging Face's",
    "hf_tokenizer_name": "another tokenizer",
    "no_ln_pre": "CLIPA",
    "no_causal_mask": "CLIPA, SigLIP",
    "pool_type": "CLIPA, SigLIP, CoCa",
}


def from_open_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under OpenAI's names."""
    state_dict = {}
    for name, tensor in tensors.items():
        ours = name.removeprefix("text.")
        if ours in state_dict:
            raise CheckpointError(f"two entries for {ours!r}, with text. before the name and without")
        state_dict[ours] = tensor
    return state_dict


def write_open_clip(folder: Path, config: CLIPConfig, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write into an empty folder what `open_clip.create_model("local-dir:FOLDER")` reads."""
    (folder / CONFIG).write_text(json.dumps(config_json(config), indent=2) + "\n")
    with (folder / WEIGHTS[0]).open("xb") as file:
        write_safetensors(file, state_dict, {"format": "pt"})


def fields_of(config: Mapping[str, object]) -> dict[str, object]:
    """The fields of a :class:`CLIPConfig` that open_clip_config.json tells.

    Raises
    ------
    CheckpointError
        If it describes what our model does not compute.
    """
    model = _section(config, "model_cfg") if "model_cfg" in config else dict(config)
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    for section, known in ((model, MODEL), (vision, VISION), (text, TEXT)):
        _refuse_unknown(section, known)
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    is_vit = not isinstance(layers, list)
    head_width = vision.get("head_width", 64)
    try:
        vision_heads = width * (1 if is_vit else 32) // head_width
    except (TypeError, ZeroDivisionError):
        raise CheckpointError(f"its {CONFIG} needs numbers as width and head_width, got {width!r:.50}") from None
    side = vision.get("image_size", 224)
    return {
        "embed_dim": model.get("embed_dim"),
        "activation": "quick_gelu" if model.get("quick_gelu", False) else "gelu",
        "image_resolution": side[0] if isinstance(side, list) and side and side == side[:1] * 2 else side,
        "vision_layers": layers if is_vit else tuple(layers),
        "vision_width": width,
        "vision_patch_size": vision.get("patch_size", 16) if is_vit else None,
        "vision_heads": vision_heads,
        "context_length": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", 49_408),
        "transformer_width": text.get("width", 512),
        "transformer_heads": text.get("heads", 8),
        "transformer_layers": text.get("layers", 12),
    } | _preprocessing(_section(config, "preprocess_cfg") if "preprocess_cfg" in config else {})


def published_heads(sizes: Mapping[str, object]) -> dict[str, int]:
    """The heads of a file that does not say them, where only models of one kind have its widths."""
    vision = sizes["vision_patch_size"] and VISION_HEADS.get(sizes["vision_width"])
    text = TEXT_HEADS.get(sizes["transformer_width"])
    return {name: heads for name, heads in (("vision_heads", vision), ("transformer_heads", text)) if heads}


def config_json(config: CLIPConfig) -> dict[str, object]:
    """What open_clip_config.json says of a model, for :func:`open_clip.create_model` and a folder."""
    feature_width = config.vision_width if config.is_vit else config.vision_width * 32
    vision = {
        "image_size": config.image_resolution,
        "layers": config.vision_layers if config.is_vit else list(config.vision_layers),
        "width": config.vision_width,
        "head_width": feature_width // config.vision_heads,
    }
    if config.is_vit:
        vision["patch_size"] = config.vision_patch_size
        vision["mlp_ratio"] = _ratio(config.vision_mlp_width, config.vision_width)
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.transformer_width,
        "heads": config.transformer_heads,
        "layers": config.transformer_layers,
        "mlp_ratio": _ratio(config.transformer_mlp_width, config.transformer_width),
    }
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": text,
        },
        "preprocess_cfg": {
            "mean": list(config.image_mean),
            "std": list(config.image_std),
            "interpolation": "bicubic",
            "resize_mode": config.image_resize,
        },
    }


def _ratio(hidden: int, width: int) -> float:
    """A number whose product with `width`, rounded down, is `hidden`."""
    return hidden / width if hidden % width == 0 else (hidden + 0.5) / width


def _section(config: Mapping[str, object], name: str) -> dict[str, object]:
    found = config.get(name)
    if not isinstance(found, dict):
        raise CheckpointError(f"its {CONFIG} needs an object as {name}, got {str(found)[:50]}")
    return found


def _refuse_unknown(section: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Refuse a setting that a plain CLIP does not have, unless it is switched off."""
    for key, value in section.items():
        if value and (key not in known or known[key] not in (None, value)):
            family = f" ({FAMILIES[key]})" if key in FAMILIES else ""
            raise CheckpointError(
                f"this is no plain CLIP{family}: its {CONFIG} says {str(key)[:50]}: {str(value)[:50]}"
            )


def _preprocessing(cfg: Mapping[str, object]) -> dict[str, object]:
    """The fields that preprocess_cfg tells; without `image_resize` if our preprocessing cannot do as it says."""
    found = {"image_mean": cfg.get("mean", CLIPConfig.image_mean), "image_std": cfg.get("std", CLIPConfig.image_std)}
    resize = cfg.get("resize_mode", "shortest")
    if resize in ("shortest", "squash") and cfg.get("interpolation", "bicubic") == "bicubic":
        found["image_resize"] = resize
    return found
