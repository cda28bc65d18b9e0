"""The three pickled forms a CLIP comes in, read without running what they hold.

OpenAI's released files are TorchScript archives, traced on a GPU: a zip of source code and of data. Only the data is
wanted, and it is the same in every form: a pickle (:mod:`clip.checkpoints.restricted_pickle`) that describes tensors,
and beside it the raw numbers, one run ("storage") for each.

    TorchScript archive             torch.save, zip                torch.save, legacy stream
    ViT-B-32/data.pkl               model/data.pkl                 pickle: magic number
    ViT-B-32/data/0, 1, 2, ...      model/data/0, 1, 2, ...        pickle: version
    ViT-B-32/constants.pkl          model/version                  pickle: about the writer's system
    ViT-B-32/code/...               ...                            pickle: the object
    ViT-B-32/version                                               pickle: order of the storages
    ...                                                            for each: element count (int64), numbers

In a TorchScript archive the object is a tree of modules, whose attributes are tensors and further modules; in the
other two it is whatever was saved, as a rule a dict of names and tensors. :func:`flatten` turns either into the dict.
A tensor is a window on its storage: an offset, a size and strides, all of them checked against the storage, and the
storage against the zip entry and its CRC-32.

File names inside the zip, the archive's version and the devices it mentions vary between writers and are not relied on.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cached_property, partial

import torch

from .mapped_file import CheckpointError, MappedFile
from .restricted_pickle import Function, Instance, read_pickle

# A training checkpoint of the largest CLIP, RN50x64, has a pickle of 0.3 MB and 1,900 modules and tensors in its model.
MAX_PICKLE = 4 << 20  # bytes; also the zip's list of contents
MAX_NODES = 10_000
MAX_NAME = 500  # characters
MAX_DIMENSIONS = 8  # a convolution's weight has four

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_archive(file: MappedFile) -> object:
    """What was saved in a TorchScript archive or by `torch.save`.

    Returns
    -------
    object
        Made of plain values, tuples, lists, dicts, `Instance` for modules and `StoredTensor` for tensors. No storage
        has been looked at yet.

    Raises
    ------
    CheckpointError
        If the file is damaged, or its pickle names anything but what tensors are made of.
    """
    return _read_zip(file) if file.read(0, 2) == b"PK" else _read_legacy(file)


def flatten(tree: object, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The tensors of a tree of modules and dicts under their dotted names; what is no tensor is left out.

    Those that are not `wanted` are shapes without numbers, on the meta device.

    Raises
    ------
    CheckpointError
        If a name is not a string, the tree is no tree or far larger than a model, or a tensor does not fit its storage.
    """
    tensors = {}
    nodes = [("", tree)]
    visited = 0
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, StoredTensor):
            if name in tensors:
                raise CheckpointError(f"two tensors named {name!r}; the file is damaged")
            try:
                tensors[name] = node.read() if wanted(name) else node.outline()
            except CheckpointError as error:
                raise CheckpointError(f"tensor {name!r}: {error}") from error.__cause__
        children = node.attributes if isinstance(node, Instance) else node
        if isinstance(children, dict):
            visited += len(children)
            if visited > MAX_NODES:
                raise CheckpointError(f"more than {MAX_NODES} modules and tensors; no CLIP has so many")
            for key, child in reversed(children.items()):  # a stack: the last in is the first out
                if type(key) is not str or len(name) + len(key) > MAX_NAME:
                    raise CheckpointError(f"expected names of tensors below {name!r}, got {str(key)[:50]!r}")
                nodes.append((f"{name}.{key}" if name else key, child))
    return tensors


# -- tensors ----------------------------------------------------------------------------------------------------------


class Storage:
    """A run of numbers in the file, mapped when first used; `locate(bytes)` checks it and tells where it starts."""

    def __init__(self, file: MappedFile, locate: Callable[[int], int], dtype: torch.dtype, count: int):
        self.file = file
        self.locate = locate
        self.dtype = dtype
        self.count = count

    @cached_property
    def numbers(self) -> torch.Tensor:
        """The elements, shape `(count,)`."""
        return self.file.tensor(self.locate(self.count * self.dtype.itemsize), self.count, self.dtype)


class StoredTensor:
    """A window on a storage."""

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]):
        self.storage = storage
        self.offset = offset
        self.size = size
        self.stride = stride

    def read(self) -> torch.Tensor:
        """The tensor, a view of the file."""
        self._check()
        return self.storage.numbers.as_strided(self.size, self.stride, self.offset)

    def outline(self) -> torch.Tensor:
        """Its shape and dtype without the numbers, on the meta device."""
        self._check()
        if self.storage.count * self.storage.dtype.itemsize > self.storage.file.size:  # nobody will look for it there
            raise CheckpointError(f"a storage of {self.storage.count} elements does not fit the file; it is damaged")
        return torch.empty(self.size, dtype=self.storage.dtype, device="meta")

    def _check(self) -> None:
        """Refuse a window that is larger than its storage."""
        count = math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        # More elements than the storage has would be a bomb: strides of zero make a terabyte from one number.
        if not 0 < count <= self.storage.count or last >= self.storage.count:
            raise CheckpointError(
                f"size {self.size}, stride {self.stride} and offset {self.offset} do not fit its storage of "
                f"{self.storage.count} elements; the file is damaged"
            )


def _is_index(value: object) -> bool:
    """Whether a value may be a size, a stride or an offset."""
    return type(value) is int and 0 <= value < 2**62


def _rebuild_tensor(arguments: tuple[object, ...]) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`"""
    match arguments:
        case (Storage() as storage, offset, tuple(size), tuple(stride), *_):
            if len(size) == len(stride) <= MAX_DIMENSIONS and all(map(_is_index, (offset, *size, *stride))):
                return StoredTensor(storage, offset, size, stride)
    raise CheckpointError("its pickle describes a tensor in a way that PyTorch does not; the file is damaged")


def _first(arguments: tuple[object, ...]) -> object:
    """For functions that, as far as the numbers go, hand back their first argument."""
    return arguments[0]


GLOBALS = {
    "torch._utils._rebuild_tensor_v2": Function(_rebuild_tensor),
    "torch._utils._rebuild_parameter": Function(_first),
    "collections.OrderedDict": Function(lambda arguments: {}),
    "torch.Size": Function(_first),
    "torch.device": Function(lambda arguments: arguments),
    # attributes of scripted modules
    "torch.jit._pickle.build_intlist": Function(_first),
    "torch.jit._pickle.build_doublelist": Function(_first),
    "torch.jit._pickle.build_boollist": Function(_first),
    "torch.jit._pickle.build_tensorlist": Function(_first),
    "torch.jit._pickle.build_tensor_from_id": Function(_first),
    "torch.jit._pickle.restore_type_tag": Function(_first),
    # types of storages, and of tensors
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32")
    },
}


def _find_global(name: str) -> object:
    """What stands for an imported name; classes of a TorchScript archive are kept as bare attributes."""
    if name.startswith("__torch__."):
        return Instance
    if name not in GLOBALS:
        raise CheckpointError(
            f"its pickle asks for {name[:200]!r}, which tensors do not need; it was neither imported nor called. If "
            "this is a whole pickled model from a source you trust, load it with the code that wrote it and save the "
            "weights alone: torch.save(model.state_dict(), ...)"
        )
    return GLOBALS[name]


class _Storages:
    """Storages by their key in the file. `locate(key, bytes)` tells where the numbers start."""

    def __init__(self, file: MappedFile, locate: Callable[[str, int], int]):
        self.file = file
        self.locate = locate
        self.by_key: dict[str, Storage] = {}

    def find(self, persistent_id: object) -> Storage:
        """The storage that a pickle points at with `("storage", type, key, device, element count)`."""
        match persistent_id:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(count), *view) if view in ([], [None]):
                storage = self.by_key.setdefault(key, Storage(self.file, partial(self.locate, key), dtype, count))
                if (storage.dtype, storage.count) == (dtype, count):
                    return storage
        raise CheckpointError("its pickle points at a storage in a way that PyTorch does not; the file is damaged")


# -- zip: TorchScript archives and torch.save -------------------------------------------------------------------------


def _read_zip(file: MappedFile) -> object:
    entries = _read_contents(file)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"expected a zip file with one data.pkl, as torch.save and torch.jit.save write it, found {len(pickles)}"
        )
    folder = pickles[0].removesuffix("data.pkl")

    def locate(key: str, length: int) -> int:
        if (entry := entries.get(f"{folder}data/{key}")) is None:
            raise CheckpointError(f"its storage {key[:50]!r} is missing from the file")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError("its storage is compressed, which PyTorch never does; load and save it with PyTorch")
        if not length == entry.file_size == entry.compress_size:
            raise CheckpointError(f"its storage should have {length} bytes, the zip file has {entry.file_size}")
        start = _data_start(file, entry)
        _check_crc32(entry, file.crc32(start, length))
        return start

    byteorder = entries.get(f"{folder}byteorder")
    if byteorder is not None and _read_small(file, byteorder) != b"little":
        raise CheckpointError("its numbers are not little-endian; save it again on a common machine")
    tree, _ = read_pickle(_read_small(file, entries[pickles[0]]), _find_global, _Storages(file, locate).find)
    return tree


class _ZipStream(io.FileIO):
    """The file as `zipfile` sees it, which reads the list of contents in one piece, however long it claims to be."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_PICKLE:
            raise zipfile.BadZipFile(f"a list of contents of {size} bytes")
        return super().read(size)


def _read_contents(file: MappedFile) -> dict[str, zipfile.ZipInfo]:
    """The entries of the zip file by name."""
    try:
        with zipfile.ZipFile(_ZipStream(file.fileno, closefd=False)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise CheckpointError(
            f"it begins like a zip file but has no sound list of contents ({error}); it is truncated or damaged: fetch "
            "or write it again"
        ) from error
    entries = {info.filename: info for info in infos}
    if len(entries) < len(infos):
        raise CheckpointError("its zip file has several entries of one name; the file is damaged or made to mislead")
    return entries


def _data_start(file: MappedFile, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, read from the header in front of them."""
    signature, name_length, extra_length = file.unpack("<4s22xHH", entry.header_offset)
    if signature != b"PK\3\4" or entry.flag_bits & 1:
        raise CheckpointError(f"its zip entry {entry.filename[-50:]!r} is encrypted or damaged")
    return entry.header_offset + 30 + name_length + extra_length


def _check_crc32(entry: zipfile.ZipInfo, crc32: int) -> None:
    """Compare with the checksum that the zip file has for an entry; PyTorch can be told to write zero instead."""
    if entry.CRC not in (0, crc32):
        raise CheckpointError(
            f"the checksum of its zip entry {entry.filename[-50:]!r} is wrong; the file is damaged: fetch it again"
        )


def _read_small(file: MappedFile, entry: zipfile.ZipInfo) -> bytes:
    """The content of an entry that is no storage; it may be compressed."""
    if max(entry.file_size, entry.compress_size) > MAX_PICKLE:
        raise CheckpointError(f"its {entry.filename[-50:]!r} has {entry.file_size} bytes, far more than a model needs")
    data = file.read(_data_start(file, entry), entry.compress_size)
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_PICKLE)
        except zlib.error as error:
            raise CheckpointError(f"its {entry.filename[-50:]!r} cannot be decompressed ({error})") from error
    elif entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"its {entry.filename[-50:]!r} is compressed by another method than deflate")
    if len(data) != entry.file_size:
        raise CheckpointError(
            f"its {entry.filename[-50:]!r} has {len(data)} bytes, the zip file says {entry.file_size}"
        )
    _check_crc32(entry, zlib.crc32(data))
    return data


# -- stream: torch.save before PyTorch 1.6 ----------------------------------------------------------------------------


def _read_legacy(file: MappedFile) -> object:
    head = file.read(0, min(file.size, 2 * MAX_PICKLE))
    starts: dict[str, int] = {}

    def locate(key: str, length: int) -> int:
        if key not in starts:
            raise CheckpointError(f"its storage {key[:50]!r} is missing from the file")
        return starts[key]

    storages = _Storages(file, locate)

    def read(position: int) -> tuple[object, int]:
        return read_pickle(head[: position + MAX_PICKLE], _find_global, storages.find, position)

    magic, position = read(0)
    if magic != LEGACY_MAGIC:
        raise CheckpointError(
            "expected a file written by torch.save, found another pickle; save the weights with "
            "torch.save(model.state_dict(), ...)"
        )
    _, position = read(position)
    system, position = read(position)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise CheckpointError("its numbers are not little-endian; save it again on a common machine")
    tree, position = read(position)
    keys, position = read(position)
    if type(keys) is not list:
        raise CheckpointError("expected the list of its storages; the file is damaged")
    for key in keys:
        if type(key) is not str or key not in storages.by_key:
            raise CheckpointError("its list of storages names one that no tensor uses; the file is damaged")
        storage = storages.by_key[key]
        (count,) = file.unpack("<q", position)
        if count != storage.count:
            raise CheckpointError(
                f"a storage should have {storage.count} elements, the file says {count}; it is damaged"
            )
        starts[key] = position + 8
        position = starts[key] + count * storage.dtype.itemsize
    return tree
