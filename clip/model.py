"""CLIP: two towers that learn to put a picture and its caption at the same place.

Source: Radford et al. (2103.00020) §2.3-2.5, Fig. 3; §2.4 for the text tower.

    image  (N, 3, R, R)                          text  (N, 77) token ids
      │  visual: ViT or ModifiedResNet             │  token_embedding + positional_embedding
      │                                            │  transformer, causal
      │                                            │  ln_final, take the end token's position, text_projection
    image_features  (N, E)                       text_features  (N, E)
      │  unit length                               │  unit length
      └────────── exp(logit_scale) · I Tᵀ ─────────┘
                  logits_per_image  (N, N)         one row a picture, one column a caption

The text tower's parts stand on :class:`CLIP` itself, as in the released files. What `clip.model` held in the released
package can be imported from here: the towers, their layers, and the three names defined below.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .attention import causal_mask
from .config import ARCHIVE_SIZES, CLIPConfig, sizes_shown
from .layers import ACTIVATIONS, LayerNorm, QuickGELU
from .resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from .transformer import ResidualAttentionBlock, Transformer
from .vit import VisionTransformer

__all__ = [
    "CLIP",
    "AttentionPool2d",
    "Bottleneck",
    "LayerNorm",
    "ModifiedResNet",
    "QuickGELU",
    "ResidualAttentionBlock",
    "Transformer",
    "VisionTransformer",
    "build_model",
    "convert_weights",
]


class CLIP(nn.Module):
    """Contrastive language-image pre-training: an image tower, a text tower and a temperature.

    Parameters
    ----------
    embed_dim : int
        E, the joint space.
    image_resolution : int
        R, pixels.
    vision_layers : int or tuple of four int
        Blocks of a Vision Transformer, or of each stage of a ModifiedResNet.
    vision_width : int
        D of the ViT, or channels after the stem of the ResNet.
    vision_patch_size : int or None
        P, pixels; not used by a ResNet.
    context_length : int
        Positions of the text tower, 77 in the released models.
    vocab_size : int
        49,408 in the released models. The last id must be the end token: it marks where a text is read out.
    transformer_width, transformer_heads, transformer_layers : int
        D, H and depth of the text tower.
    activation : str
        "quick_gelu" as in all released models, or "gelu".
    vision_heads, vision_mlp_width, transformer_mlp_width : int, optional
        Otherwise as in the released models: 64 channels to a head, perceptrons 4 times as wide as their tower.
    image_mean, image_std, image_resize
        How the pictures are made ready that the model reads; kept for whoever does it (see :class:`CLIPConfig`).

    Raises
    ------
    ValueError
        If the sizes do not fit each other.
    """

    def __init__(
        self,
        embed_dim: int,
        # vision
        image_resolution: int,
        vision_layers: int | tuple[int, int, int, int],
        vision_width: int,
        vision_patch_size: int | None,
        # text
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
        activation: str = "quick_gelu",
        # what others vary
        vision_heads: int | None = None,
        vision_mlp_width: int | None = None,
        transformer_mlp_width: int | None = None,
        image_mean: tuple[float, float, float] = CLIPConfig.image_mean,
        image_std: tuple[float, float, float] = CLIPConfig.image_std,
        image_resize: str = CLIPConfig.image_resize,
    ):
        super().__init__()
        config = CLIPConfig(
            embed_dim,
            image_resolution,
            vision_layers,
            vision_width,
            vision_patch_size,
            context_length,
            vocab_size,
            transformer_width,
            transformer_heads,
            transformer_layers,
            activation,
            vision_heads,
            vision_mlp_width,
            transformer_mlp_width,
            image_mean,
            image_std,
            image_resize,
        )
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.image_mean, self.image_std, self.image_resize = config.image_mean, config.image_std, config.image_resize

        if config.is_vit:
            self.visual = VisionTransformer(
                input_resolution=image_resolution,
                patch_size=vision_patch_size,
                width=vision_width,
                layers=vision_layers,
                heads=config.vision_heads,
                output_dim=embed_dim,
                activation=activation,
                mlp_width=config.vision_mlp_width,
            )
        else:
            self.visual = ModifiedResNet(
                layers=vision_layers,
                output_dim=embed_dim,
                heads=config.vision_heads,
                input_resolution=image_resolution,
                width=vision_width,
            )

        self.transformer = Transformer(
            width=transformer_width,
            layers=transformer_layers,
            heads=config.transformer_heads,
            attn_mask=self.build_attention_mask(),
            activation=activation,
            mlp_width=config.transformer_mlp_width,
        )
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP §2.5: log of 1/τ, τ = 0.07

        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draw the weights as the released code does; the ViT keeps what its constructor drew."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                nn.init.normal_(projection.weight, std=pool.c_proj.in_features**-0.5)
            for block in self.visual.modules():
                if isinstance(block, Bottleneck):
                    nn.init.zeros_(block.bn3.weight)  # each block starts as its shortcut

        # GPT-2: what is added to the residual stream, 2 · layers times, is scaled down so that the sum keeps its size.
        width, layers = self.transformer.width, self.transformer.layers
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

        nn.init.normal_(self.text_projection, std=width**-0.5)

    def build_attention_mask(self) -> torch.Tensor:
        """The causal mask (context_length, context_length) that the text tower's blocks start with.

        Reading needs no causality; it was kept so that the tower can start from, or be trained also as, a language
        model (CLIP §2.4).
        """
        return causal_mask(self.context_length)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the towers' matrix products."""
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embed pictures.

        Parameters
        ----------
        image : torch.Tensor
            (N, 3, R, R), float, as `preprocess` returns it.

        Returns
        -------
        torch.Tensor
            (N, E) of the model's dtype, not unit length.

        Raises
        ------
        ValueError
            If the image tower cannot read pictures of that shape.
        """
        image = image.type(self.dtype)
        try:
            if not _is_recording(image):
                self._check_whole_patches(image)
            return self.visual(image)
        except (RuntimeError, ValueError) as error:
            side = getattr(self.visual, "input_resolution", None)
            if side is None or image.shape[1:] == (3, side, side):  # then it is about something else
                raise
            raise ValueError(
                f"expected pictures (N, 3, {side}, {side}), got {tuple(image.shape)}: `preprocess` makes them, "
                "image[None] is a batch of one, and clip.load(..., image_size=...) makes a model for another size"
            ) from error

    def _check_whole_patches(self, image: torch.Tensor) -> None:
        """Raise a ValueError if the image tower would silently leave out the edges of a picture of a wrong size."""
        side, stride = getattr(self.visual, "input_resolution", None), getattr(self.visual, "stride", 1)
        if image.shape[2:] != (side, side) and any(length % stride for length in image.shape[2:]):
            raise ValueError(f"the tower reads whole squares of {stride} pixels and would leave out the rest")

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Embed texts, each read out at its first end token.

        No position after the longest caption's end token is computed: attention is causal, so nothing before could
        have seen them. Hooks inside the tower therefore see a shorter sequence than `text`.

        Parameters
        ----------
        text : torch.Tensor
            (N, L) token ids as `clip.tokenize` returns them, L at most the context length.

        Returns
        -------
        torch.Tensor
            (N, E) of the model's dtype, not unit length.

        Raises
        ------
        ValueError
            If `text` is not two-dimensional, or longer than the context.
        """
        end = text.argmax(dim=-1)  # (N,): the end token has the highest id, and argmax finds the first one
        length = text.shape[-1]
        if not _is_recording(text):  # a graph would have this caption's length frozen into it
            length = self._length_needed(text, end)

        x = self.token_embedding(text[:, :length]).type(self.dtype)  # (N, L, D)
        x = x + self.positional_embedding[:length].type(self.dtype)
        x = x.permute(1, 0, 2)  # (N, L, D) -> (L, N, D)
        x = self.transformer(x)
        x = x.permute(1, 0, 2)  # (L, N, D) -> (N, L, D)
        x = self.ln_final(x).type(self.dtype)
        return x[torch.arange(x.shape[0], device=x.device), end] @ self.text_projection

    def _length_needed(self, text: torch.Tensor, end: torch.Tensor) -> int:
        """How many positions of `text` the features at `end` depend on, rounded up to a multiple of 8.

        All of them where somebody took a mask away, or replaced it by one that looks ahead.
        """
        context = self.positional_embedding.shape[0]
        if text.dim() != 2 or text.shape[1] > context:
            raise ValueError(f"expected token ids of shape (N, up to {context}), got {tuple(text.shape)}")
        if len(text) == 0 or not getattr(self.transformer, "is_causal", False):
            return text.shape[1]
        return min(text.shape[1], 8 * math.ceil((int(end.max()) + 1) / 8))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare every picture with every text (CLIP Fig. 3).

        Parameters
        ----------
        image : torch.Tensor
            (N, 3, R, R), float.
        text : torch.Tensor
            (M, L) token ids.

        Returns
        -------
        logits_per_image : torch.Tensor
            (N, M), cosines times exp(logit_scale); the softmax of a row is over texts.
        logits_per_text : torch.Tensor
            (M, N), its transpose.
        """
        image_features = self.encode_image(image)
        text_features = self.encode_text(text)

        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        text_features = text_features / text_features.norm(dim=-1, keepdim=True)

        # CLIP §2.5 keeps exp(logit_scale) at most 100 while it trains; the release does not clip it here, nor do we.
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()


class ImageTower(CLIP):
    """A CLIP without its text tower: `encode_image` and `logit_scale`, with the names they have in the whole model.

    Parameters
    ----------
    config : CLIPConfig
        The sizes of the whole model.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__(**vars(config))
        del self.transformer, self.token_embedding, self.positional_embedding, self.ln_final, self.text_projection

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Raise a RuntimeError: there is nothing to embed texts with."""
        raise RuntimeError(
            'this model cannot embed texts: it was loaded with tower="image"; load a whole one without `tower`'
        )


class TextTower(CLIP):
    """A CLIP without its image tower: `encode_text` and `logit_scale`, with the names they have in the whole model.

    Parameters
    ----------
    config : CLIPConfig
        The sizes of the whole model.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__(**vars(config))
        del self.visual

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tower's matrix products."""
        return self.text_projection.dtype

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Raise a RuntimeError: there is nothing to embed pictures with."""
        raise RuntimeError(
            'this model cannot embed pictures: it was loaded with tower="text"; load a whole one without `tower`'
        )


TOWERS = {"image": ImageTower, "text": TextTower}


def tower_of(model: CLIP) -> str | None:
    """The tower, "image" or "text", that a model is alone; None if it is a whole one."""
    return next((tower for tower, kind in TOWERS.items() if isinstance(model, kind)), None)


def _is_recording(x: torch.Tensor) -> bool:
    """Whether the operations on `x` become a graph that other tensors are to run through: numbers must not be read."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or type(x) is not torch.Tensor  # FakeTensor and its like
        or x.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(x)  # vmap
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def convert_weights(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Put the weights that enter matrix products into half precision, in place, as the released files have them.

    LayerNorm, BatchNorm, embeddings and `logit_scale` stay as they are.

    Parameters
    ----------
    model : nn.Module
        A CLIP model, or any other.
    dtype : torch.dtype
        float16 as released, or bfloat16.
    """
    for _, parameter in _matrix_parameters(model):
        parameter.data = parameter.data.to(dtype)


def _matrix_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of convolutions, linear layers, attention and projections, with their names."""
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            names = {"weight", "bias"}
        elif isinstance(module, nn.MultiheadAttention):
            names = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
            names |= {"in_proj_bias", "bias_k", "bias_v"}
        else:
            names = {"text_projection", "proj"}
        for name, parameter in module.named_parameters(recurse=False):
            if name in names:
                yield f"{prefix}.{name}" if prefix else name, parameter


def build_model(state_dict: Mapping[str, torch.Tensor]) -> CLIP:
    """Build the model that a state dict with OpenAI's names belongs to.

    Parameters
    ----------
    state_dict : mapping of str to torch.Tensor
        Weights, copied; the mapping is left as it is. Sizes are read from the shapes, the activation is QuickGELU.

    Returns
    -------
    CLIP
        In half precision as :func:`convert_weights` makes it, on the CPU, in evaluation mode.

    Raises
    ------
    ValueError
        If it is no state dict of a CLIP model.
    RuntimeError
        If entries are missing, unexpected or of another shape.
    """
    weights = {name: tensor for name, tensor in state_dict.items() if name not in ARCHIVE_SIZES}
    return assemble(CLIPConfig.from_state_dict(weights), weights, torch.float16, "cpu")


def assemble(
    config: CLIPConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    tower: str | None = None,
) -> CLIP:
    """Build a model around weights, emptying `weights` on the way.

    The model is never filled with random numbers, and each tensor is let go as soon as its copy is made, so that no
    more than one copy of the weights is in memory even if `weights` is a view of a file.

    Parameters
    ----------
    config : CLIPConfig
        The model's sizes.
    weights : dict of str to torch.Tensor
        One tensor for each entry of the model's state dict. Empty afterwards.
    dtype : torch.dtype
        Of the matrices. Everything else is kept in at least float32.
    device : torch.device or str
        Where the model is to live.
    tower : str, optional
        "image" or "text", if `weights` are of this tower alone.

    Returns
    -------
    CLIP
        In evaluation mode; an :class:`ImageTower` or a :class:`TextTower` if one was named.

    Raises
    ------
    RuntimeError
        If entries are missing, unexpected or of another shape.
    """
    model = _skeleton(config, tower)
    entries = model.state_dict()
    _compare(entries, weights)

    matrices = {name for name, _ in _matrix_parameters(model)}
    others = torch.promote_types(dtype, torch.float32)
    own = {}
    for name, entry in sorted(entries.items(), key=lambda item: -item[1].numel()):  # large ones while there is room
        target = dtype if name in matrices else others if entry.is_floating_point() else entry.dtype
        tensor = weights.pop(name)
        own[name] = tensor.to(device, target, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(own, assign=True)
    return model.to(device).eval()


def check_entries(config: CLIPConfig, weights: Mapping[str, torch.Tensor], tower: str | None = None) -> None:
    """Raise a RuntimeError that lists what is missing, unexpected or of another shape in a model of these sizes."""
    _compare(_skeleton(config, tower).state_dict(), weights)


def _compare(expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise a RuntimeError that lists the differences in names and shapes."""
    common = [name for name in expected if name in weights]
    shapes = [(name, tuple(expected[name].shape), tuple(weights[name].shape)) for name in common]
    faults = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [f"{name} (expected {want}, got {got})" for name, want, got in shapes if want != got],
    }
    found = [
        f"{len(names)} {fault}: {', '.join(names[:5])}{' ...' * (len(names) > 5)}"
        for fault, names in faults.items()
        if names
    ]
    if found:
        raise RuntimeError("the weights are not those of this CLIP model: " + "; ".join(found))


def _skeleton(config: CLIPConfig, tower: str | None = None) -> CLIP:
    """A model without weights: its memory is asked for, but neither filled nor touched."""
    with _Uninitialised():
        return TOWERS[tower](config) if tower else CLIP(**vars(config))


class _Uninitialised(TorchFunctionMode):
    """Inside this context modules are built without drawing a random number: their weights are about to be replaced."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)


def config_of(model: CLIP) -> CLIPConfig:
    """The sizes of a model as they stand, read from its weights and modules; of a tower that is not there, ViT-B/32's.

    Raises
    ------
    ValueError
        If the model was changed into something that no sizes describe.
    """
    tower = tower_of(model)
    visual = None if tower == "text" else model.visual
    text_blocks = [] if tower == "image" else model.transformer.resblocks
    vision_blocks = visual.transformer.resblocks if isinstance(visual, VisionTransformer) else []

    layers = {type(block.mlp.gelu) for block in (*text_blocks, *vision_blocks)}  # none in a ResNet alone
    names = [name for name, layer in ACTIVATIONS.items() if layers <= {layer}]
    if not names:
        raise ValueError(f"expected the same activation in all blocks, one of {list(ACTIVATIONS)}, got {layers}")
    heads = {block.attn.num_heads for block in text_blocks} or {None}
    vision_heads = {block.attn.num_heads for block in vision_blocks} or {visual.attnpool.num_heads if visual else None}
    if len(heads) > 1 or len(vision_heads) > 1:
        raise ValueError(
            f"expected one number of heads in all blocks of a tower, got {heads} in the text tower and {vision_heads} "
            "in the image tower"
        )
    config = CLIPConfig(
        **sizes_shown(model.state_dict(), tower),
        transformer_heads=heads.pop(),
        vision_heads=vision_heads.pop(),
        activation=names[0],
        image_mean=model.image_mean,
        image_std=model.image_std,
        image_resize=model.image_resize,
    )
    if visual is None:
        return config
    # Shapes tell the resolution to a multiple of the stride only.
    same_grid = visual.input_resolution // config.stride == config.image_resolution // config.stride
    return replace(config, image_resolution=visual.input_resolution) if same_grid else config
