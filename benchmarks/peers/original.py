"""The original, openai/CLIP, from the package clip-anytorch: used as its README does."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from .. import inputs
from ..process import Run, serve
from . import prepare_original

prepare_original()
import clip  # noqa: E402
from clip.clip import _tokenizer, _transform  # noqa: E402


def tokenize(texts: list) -> Run:
    texts = inputs.texts(*texts)
    return lambda: clip.tokenize(texts, truncate=True)


def tokenize_first(texts: list) -> Run:
    texts = inputs.texts(*texts)

    def run() -> torch.Tensor:
        _tokenizer.cache = {token: token for token in inputs.SPECIAL_TOKENS}
        return clip.tokenize(texts, truncate=True)

    return run


def preprocess(folder: str, threads: int) -> Run:
    paths, transform = sorted(Path(folder).iterdir()), _transform(inputs.RESOLUTION)

    def read(path: Path) -> torch.Tensor:
        return transform(Image.open(path))

    def run() -> torch.Tensor:
        if threads == 1:
            return torch.stack([read(path) for path in paths])
        with ThreadPoolExecutor(threads) as pool:
            return torch.stack(list(pool.map(read, paths)))

    return run


@cache
def model(path: str) -> torch.nn.Module:
    return clip.load(path, device="cpu")[0]


def encode_image(path: str, batch: int) -> Run:
    images = inputs.images(batch)
    return torch.no_grad()(lambda: model(path).encode_image(images))


def encode_text(path: str, batch: int) -> Run:
    tokens = clip.tokenize(inputs.texts("captions", batch))
    return torch.no_grad()(lambda: model(path).encode_text(tokens))


def zero_shot(path: str, classes: int) -> Run:
    """The loop of its notebook on prompt engineering."""

    def run() -> torch.Tensor:
        weights = []
        for name in inputs.class_names(classes):
            tokens = clip.tokenize([template.format(name) for template in inputs.TEMPLATES])
            features = model(path).encode_text(tokens)
            features /= features.norm(dim=-1, keepdim=True)
            feature = features.mean(dim=0)
            weights.append(feature / feature.norm())
        return torch.stack(weights)

    return torch.no_grad()(run)


def train_step(path: str, batch: int, dtype: str) -> Run:
    """The usual loop around it: autocast, cross-entropy both ways, AdamW as the paper has it."""
    learner = clip.load(path, device="cpu")[0].train()
    images, tokens = inputs.images(batch), clip.tokenize(inputs.texts("captions", batch))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    labels = torch.arange(batch)

    def run() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            per_image, per_text = learner(images, tokens)
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


if __name__ == "__main__":
    serve("clip-anytorch", [tokenize, tokenize_first, preprocess, encode_image, encode_text, zero_shot, train_step])
