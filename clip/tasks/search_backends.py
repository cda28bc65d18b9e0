"""Nearest neighbours among unit vectors: exactly, or in less time and nearly so.

All backends answer one question, `nearest(queries, top)`: which vectors have the highest cosines?

    queries (Q, E)       vectors (N, E), half precision
        └───── nearest ─────┘
    cosines (Q, k), places (Q, k)      k = min(top, N), best first; place -1 where fewer were found

| name       | how                                                   | finds the nearest | before the first query |
|------------|-------------------------------------------------------|-------------------|------------------------|
| exact      | all N cosines, by torch, a chunk at a time            | always            | nothing                |
| faiss-flat | all N cosines, by faiss                               | always            | reads all              |
| faiss-ivf  | only the cells near the query, out of about sqrt(N)   | mostly            | k-means                |
| faiss-hnsw | a walk through a graph of neighbours (1603.09320)     | mostly            | builds the graph       |
| qdrant     | such a graph on a server, or on several               | mostly            | sends all there        |

faiss and Qdrant keep the vectors in half precision too, which is how an index holds them: nothing more is lost.
"""

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

__all__ = ["BACKENDS", "Backend", "ExactSearch", "FaissSearch", "QdrantSearch", "overlap"]

BACKENDS = ("exact", "faiss-flat", "faiss-ivf", "faiss-hnsw", "qdrant")
CHUNK = 4096  # vectors in float32 at once: 8 MiB of them if E = 512, about what a processor's cache holds
QUERIES = 1024  # at once; with a chunk they make 16 MiB of cosines
QDRANT_BATCH = 256  # vectors sent at once
NEAREST = tuple[torch.Tensor, torch.Tensor]


class Backend(Protocol):
    """What can stand behind a search."""

    def nearest(self, queries: torch.Tensor, top: int) -> NEAREST:
        """The best `top` vectors for each query.

        Parameters
        ----------
        queries : torch.Tensor
            (Q, E), float32, of unit length, on the CPU.
        top : int
            How many; all N, if there are fewer.

        Returns
        -------
        cosines : torch.Tensor
            (Q, k), float32, falling.
        places : torch.Tensor
            (Q, k), int64, counted from 0 in the order of the vectors; -1 where an approximate search found fewer.
        """


class ExactSearch:
    """All cosines, computed in chunks, so that a memory-mapped file of any size will do.

    Parameters
    ----------
    vectors : torch.Tensor
        (N, E), float16 or float32, of unit length, on any device; the search runs there.
    """

    def __init__(self, vectors: torch.Tensor):
        self._vectors = vectors

    def nearest(self, queries: torch.Tensor, top: int) -> NEAREST:
        """As :meth:`Backend.nearest`."""
        parts = [self._nearest(part.to(self._vectors.device), top) for part in queries.split(QUERIES)]
        return torch.cat([cosines for cosines, _ in parts]), torch.cat([places for _, places in parts])

    def _nearest(self, queries: torch.Tensor, top: int) -> NEAREST:
        """The best of all chunks, kept from chunk to chunk."""
        best = queries.new_empty(len(queries), 0)
        places = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        room = torch.empty(CHUNK, self._vectors.shape[1], device=queries.device)  # asked for once: that takes longest
        for start in range(0, len(self._vectors), CHUNK):
            chunk = self._vectors[start : start + CHUNK]
            cosines = queries @ room[: len(chunk)].copy_(chunk).T  # (Q, n)
            nearest = cosines.topk(min(top, len(chunk)))
            best = torch.cat([best, nearest.values], dim=1)
            places = torch.cat([places, nearest.indices + start], dim=1)
            best, order = best.topk(min(top, best.shape[1]))
            places = places.gather(1, order)
        return best.cpu(), places.cpu()


class FaissSearch:
    """The search of faiss, built once and kept in a file.

    Parameters
    ----------
    vectors : torch.Tensor
        (N, E), float16 or float32, of unit length, on the CPU.
    kind : str
        "flat", "ivf" or "hnsw".
    file : path, optional
        Where it is kept: read if it is there, otherwise written if that can be. The caller gives other vectors another
        name.

    Raises
    ------
    ImportError
        If faiss is not installed.
    ValueError
        If there is no such kind.
    """

    def __init__(self, vectors: torch.Tensor, kind: str, file: str | os.PathLike | None = None):
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                "searching with faiss needs the package faiss-cpu: pip install clip-from-scratch[search]"
            ) from error
        if kind not in ("flat", "ivf", "hnsw"):
            raise ValueError(f'expected "flat", "ivf" or "hnsw", got {kind!r}')
        if file is not None and Path(file).exists():
            self._index = faiss.read_index(os.fspath(file))
        else:
            self._index = _faiss_index(vectors, kind)
            if file is not None:
                unfinished = Path(f"{os.fspath(file)}.{uuid.uuid4().hex}.part")
                with suppress(OSError, RuntimeError):  # the disk may be full, or the folder somebody else's
                    faiss.write_index(self._index, str(unfinished))
                    unfinished.replace(file)
                with suppress(OSError):
                    unfinished.unlink()
        # These are not kept in the file.
        if kind == "ivf":
            self._index.nprobe = min(64, self._index.nlist)  # cells looked into
        elif kind == "hnsw":
            self._index.hnsw.efSearch = 128  # candidates kept on the walk

    def nearest(self, queries: torch.Tensor, top: int) -> NEAREST:
        """As :meth:`Backend.nearest`."""
        cosines, places = self._index.search(queries.numpy(), min(top, self._index.ntotal))
        return torch.from_numpy(cosines), torch.from_numpy(places)


def _faiss_index(vectors: torch.Tensor, kind: str) -> object:
    """A faiss index of vectors kept in half precision."""
    import faiss

    count, width = vectors.shape
    cells = max(1, min(int(count**0.5), count // 39))  # k-means wants 39 vectors a cell
    recipe = {"flat": "SQfp16", "ivf": f"IVF{cells},SQfp16", "hnsw": "HNSW32,SQfp16"}[kind]
    index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf":
        index.by_residual = False  # the vectors as they are, not what is left of them beside their cell's center
        index.cp.min_points_per_centroid = 1  # no warning if even a single cell has too few
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(count, generator=generator)[: 64 * cells].sort().values
    index.train(vectors[sample].float().numpy())  # only ivf learns something
    for chunk in vectors.split(CHUNK):
        index.add(chunk.float().numpy())
    return index


class QdrantSearch:
    """The search of a Qdrant server, which gets the vectors once.

    Parameters
    ----------
    vectors : torch.Tensor
        (N, E), float16 or float32, of unit length, on the CPU.
    server : str
        The server's address ("http://localhost:6333"); or, for trials without one, a folder, or ":memory:".
    name : str
        Says which vectors these are, in two parts: "photos-12" replaces every other collection "photos-*" there.

    Raises
    ------
    ImportError
        If qdrant-client is not installed.
    OSError
        If the server does not answer.
    """

    def __init__(self, vectors: torch.Tensor, server: str, name: str):
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise ImportError(
                "searching with Qdrant needs the package qdrant-client: pip install clip-from-scratch[search]"
            ) from error
        self._models, self._name, self._count = models, name, len(vectors)
        if server == ":memory:":
            self._client = QdrantClient(server)
        elif "://" in server:
            self._client = QdrantClient(url=server, check_compatibility=False)
        else:
            self._client = QdrantClient(path=server)
        try:
            self._send(vectors)
        except Exception as error:
            self._client.close()
            raise OSError(f"Qdrant at {server}: {error}") from error

    def _send(self, vectors: torch.Tensor) -> None:
        """Bring the vectors there, unless all are there already."""
        models, client = self._models, self._client
        family = self._name.rpartition("-")[0]
        for collection in client.get_collections().collections:
            if collection.name.rpartition("-")[0] == family and collection.name != self._name:
                client.delete_collection(collection.name)
        if not client.collection_exists(self._name):
            dot, half = models.Distance.DOT, models.Datatype.FLOAT16
            settings = models.VectorParams(size=vectors.shape[1], distance=dot, datatype=half)
            client.create_collection(self._name, vectors_config=settings)
        if client.count(self._name).count < len(vectors):  # fewer than all if a process was stopped while it sent them
            for start in range(0, len(vectors), QDRANT_BATCH):
                part = vectors[start : start + QDRANT_BATCH].float().tolist()
                client.upsert(self._name, models.Batch(ids=range(start, start + len(part)), vectors=part), wait=True)

    def nearest(self, queries: torch.Tensor, top: int) -> NEAREST:
        """As :meth:`Backend.nearest`.

        Raises
        ------
        OSError
            If the server does not answer.
        """
        top = min(top, self._count)
        requests = [self._models.QueryRequest(query=query, limit=top) for query in queries.tolist()]
        try:
            answers = self._client.query_batch_points(self._name, requests)
        except Exception as error:
            raise OSError(f"Qdrant: {error}") from error
        cosines = torch.full((len(queries), top), -torch.inf)
        places = torch.full((len(queries), top), -1)
        for row, answer in enumerate(answers):
            for column, point in enumerate(answer.points):
                cosines[row, column], places[row, column] = point.score, point.id
        return cosines, places


def overlap(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Recall against exact search: the share of the true nearest that were found.

    Parameters
    ----------
    found, exact : torch.Tensor
        (Q, k), the places that two backends gave for the same queries.

    Returns
    -------
    float
        Between 0 and 1.
    """
    return (exact[:, :, None] == found[:, None, :]).any(dim=2).double().mean().item()
