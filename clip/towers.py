"""Towers and heads to choose from: ours, any image model of timm, any text encoder of transformers.

An image tower takes pictures (N, 3, R, R), says R as `input_resolution`, and gives one vector for each, (N, D). A text
tower takes token ids (N, L), says the longest L as `context_length`, and gives (N, D). A head brings D to the joint
space, E. Any module that does so can stand in a :class:`clip.dual_encoder.DualEncoder`; these can be saved with it:

    image tower    VisionTransformer · ModifiedResNet          ours
                   TimmTower                                   timm, by name
    text tower     TextTransformer                             ours, CLIP's
                   TransformersTower                           transformers, by class and configuration
    tokenizer      WordTokenizer                               tokenizers; ours is clip.tokenize
    head           nn.Linear without a bias · ResidualHead     W_i and W_t of CLIP Fig. 3; the head of Simple CLIP

What is saved is a name from this table and plain arguments (:func:`describe`), and what is built from a file is one of
these (:func:`build`): a file names no code, and none is fetched.

timm and transformers are optional: ``pip install clip-from-scratch[towers]``.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .layers import ACTIVATIONS, LayerNorm
from .model import ModifiedResNet, TextTower, VisionTransformer, _is_recording
from .transformer import Transformer

__all__ = ["ResidualHead", "TextTransformer", "TimmTower", "TransformersTower", "WordTokenizer", "build", "describe"]

NO_TOKEN = -1  # an id where a row of token ids has ended
POOLINGS = ("first", "mean", "pooler")
INSTALL = "pip install clip-from-scratch[towers]"


class ResidualHead(nn.Module):
    """The head of Simple CLIP (moein-shariatnia/OpenAI-CLIP): a linear map, and what a perceptron adds to it.

        p = W x + b        D -> E
        LayerNorm(p + dropout(W' gelu(p) + b'))

    The LayerNorm leaves vectors of length about √E, so its author compares them without bringing them to unit length.

    Parameters
    ----------
    width : int
        D, what the tower gives.
    embed_dim : int
        E, 256 there.
    dropout : float
        The share of the perceptron's numbers that is left out while training.
    """

    def __init__(self, width: int, embed_dim: int, dropout: float = 0.1):
        super().__init__()
        self.projection = nn.Linear(width, embed_dim)
        self.gelu = nn.GELU()
        self.fc = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = LayerNorm(embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, E), not unit length."""
        projected = self.projection(x)
        return self.layer_norm(projected + self.dropout(self.fc(self.gelu(projected))))


class TextTransformer(TextTower):
    """CLIP's text tower as a module of its own, with the names that its parts have on CLIP.

    Parameters
    ----------
    context_length, vocab_size : int
        As for :class:`clip.model.CLIP`; the last id is the end token, at which a text is read out.
    width, layers, heads : int
        D, depth and H.
    output_dim : int
        E: the tower ends with CLIP's projection.
    activation : str
        "quick_gelu" or "gelu".
    mlp_width : int, optional
        M; 4D if not given.
    """

    def __init__(
        self,
        context_length: int,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        activation: str = "quick_gelu",
        mlp_width: int | None = None,
    ):
        nn.Module.__init__(self)  # no image tower, no temperature
        self.visual = None
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.transformer = Transformer(width, layers, heads, self.build_attention_mask(), activation, mlp_width)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        self.initialize_parameters()

    @property
    def output_dim(self) -> int:
        """E, what the tower gives."""
        return self.text_projection.shape[1]

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Embed token ids (N, L), as `clip.tokenize` returns them, as (N, E), not unit length."""
        return self.encode_text(text)


class TimmTower(nn.Module):
    """An image model of timm without its classifier.

    Parameters
    ----------
    name : str
        One of `timm.list_models()`, such as "resnet50".
    input_resolution : int, optional
        R, pixels; by default what the model was made for.
    pretrained : bool
        Begin with the weights that timm fetches for this name.

    Attributes
    ----------
    output_dim : int
        D.
    mean, std : tuple of float
        What the pretrained weights expect pictures to be normalised by; not CLIP's.

    Raises
    ------
    ImportError
        If timm is not installed.
    ValueError
        If timm has no model of that name.
    """

    def __init__(self, name: str, input_resolution: int | None = None, pretrained: bool = False):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"a tower from timm needs that package: {INSTALL}") from error
        if not timm.is_model(name):  # which also keeps out names that stand for an address or a folder
            raise ValueError(f"timm has no model {name!r}; see timm.list_models()")
        fixed = timm.get_pretrained_cfg(name).fixed_input_size
        size = {"img_size": input_resolution} if fixed and input_resolution else {}
        self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
        self.name = name
        self.input_resolution = input_resolution or self.model.pretrained_cfg["input_size"][-1]
        self.output_dim = getattr(self.model, "head_hidden_size", None) or self.model.num_features
        self.mean, self.std = (tuple(self.model.pretrained_cfg[key]) for key in ("mean", "std"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed pictures (N, 3, R, R) as (N, D)."""
        return self.model(images)


class TransformersTower(nn.Module):
    """A text encoder of transformers, and how its tokens become one vector.

    Parameters
    ----------
    encoder : transformers.PreTrainedModel
        Takes ids and an attention mask: `AutoModel.from_pretrained(...)`, `BertModel(BertConfig(...))`.
    pooling : str
        "first", the first token's vector; "mean", of all tokens; "pooler", what the encoder itself makes of them, in
        BERT a layer and a tanh on the first token.
    context_length : int
        The longest row of ids.

    Attributes
    ----------
    output_dim : int
        D.

    Raises
    ------
    ValueError
        If there is no such pooling, or the encoder has fewer positions.
    """

    def __init__(self, encoder: nn.Module, pooling: str = "first", context_length: int = 77):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"expected a pooling among {list(POOLINGS)}, got {pooling!r}")
        positions = getattr(encoder.config, "max_position_embeddings", None) or context_length
        if not 0 < context_length <= positions:
            raise ValueError(f"expected a context_length of at most {positions}, got {context_length}")
        self.encoder = encoder
        self.pooling = pooling
        self.context_length = context_length
        self.output_dim = encoder.config.hidden_size

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Embed texts; no text changes by what it is padded with.

        Parameters
        ----------
        text : torch.Tensor
            (N, L) token ids, and -1 behind the end of each text, as :class:`WordTokenizer` returns them. (An id of the
            vocabulary could not mark the end: in some, padding and the end of a text share one.)

        Returns
        -------
        torch.Tensor
            (N, D).
        """
        if not _is_recording(text):  # a graph would have the longest text's length frozen into it
            text = text[:, : max(1, int((text != NO_TOKEN).sum(dim=1).max()))]
        mask = text != NO_TOKEN
        filler = self.encoder.config.pad_token_id or 0
        output = self.encoder(input_ids=text.masked_fill(~mask, filler).long(), attention_mask=mask.long())
        if self.pooling == "pooler":
            return output.pooler_output
        if self.pooling == "first":
            return output.last_hidden_state[:, 0]
        weights = F.normalize(mask.to(output.last_hidden_state.dtype), p=1, dim=1)  # (N, L), 1 / length or 0
        return (weights[:, None] @ output.last_hidden_state)[:, 0]


class WordTokenizer(nn.Module):
    """A tokenizer of the tokenizers package, called as `clip.tokenize` is.

    It is a module because it belongs to the weights: what it is made of, its vocabulary for instance, is kept among
    them as the bytes of its JSON text.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer or bytes
        What every fast tokenizer of transformers has as its `backend_tokenizer`; or its JSON text.

    Raises
    ------
    ImportError
        If tokenizers is not installed; transformers brings it.
    ValueError
        If the text is none of a tokenizer.
    """

    def __init__(self, tokenizer: object):
        super().__init__()
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"a tokenizer from outside needs the package tokenizers: {INSTALL}") from error
        text = tokenizer if isinstance(tokenizer, bytes) else tokenizer.to_str().encode()
        try:
            # one of our own: how it cuts and pads is no business of others
            self.tokenizer = Tokenizer.from_buffer(text)
        except Exception as error:  # the package knows no other kind
            raise ValueError(f"expected a tokenizer's JSON text, got {text[:40]!r}... ({error})") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.register_buffer("json", torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def _apply(self, fn, recurse=True):
        """Stay on the CPU, where texts are, when the model is moved."""
        return self

    def forward(self, texts: str | Iterable[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
        """Turn texts into token ids, with the special tokens that this tokenizer puts around them.

        Parameters
        ----------
        texts : str or iterable of str
            One text or N.
        context_length : int
            Ids in a row.
        truncate : bool
            Cut a text that is too long, keeping its special tokens, instead of raising an error.

        Returns
        -------
        torch.Tensor
            int32, (N, context_length), on the CPU; -1 behind the end of a text.

        Raises
        ------
        RuntimeError
            If a text is too long and `truncate` is not set.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = [row.ids for row in self.tokenizer.encode_batch(texts)]
        for i, row in enumerate(rows):
            if len(row) > context_length and not truncate:
                raise RuntimeError(
                    f"text {i}, {texts[i][:40]!r}..., has {len(row)} tokens with its special ones, more than the "
                    f"context length of {context_length}; shorten it, or set `truncate` to cut it"
                )
        if any(len(row) > context_length for row in rows):
            self.tokenizer.enable_truncation(context_length)
            rows = [row.ids for row in self.tokenizer.encode_batch(texts)]
            self.tokenizer.no_truncation()
        tokens = np.full((len(rows), context_length), NO_TOKEN, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        return torch.from_numpy(tokens)


# -- as text, and back ------------------------------------------------------------------------------------------------


def describe(module: nn.Module) -> dict[str, object]:
    """What :func:`build` needs to make such a module again, without its weights: a name, and plain arguments.

    Raises
    ------
    ValueError
        If it is none of those that this module lists.
    """
    kind = type(module)
    if kind is nn.Identity:
        arguments = {}
    elif kind is nn.Linear and module.bias is None:
        arguments = {"in_features": module.in_features, "out_features": module.out_features}
    elif kind is ResidualHead:
        width, embed_dim = module.projection.in_features, module.projection.out_features
        arguments = {"width": width, "embed_dim": embed_dim, "dropout": module.dropout.p}
    elif kind is VisionTransformer:
        arguments = {
            "input_resolution": module.input_resolution,
            "patch_size": module.conv1.kernel_size[0],
            "output_dim": None if module.proj is None else module.proj.shape[1],
            **_sizes(module.transformer),
        }
    elif kind is ModifiedResNet:
        arguments = {
            "layers": [len(stage) for stage in (module.layer1, module.layer2, module.layer3, module.layer4)],
            "output_dim": module.attnpool.c_proj.out_features,
            "heads": module.attnpool.num_heads,
            "input_resolution": module.input_resolution,
            "width": module.conv3.out_channels,
        }
    elif kind is TextTransformer:
        arguments = {
            "context_length": module.context_length,
            "vocab_size": module.vocab_size,
            "output_dim": module.output_dim,
            **_sizes(module.transformer),
        }
    elif kind is TimmTower:
        arguments = {"name": module.name, "input_resolution": module.input_resolution}
    elif kind is TransformersTower:
        arguments = {
            "encoder": _describe_encoder(module.encoder),
            "pooling": module.pooling,
            "context_length": module.context_length,
        }
    else:
        raise ValueError(f"expected one of {', '.join(BUILDERS)} (a Linear without a bias), got {module}")
    return {"class": kind.__name__, **arguments}


def build(description: Mapping[str, object]) -> nn.Module:
    """Make the module that :func:`describe` described, with random weights.

    Raises
    ------
    ValueError
        If it is no such description.
    ImportError
        If the package that it needs is not installed.
    """
    try:
        arguments = dict(description)
        return BUILDERS[arguments.pop("class")](**arguments)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a description of one of {', '.join(BUILDERS)}, got {description!r:.200}") from error


def _sizes(transformer: Transformer) -> dict[str, object]:
    """Width, depth, heads, activation and perceptrons of a transformer, whose blocks must be alike."""
    blocks = [
        (block.attn.num_heads, type(block.mlp.gelu), block.mlp.c_fc.out_features) for block in transformer.resblocks
    ]
    names = [name for name, layer in ACTIVATIONS.items() if layer is blocks[0][1]]
    if len(set(blocks)) > 1 or not names:
        raise ValueError(f"expected blocks that are alike, got (heads, activation, perceptron) {blocks}")
    return {
        "width": transformer.width,
        "layers": len(blocks),
        "heads": blocks[0][0],
        "activation": names[0],
        "mlp_width": blocks[0][2],
    }


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free linear projection."""
    return nn.Linear(in_features, out_features, bias=False)


def _vision_transformer(
    input_resolution: int,
    patch_size: int,
    width: int,
    layers: int,
    heads: int,
    output_dim: int | None,
    activation: str,
    mlp_width: int,
) -> VisionTransformer:
    """A ViT, without its projection if `output_dim` is None."""
    tower = VisionTransformer(
        input_resolution, patch_size, width, layers, heads, output_dim or 1, activation, mlp_width
    )
    if output_dim is None:
        tower.proj = None
    return tower


def _transformers_tower(encoder: dict[str, object], pooling: str, context_length: int) -> TransformersTower:
    """An encoder built from its configuration, with its pooling."""
    return TransformersTower(_build_encoder(**encoder), pooling, context_length)


BUILDERS = {
    "Identity": nn.Identity,
    "Linear": _linear,
    "ResidualHead": ResidualHead,
    "VisionTransformer": _vision_transformer,
    "ModifiedResNet": ModifiedResNet,
    "TextTransformer": TextTransformer,
    "TimmTower": TimmTower,
    "TransformersTower": _transformers_tower,
}

# Entries of every configuration that say nothing about the network, or where to fetch something from
UNSAID = {"architectures", "auto_map", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version"}


def _describe_encoder(encoder: nn.Module) -> dict[str, object]:
    """The class of an encoder, and where its configuration differs from that of the class."""
    name, config = type(encoder).__name__, encoder.config
    if _encoder_class(name) is not type(encoder):
        raise ValueError(f"expected a text encoder that transformers itself defines, got {type(encoder)}")
    settings, default = _settings(config), _settings(type(config)())
    return {"name": name, "config": {key: settings[key] for key in default if settings[key] != default[key]}}


def _build_encoder(name: str, config: dict[str, object]) -> nn.Module:
    """The encoder of that class with that configuration."""
    kind = _encoder_class(name)
    if unknown := config.keys() - _settings(kind.config_class()).keys():
        raise ValueError(f"a {kind.config_class.__name__} has no {', '.join(sorted(unknown))}")
    return kind(kind.config_class(**config))


def _settings(config: object) -> dict[str, object]:
    """The entries of a transformers configuration that make the network, as JSON has them."""
    return {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in UNSAID}


def _encoder_class(name: str) -> type:
    """A class of transformers that encodes texts, by its name: nothing else is built because a file says so."""
    try:
        import transformers
        from transformers.models.auto import modeling_auto as auto
    except ImportError as error:
        raise ImportError(f"a tower from transformers needs that package: {INSTALL}") from error
    names = {auto.MODEL_MAPPING_NAMES.get(family) for family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    if name not in names | set(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values()):
        raise ValueError(f"expected a text encoder that transformers itself defines, got {name!r:.50}")
    return getattr(transformers, name)
