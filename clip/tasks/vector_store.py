"""Vectors on disk that know their files, and survive being killed.

    photos.clipindex/
      index.sqlite        facts      which model made it, by name and the weights of its towers; which folders
                          files      path, size, time of change; the digest of the content, or why there is none
                          contents   digest, and its row below
      vectors-0.f16       (N, E), half precision, unit length, memory-mapped

Equal contents share a row. The vectors' file only grows: a batch is appended, brought onto the disk, and then one
transaction says that it is there. When rows have died with their files, the living are copied to a new file, and one
transaction names it. So the process may be killed between any two instructions: what the database says is so, and what
it does not mention is overwritten or cleared away next time. A second process that writes waits for its turn; one that
reads keeps the file it has open.
"""

import os
import sqlite3
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

__all__ = ["File", "Seen", "Snapshot", "VectorStore"]

DATABASE = "index.sqlite"
FORM = 3  # of the folder, to be raised when it changes
COPIED = 65536  # rows at once

# A content lives as long as a file has it, and `generation` tells the states of the vectors apart.
SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value)",
    "CREATE TABLE contents (digest BLOB PRIMARY KEY, row INTEGER NOT NULL UNIQUE)",
    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, changed INTEGER, digest BLOB, error TEXT)",
    "CREATE INDEX files_by_digest ON files (digest)",
    "CREATE TRIGGER orphans_after_DELETE AFTER DELETE ON files BEGIN DELETE FROM contents "
    "WHERE digest = OLD.digest AND NOT EXISTS (SELECT 1 FROM files WHERE files.digest = OLD.digest); END",
    *(
        f"CREATE TRIGGER generation_after_{event} AFTER {event} ON contents BEGIN "
        "UPDATE facts SET value = value + 1 WHERE name = 'generation'; END"
        for event in ("INSERT", "UPDATE", "DELETE")
    ),
)
SET_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"
FORGET_ORPHAN = (
    "DELETE FROM contents WHERE digest = ? AND NOT EXISTS (SELECT 1 FROM files WHERE files.digest = contents.digest)"
)
NOTE_FILE = (
    "INSERT INTO files VALUES (?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET "
    "size = excluded.size, changed = excluded.changed, digest = excluded.digest, error = excluded.error"
)


@dataclass(frozen=True)
class File:
    """A file as the file system tells of it."""

    path: str
    size: int  # bytes
    changed: int  # nanoseconds


@dataclass(frozen=True)
class Seen:
    """What was found in a file: a content, or nothing that can be read."""

    file: File
    digest: bytes | None
    error: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """All vectors at one moment.

    Attributes
    ----------
    generation : int
        Which moment; equal if nothing was added or dropped.
    vectors : torch.Tensor
        (N, E), float16; a view of the file, read when looked at, unless it had gaps.
    rows : torch.Tensor or None
        (N,), int64: where the file has them; None if in order.
    """

    generation: int
    vectors: torch.Tensor
    rows: torch.Tensor | None


class VectorStore:
    """The folder of an index.

    Parameters
    ----------
    path : path
        Need not be there yet.
    weights : mapping of str to str, optional
        Who is asking: the digests of a model's towers, "image" and "text" or one of them. Vectors of another model are
        refused with a ValueError, by whatever is about vectors.

    Raises
    ------
    ValueError
        If there is something else.
    """

    def __init__(self, path: str | os.PathLike, weights: Mapping[str, str] | None = None):
        self.path, self._weights = Path(path), weights or {}
        names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if (self.path.exists() and not self.path.is_dir()) or (names and DATABASE not in names):
            raise ValueError(f"{self.path}: expected an index, or nothing, and there is something else")

    def exists(self) -> bool:
        """Whether it was made; a folder that the maker was killed in is not there yet."""
        if not (self.path / DATABASE).exists():
            return False
        with self._transaction() as database:
            return _is_made(database)

    def claim(self, model: str) -> None:
        """Make it, for the model that is asking and goes by that name; or hand it over, if it holds no contents.

        Raises
        ------
        ValueError
            If it holds another model's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._transaction(write=True) as database:
            if not _is_made(database):
                for statement in SCHEMA:
                    database.execute(statement)
                facts = {
                    "form": FORM,
                    "width": 0,  # E, known with the first vectors
                    "vectors": "vectors-0.f16",
                    "generation": 0,
                    "id": uuid.uuid4().hex,
                }
                database.executemany(SET_FACT, facts.items())
            if database.execute("SELECT 1 FROM contents").fetchone() is None:
                database.execute("DELETE FROM files")  # what one model cannot embed, another may
                weights = {f"{tower}_weights": digest for tower, digest in self._weights.items()}
                database.executemany(SET_FACT, {"model": model, **weights}.items())
            self._facts(database)

    def facts(self) -> dict[str, str | int]:
        """What it says of itself.

        Raises
        ------
        ValueError
            If there is no index, or one of another form or model.
        """
        if not self.exists():
            raise ValueError(f"{self.path}: there is no index; make one with `clip index` or Index.build")
        with self._transaction() as database:
            return self._facts(database)

    def set_fact(self, name: str, value: str) -> None:
        """Note something about the whole."""
        with self._transaction(write=True) as database:
            database.execute(SET_FACT, (name, value))

    def __len__(self) -> int:
        """How many different contents there are."""
        with self._transaction() as database:
            return database.execute("SELECT COUNT(*) FROM contents").fetchone()[0]

    def files(self) -> list[Seen]:
        """All files it knows, those that cannot be read included; not those whose content has gone."""
        known = (
            "SELECT path, size, changed, digest, error FROM files "
            "WHERE digest IS NULL OR digest IN (SELECT digest FROM contents)"
        )
        with self._transaction() as database:
            rows = database.execute(known).fetchall()
        return [Seen(File(os.fsdecode(path), size, changed), *found) for path, size, changed, *found in rows]

    def known(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of the digests whose content has a vector."""
        lookup = "SELECT 1 FROM contents WHERE digest = ?"
        with self._transaction() as database:
            return {digest for digest in digests if database.execute(lookup, (digest,)).fetchone()}

    def add(self, seen: Sequence[Seen], digests: Sequence[bytes] = (), vectors: torch.Tensor | None = None) -> None:
        """Append new contents, and note what was found in files.

        Parameters
        ----------
        seen : sequence of Seen
            Each with a digest that is known or among the new ones, or with an error.
        digests : sequence of bytes
            n new contents.
        vectors : torch.Tensor
            (n, E), of unit length.
        """
        with self._transaction(write=True) as database:
            if digests:
                [end] = database.execute("SELECT COALESCE(MAX(row) + 1, 0) FROM contents").fetchone()
                database.execute(SET_FACT, ("width", vectors.shape[1]))
                _write(self.path / self._facts(database)["vectors"], end, vectors.numpy())
                rows = zip(digests, count(end), strict=False)
                database.executemany("INSERT OR IGNORE INTO contents VALUES (?, ?)", rows)
            notes = [
                (os.fsencode(one.file.path), one.file.size, one.file.changed, one.digest, one.error) for one in seen
            ]
            before = "SELECT digest FROM files WHERE path = ? AND digest IS NOT NULL"
            left = {row for path, *_ in notes for row in database.execute(before, (path,))}
            database.executemany(NOTE_FILE, notes)
            database.executemany(FORGET_ORPHAN, left)  # only now: files may have exchanged their contents

    def drop(self, paths: Collection[str]) -> None:
        """Forget files, and close the gaps that contents without a file have left, now or earlier."""
        with self._transaction(write=True) as database:
            database.executemany("DELETE FROM files WHERE path = ?", [(os.fsencode(path),) for path in paths])
            rows = _rows(database)
            if len(rows) and rows[-1] >= len(rows):
                old = self._mapped(self._facts(database), rows[-1] + 1)
                new = self.path / f"vectors-{uuid.uuid4().hex}.f16"
                for start in range(0, len(rows), COPIED):
                    _write(new, start, old[rows[start : start + COPIED]])
                # Rising, so that each number is free when it is given.
                database.executemany("UPDATE contents SET row = ? WHERE row = ?", enumerate(rows.tolist()))
                database.execute(SET_FACT, ("vectors", new.name))
        self._clear()

    def snapshot(self) -> Snapshot | None:
        """All vectors as they are now, or None if there is none."""
        with self._transaction() as database:
            facts = self._facts(database)
            [size, end] = database.execute("SELECT COUNT(*), MAX(row) + 1 FROM contents").fetchone()
            if not size:
                return None
            vectors = torch.from_numpy(self._mapped(facts, end))
            if size == end:
                return Snapshot(facts["generation"], vectors, None)
            rows = torch.from_numpy(_rows(database))  # an update was stopped before it could close the gaps
            return Snapshot(facts["generation"], vectors[rows], rows)

    def paths(self, snapshot: Snapshot, places: Collection[int]) -> dict[int, list[str]] | None:
        """The files, sorted, behind some of a snapshot's vectors; None if it is not of now."""
        lookup = "SELECT path FROM files JOIN contents USING (digest) WHERE row = ? ORDER BY path"
        rows = {place: place if snapshot.rows is None else snapshot.rows[place].item() for place in places}
        with self._transaction() as database:
            if self._facts(database)["generation"] != snapshot.generation:
                return None
            return {
                place: [os.fsdecode(path) for [path] in database.execute(lookup, (row,))] for place, row in rows.items()
            }

    def _facts(self, database: sqlite3.Connection) -> dict[str, str | int]:
        """What it says of itself, once it is sure that this version reads it and that it is of the model's."""
        facts = dict(database.execute("SELECT name, value FROM facts"))
        if facts["form"] != FORM:
            raise ValueError(f"{self.path}: an index of form {facts['form']}, and this version reads form {FORM}")
        for tower, digest in self._weights.items():
            made_by = facts.get(f"{tower}_weights", "")
            if digest != made_by:
                raise ValueError(
                    f"{self.path} was made by {facts['model']!r}, whose {tower} tower has the weights {made_by[:12]}, "
                    f"and these are {digest[:12]}: use the model that made it, or make another index"
                )
        return facts

    def _mapped(self, facts: dict[str, str | int], end: int) -> np.ndarray:
        """(end, E), float16: the rows as the file has them, read when they are looked at."""
        file, shape = self.path / facts["vectors"], (int(end), facts["width"])
        if not file.exists() or file.stat().st_size < 2 * shape[0] * shape[1]:
            raise OSError(f"{file} is shorter than its database says: the index is damaged; make it anew")
        return np.memmap(file, "<f2", "c", shape=shape)  # "c": writable for torch's sake, and never written back

    def _clear(self) -> None:
        """Remove what belongs to earlier states, or to none."""
        with self._transaction(write=True) as database:  # so that nobody is writing
            facts = self._facts(database)
            for file in self.path.glob("*-*"):
                of_now = file.name == facts["vectors"] or file.name.endswith(f"-{facts['generation']}.faiss")
                if file.suffix in (".f16", ".faiss", ".part") and not of_now:
                    with suppress(OSError):  # Windows keeps what somebody reads
                        file.unlink()

    @contextmanager
    def _transaction(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction, undone by whatever is raised in it; SQLite's complaints become OSErrors."""
        try:
            with closing(sqlite3.connect(self.path / DATABASE, timeout=60, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                with database:
                    yield database
        except sqlite3.Error as error:
            raise OSError(f"{self.path / DATABASE}: {error}") from error


def _is_made(database: sqlite3.Connection) -> bool:
    """Whether the tables are there."""
    return database.execute("SELECT 1 FROM sqlite_master WHERE name = 'facts'").fetchone() is not None


def _rows(database: sqlite3.Connection) -> np.ndarray:
    """(N,), int64: the rows in use, rising."""
    return np.array(database.execute("SELECT row FROM contents ORDER BY row").fetchall(), np.int64).reshape(-1)


def _write(file: Path, row: int, vectors: np.ndarray) -> None:
    """Put vectors (n, E) where row `row` begins, and bring them onto the disk."""
    file.touch()
    with file.open("r+b") as stream:
        stream.seek(2 * row * vectors.shape[1])
        stream.write(vectors.astype("<f2").tobytes())
        stream.flush()
        os.fsync(stream.fileno())
