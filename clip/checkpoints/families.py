"""What is no plain CLIP, and how its weights give it away.

CLIP's idea has been built with other towers, other losses and other vocabularies. Their files look much like CLIP's,
and some would even load in part, so each is refused by name:

    family             what gives it away
    SigLIP             logit_bias: its loss judges every pair alone, with a bias; the towers are others too
    CoCa               text_decoder, an attention pool, a class token behind the text: it writes captions as well
    EVA                gated perceptrons and rotary positions in the image tower
    timm trunks        ConvNeXt, Swin, ViTamin, MobileCLIP, PE: the image tower is any model of the library timm
    other text towers  RoBERTa, XLM-RoBERTa, mT5, BERT: not causal, with tokenizers of their own
    CLIPA              no norm before the blocks, the mean of the tokens instead of a class token
    MetaCLIP 2         CLIP's architecture, but the vocabulary of another tokenizer
"""

import re
from collections.abc import Mapping

import torch

from .mapped_file import CheckpointError

# The first that fits names the family: SigLIP's image towers, for instance, are timm's.
GIVE_AWAYS = {
    r"logit_bias": "a SigLIP",
    r"(vision|text)_model\.head\..*|vision_model\.embeddings\.patch_embedding\.bias": "a SigLIP",
    r"text_decoder\..*|visual\.attn_pool\..*|text\.cls_emb": "a CoCa",
    r"visual\.trunk\.blocks\.\d+\.(attn\.q_proj|attn\.q_bias|mlp\.fc1_g|mlp\.w1)\b.*": "an EVA-CLIP",
    r"visual\.(blocks\.\d+|rope)\..*": "an EVA-CLIP",
    r"visual\.trunk\..*": "a model with an image tower of the library timm (ConvNeXt, Swin, ViTamin, MobileCLIP, ...)",
    r"text\.transformer\.(?!resblocks\.).*|text_model\.(encoder\.layer|embeddings\.word_embeddings)\..*": (
        "a model with another text tower than CLIP's (RoBERTa, XLM-RoBERTa, mT5, ...)"
    ),
    r".*\.ls_[12]\.gamma": "a model with layer scale",
}
VOCABULARIES = {250_002: "XLM-RoBERTa's", 250_100: "mT5's", 901_629: "XLM-V's"}


def refuse_other_families(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a CheckpointError that names the family, and the entry that gave it away, if this is no plain CLIP.

    Parameters
    ----------
    tensors : mapping of str to torch.Tensor
        Under the names of the file; only names and shapes are looked at.
    """
    for pattern, family in GIVE_AWAYS.items():
        found = next((name for name in tensors if re.fullmatch(pattern, name)), None)
        if found is not None:
            raise CheckpointError(f"this is {family}, not a plain CLIP, as {found!r} shows; it cannot be loaded")
    if "visual.transformer.resblocks.0.ln_1.weight" in tensors and "visual.ln_pre.weight" not in tensors:
        raise CheckpointError(
            "this is a CLIPA, not a plain CLIP, as it has no 'visual.ln_pre.weight'; it cannot be loaded"
        )
    for name in (
        "token_embedding.weight",
        "text.token_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
    ):
        vocabulary = VOCABULARIES.get(len(tensors[name])) if name in tensors and tensors[name].dim() else None
        if vocabulary:
            raise CheckpointError(
                f"this is a model of many languages, not a plain CLIP: the {len(tensors[name])} rows of {name!r} are "
                f"{vocabulary} vocabulary; it cannot be loaded"
            )
