"""A checkpoint file as memory: its bytes where they lie, and tensors that are views of them.

Mapping a file costs nothing until a page is touched. So names and shapes can be looked at, and an unfit file refused,
before any weight has been read; and a loader that copies one tensor at a time never holds the weights twice:

    weights on disk ── pages of the mapping ── tensor, a view ── copy_ ── parameter
                       come in when touched,   go when the tensor is dropped

The price: the tensors depend on the file. Writing to one changes the process's own copy and never the file, and
replacing or deleting the file is harmless; but a file that is cut short in place takes its pages with it, and touching
them then kills the process (SIGBUS). So copy soon, and `clone()` what is to stay.
"""

import mmap
import os
import struct
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch


class CheckpointError(RuntimeError):
    """A checkpoint file that cannot be read or written: which file, what was expected, what came, what to do."""


@contextmanager
def map_file(path: str | os.PathLike[str]) -> Iterator["MappedFile"]:
    """Open `path` for the readers of this package.

    Tensors taken from the file may outlive the block.

    Raises
    ------
    CheckpointError
        If `path` cannot be opened or is empty. Whatever `CheckpointError` leaves the block, its message starts with
        the path.
    """
    path = Path(path)
    with naming(path):
        if path.is_dir():
            raise CheckpointError("expected a checkpoint file, found a folder; name the file inside it")
        if not path.exists():
            raise CheckpointError("no such file")
        if not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError("expected a checkpoint file, found a device or a pipe")
        with path.open("rb") as file:
            yield MappedFile(file)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path before the message of whatever `CheckpointError` leaves the block; an OSError becomes one."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except CheckpointError as error:
        if str(error).startswith(str(path)):  # of a file in a folder
            raise
        raise CheckpointError(f"{path}: {error}") from error.__cause__


class MappedFile:
    """The bytes of an open file. Every access is checked against the file's length."""

    def __init__(self, file: BinaryIO):
        self.size = os.fstat(file.fileno()).st_size
        if self.size == 0:
            raise CheckpointError("the file is empty; if it was downloaded, fetch it again")
        self.fileno = file.fileno()
        self._mapping = mmap.mmap(self.fileno, self.size, access=mmap.ACCESS_COPY)

    def read(self, start: int, length: int) -> bytes:
        """A copy of `length` bytes from `start`."""
        return bytes(self._view(start, length))

    def unpack(self, layout: str, start: int) -> tuple[int | bytes, ...]:
        """The numbers at `start`, laid out as the `struct` format string says."""
        return struct.unpack(layout, self._view(start, struct.calcsize(layout)))

    def crc32(self, start: int, length: int) -> int:
        """The CRC-32 of `length` bytes from `start`."""
        return zlib.crc32(self._view(start, length))

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` little-endian elements from `start`, shape `(count,)`: a view, or a copy if they are not aligned."""
        view = self._view(start, count * dtype.itemsize)
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(view) if start % dtype.itemsize else view, dtype=dtype)

    def _view(self, start: int, length: int) -> memoryview:
        """The bytes themselves, whose pages are given back when the view and all tensors on it are gone."""
        if not 0 <= start <= start + length <= self.size:
            raise CheckpointError(
                f"needs bytes {start} to {start + length}, but the file ends at {self.size}; "
                "it is truncated or damaged: fetch or write it again"
            )
        view = memoryview(self._mapping)[start : start + length]
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: the rest belongs to the neighbours
        last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            release = weakref.finalize(view, self._mapping.madvise, mmap.MADV_DONTNEED, first, last - first)
            release.atexit = False
        return view
