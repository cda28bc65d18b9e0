"""What the machine can do, and what a model asks of it, in floating point operations (a multiply-add is two)."""

import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import clip
from clip.attention import causal_mask
from clip.config import CLIPConfig
from clip.model import ImageTower, TextTower

from .process import Run

SHAPES = ((1600, 768, 3072), (2048, 2048, 2048), (3072, 3072, 3072))  # the first is of a ViT-B/32
WAYS = ("torch.mm", "oneDNN, packed weights", "1x1 convolution, channels last")
REPEATS = 5


def peak(dtype: str, shapes: list[tuple[int, int, int]]) -> Run:
    """A run gives, for each of WAYS, the most operations a second, of any shape and any of five tries."""

    def run() -> torch.Tensor:
        best = dict.fromkeys(WAYS, 0.0)
        for rows, inputs, outputs in shapes:
            for way, multiply in _ways(rows, inputs, outputs, getattr(torch, dtype)).items():
                for _ in range(REPEATS):
                    start = time.perf_counter()
                    multiply()
                    best[way] = max(best[way], 2 * rows * inputs * outputs / (time.perf_counter() - start))
        return torch.tensor(list(best.values()), dtype=torch.float64)

    return torch.no_grad()(run)


def _ways(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, Run]:
    """The same product, (rows, inputs) by (inputs, outputs), in each of WAYS that this processor knows."""
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    pixels = x.T.reshape(1, inputs, rows, 1).contiguous(memory_format=torch.channels_last)
    kernels = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    calls = [lambda: torch.mm(x, weight.T)]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    except (AttributeError, RuntimeError):
        calls.append(calls[0])
    calls.append(lambda: F.conv2d(pixels, kernels))
    return dict(zip(WAYS, calls, strict=True))


def image_operations(config: CLIPConfig, batch: int) -> int:
    """What our fast path multiplies for a batch of pictures: of the last block for one token only."""
    with torch.device("meta"):
        model = clip.optimize(ImageTower(config))
        images = torch.empty(batch, 3, config.image_resolution, config.image_resolution)
    with FlopCounterMode(display=False) as counter:
        model.visual(images)
    return counter.get_total_flops()


def text_operations(config: CLIPConfig, texts: list[str], batch_size: int) -> int:
    """The same for texts, in batches of similar length, padded to the longest."""
    with torch.device("meta"):
        plain = TextTower(config)
    for block in plain.transformer.resblocks:
        block.attn_mask = causal_mask(plain.context_length)  # its numbers decide whether the fast path is taken
    model = clip.optimize(plain)
    lengths = sorted(clip.count_tokens(texts))
    with FlopCounterMode(display=False) as counter:
        for start in range(0, len(lengths), batch_size):
            batch = lengths[start : start + batch_size]
            x = torch.empty(len(batch), max(batch), config.transformer_width, device="meta")
            end = torch.empty(len(batch), dtype=torch.long, device="meta")
            model.project_text(model.transformer(x, end))
    return counter.get_total_flops()
