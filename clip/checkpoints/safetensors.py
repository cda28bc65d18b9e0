"""The safetensors format: a table of contents in JSON, then the numbers.

Source: the format's description and reference implementation, huggingface/safetensors.

    8 bytes    length of the header, little-endian
    header     {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, ...,
                "__metadata__": {"any": "text"}}
    data       the tensors, row by row, little-endian; offsets count from here, without gap or overlap

Nothing in it can be executed, and a tensor is found without reading the others: what one wishes of a file of weights.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import BinaryIO

import torch

from .mapped_file import CheckpointError, MappedFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 8 << 20  # bytes; the header of the largest CLIP, RN50x64, has 0.15 MB
MAX_DIMENSIONS = 8


def read_safetensors(
    file: MappedFile, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, views of the file in the order of its header, and its metadata.

    Those that are not `wanted` are shapes without numbers, on the meta device.

    Raises
    ------
    CheckpointError
        If the header is damaged, or what it promises does not fill the file exactly.
    """
    (length,) = file.unpack("<Q", 0)
    if length > MAX_HEADER:
        raise CheckpointError(f"a safetensors header of {length} bytes; at most {MAX_HEADER} are expected")
    try:
        header = json.loads(file.read(8, length), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its safetensors header is no JSON text ({error}); the file is damaged") from None
    if type(header) is not dict:
        raise CheckpointError("its safetensors header is no JSON object; the file is damaged")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise CheckpointError("its safetensors metadata is not text by name; the file is damaged")

    data = 8 + length
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, start, end = _read_entry(name, entry)
        if wanted(name):
            tensors[name] = file.tensor(data + start, math.prod(shape), dtype).reshape(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        spans.append((start, end))
    filled = 0
    for start, end in sorted(spans):
        if start != filled:
            raise CheckpointError(
                f"its tensors overlap or leave a gap at byte {filled} of the data; the file is damaged"
            )
        filled = end
    if data + filled != file.size:
        raise CheckpointError(f"its tensors end at byte {data + filled}, the file at {file.size}; it is damaged")
    return tensors, metadata


def write_safetensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors one by one; the widest numbers come first, so that each lies at a multiple of its own width.

    Raises
    ------
    ValueError
        If the format has no name for a tensor's dtype.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name} is {tensor.dtype}; a safetensors file can hold {', '.join(map(str, NAMES))}")
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in ordered:
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _read_entry(name: str, entry: object) -> tuple[torch.dtype, list[int], int, int]:
    """Dtype, shape and place of one tensor, after checking that they agree."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            len(shape) <= MAX_DIMENSIONS
            and all(type(number) is int and 0 <= number < 2**62 for number in (*shape, start, end))
            and math.prod(max(size, 1) for size in shape) < 2**62
        ):
            if dtype not in DTYPES:
                raise CheckpointError(f"tensor {name!r} has dtype {dtype[:20]!r}, expected one of {', '.join(DTYPES)}")
            if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
                raise CheckpointError(
                    f"tensor {name!r} of {dtype} {shape} has {end - start} bytes; the file is damaged"
                )
            return DTYPES[dtype], shape, start, end
    raise CheckpointError(f"tensor {name!r} needs dtype, shape and data_offsets in its header; the file is damaged")


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, in which no name may stand twice."""
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name stands twice")
    return names
