"""Encoding many: streams of pictures and lists of texts become unit vectors, batch by batch.

    paths, pictures, functions that open one
      │  read_pictures       decoded and preprocessed on threads, one batch ahead of the model
      │  encode_images       encode_image, unit length
    Rows, Rows, ...          which pictures these are, their vectors, and why others have none
      │  gather
    Rows                     all in one

A picture that cannot be read costs its own row and nothing else: the error stands beside the rows. Two batches of
pictures are in memory, however long the stream is. On a CPU, an optimised copy of the model (`clip.optimize`) is
faster.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from ..clip import tokenize
from ..model import CLIP
from ..preprocess import ImageError, Preprocess, open_image

__all__ = ["Picture", "Rows", "encode_images", "encode_texts", "gather", "read_pictures"]

Picture = str | os.PathLike | Image.Image | Callable[[], Image.Image]  # the last opens it when its turn has come


@dataclass(frozen=True)
class Rows:
    """Some pictures of a stream, each as one row of a tensor.

    Attributes
    ----------
    indices : list of int
        Where in the stream the picture of each row stands, counted from 0.
    values : torch.Tensor
        (n, ...), float32, on the CPU; without a dimension more than the first if n is 0.
    errors : dict of int to ImageError
        Why the others could not be read, by their places in the stream.
    """

    indices: list[int]
    values: torch.Tensor
    errors: dict[int, ImageError]

    def __len__(self) -> int:
        """How many pictures this is about, those that could not be read included."""
        return len(self.indices) + len(self.errors)

    def through(self, tower: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> "Rows":
        """What a tower on a device makes of them: its answers in place of the pictures, float32, on the CPU."""
        if not self.indices:
            return self
        return Rows(self.indices, tower(self.values.to(device)).float().cpu(), self.errors)


def read_pictures(
    pictures: Iterable[Picture],
    preprocess: Preprocess,
    batch_size: int = 64,
    workers: int = 2,
    progress: bool = False,
    draft: int | None = None,
) -> Iterator[Rows]:
    """Decode and preprocess a stream of pictures, on threads, while the batch before is in use.

    Parameters
    ----------
    pictures : iterable
        Paths, which :func:`clip.preprocess.open_image` reads; Pillow pictures; or functions that return one.
    preprocess : Preprocess
        As :func:`clip.load` returned it.
    batch_size : int
        Pictures at once; two batches are in memory.
    workers : int
        Threads.
    progress : bool
        Show on standard error how many are done with, if that is a terminal.
    draft : int, optional
        As for :func:`clip.preprocess.open_image`, of paths: faster, and not exact.

    Yields
    ------
    Rows
        `values` (n, 3, R, R), in the stream's order.

    Raises
    ------
    ValueError
        If `batch_size` or `workers` is not positive.
    """
    if batch_size < 1 or workers < 1:
        raise ValueError(f"expected at least one picture at once and one thread, got {batch_size} and {workers}")
    stream, total = enumerate(pictures), len(pictures) if isinstance(pictures, Sized) else None
    bar = tqdm(total=total, desc="encoding", unit=" pictures", disable=None if progress else True)
    with bar, ThreadPoolExecutor(workers) as pool:

        def next_batch() -> list[tuple[int, Future]]:
            batch = islice(stream, batch_size)
            return [(index, pool.submit(_read, picture, preprocess, draft)) for index, picture in batch]

        ahead = next_batch()
        while batch := ahead:
            ahead = next_batch()
            results = {index: task.result() for index, task in batch}
            errors = {index: result for index, result in results.items() if isinstance(result, ImageError)}
            images = [image for index, image in results.items() if index not in errors]
            indices = [index for index in results if index not in errors]
            yield Rows(indices, torch.stack(images) if images else torch.empty(0), errors)
            bar.update(len(batch))


def _read(picture: Picture, preprocess: Preprocess, draft: int | None) -> torch.Tensor | ImageError:
    """One picture for the model, or why there is none."""
    named = isinstance(picture, str | os.PathLike)
    try:
        opened = open_image(picture, draft) if named else picture() if callable(picture) else picture
        return preprocess(opened)
    except ImageError as error:
        return error
    except ValueError as error:  # of a shape that cannot be resized
        return ImageError(f"{os.fspath(picture)}: {error}" if named else str(error))


@torch.no_grad()
def encode_images(
    model: CLIP,
    preprocess: Preprocess,
    pictures: Iterable[Picture],
    batch_size: int = 64,
    workers: int = 2,
    progress: bool = False,
    draft: int | None = None,
) -> Iterator[Rows]:
    """Encode a stream of pictures.

    Parameters
    ----------
    model : CLIP
        Any model with `encode_image` and `logit_scale`.
    preprocess, pictures, batch_size, workers, progress, draft
        As for :func:`read_pictures`.

    Yields
    ------
    Rows
        `values` (n, E), of unit length.
    """
    for rows in read_pictures(pictures, preprocess, batch_size, workers, progress, draft):
        rows = rows.through(model.encode_image, model.logit_scale.device)
        yield replace(rows, values=F.normalize(rows.values, dim=-1))


@torch.no_grad()
def encode_texts(
    model: CLIP, texts: Sequence[str], batch_size: int = 256, truncate: bool = False, progress: bool = False
) -> torch.Tensor:
    """Encode texts; those of like length together, since a batch takes as long as its longest text.

    Parameters
    ----------
    model : CLIP
        Any model with `encode_text` and `logit_scale`.
    texts : sequence of str
        N of them.
    batch_size : int
        Texts at once.
    truncate : bool
        Cut a text that is too long instead of raising an error.
    progress : bool
        Show on standard error how many are done with, if that is a terminal.

    Returns
    -------
    torch.Tensor
        (N, E), float32, of unit length, on the CPU, in the order of `texts`.

    Raises
    ------
    RuntimeError
        If a text is longer than the model's context and `truncate` is not set.
    """
    if not texts:
        raise ValueError("expected at least one text, got none")
    device = model.logit_scale.device
    tokenizer = getattr(model, "tokenizer", None) or tokenize
    tokens = tokenizer(texts, getattr(model, "context_length", 77), truncate)
    order = (tokens > 0).sum(dim=1).argsort()  # by length: behind a text's end stand zeros, or less
    features = []
    with tqdm(total=len(texts), desc="encoding", unit=" texts", disable=None if progress else True) as bar:
        for part in order.split(batch_size):
            features.append(model.encode_text(tokens[part].to(device)).float().cpu())
            bar.update(len(part))
    return F.normalize(torch.cat(features)[order.argsort()], dim=-1)


def gather(batches: Iterable[Rows]) -> Rows:
    """All rows of a stream as one.

    Raises
    ------
    ImageError
        If the stream has pictures, but none could be read.
    """
    batches = list(batches)
    errors = {index: error for rows in batches for index, error in rows.errors.items()}
    read = [rows for rows in batches if rows.indices]
    if errors and not read:
        raise ImageError(f"no picture can be read ({len(errors)} tried); the first: {next(iter(errors.values()))}")
    values = torch.cat([rows.values for rows in read]) if read else torch.empty(0)
    return Rows([index for rows in read for index in rows.indices], values, errors)
