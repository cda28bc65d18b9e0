"""Searching pictures by words: an index on disk that is built once and kept up to date.

    folders
      │  files that are new or changed      by size and time of change
      │  contents that are new              by sha256: a copy or a moved file is not embedded again
      │  encode_images                      a batch, a transaction
    photos.clipindex                        vectors of unit length (vector_store.py)
      │  query @ vectors                    all of them, or by a faster way (search_backends.py)
    matches                                 paths, cosines, ranks

This is the use of what a model learned to do; its measure, recall over captioned pictures, is in `metrics.py`.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from ..checkpoints.released import sha256_of
from ..model import CLIP, ImageTower, TextTower
from ..optimize import OptimizedCLIP, optimized_copy
from ..preprocess import PICTURE_SUFFIXES, Preprocess
from .encode import Rows, encode_images, encode_texts
from .search_backends import BACKENDS, Backend, ExactSearch, FaissSearch, QdrantSearch, overlap
from .vector_store import File, Seen, VectorStore

__all__ = ["Changes", "Index", "Match", "Query", "folders_of", "model_of", "tower_digests"]

QDRANT = "http://localhost:6333"  # where a server listens unless told otherwise

Term = str | os.PathLike | Image.Image  # a sentence; a picture's path; a picture


@dataclass(frozen=True)
class Query:
    """More like this, less like that: a weighted sum of unit vectors, brought back to unit length.

    Attributes
    ----------
    terms : sequence of (float, str or path or PIL.Image.Image)
        Weights, negative for "less", each with a sentence (a string) or a picture (a `Path`, or the picture itself).

    Examples
    --------
    >>> str(Query([(1, "a house"), (0.5, "snow"), (-0.5, "people")]))
    'a house + 0.5 snow - 0.5 people'
    """

    terms: Sequence[tuple[float, Term]]

    def __str__(self) -> str:
        text = ""
        for weight, term in self.terms:
            sign = "-" if weight < 0 else "+" if text else ""
            size = "" if abs(weight) == 1 else f"{abs(weight):g}"
            name = "a picture" if isinstance(term, Image.Image) else os.fspath(term)
            text = " ".join(part for part in (text, sign, size, name) if part)
        return text


@dataclass(frozen=True)
class Match:
    """One picture of an answer."""

    rank: int  # from 1
    cosine: float  # [-1, 1], of the query and this picture; 0.2 to 0.3 is usual where a sentence fits a photograph
    path: str
    copies: tuple[str, ...] = ()  # further files of the same content


@dataclass(frozen=True)
class Changes:
    """What an update did."""

    embedded: int  # new or changed files that went through the model
    recognised: int  # those that did not need to: copies, or moved
    unchanged: int  # files that were not even read, being as they were last time
    dropped: int  # files that are there no more
    errors: dict[str, str]  # why files, or folders, cannot be read: found now, or earlier and unchanged since


class Index:
    """The pictures of some folders, searchable; :meth:`build` and :meth:`open` make it.

    Other processes may search while one updates, and see the new state at their next search.

    Attributes
    ----------
    changes : Changes or None
        What the last :meth:`build` or :meth:`update` did.

    Examples
    --------
    >>> model, preprocess = clip.load("ViT-B/32")  # doctest: +SKIP
    >>> index = Index.build("photos.clipindex", ["photos"], model, preprocess, name="ViT-B/32")  # doctest: +SKIP
    >>> [matches] = index.search("a red bicycle", top=3)  # doctest: +SKIP
    >>> matches[0]  # doctest: +SKIP
    Match(rank=1, cosine=0.312, path='/home/me/photos/17.jpg', copies=())
    """

    def __init__(self, path: str | os.PathLike, model: CLIP, preprocess: Preprocess, backend: str, server: str | None):
        self.changes: Changes | None = None
        self._store, self._model, self._preprocess = VectorStore(path, tower_digests(model)), model, preprocess
        self._backend_name, self._server = backend, server
        self._snapshot, self._backend = None, None

    @classmethod
    def build(
        cls,
        path: str | os.PathLike,
        folders: Sequence[str | os.PathLike],
        model: CLIP,
        preprocess: Preprocess,
        name: str,
        *,
        batch_size: int = 64,
        workers: int = 2,
        progress: bool = False,
        draft: int | None = None,
    ) -> "Index":
        """Make an index of all pictures below some folders, or go on with one that an earlier call has made or begun.

        Parameters
        ----------
        path : path
            The folder to be made, "photos.clipindex" say.
        model, preprocess
            As :func:`clip.load` returned them, with both towers.
        name : str
            What `clip.load` was given: kept, so that a search can load the same.
        folders, batch_size, workers, progress, draft
            As for :meth:`update`.

        Raises
        ------
        ValueError
            If `path` is something else, or holds another model's vectors; or the model has one tower only, or was
            optimised.
        OSError
            If a folder is not there, or something cannot be read or written.
        """
        folders = folders_of(path, folders)
        if isinstance(model, ImageTower | TextTower):
            raise ValueError(f"expected a CLIP with both towers, got {type(model).__name__}: load it without `tower`")
        index = cls(path, model, preprocess, "exact", None)
        index._store.claim(name)
        index.update(folders, batch_size=batch_size, workers=workers, progress=progress, draft=draft)
        return index

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        model: CLIP,
        preprocess: Preprocess,
        backend: str = "exact",
        server: str | None = None,
    ) -> "Index":
        """Open an index, to search or to update it.

        Parameters
        ----------
        path : path
            The folder that :meth:`build` made.
        model, preprocess
            The model that made it, on any device; :func:`model_of` tells its name. One tower will do: the text tower
            to search by sentences, the image tower to search by pictures or to update.
        backend : str
            How the nearest are found: one of :data:`clip.tasks.search_backends.BACKENDS`.
        server : str, optional
            Where Qdrant is; "http://localhost:6333", unless given.

        Raises
        ------
        ValueError
            If there is no index, its vectors are another model's, the model was optimised, or there is no such backend.
        """
        if backend not in BACKENDS:
            raise ValueError(f"expected a backend out of {', '.join(BACKENDS)}; got {backend!r}")
        index = cls(path, model, preprocess, backend, server)
        index._store.facts()
        return index

    def __len__(self) -> int:
        """How many different pictures there are."""
        return len(self._store)

    def update(
        self,
        folders: Sequence[str | os.PathLike] = (),
        *,
        batch_size: int = 64,
        workers: int = 2,
        progress: bool = False,
        draft: int | None = None,
    ) -> None:
        """Make the index hold exactly the pictures that are below the folders now; `changes` tells what that took.

        Only files that are new, or whose size or time of change is, are read, and only new contents are embedded, on
        the CPU by an optimised copy of the model. Bad files are listed in `changes.errors`, and not read again until
        they change.

        Parameters
        ----------
        folders : sequence of path
            Searched through all their folders for names ending in one of :data:`clip.preprocess.PICTURE_SUFFIXES`.
            Without any, those of last time.
        batch_size : int
            Pictures in the model at once, which is all that is lost if the process is killed.
        workers : int
            Threads that read.
        progress : bool
            Show on standard error how far it is, if that is a terminal.
        draft : int, optional
            As for :func:`clip.preprocess.open_image`: large photographs are read faster, and not exactly.

        Raises
        ------
        OSError
            If a folder is not there: its pictures would be dropped.
        ValueError
            If there are no folders of last time.
        RuntimeError
            If there is something to embed, and the model has no image tower.
        """
        folders = folders_of(self._store.path, folders)
        found, errors = _find(folders)
        self._store.set_fact("folders", json.dumps(folders))

        known = {seen.file.path: seen for seen in self._store.files()}
        unchanged = {path for path, file in found.items() if path in known and known[path].file == file}
        new = [found[path] for path in sorted(found.keys() - unchanged)]
        gone = [path for path in known if path not in found and not _is_below(path, errors)]
        errors |= {path: known[path].error for path in unchanged if known[path].error}

        embedded, recognised, fresh_errors = self._add(new, batch_size, workers, progress, draft)
        self._store.drop(gone)
        errors = dict(sorted((errors | fresh_errors).items()))
        self.changes = Changes(embedded, recognised, len(unchanged), len(gone), errors)

    def search(self, *queries: Term | Query, top: int = 9) -> list[list[Match]]:
        """Find the pictures that are nearest to each query.

        Parameters
        ----------
        *queries : str, path, PIL.Image.Image or Query
            Sentences (strings), pictures (a `Path`, or the picture itself), or weighted sums of both.
        top : int
            Matches for each; all there are, if there are fewer.

        Returns
        -------
        list of list of Match
            For each query its matches, the best first.

        Raises
        ------
        ValueError
            If there is no query, or the terms of one cancel each other.
        ImageError
            If a picture cannot be read.
        RuntimeError
            If a sentence is longer than the model's context, or the model lacks the tower to embed a query.
        """
        vectors = self._embed(queries, top)
        while True:
            self._load()
            if self._snapshot is None:
                return [[] for _ in queries]
            cosines, places = self._backend.nearest(vectors, top)
            paths = self._store.paths(self._snapshot, set(places[places >= 0].tolist()))
            if paths is not None:  # otherwise another process has changed the index in between
                return [
                    [
                        Match(rank, cosine, paths[place][0], tuple(paths[place][1:]))
                        for rank, (cosine, place) in enumerate(zip(*answer, strict=True), 1)
                        if place >= 0
                    ]
                    for answer in zip(cosines.tolist(), places.tolist(), strict=True)
                ]

    def recall(self, *queries: Term | Query, top: int = 9) -> float:
        """The share of the `top` nearest pictures, of all queries together, that the backend finds.

        Parameters
        ----------
        *queries, top
            As for :meth:`search`.

        Returns
        -------
        float
            Between 0 and 1, against the exact search.

        Raises
        ------
        ValueError
            If there is no query, or no picture.
        """
        vectors = self._embed(queries, top)
        self._load()
        if self._snapshot is None:
            raise ValueError(f"{self._store.path}: the index is empty, so there is nothing to find")
        _, found = self._backend.nearest(vectors, top)
        _, nearest = ExactSearch(self._snapshot.vectors).nearest(vectors, top)
        return overlap(found, nearest)

    def _embed(self, asked: Sequence[Term | Query], top: int) -> torch.Tensor:
        """(Q, E), of unit length: the weighted sums; a ValueError if nothing is asked for."""
        if not asked or top < 1:
            raise ValueError(f"expected at least one query and at least one match, got {len(asked)} and {top}")
        queries = [query if isinstance(query, Query) else Query([(1, query)]) for query in asked]
        terms = [term for query in queries for _, term in query.terms]
        texts = [place for place, term in enumerate(terms) if isinstance(term, str)]
        pictures = [place for place, term in enumerate(terms) if not isinstance(term, str)]
        vectors = {}
        if texts:
            vectors |= zip(texts, encode_texts(self._model, [terms[place] for place in texts]), strict=True)
        for rows in encode_images(self._model, self._preprocess, [terms[place] for place in pictures]):
            for error in rows.errors.values():
                raise error
            vectors |= zip([pictures[index] for index in rows.indices], rows.values, strict=True)
        sums, places = [], count()
        for query in queries:
            if not all(math.isfinite(weight) for weight, _ in query.terms):
                raise ValueError(f"expected weights that are finite numbers, got {query}")
            total = sum(weight * vectors[next(places)] for weight, _ in query.terms)
            if not query.terms or total.norm() < 1e-4:
                raise ValueError(f"the terms of a query cancel each other: {query}")
            sums.append(F.normalize(total, dim=0))
        return torch.stack(sums)

    def _load(self) -> None:
        """Get the vectors as they are now, and what searches them, unless they are those of last time."""
        facts = self._store.facts()
        if self._snapshot and self._snapshot.generation == facts["generation"]:
            return
        self._snapshot = self._store.snapshot()
        if self._snapshot:
            self._backend = self._open_backend(self._snapshot.vectors, f"{facts['id']}-{self._snapshot.generation}")

    def _open_backend(self, vectors: torch.Tensor, state: str) -> Backend:
        """What searches the vectors (N, E)."""
        if self._backend_name == "exact":
            return ExactSearch(vectors)
        if self._backend_name == "qdrant":
            return QdrantSearch(vectors, self._server or QDRANT, state)
        kind = self._backend_name.removeprefix("faiss-")
        return FaissSearch(vectors, kind, self._store.path / f"{kind}-{state.rpartition('-')[2]}.faiss")

    def _add(
        self, files: Sequence[File], batch_size: int, workers: int, progress: bool, draft: int | None
    ) -> tuple[int, int, dict[str, str]]:
        """Embed what is new in these files: how many were, how many did not need to be, which are bad."""
        holders: dict[bytes, list[File]] = {}  # contents on their way through the model, in order, and their files
        embedded, recognised, errors = 0, 0, {}
        model = self._model
        if files and model.logit_scale.device.type == "cpu":
            model = optimized_copy(model)

        def unseen() -> Iterator[str]:
            """One file of each content that has no vector yet, looked up a batch at a time."""
            nonlocal recognised
            with ThreadPoolExecutor(workers) as pool:
                for start in range(0, len(files), batch_size):
                    batch = list(pool.map(_look, files[start : start + batch_size]))
                    known = self._store.known({one.digest for one in batch if one.digest})
                    fresh = []
                    for one in batch:
                        if one.error:  # not remembered: it may go without a change of the file
                            errors[one.file.path] = one.error
                        elif one.digest in holders:
                            holders[one.digest].append(one.file)
                        elif one.digest not in known:
                            holders[one.digest] = [one.file]
                            fresh.append(one.file.path)
                    old = [one for one in batch if one.digest in known]
                    self._store.add(old)
                    recognised += len(old)
                    bar.update(len(batch) - len(fresh))
                    yield from fresh

        with tqdm(total=len(files), unit=" pictures", disable=None if progress and files else True) as bar:
            done = 0
            for rows in encode_images(model, self._preprocess, unseen(), batch_size, workers, draft=draft):
                batch = [(digest, holders.pop(digest)) for digest in list(islice(holders, len(rows)))]
                vectors, reasons = _sound(rows)
                digests = [digest for place, (digest, _) in enumerate(batch, done) if place not in reasons]
                seen = []
                for place, (digest, copies) in enumerate(batch, done):
                    error = reasons.get(place)
                    if error is None:
                        recognised += len(copies) - 1
                        seen += [Seen(file, digest) for file in copies]
                    else:
                        error = error.removeprefix(f"{copies[0].path}: ")
                        seen += [Seen(file, None, error) for file in copies]
                        errors |= {file.path: error for file in copies}
                self._store.add(seen, digests, vectors)
                embedded += len(digests)
                done += len(rows)
                bar.update(len(rows))
        return embedded, recognised, errors


def model_of(path: str | os.PathLike) -> str | None:
    """The name of the model that made an index; None, if there is nothing yet.

    Raises
    ------
    ValueError
        If there is something else.
    """
    store = VectorStore(path)
    return store.facts()["model"] if store.exists() else None


def folders_of(path: str | os.PathLike, folders: Sequence[str | os.PathLike] = ()) -> list[str]:
    """The folders whose pictures an index is to hold, absolute: those given, or without any those of last time.

    Raises
    ------
    OSError
        If one is not there.
    ValueError
        If there are none, or `path` is no index.
    """
    store, folders = VectorStore(path), sorted({os.path.abspath(folder) for folder in folders})
    if not folders and store.exists():
        folders = json.loads(store.facts().get("folders", "[]"))
    if not folders:
        raise ValueError("expected at least one folder of pictures")
    for folder in folders:
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"{folder}: there is no such folder")
    return folders


def tower_digests(model: CLIP) -> dict[str, str]:
    """For each tower that a model has, "image" and "text", a sha256 over the names, shapes and values of its weights.

    The values are rounded to float16 first, so that a copy in float16 or float32, on whatever device, has the same.
    One in bfloat16 has another: its values are others. `logit_scale` does not count, as no vector depends on it.

    Returns
    -------
    dict of str to str
        Hexadecimal digits.

    Raises
    ------
    ValueError
        If the model was optimised: its weights are not those of a CLIP any more.
    """
    if isinstance(model, OptimizedCLIP):
        raise ValueError(
            "expected the model as it was loaded, got an optimised copy, whose weights cannot be compared; an index "
            "makes such a copy by itself where that pays"
        )
    digests = {}
    for name, tensor in sorted(model.state_dict().items()):
        if name != "logit_scale":
            digest = digests.setdefault("image" if name.startswith("visual") else "text", hashlib.sha256())
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.half().cpu().contiguous().numpy().astype("<f2").tobytes())
    return {tower: digest.hexdigest() for tower, digest in digests.items()}


def _find(folders: Sequence[str]) -> tuple[dict[str, File], dict[str, str]]:
    """The pictures below some folders, by path, and why folders or files cannot be looked at."""
    files, errors = {}, {}

    def note(error: OSError) -> None:
        errors[error.filename] = error.strerror

    for top in folders:
        for folder, _, names in os.walk(top, onerror=note):
            for path in (os.path.join(folder, name) for name in names if name.lower().endswith(PICTURE_SUFFIXES)):
                try:
                    about = os.stat(path)
                except FileNotFoundError:  # a link that leads nowhere
                    continue
                except OSError as error:
                    note(error)
                else:
                    if stat.S_ISREG(about.st_mode):  # reading from a pipe might never end
                        files[path] = File(path, about.st_size, about.st_mtime_ns)
    return files, errors


def _is_below(path: str, folders: Iterable[str]) -> bool:
    """Whether the path is one of these, or lies in one."""
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def _look(file: File) -> Seen:
    """The sha256 of a file's content, or why it cannot be read."""
    try:
        return Seen(file, sha256_of(Path(file.path)).digest())
    except OSError as error:
        return Seen(file, None, error.strerror or str(error))


def _sound(rows: Rows) -> tuple[torch.Tensor, dict[int, str]]:
    """The rows that are numbers, and by their places in the stream why the others have none."""
    reasons = {place: str(error) for place, error in rows.errors.items()}
    if not rows.indices:
        return rows.values, reasons
    sound = rows.values.isfinite().all(dim=1)
    reasons |= {
        place: "the model's answer is no number" for place, ok in zip(rows.indices, sound, strict=True) if not ok
    }
    return rows.values[sound], reasons
