"""Ours."""

import tempfile
from functools import cache
from pathlib import Path

import torch

import clip
from clip.clip import _tokenizer
from clip.preprocess import Preprocess
from clip.tasks.encode import read_pictures
from clip.training.data import Batch
from clip.training.options import TrainingOptions
from clip.training.trainer import Trainer

from .. import inputs
from ..peak import peak
from ..process import Run, serve


def tokenize(texts: list) -> Run:
    texts = inputs.texts(*texts)
    return lambda: clip.tokenize(texts, truncate=True)


def tokenize_first(texts: list) -> Run:
    texts = inputs.texts(*texts)

    def run() -> torch.Tensor:
        _tokenizer.cache.clear()
        _tokenizer.cache.update({token: token for token in inputs.SPECIAL_TOKENS})
        _tokenizer._chunk_ids.clear()
        return clip.tokenize(texts, truncate=True)

    return run


def preprocess(folder: str, threads: int, draft: int | None = None) -> Run:
    paths, transform = sorted(Path(folder).iterdir()), Preprocess(inputs.RESOLUTION)
    return lambda: torch.cat([rows.values for rows in read_pictures(paths, transform, workers=threads, draft=draft)])


@cache
def model(path: str, dtype: str) -> torch.nn.Module:
    plain, _ = clip.load(path, device="cpu")
    return clip.optimize(plain, getattr(torch, dtype))


def encode_image(path: str, batch: int, dtype: str = "float32") -> Run:
    fast, images = model(path, dtype), inputs.images(batch)
    return lambda: fast.encode_image(images)


def encode_text(path: str, batch: int, dtype: str = "float32") -> Run:
    fast, tokens = model(path, dtype), clip.tokenize(inputs.texts("captions", batch))
    return lambda: fast.encode_text(tokens)


def zero_shot(path: str, classes: int) -> Run:
    fast, names = model(path, "float32"), inputs.class_names(classes)
    return lambda: clip.ZeroShotClassifier(fast, names, inputs.TEMPLATES).weights.T


def train_step(path: str, batch: int, dtype: str = "float32") -> Run:
    plain, _ = clip.load(path, device="cpu")
    captions = inputs.texts("captions", batch)
    pairs = Batch(inputs.images(batch), clip.tokenize(captions), torch.arange(batch), captions, captions, [])
    options = TrainingOptions(out=tempfile.gettempdir(), batch_size=batch, precision=dtype, steps=1000)
    trainer = Trainer(plain, [pairs], options)
    return lambda: torch.tensor(trainer.update(pairs)["loss"])


if __name__ == "__main__":
    serve("torch", [tokenize, tokenize_first, preprocess, encode_image, encode_text, zero_shot, train_step, peak])
