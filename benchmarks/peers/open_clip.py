"""open_clip, its model for OpenAI's files, and the step of its training loop."""

import math
from functools import cache

import torch

from .. import inputs
from ..process import Run, serve
from . import prepare_torchvision

prepare_torchvision()
import open_clip  # noqa: E402


def load(path: str) -> torch.nn.Module:
    return open_clip.load_openai_model(path, precision="fp32", device="cpu")


@cache
def model(path: str) -> torch.nn.Module:
    return load(path).eval()


def encode_image(path: str, batch: int) -> Run:
    images = inputs.images(batch)
    return torch.no_grad()(lambda: model(path).encode_image(images))


def encode_text(path: str, batch: int) -> Run:
    tokens = open_clip.tokenize(inputs.texts("captions", batch))
    return torch.no_grad()(lambda: model(path).encode_text(tokens))


def train_step(path: str, batch: int, dtype: str) -> Run:
    learner, loss_of = load(path).train(), open_clip.ClipLoss()
    images, tokens = inputs.images(batch), open_clip.tokenize(inputs.texts("captions", batch))
    groups = [
        {"params": [p for p in learner.parameters() if (p.ndim < 2) == is_small], "weight_decay": decay}
        for is_small, decay in ((True, 0.0), (False, 0.2))
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)

    def run() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            loss = loss_of(*learner(images, tokens)[:3])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            learner.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    return run


if __name__ == "__main__":
    serve("open_clip_torch", [encode_image, encode_text, train_step])
