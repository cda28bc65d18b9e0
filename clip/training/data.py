"""Data: captioned pictures read from files, and dealt out in batches that seed, epoch and position decide alone.

    captions.csv · pairs.jsonl · annotations.json · FOLDER · shards/*.tar
      │  read_captions         every picture once, with all its captions; no picture is opened yet
    [Captioned, ...]
      │  split                 by picture, so that no picture is on both sides
      │  CaptionedPictures     opens a picture, varies it (augment.py), draws one of its captions
    PairDataset                or drawn on the spot (drawn.py), or several of them: Mixed
      │  Batches.epoch(n)      a permutation of all draws, each with a random generator of its own
    Batch, Batch, ...          images (N, 3, R, R), tokens (N, L), identities (N,)

Nothing here has a state that moves on: what draw 17 of epoch 3 gives follows from (seed, 3, 17). So a run can go on in
the middle of an epoch, and any number of worker processes give the same bits.
"""

import bisect
import csv
import glob
import hashlib
import io
import itertools
import json
import os
import random
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader

from ..clip import tokenize
from ..preprocess import PICTURE_SUFFIXES, ImageError, Preprocess, open_image
from .augment import Augment

__all__ = [
    "Batch",
    "Batches",
    "Captioned",
    "CaptionedPictures",
    "Mixed",
    "Pair",
    "PairDataset",
    "TarMember",
    "read_captions",
    "split",
]

# What the columns of tables and the keys of JSON lines may be called
IMAGE_NAMES = ("image", "image_path", "filename", "filepath")
CAPTION_NAMES = ("caption", "title")
ID_NAME = "id"
FORMATS = "a table (.csv, .tsv, .txt), JSON (.json, .jsonl), a folder with a folder for each class, or .tar shards"

PROBES = 16  # draws that stand for a data set in its fingerprint


Tokenizer = Callable[..., torch.Tensor]  # clip.tokenize, or another called as it is


@dataclass(frozen=True)
class Pair:
    """A picture and a caption that belong together.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB.
    caption : str
    identity : str
        Pairs of one identity match each other: the same picture, or the same meaning.
    source : str
        Where the picture comes from, for messages; empty if it was drawn on the spot.
    """

    image: Image.Image
    caption: str
    identity: str
    source: str = ""


class PairDataset(Protocol):
    """What the trainer learns from."""

    def __len__(self) -> int:
        """The draws in an epoch."""
        ...

    def draw(self, index: int, rng: random.Random) -> list[Pair]:
        """The pairs of one draw: usually one; a scene with its twins gives several.

        A pure function of `index` and the state of `rng`. Raises ImageError for a picture that cannot be read.
        """
        ...


# Reading captions


@dataclass(frozen=True)
class TarMember:
    """A file inside an uncompressed tar archive: `size` bytes from byte `offset` on."""

    path: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


@dataclass(frozen=True)
class Captioned:
    """A picture that has not been opened yet, with everything that is said of it.

    Attributes
    ----------
    source : str or TarMember
        The picture's path, or its place in a shard.
    captions : tuple of str
        At least one.
    identity : str
        Pictures of one identity match each other's captions: the id given with it, the name of its class, or the
        picture's own name as written beside its captions. Of several sources too: names and ids that mean different
        things in two of them must be made to differ.
    group : str
        What stays on one side of a split: the identity, but in a folder of classes the picture.
    """

    source: str | TarMember
    captions: tuple[str, ...]
    identity: str
    group: str

    def open(self) -> Image.Image:
        """The picture, upright and in its own mode; an ImageError names what cannot be read."""
        if isinstance(self.source, str):
            return open_image(self.source)
        try:
            with open(self.source.path, "rb") as shard:
                shard.seek(self.source.offset)
                data = shard.read(self.source.size)
        except OSError as error:
            raise ImageError(f"{self.source}: {error.strerror}") from error
        try:
            return open_image(io.BytesIO(data))
        except (ImageError, TypeError) as error:  # it cannot name what is no file
            raise ImageError(f"{self.source}: empty, damaged, or in no picture format that Pillow reads") from error


def read_captions(
    path: str | os.PathLike,
    images: str | os.PathLike | None = None,
    templates: Sequence[str] | None = None,
) -> list[Captioned]:
    """Read which captions belong to which picture, in one of the forms that data sets come in.

    Parameters
    ----------
    path : str or os.PathLike
        One of

        - a table (.csv, .tsv, .txt): a header, then one row a caption, comma or tab between columns. The picture is in
          a column `image`, `image_path`, `filename` or `filepath`, the caption in `caption` or `title`; `id` may name
          what is shown. Flickr8k's captions.txt is one.
        - JSON lines (.jsonl, .json): `{"image_path": "1.jpg", "captions": ["a dog", "a pet"]}`, keys as the columns.
        - COCO's captions (.json): `images` and `annotations`.
        - a folder that holds a folder of pictures for each class, named as the class with _ for spaces.
        - WebDataset shards: a .tar file, a folder of them, or a pattern: "shards/{000..013}.tar", "shards/*.tar". A
          picture `a/7.jpg` has its caption in `a/7.txt`, or under "caption" in `a/7.json`.
    images : str or os.PathLike, optional
        The folder that pictures in tables and JSON are named from. By default the folder of `path`.
    templates : sequence of str, optional
        The captions of a folder of classes, with ``{}`` for the class. By default "a photo of a {}.".

    Returns
    -------
    list of Captioned
        Each picture once, in the order of the files. Pictures are not opened, nor looked for.

    Warns
    -----
    UserWarning
        If captions are empty: they are left out, and counted.

    Raises
    ------
    ValueError
        If the form is none of these, or something is missing or of the wrong kind; the message names file and line.
    OSError
        If a file cannot be read.
    """
    path = os.fspath(path)
    folder = os.fspath(images) if images is not None else os.path.dirname(path)
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):
        shards = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        rows = _shards(shards) if shards else _classes(path, templates or ("a photo of a {}.",))
    elif suffix == ".tar":
        rows = _shards(_expanded(path))
    elif suffix in (".json", ".jsonl"):
        rows = _json(path, folder)
    elif suffix in (".csv", ".tsv", ".txt"):
        rows = _table(path, folder)
    else:
        raise ValueError(f"{path}: expected {FORMATS}")
    return _grouped(path, rows)


Row = tuple[str, Captioned]  # where it stands, and what it says


def _grouped(path: str, rows: Iterable[Row]) -> list[Captioned]:
    """Each picture once, with the captions of all its rows; empty captions are left out and counted."""
    pictures: dict[str | TarMember, Captioned] = {}
    empty: list[str] = []
    for place, row in rows:
        said = tuple(caption.strip() for caption in row.captions if caption.strip())
        empty += [place] * (len(row.captions) - len(said))
        known = pictures.get(row.source)
        if known and known.identity != row.identity:
            raise ValueError(f"{place}: {row.source} has the id {row.identity!r} here, and {known.identity!r} before")
        if said:
            captions = (known.captions if known else ()) + said
            pictures[row.source] = Captioned(row.source, captions, row.identity, row.group)
    if empty:
        warnings.warn(f"{path}: {len(empty)} empty captions were left out, the first in {empty[0]}", stacklevel=3)
    if not pictures:
        raise ValueError(f"{path}: expected pictures with captions, found none")
    return list(pictures.values())


def _table(path: str, folder: str) -> Iterator[Row]:
    """The rows of a CSV or TSV file with a header."""
    text = _text(path)
    header_line = text.partition("\n")[0]
    delimiter = "\t" if "\t" in header_line else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [name.strip().lower() for name in next(reader, [])]
    image, caption = _column(path, header, IMAGE_NAMES), _column(path, header, CAPTION_NAMES)
    number = header.index(ID_NAME) if ID_NAME in header else None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{place}: {error}; a field with quotes in it must stand in quotes, and each of its quotes be doubled"
            ) from error
        if fields is None:
            return
        if not fields:  # an empty line
            continue
        if len(fields) != len(header):
            raise ValueError(
                f"{place}: expected {len(header)} fields ({', '.join(header)}), got {len(fields)}; a caption with a "
                f"{'tab' if delimiter == chr(9) else 'comma'} must stand in double quotes"
            )
        identity = None if number is None else fields[number].strip()
        yield place, _captioned(place, folder, fields[image].strip(), [fields[caption]], identity)


def _column(path: str, header: list[str], names: tuple[str, ...]) -> int:
    """The place of the one column that is called so."""
    found = [i for i, name in enumerate(header) if name in names]
    if len(found) != 1:
        raise ValueError(
            f"{path}, line 1: expected a header with one column called {' or '.join(names)}, got {', '.join(header)!r}"
        )
    return found[0]


def _json(path: str, folder: str) -> Iterator[Row]:
    """The rows of a file of JSON lines, or of COCO's captions."""
    text = _text(path)
    try:
        first = json.loads(text.lstrip().partition("\n")[0])
    except ValueError:
        first = None  # one document over many lines
    if Path(path).suffix.lower() == ".jsonl" or (isinstance(first, dict) and "annotations" not in first):
        return _json_lines(path, folder, text)
    return _coco(path, folder, text)


def _json_lines(path: str, folder: str, text: str) -> Iterator[Row]:
    """`{"image_path": "1.jpg", "captions": ["a dog", "a pet"]}` a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: expected a JSON object, got {line[:60]!r} ({error})") from error
        entry = entry if isinstance(entry, dict) else {}
        image = next((entry[name] for name in IMAGE_NAMES if name in entry), None)
        captions = entry.get("captions") or [entry[name] for name in CAPTION_NAMES if name in entry]
        if not image or not captions:
            raise ValueError(f'{place}: expected {{"image_path": ..., "captions": [...]}}, got {line[:60]!r}')
        identity = None if entry.get(ID_NAME) is None else str(entry[ID_NAME])
        yield place, _captioned(place, folder, image, captions, identity)


def _coco(path: str, folder: str, text: str) -> Iterator[Row]:
    """`{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}`."""
    try:
        document = json.loads(text)
        names = {image["id"]: image["file_name"] for image in document["images"]}
        annotations = list(document["annotations"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: expected JSON lines, or COCO's images (id, file_name) and annotations (image_id, caption); "
            f"got {text[:60]!r} ({type(error).__name__}: {error})"
        ) from error
    for number, annotation in enumerate(annotations):
        place = f"{path}, annotations[{number}]"
        try:
            image, caption = names[annotation["image_id"]], annotation["caption"]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{place}: expected a caption and the image_id of one of the {len(names)} images, got {annotation}"
            ) from error
        yield place, _captioned(place, folder, image, [caption], None)


def _captioned(place: str, folder: str, image: object, captions: object, identity: str | None) -> Captioned:
    """A picture named in a file, once it is sure that these are strings."""
    if not isinstance(image, str) or not image:
        raise ValueError(f"{place}: expected the name of a picture, got {image!r}")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{place}: expected a list of captions, got {captions!r}")
    identity = identity or image
    return Captioned(os.path.join(folder, image), tuple(captions), identity, identity)


def _classes(path: str, templates: Sequence[str]) -> Iterator[Row]:
    """The pictures of a folder of classes, each with every template as a caption."""
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"expected templates with {{}} where the class goes, got {template!r}")
    found = False
    for folder in sorted(entry for entry in Path(path).iterdir() if entry.is_dir()):
        captions = tuple(template.replace("{}", folder.name.replace("_", " ")) for template in templates)
        for picture in sorted(folder.iterdir()):
            if picture.suffix.lower() in PICTURE_SUFFIXES:
                found = True
                name = f"{folder.name}/{picture.name}"
                yield str(picture), Captioned(str(picture), captions, folder.name, name)
    if not found:
        raise ValueError(
            f"{path}: expected a folder with a folder of pictures for each class, or with .tar shards; if there is a "
            "file of captions in it, give that"
        )


def _expanded(pattern: str) -> list[str]:
    """The shards of a pattern: `_expanded("{08..10}.tar")` is 08.tar, 09.tar, 10.tar; * and ? look for files."""
    if os.path.exists(pattern):
        return [pattern]
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbers.groups()
        before, after = pattern[: numbers.start()], pattern[numbers.end() :]
        names = (f"{before}{number:0{len(first)}}{after}" for number in range(int(first), int(last) + 1))
        return [path for name in names for path in _expanded(name)]
    if glob.has_magic(pattern):
        if not (found := sorted(glob.glob(pattern))):
            raise FileNotFoundError(f"no file matches {pattern}")
        return found
    return [pattern]


def _shards(paths: Iterable[str]) -> Iterator[Row]:
    """The samples of WebDataset shards: files that share a name up to its first dot, a picture and a text."""
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:
                yield from _shard(path, archive)
        except tarfile.TarError as error:
            raise ValueError(f"{path}: expected an uncompressed, whole tar archive ({error})") from error


def _shard(path: str, archive: tarfile.TarFile) -> Iterator[Row]:
    """The samples of one open shard, in its order."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}  # key -> suffix -> member
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if member.isreg() and stem:
            samples.setdefault(f"{folder}/{stem}" if folder else stem, {})["." + suffix.lower()] = member
    for key, files in samples.items():
        place = f"{path}/{key}"
        picture = next((files[suffix] for suffix in PICTURE_SUFFIXES if suffix in files), None)
        text = files.get(".txt") or files.get(".json")
        if picture is None or text is None:
            raise ValueError(
                f"{place}: expected a picture ({', '.join(PICTURE_SUFFIXES)}) and a .txt or .json, "
                f"got {', '.join(files)}"
            )
        try:
            caption = archive.extractfile(text).read().decode("utf-8-sig")
            caption = json.loads(caption)["caption"] if text.name.lower().endswith(".json") else caption
            if not isinstance(caption, str):
                raise TypeError(f"the caption is {caption!r}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}/{text.name}: expected a caption ({type(error).__name__}: {error})") from error
        source = TarMember(path, picture.offset_data, picture.size, picture.name)
        identity = f"{os.path.basename(path)}/{key}"
        yield place, Captioned(source, (caption,), identity, identity)


def _text(path: str) -> str:
    """A UTF-8 file, with or without byte order mark, lines ended in any way."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error}); convert it to UTF-8") from error


def split(items: Sequence[Captioned], fraction: float, seed: int) -> tuple[list[Captioned], list[Captioned]]:
    """Keep about `fraction` of the pictures back for validation; those of one group stay together.

    Whether a picture is kept back depends on its group and the seed alone. So other rows may come and go, or move, and
    no picture changes sides.

    Parameters
    ----------
    items : sequence of Captioned
        What to split.
    fraction : float
        Of the groups, in [0, 1].
    seed : int
        Other seeds choose others.

    Returns
    -------
    (list of Captioned, list of Captioned)
        To learn from, and for validation, each in the order given.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    sides: tuple[list[Captioned], list[Captioned]] = ([], [])
    for item in items:
        share = _number(f"{seed} {item.group}") / 2**64 + 0.5  # [0, 1)
        sides[share < fraction].append(item)
    return sides


def _number(name: str) -> int:
    """A signed 64-bit number for a name, the same on every machine, different for different names."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


# Data sets


class CaptionedPictures:
    """A data set of pictures that were read by `read_captions`: draw i opens picture i and draws one of its captions.

    Parameters
    ----------
    items : sequence of Captioned
        What to draw from.
    augment : callable, optional
        Varies a picture at random, see :mod:`clip.training.augment`.
    """

    def __init__(self, items: Sequence[Captioned], augment: Augment | None = None):
        self.items = list(items)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.items)

    def draw(self, index: int, rng: random.Random) -> list[Pair]:
        """One pair. A transparent picture loses its transparency as in :class:`clip.preprocess.Preprocess`.

        Raises
        ------
        ImageError
            If the picture cannot be read.
        """
        item = self.items[index]
        caption = rng.choice(item.captions)
        image = item.open().convert("RGB")
        if self.augment:
            image = self.augment(image, rng)
        return [Pair(image, caption, item.identity, str(item.source))]


class Mixed:
    """Several data sets as one, each with its share of the draws.

    The draws of an epoch are dealt to the parts in blocks. A block of k draws from a part of n takes draw i from the
    stretch of [0, n) between i · n / k and (i + 1) · n / k, at a place that the random generator chooses. So if k = n
    each of the part's draws comes exactly once an epoch, if k = 3 n three times, if k = n / 3 one of any three
    neighbours, another one in each epoch; on average all come equally often.

    Parameters
    ----------
    parts : sequence of PairDataset
        None of them empty.
    weights : sequence of float
        How many of the draws go to each part, relative to the others. A part's length as its weight gives every draw
        once.
    length : int, optional
        The draws in an epoch. By default as many as all parts have together.
    """

    def __init__(self, parts: Sequence[PairDataset], weights: Sequence[float], length: int | None = None):
        if len(parts) != len(weights) or not parts:
            raise ValueError(f"expected one weight for each part, got {len(weights)} for {len(parts)}")
        if not all(weight > 0 for weight in weights) or not all(len(part) for part in parts):
            raise ValueError(f"expected positive weights {list(weights)} and parts that are not empty")
        self.parts = list(parts)
        self.length = sum(len(part) for part in parts) if length is None else length
        shares = [total / sum(weights) for total in itertools.accumulate(weights)]
        self.ends = [round(self.length * share) for share in shares]  # of the blocks

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int, rng: random.Random) -> list[Pair]:
        """What the part that this draw belongs to gives."""
        if not 0 <= index < self.length:
            raise IndexError(f"expected an index in [0, {self.length}), got {index}")
        block = bisect.bisect_right(self.ends, index)
        start = self.ends[block - 1] if block else 0
        part = self.parts[block]
        place = (index - start + rng.random()) * len(part) / (self.ends[block] - start)
        return part.draw(min(int(place), len(part) - 1), rng)


# Batches


@dataclass(frozen=True)
class Batch:
    """N pairs, ready for both towers.

    Attributes
    ----------
    images : torch.Tensor
        (N, 3, R, R), float32, normalised.
    tokens : torch.Tensor
        (N, context_length), int32.
    identities : torch.Tensor
        (N,), int64: equal for pairs that match each other.
    captions : list of str
        N, as drawn.
    sources : list of str
        N, where each picture comes from.
    bad : list of str
        Pictures that were left out, and why.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    identities: torch.Tensor
    captions: list[str]
    sources: list[str]
    bad: list[str]


class Batches:
    """A data set cut into batches, epoch after epoch.

    Parameters
    ----------
    dataset : PairDataset
        What to draw from.
    batch_size : int
        Draws in a batch. It has more pairs where draws give several, and fewer where pictures cannot be read.
    preprocess : Preprocess
        Of the model that is to learn.
    seed : int
        Of the order, and of all that is drawn.
    workers : int
        Processes that read ahead; 0 reads in this one. The batches are the same.
    context_length : int
        Token ids a caption; longer captions are cut.
    drop_last : bool
        Leave out the draws at the end of an epoch that do not fill a batch. They are others in each epoch.
    tokenizer : callable, optional
        The model's own, called as `clip.tokenize`, which it is by default.

    Examples
    --------
    >>> items = read_captions("captions.txt", images="Flickr8k")  # doctest: +SKIP
    >>> batches = Batches(CaptionedPictures(items), 256, preprocess)  # doctest: +SKIP
    >>> next(batches.epoch(0)).images.shape  # doctest: +SKIP
    torch.Size([256, 3, 224, 224])
    """

    def __init__(
        self,
        dataset: PairDataset,
        batch_size: int,
        preprocess: Preprocess,
        seed: int = 0,
        workers: int = 0,
        context_length: int = 77,
        drop_last: bool = True,
        tokenizer: Tokenizer | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.drop_last = drop_last
        self._order = _Order(len(dataset), batch_size, len(self), seed)
        self._maker = _Maker(dataset, preprocess, seed, context_length, tokenizer or tokenize)
        self._ahead: Iterator[Batch] = iter(())  # what the workers make
        self._ahead_at: tuple[int, int] | None = None  # epoch and position of the next of these

    def __len__(self) -> int:
        """The batches in an epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @cached_property
    def fingerprint(self) -> str:
        """Tells whether a run can go on with these batches.

        It changes with the length, the batch size and the seed, and with the captions, the identities and the sizes of
        the pictures in a sample of the draws; not with the folder they lie in.
        """
        digest = hashlib.blake2b(f"{len(self.dataset)} {self.batch_size} {self.seed} {self.drop_last}".encode())
        for probe in range(PROBES):
            index = probe * len(self.dataset) // PROBES
            try:
                pairs = self.dataset.draw(index, _generator(self.seed, 0, index)) if len(self.dataset) else []
            except ImageError:
                pairs = []
            digest.update(repr([(pair.caption, pair.identity, pair.image.size) for pair in pairs]).encode())
        return digest.hexdigest()[:32]

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the one at `start` on: the same as all of them without the first `start`.

        With workers, several epochs one after the other keep them busy throughout.

        Raises
        ------
        ValueError
            If not one picture of a batch can be read.
        RuntimeError
            If a worker process dies.
        """
        if self.workers:
            batches = self._read_ahead(number, start)
        else:
            batches = (self._maker[number, draws] for draws in self._order.epoch(number)[start:])
        for batch in batches:
            if not batch.captions:
                why = batch.bad[0] if batch.bad else "the data set gave no pairs"
                raise ValueError(
                    f"not one picture of a batch in epoch {number} can be read; is the folder of pictures right? "
                    f"The first: {why}"
                )
            yield batch

    def _read_ahead(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch, made by workers; they are started anew if they were making others."""
        for position in range(start, len(self)):
            if self._ahead_at != (number, position):
                self.close()  # the workers before end before the next begin, or these would inherit them
                self._ahead = iter(self._loader(number, position))
            self._ahead_at = None
            try:
                batch = next(self._ahead)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                raise RuntimeError(
                    f"a process that reads pictures died ({error}). Mostly it was killed for using too much memory, or "
                    "/dev/shm is full: use fewer workers, or 0 to read in the main process"
                ) from error
            last = position + 1 == len(self)
            self._ahead_at = (number + 1, 0) if last else (number, position + 1)
            yield batch

    def close(self) -> None:
        """Let the workers go; an epoch asked for afterwards begins with new ones."""
        self._ahead, self._ahead_at = iter(()), None

    def _loader(self, number: int, position: int) -> DataLoader:
        """Workers that make all batches from this one on, epoch after epoch."""
        return DataLoader(
            self._maker,
            sampler=self._order.forever(number, position),
            batch_size=None,  # a key is a whole batch; PyTorch lets each worker compute on one thread
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or it would draw from the global one
        )


@dataclass(frozen=True)
class _Order:
    """Which draws make up which batch."""

    length: int
    batch_size: int
    batches: int
    seed: int

    def epoch(self, number: int) -> list[torch.Tensor]:
        """The indices of the draws of each batch of an epoch."""
        generator = torch.Generator().manual_seed(_number(f"{self.seed} {number}") % 2**63)
        order = torch.randperm(self.length, generator=generator)
        return list(order.split(self.batch_size))[: self.batches]

    def forever(self, number: int, position: int) -> Iterator[tuple[int, torch.Tensor]]:
        """What to make, from a batch of an epoch on, epoch after epoch."""
        yield from ((number, draws) for draws in self.epoch(number)[position:])
        for later in itertools.count(number + 1):
            yield from ((later, draws) for draws in self.epoch(later))


class _Maker:
    """Makes the batch of some draws of an epoch; this is what goes to the workers."""

    def __init__(
        self, dataset: PairDataset, preprocess: Preprocess, seed: int, context_length: int, tokenizer: Tokenizer
    ):
        self.dataset = dataset
        self.preprocess = preprocess
        self.seed = seed
        self.context_length = context_length
        self.tokenizer = tokenizer

    def __getitem__(self, key: tuple[int, torch.Tensor]) -> Batch:
        epoch, draws = key
        images: list[torch.Tensor] = []
        pairs: list[Pair] = []
        sources: list[str] = []
        bad: list[str] = []
        for index in draws.tolist():
            rng = _generator(self.seed, epoch, index)
            try:
                drawn = self.dataset.draw(index, rng)
                images += self._preprocessed(drawn)
                pairs += drawn
                sources += [pair.source or f"draw {index} of epoch {epoch}" for pair in drawn]
            except ImageError as error:
                bad.append(str(error))
        rows = [_token_row(self.tokenizer, pair.caption, self.context_length) for pair in pairs]
        return Batch(
            images=torch.stack(images) if images else torch.empty(0),
            tokens=torch.stack(rows) if rows else torch.empty(0),
            identities=torch.tensor([_number(pair.identity) for pair in pairs], dtype=torch.int64),
            captions=[pair.caption for pair in pairs],
            sources=sources,
            bad=bad,
        )

    def _preprocessed(self, pairs: list[Pair]) -> list[torch.Tensor]:
        """The pictures of one draw as tensors; one of a shape that cannot be resized is an ImageError too."""
        images = []
        for pair in pairs:
            try:
                images.append(self.preprocess(pair.image))
            except ValueError as error:
                raise ImageError(f"{pair.source or pair.caption}: {error}") from error
        return images


def _generator(seed: int, epoch: int, index: int) -> random.Random:
    """All randomness of one draw; a string seeds it the same way in every process and on every machine."""
    return random.Random(f"{seed} {epoch} {index}")


@lru_cache(maxsize=2**15)
def _token_row(tokenizer: Tokenizer, caption: str, context_length: int) -> torch.Tensor:
    """The token ids of a caption (context_length,), kept since captions come back in each epoch."""
    return tokenizer(caption, context_length, truncate=True)[0]


def _as_it_is(batch: Batch) -> Batch:
    """What the loader is to do with a batch that is complete already."""
    return batch
