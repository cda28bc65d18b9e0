"""Optimizing: the same function, computed in less time.

:func:`optimize` makes an inference copy of a model. What it computes differs from the model by rounding only, since
each step is an identity:

    linear layers    The weights are laid out in memory as the processor reads them, once and not in every call.
    convolutions     One that reads whole patches is a linear layer over the numbers of a patch (ViT Eq. 1), one of
                     size 1x1 a linear layer over the channels of a pixel. The others are computed with channels last.
    BatchNorm        In evaluation its statistics are constants. With s = γ / √(σ² + ε),
                     s · (W∗x - μ) + β  =  (s · W)∗x + (β - s · μ),  the convolution before it with other weights.
    QuickGELU        x σ(1.702 x) = silu(1.702 x) / 1.702, and the two factors go into the weights before and after.
    the last block   Only one token of it is read out, so only that one asks and goes through the perceptron.
    short texts      Linear layers see the tokens of all texts in one row, without what pads them to the same length.
    a lone query     It needs neither the keys nor the values of the L tokens x_l, as the products can be regrouped:
                     q · (W_k x_l + b_k)  =  (W_kᵀ q) · x_l + q · b_k, and what is the same for all l the softmax does
                     not see;  Σ a_l (W_v x_l + b_v)  =  W_v (Σ a_l x_l) + b_v,  as Σ a_l = 1.
                     So it is in the last block, and in the attention pool of the ResNets.

The model as it is meant to be read and trained is that of `clip.model`.
"""

import copy
import functools
import time
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .attention import MultiheadAttention, causal_mask
from .dual_encoder import DualEncoder, convert_foreign_towers
from .layers import LayerNorm, QuickGELU
from .model import CLIP, ImageTower, TextTower, _is_recording, convert_weights
from .resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from .towers import ResidualHead, TextTransformer
from .transformer import ResidualAttentionBlock, Transformer
from .vit import VisionTransformer

__all__ = ["OptimizedCLIP", "OptimizedDualEncoder", "optimize", "optimized_copy"]

AT_ONCE = 4  # pictures in a ResNet on a CPU: what its first layers make of more does not stay in the processor's cache


def optimize(model: CLIP, dtype: torch.dtype | None = None) -> CLIP:
    """Make a copy of a model that is faster, and for inference only.

    Parameters
    ----------
    model : CLIP
        Left as it is. The copy shares no memory with it: what is changed in one later does not show in the other.
    dtype : torch.dtype, optional
        Of the copy's matrix products; the model's own if not given. bfloat16 is almost twice as fast as float32 on
        processors that know it. Features of ViTs and texts keep a cosine above 0.999 with those in float32, and those
        of ResNets lose no more than the plain model does in bfloat16.

    Returns
    -------
    CLIP
        An :class:`OptimizedCLIP`, on the device of the model, in evaluation mode. What is not as `clip.model` builds it
        (replaced blocks, hooks, other classes, a :class:`clip.DualEncoder`'s towers of timm and transformers) is copied
        as it is, and a warning names it. If that is the model itself, a plain copy is returned. An
        :class:`OptimizedCLIP` of that dtype is returned as it is. Which layers are packed is measured on the spot, so
        that two copies may differ in rounding.

    Raises
    ------
    ValueError
        If `dtype` is not a floating point type, or `model` was optimised with another one.

    Examples
    --------
    >>> model, preprocess = clip.load("ViT-B/32", device="cpu")  # doctest: +SKIP
    >>> model = clip.optimize(model)  # doctest: +SKIP
    """
    copied = optimized_copy(model, dtype)
    left = [name or "the model itself" for name, part in copied.named_modules() if _is_left(part)]
    if left and copied is not model:
        warnings.warn(f"not as clip.model builds it, so copied and not optimised: {', '.join(left)}", stacklevel=2)
    return copied


def optimized_copy(model: CLIP, dtype: torch.dtype | None = None) -> CLIP:
    """What :func:`optimize` returns, without its warning: for code that optimises though nobody asked it to."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type, got {dtype}")
    if isinstance(model, OptimizedCLIP):
        if dtype not in (None, model.dtype):
            raise ValueError(f"expected a plain model for {dtype}, got one that was optimised in {model.dtype}")
        return model
    if type(model) in (CLIP, ImageTower, TextTower) and _is_untouched(model):
        copied = OptimizedCLIP(model, dtype or model.dtype)
    elif type(model) is DualEncoder and _is_untouched(model):
        copied = OptimizedDualEncoder(model, dtype or model.dtype)
    else:
        copied = _left(model)
    if dtype is not None:
        for part in filter(_is_left, copied.modules()):
            convert_weights(part, dtype)
    return copied


class OptimizedCLIP(CLIP):
    """The inference copy of a model, as :func:`optimize` makes it.

    It embeds as every CLIP does, and answers to `dtype`, `logit_scale`, `context_length`, `vocab_size` and
    `visual.input_resolution`. It has no gradients, and computes in its own precision also under autocast. It cannot be
    trained, moved, converted, pickled or saved: do that with the model, and optimise again.

    Parameters
    ----------
    model : CLIP
        With both towers or with one.
    dtype : torch.dtype
        Of the matrix products.
    """

    def __init__(self, model: CLIP, dtype: torch.dtype):
        nn.Module.__init__(self)  # none of a CLIP's weights
        self._dtype = dtype
        self.context_length = model.context_length
        self.vocab_size = model.vocab_size
        self.image_mean, self.image_std, self.image_resize = model.image_mean, model.image_std, model.image_resize
        self.logit_scale = _fixed(model.logit_scale)
        self.visual = self.transformer = None
        if not isinstance(model, TextTower):
            self.visual = _image_tower(model.visual, dtype)
        if not isinstance(model, ImageTower):
            self._copy_text_tower(model)
        super().train(False)

    def _copy_text_tower(self, model: CLIP) -> None:
        """Take over the parts of the text tower, which stand on the model itself."""
        self.token_embedding = _as_it_is(model.token_embedding)
        self.positional_embedding = _fixed(model.positional_embedding)
        self.ln_final = _as_it_is(model.ln_final)
        if _is_ours(model, {"": type(model), **_TEXT_TOWER}, inside=("visual", "transformer.resblocks.")):
            self.transformer = _Transformer(model.transformer, self.dtype)
            self.project_text = _Linear(model.text_projection.T, None, self.dtype)
        else:
            self.transformer = _left(model.transformer)
            self.text_projection = _fixed(model.text_projection, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the towers' matrix products."""
        return self._dtype

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embed pictures, as :meth:`CLIP.encode_image` does."""
        if self.visual is None:
            return TextTower.encode_image(self, image)  # says that it is not there
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return super().encode_image(image)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Embed texts, as :meth:`CLIP.encode_text` does."""
        if self.transformer is None:
            return ImageTower.encode_text(self, text)
        with torch.no_grad(), torch.autocast(text.device.type, enabled=False):
            if not isinstance(self.transformer, _Transformer):
                return super().encode_text(text)
            end = text.argmax(dim=-1)
            length = text.shape[-1] if _is_recording(text) else self._length_needed(text, end)
            x = self.token_embedding(text[:, :length]).type(self.dtype)  # (N, L, D)
            x = x + self.positional_embedding[:length].type(self.dtype)
            return self.project_text(self.ln_final(self.transformer(x, end)))

    def train(self, mode: bool = True) -> "OptimizedCLIP":
        """Stay in evaluation mode; a RuntimeError if asked to train."""
        if mode:
            raise RuntimeError("an optimised copy is for inference: train the model it was made from")
        return self

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """Raise a RuntimeError: the weights are no longer those of a CLIP."""
        raise RuntimeError("an optimised copy has no state dict: take that of the model it was made from")

    def __reduce_ex__(self, protocol):
        raise TypeError("an optimised copy can be neither copied nor pickled: take the model, and optimise there")

    def _apply(self, fn, recurse=True):
        """What `to`, `half`, `cuda` and the like come down to: nothing to do, or a RuntimeError."""
        before = torch.empty(0, dtype=self.dtype, device=self.logit_scale.device)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise RuntimeError(
                f"an optimised copy stays on {before.device} in {before.dtype}: move or convert the model it was made "
                "from, and optimise that"
            )
        return self


class OptimizedDualEncoder(OptimizedCLIP, DualEncoder):
    """The inference copy of a :class:`clip.DualEncoder`: of its parts, those that are ours are optimised.

    Parameters
    ----------
    model : DualEncoder
        With both towers or with one.
    dtype : torch.dtype
        Of the matrix products, and of everything in a tower from outside.
    """

    def __init__(self, model: DualEncoder, dtype: torch.dtype):
        nn.Module.__init__(self)
        self._dtype = dtype
        self.context_length = model.context_length
        self.logit_scale = _fixed(model.logit_scale)
        self.tokenizer, self.preprocess = copy.deepcopy(model.tokenizer), copy.deepcopy(model.preprocess)
        self.visual = self.visual_projection = self.text_tower = self.text_projection = None
        if model.visual is not None:
            self.visual = _image_tower(model.visual, dtype)
            self.visual_projection = _head(model.visual_projection, dtype)
        if model.text_tower is not None:
            self.text_tower = _text_tower(model.text_tower, dtype)
            self.text_projection = _head(model.text_projection, dtype)
        convert_foreign_towers(self, dtype)
        nn.Module.train(self, False)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Embed texts, as :meth:`DualEncoder.encode_text` does."""
        with torch.no_grad(), torch.autocast(text.device.type, enabled=False):
            return DualEncoder.encode_text(self, text)


# -- the towers -------------------------------------------------------------------------------------------------------


def _image_tower(visual: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The copy of an image tower."""
    if _is_ours(visual, _VISION_TRANSFORMER, inside=("transformer.resblocks.",)) and _reads_patches(visual.conv1):
        return _VisionTransformer(visual, dtype)
    if _is_ours(visual, _MODIFIED_RESNET, inside=("layer1.", "layer2.", "layer3.", "layer4.", "attnpool")):
        return _ModifiedResNet(visual, dtype)
    return _left(visual)


def _text_tower(tower: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The copy of a text tower that is a module of its own."""
    if type(tower) is TextTransformer and _is_untouched(tower):
        return _TextTransformer(tower, dtype)
    return _left(tower)


def _head(head: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The copy of what stands between a tower and the joint space."""
    if _is_ours(head, {"": nn.Linear}):
        return _Linear(head.weight, head.bias, dtype)
    if _is_ours(head, {"": nn.Identity}):
        return _as_it_is(head)
    if not _is_ours(head, _RESIDUAL_HEAD):
        return _left(head)
    copied = _as_it_is(head)
    copied.projection = _Linear(head.projection.weight, head.projection.bias, dtype)
    copied.fc = _Linear(head.fc.weight, head.fc.bias, dtype)
    return copied


class _TextTransformer(OptimizedCLIP):
    """CLIP's text tower as a module of its own."""

    def __init__(self, tower: TextTransformer, dtype: torch.dtype):
        nn.Module.__init__(self)
        self._dtype = dtype
        self.context_length, self.vocab_size = tower.context_length, tower.vocab_size
        self.output_dim = tower.output_dim
        self._copy_text_tower(tower)
        nn.Module.train(self, False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """(N, L) token ids -> (N, E)."""
        return self.encode_text(text)


def _reads_patches(conv: nn.Conv2d) -> bool:
    """Whether a convolution reads each whole patch once, so that patches do not overlap."""
    return conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.groups == 1


class _VisionTransformer(nn.Module):
    """The ViT, whose patches are rows of a matrix, and whose last block knows that only the class token is read."""

    def __init__(self, visual: VisionTransformer, dtype: torch.dtype):
        super().__init__()
        self.input_resolution, self.stride = visual.input_resolution, visual.stride
        self.output_dim = visual.output_dim
        self.patch_size = visual.conv1.kernel_size
        self.conv1 = _Linear(visual.conv1.weight.flatten(1), None, dtype)
        self.class_embedding = _fixed(visual.class_embedding, dtype)
        self.positional_embedding = _fixed(visual.positional_embedding, dtype)
        self.ln_pre = _as_it_is(visual.ln_pre)
        self.transformer = _Transformer(visual.transformer, dtype)
        self.ln_post = _as_it_is(visual.ln_post)
        self.proj = nn.Identity() if visual.proj is None else _Linear(visual.proj.T, None, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, R, R) -> (N, E)."""
        x = self.conv1(_patches(x, self.patch_size))  # (N, G², D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (N, G² + 1, D)
        x = self.ln_pre(x + self.positional_embedding)
        class_token = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.proj(self.ln_post(self.transformer(x, class_token)))


def _patches(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, 3, R, R) -> (N, G², 3 P²): the numbers of each patch in the order of a convolution's weights."""
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"expected pictures of shape (N, 3, R, R), got {tuple(image.shape)}")
    height, width = size
    patches = image.unfold(2, height, height).unfold(3, width, width)  # (N, 3, G, G, P, P)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class _ModifiedResNet(nn.Module):
    """The ResNet without BatchNorm, channels last."""

    def __init__(self, visual: ModifiedResNet, dtype: torch.dtype):
        super().__init__()
        self.input_resolution, self.stride = visual.input_resolution, visual.stride
        self.output_dim = visual.output_dim
        self.conv1 = _without_norm(visual.conv1, visual.bn1, dtype, relu=True)
        self.conv2 = _without_norm(visual.conv2, visual.bn2, dtype, relu=True)
        self.conv3 = _without_norm(visual.conv3, visual.bn3, dtype, relu=True)
        self.avgpool = _as_it_is(visual.avgpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(*(_bottleneck(block, dtype) for block in stage))
            for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        )
        pool = visual.attnpool
        self.attnpool = _AttentionPool2d(pool, dtype) if _is_ours(pool, _ATTENTION_POOL) else _left(pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, R, R) -> (N, E)."""
        if x.device.type == "cpu" and len(x) > AT_ONCE and not _is_recording(x):
            return torch.cat([self._embed(part) for part in x.split(AT_ONCE)])
        return self._embed(x)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, R, R) -> (N, E)."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x)
        x = self.conv2(x)
        x = self.conv3(x)
        x = self.avgpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.attnpool(x)


def _bottleneck(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The copy of one block of a ResNet."""
    kinds = _BOTTLENECK if getattr(block, "downsample", None) is None else {**_BOTTLENECK, **_DOWNSAMPLE}
    return _Bottleneck(block, dtype) if _is_ours(block, kinds) else _left(block)


class _Bottleneck(nn.Module):
    """Three convolutions around a shortcut."""

    def __init__(self, block: Bottleneck, dtype: torch.dtype):
        super().__init__()
        self.conv1 = _without_norm(block.conv1, block.bn1, dtype, relu=True)
        self.conv2 = _without_norm(block.conv2, block.bn2, dtype, relu=True)
        self.avgpool = _as_it_is(block.avgpool)
        self.conv3 = _without_norm(block.conv3, block.bn3, dtype)
        self.downsample = nn.Identity()
        if block.downsample is not None:
            pool, conv, norm = block.downsample
            self.downsample = nn.Sequential(_as_it_is(pool), _without_norm(conv, norm, dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inplanes, H, W) -> (N, 4 · planes, H / stride, W / stride)."""
        identity = self.downsample(x)
        x = self.conv1(x)
        x = self.conv2(x)
        x = self.conv3(self.avgpool(x))
        return x.add_(identity).relu_()


class _AttentionPool2d(nn.Module):
    """The attention pool, whose mean is a single query."""

    def __init__(self, pool: AttentionPool2d, dtype: torch.dtype):
        super().__init__()
        self.positional_embedding = _fixed(pool.positional_embedding, dtype)
        self.attn = _OneQueryAttention(
            torch.cat([pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight]),
            torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
            pool.c_proj,
            pool.num_heads,
            dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, G, G) -> (N, E)."""
        x = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, G², C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # (N, G² + 1, C)
        return self.attn(x[:, 0], x)


# -- the transformer, sequence second ---------------------------------------------------------------------------------


class _Transformer(nn.Module):
    """The blocks of a transformer for (N, L, D), of which one token of each sequence is wanted."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype):
        super().__init__()
        self.is_causal = transformer.is_causal
        *blocks, last = transformer.resblocks
        copies = [_Block(block, dtype) if _is_our_block(block) else _left(block) for block in blocks]
        copies.append(_LastBlock(last, dtype) if _is_our_block(last) else _left(last))
        self.resblocks = nn.ModuleList(copies)

    def forward(self, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """(N, L, D) -> (N, D): for each sequence what became of the token (N,) that is read out."""
        *blocks, last = self.resblocks
        if self.is_causal and all(isinstance(block, _Block) for block in blocks) and not _is_recording(x):
            packing = _Packing(token, x.shape[1])  # nobody looks beyond the token
            x = packing.pack(x)
            for block in blocks:
                x = block(x, packing)
            x = packing.unpack(x)
        else:
            for block in blocks:
                x = block(x) if isinstance(block, _Block) else _sequence_first(block, x)
        if isinstance(last, _LastBlock):
            return last(x, token)
        return _take(_sequence_first(last, x), token)


class _Packing:
    """N sequences in a batch (N, L, D), or one behind the other (T, D) without what comes after their `last` (N,)."""

    def __init__(self, last: torch.Tensor, length: int):
        wanted = torch.arange(length, device=last.device) <= last[:, None]  # (N, L)
        self.shape = wanted.shape
        self.places = wanted.flatten().nonzero()[:, 0]  # (T,)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, D) -> (T, D)."""
        return x.flatten(0, 1)[self.places]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (N, L, D), zeros where nothing was."""
        count, length = self.shape
        return x.new_zeros(count * length, x.shape[1]).index_copy_(0, self.places, x).unflatten(0, (count, length))


def _sequence_first(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N, L, D) -> (N, L, D) by a block for (L, N, D), as those of the plain model are."""
    return block(x.transpose(0, 1)).transpose(0, 1)


class _Block(nn.Module):
    """A residual attention block for (N, L, D)."""

    def __init__(self, block: ResidualAttentionBlock, dtype: torch.dtype):
        super().__init__()
        self.heads = block.attn.num_heads
        self.is_causal = block.attn_mask is not None
        self.ln_1 = _as_it_is(block.ln_1)
        self.in_proj = _Linear(block.attn.in_proj_weight, block.attn.in_proj_bias, dtype)
        self.out_proj = _Linear(block.attn.out_proj.weight, block.attn.out_proj.bias, dtype)
        self.ln_2 = _as_it_is(block.ln_2)
        self.mlp = _perceptron(block.mlp, dtype)

    def forward(self, x: torch.Tensor, packing: _Packing | None = None) -> torch.Tensor:
        """(N, L, D) -> (N, L, D), or with a packing (T, D) -> (T, D)."""
        qkv = self.in_proj(self.ln_1(x))
        if packing is not None:
            qkv = packing.unpack(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, H, L, d) each
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal).transpose(1, 2).flatten(2)
        x = x + self.out_proj(heads if packing is None else packing.pack(heads))
        return x + self.mlp(self.ln_2(x))


class _LastBlock(nn.Module):
    """A residual attention block of which one token of each sequence is wanted."""

    def __init__(self, block: ResidualAttentionBlock, dtype: torch.dtype):
        super().__init__()
        self.is_causal = block.attn_mask is not None
        attn = block.attn
        self.ln_1 = _as_it_is(block.ln_1)
        self.attn = _OneQueryAttention(attn.in_proj_weight, attn.in_proj_bias, attn.out_proj, attn.num_heads, dtype)
        self.ln_2 = _as_it_is(block.ln_2)
        self.mlp = _perceptron(block.mlp, dtype)

    def forward(self, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """(N, L, D) and a position (N,) in each -> (N, D)."""
        normed = self.ln_1(x)
        seen = torch.arange(x.shape[1], device=x.device) <= token[:, None] if self.is_causal else None  # (N, L)
        x = _take(x, token) + self.attn(_take(normed, token), normed, seen)
        return x + self.mlp(self.ln_2(x))


class _OneQueryAttention(nn.Module):
    """Attention with a single query to each sequence: neither keys nor values are computed.

    What is multiplied here is small, so half precision would gain nothing and is not used for it.
    """

    def __init__(
        self,
        in_proj_weight: torch.Tensor,
        in_proj_bias: torch.Tensor,
        out_proj: nn.Linear,
        heads: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        w_q, w_k, w_v = in_proj_weight.detach().chunk(3)  # (D, D) each
        b_q, _, b_v = in_proj_bias.detach().chunk(3)  # the softmax does not see b_k
        precise = torch.promote_types(dtype, torch.float32)
        self.scale = (len(w_q) // heads) ** -0.5
        self.query = _Linear(w_q, b_q, dtype)
        self.w_k = _fixed(w_k.unflatten(0, (heads, -1)), precise)  # (H, d, D)
        self.w_v = _fixed(w_v.unflatten(0, (heads, -1)), precise)
        self.b_v = _fixed(b_v, precise)  # (D,)
        self.out_proj = _Linear(out_proj.weight, out_proj.bias, dtype)

    def forward(self, query: torch.Tensor, x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Ask `query` (N, D) of `x` (N, L, D), as far as it is `seen` (N, L) -> (N, E)."""
        heads = len(self.w_k)
        q = self.query(query).unflatten(-1, (heads, -1)).to(self.w_k.dtype)  # (N, H, d)
        tokens = x.to(self.w_k.dtype)
        q = torch.einsum("nhd,hdD->nhD", q * self.scale, self.w_k)  # W_kᵀ q
        scores = q @ tokens.mT  # (N, H, L)
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
        means = scores.softmax(dim=-1) @ tokens  # (N, H, D)
        values = torch.einsum("nhD,hdD->nhd", means, self.w_v).flatten(1) + self.b_v  # (N, D)
        return self.out_proj(values.to(x.dtype))


def _perceptron(mlp: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    """The two linear layers of a block, with the factors of QuickGELU in their weights."""
    if type(mlp.gelu) is QuickGELU:
        before, activation, after = 1.702, nn.SiLU(inplace=True), 1 / 1.702
    else:
        before, activation, after = 1, _as_it_is(mlp.gelu), 1
    return nn.Sequential(
        _Linear(mlp.c_fc.weight * before, mlp.c_fc.bias * before, dtype),
        activation,
        _Linear(mlp.c_proj.weight * after, mlp.c_proj.bias, dtype),
    )


def _take(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """(N, L, D) -> (N, D): one position of each sequence."""
    return x[torch.arange(len(x), device=x.device), token]


# -- linear layers and convolutions -----------------------------------------------------------------------------------


class _Linear(nn.Module):
    """A linear layer with weights (outputs, inputs) of its own, packed where that is faster; maybe with a ReLU."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, relu: bool = False):
        super().__init__()
        self.relu = relu
        weight = _fixed(weight, dtype)
        self.bias = None if bias is None else _fixed(bias, dtype)
        self.is_packed = weight.device.type == "cpu" and _packing_pays(*weight.shape, dtype)
        self.weight = _pack(weight) if self.is_packed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        if self.is_packed:
            return _packed_linear(x, self.weight, self.bias, self.relu)
        x = F.linear(x, self.weight, self.bias)
        return x.relu_() if self.relu else x


# PyTorch's own compiler calls these two; PyTorch has no public name for them.


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """Weights in the layout that oneDNN chooses for this processor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, relu: bool = False
) -> torch.Tensor:
    """`F.linear` for weights that were packed, and maybe a ReLU."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "relu" if relu else "none", [], "")


@functools.cache
def _packing_pays(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether packed weights of this shape are faster, here and now: the best of three runs each, turn by turn."""
    rows = max(64, 2**26 // (outputs * inputs))  # about a millisecond's work
    x, weight = torch.zeros(rows, inputs, dtype=dtype), torch.zeros(outputs, inputs, dtype=dtype)
    try:
        ways = {F.linear: weight, _packed_linear: _pack(weight)}
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(3):
            for linear, weights in ways.items():
                start = time.perf_counter()
                linear(x, weights, None)
                best[linear] = min(best[linear], time.perf_counter() - start)
    except (AttributeError, RuntimeError):  # not in this PyTorch, or not for this processor and dtype
        return False
    return best[_packed_linear] < best[F.linear]


def _without_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype, relu: bool = False) -> nn.Module:
    """What `conv` and then `norm` do, s · (W∗x - μ) + β = (s · W)∗x + (β - s · μ), in one; and maybe a ReLU."""
    precise = torch.promote_types(conv.weight.dtype, torch.float32)
    s = norm.weight.to(precise) / (norm.running_var.to(precise) + norm.eps).sqrt()
    weight = s[:, None, None, None] * conv.weight.to(precise)
    bias = norm.bias.to(precise) - s * norm.running_mean.to(precise)
    if conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1:
        return _PixelwiseLinear(weight.flatten(1), bias, dtype, relu)
    folded = _as_it_is(conv)
    folded.weight = _fixed(weight, dtype, torch.channels_last)
    folded.bias = _fixed(bias, dtype)
    return nn.Sequential(folded, nn.ReLU(inplace=True)) if relu else folded


class _PixelwiseLinear(nn.Module):
    """A 1x1 convolution: with channels last, pixels are the rows of a matrix."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, relu: bool):
        super().__init__()
        self.linear = _Linear(weight, bias, dtype, relu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H, W), channels last in memory."""
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# -- what is ours, and what is left as it was -------------------------------------------------------------------------

_CONVOLUTIONS = {
    f"{name}{i}": kind
    for i in (1, 2, 3)
    for name, kind in (("conv", nn.Conv2d), ("bn", nn.BatchNorm2d), ("relu", nn.ReLU))
}
_MODIFIED_RESNET = {
    "": ModifiedResNet,
    **_CONVOLUTIONS,
    "avgpool": nn.AvgPool2d,
    **dict.fromkeys(("layer1", "layer2", "layer3", "layer4"), nn.Sequential),
}
_BOTTLENECK = {"": Bottleneck, **_CONVOLUTIONS, "avgpool": (nn.AvgPool2d, nn.Identity)}
_DOWNSAMPLE = {
    "downsample": nn.Sequential,
    "downsample.-1": nn.AvgPool2d,
    "downsample.0": nn.Conv2d,
    "downsample.1": nn.BatchNorm2d,
}
_ATTENTION_POOL = {"": AttentionPool2d, **dict.fromkeys(("q_proj", "k_proj", "v_proj", "c_proj"), nn.Linear)}
_TRANSFORMER = {"transformer": Transformer, "transformer.resblocks": nn.Sequential}
_VISION_TRANSFORMER = {
    "": VisionTransformer,
    "conv1": nn.Conv2d,
    "ln_pre": LayerNorm,
    **_TRANSFORMER,
    "ln_post": LayerNorm,
}
_TEXT_TOWER = {**_TRANSFORMER, "token_embedding": nn.Embedding, "ln_final": LayerNorm}
_RESIDUAL_HEAD = {
    "": ResidualHead,
    "projection": nn.Linear,
    "gelu": nn.GELU,
    "fc": nn.Linear,
    "dropout": nn.Dropout,
    "layer_norm": LayerNorm,
}
_BLOCK = {
    "": ResidualAttentionBlock,
    "attn": MultiheadAttention,
    "attn.out_proj": NonDynamicallyQuantizableLinear,
    "ln_1": LayerNorm,
    "mlp": nn.Sequential,
    "mlp.c_fc": nn.Linear,
    "mlp.gelu": (QuickGELU, nn.GELU),
    "mlp.c_proj": nn.Linear,
    "ln_2": LayerNorm,
}


def _is_ours(module: nn.Module, kinds: Mapping[str, type | tuple[type, ...]], inside: tuple[str, ...] = ()) -> bool:
    """Whether a module is made of parts of these names and classes, untouched; what is `inside` is not looked at."""
    parts = {name: part for name, part in module.named_modules() if not name.startswith(inside)}
    return parts.keys() == kinds.keys() and all(
        type(part) in (kinds[name] if isinstance(kinds[name], tuple) else (kinds[name],)) and _is_untouched(part)
        for name, part in parts.items()
    )


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module computes what its class does in our models, with nobody listening."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or any(callable(getattr(type(module), name, None)) for name in vars(module))  # a method of its own
        or (isinstance(module, nn.Conv2d) and module.bias is not None)
        or (isinstance(module, nn.BatchNorm2d) and module.running_mean is None)
    )


def _is_our_block(block: nn.Module) -> bool:
    """Whether a residual attention block is ours, with the causal mask or none."""
    if not _is_ours(block, _BLOCK):
        return False
    mask = block.attn_mask
    return mask is None or (mask.dim() == 2 and torch.equal(mask.float().cpu(), causal_mask(len(mask))))


def _left(module: nn.Module) -> nn.Module:
    """A copy of a module that is not ours, marked as such."""
    copied = _as_it_is(module)
    copied.left_as_it_was = True
    return copied


def _is_left(module: nn.Module) -> bool:
    """Whether it is such a copy."""
    return "left_as_it_was" in vars(module)


def _as_it_is(module: nn.Module) -> nn.Module:
    """A copy of a module, for inference."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def _fixed(
    weight: torch.Tensor, dtype: torch.dtype | None = None, memory_format: torch.memory_format = torch.contiguous_format
) -> nn.Parameter:
    """A copy of a weight, in a dtype of its own if one is given, for inference."""
    copied = weight.detach().to(dtype=dtype or weight.dtype, memory_format=memory_format, copy=True)
    return nn.Parameter(copied, requires_grad=False)
