"""The safetensors format: the same bytes mean the same to the reference implementation, and damage is noticed."""

import io
import json
import struct

import pytest
import safetensors.torch
import torch

from clip.checkpoints import CheckpointError
from clip.checkpoints.mapped_file import map_file
from clip.checkpoints.safetensors import DTYPES, read_safetensors, write_safetensors

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "z.weight": torch.randn(3, 5, generator=GENERATOR).half(),
    "flag": torch.tensor([True, False, True]),
    "a.weight": torch.randn(2, 3, 7, generator=GENERATOR),
    "naïve 名": torch.randn(11, generator=GENERATOR).bfloat16(),
    "scalar": torch.tensor(2.5),
    "count": torch.tensor(-7),
    "empty": torch.empty(0, 3),
    "wide": torch.randn(2, generator=GENERATOR).double(),
}


def read(path):
    with map_file(path) as file:
        return read_safetensors(file)


def write(path, tensors, metadata):
    with path.open("wb") as file:
        write_safetensors(file, tensors, metadata)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num())


def test_the_reference_reads_what_we_write(tmp_path):
    write(tmp_path / "x.safetensors", TENSORS, {"format": "pt", "note": "naïve"})
    assert_equal(safetensors.torch.load_file(tmp_path / "x.safetensors"), TENSORS)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "naïve"}


def test_we_read_what_the_reference_writes(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    tensors, metadata = read(tmp_path / "x.safetensors")
    assert_equal(tensors, TENSORS)
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_kept_both_ways(tmp_path, dtype):
    tensor = torch.randn(3, 5, generator=GENERATOR).mul(20).abs().to(dtype)
    write(tmp_path / "ours", {"x": tensor}, {})
    safetensors.torch.save_file({"x": tensor}, tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        assert_equal(safetensors.torch.load_file(path), {"x": tensor})
        assert_equal(read(path)[0], {"x": tensor})


def test_every_bit_and_the_order_of_names_survive(tmp_path):
    odd = torch.tensor([0x7FC00001, 0xFF800123 - 2**32, 1, -(2**31)], dtype=torch.int32).view(
        torch.float32
    )  # NaNs, -0.0
    write(tmp_path / "x", {"b": odd, "a": odd.half(), "c": odd[:1]}, {})
    tensors, _ = read(tmp_path / "x")
    assert list(tensors) == ["b", "a", "c"]
    assert torch.equal(tensors["b"].view(torch.int32), odd.view(torch.int32))


def test_tensors_lie_at_multiples_of_their_width(tmp_path):
    write(tmp_path / "x", TENSORS, {"odd": "length"})
    tensors, _ = read(tmp_path / "x")
    base = min(tensor.data_ptr() for tensor in tensors.values() if tensor.numel())
    assert all((tensor.data_ptr() - base) % tensor.dtype.itemsize == 0 for tensor in tensors.values() if tensor.numel())


def test_strides_are_written_out(tmp_path):
    tensor = torch.randn(4, 6, generator=GENERATOR)
    write(tmp_path / "x", {"transposed": tensor.T, "part": tensor[1:3, ::2], "same": torch.ones(1).expand(5)}, {})
    expected = {"transposed": tensor.T.clone(), "part": tensor[1:3, ::2].clone(), "same": torch.ones(5)}
    assert_equal(read(tmp_path / "x")[0], expected)


def test_parameters_are_their_numbers(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    write(tmp_path / "x", {"p": parameter}, {})
    assert_equal(read(tmp_path / "x")[0], {"p": parameter.detach()})


def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"c is torch\.complex64; a safetensors file can hold torch\.float64"):
        write_safetensors(io.BytesIO(), {"c": torch.zeros(1, dtype=torch.complex64)}, {})


def made(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_a_hand_made_file_is_read(tmp_path):
    path = tmp_path / "x"
    header = {"__metadata__": {"k": "v"}, "b": entry(shape=(1,), start=8, end=12), "a": entry()}
    path.write_bytes(made(header, struct.pack("<3f", 1, 2, 3)))
    tensors, metadata = read(path)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"b": [3.0], "a": [1.0, 2.0]}
    assert metadata == {"k": "v"}


TWO = b"\0" * 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0" * 5, "ends at 5"),
        (made({"a": entry()}, TWO, length=1000), "truncated or damaged"),
        (made({"a": entry()}, TWO, length=2**63), "at most"),
        (made(b"{"), "no JSON text"),
        (made(b'{"a\xff": 1}'), "no JSON text"),
        (made(b'{"a":' * 100_000), "no JSON text"),
        (made(b'{"a": ' + b"9" * 5000 + b"}"), "no JSON text"),
        (made(b'{"a": 1, "a": 1}'), "stands twice"),
        (made([1]), "no JSON object"),
        (made({"__metadata__": [1]}), "metadata is not text"),
        (made({"__metadata__": {"a": 1}}), "metadata is not text"),
        (made({"a": 1}), "'a' needs dtype, shape and data_offsets"),
        (made({"a": {"dtype": "F32", "shape": [2]}}, TWO), "needs dtype"),
        (made({"a": entry(dtype=3)}, TWO), "needs dtype"),
        (made({"a": entry(dtype="F16")}, TWO), r"'a' of F16 \[2\] has 8 bytes"),
        (made({"a": entry(shape=(3,))}, TWO), "has 8 bytes"),
        (made({"a": entry(shape=(2.0,))}, TWO), "needs dtype"),
        (made({"a": entry(shape=(True, 2))}, TWO), "needs dtype"),
        (made({"a": entry(shape=(-1, -2))}, TWO), "needs dtype"),
        (made({"a": entry(start=8, end=0)}, TWO), "has -8 bytes"),
        (made({"a": entry(start=-8, end=0)}, TWO), "needs dtype"),
        (made({"a": entry(start=2**70, end=2**70 + 8)}, TWO), "needs dtype"),
        (made({"a": entry()}, TWO[:-1]), "truncated or damaged"),
        (made({"a": entry()}, TWO + b"\0"), "tensors end at byte"),
        (made({"a": entry(start=4, end=12)}, TWO + TWO), "overlap or leave a gap at byte 0"),
        (made({"a": entry(), "b": entry(start=4, end=12)}, TWO + TWO), "overlap or leave a gap at byte 8"),
        (made({"a": entry(), "b": entry(start=12, end=20)}, TWO * 3), "overlap or leave a gap at byte 8"),
        (made({"a": entry(), "b": entry()}, TWO), "overlap or leave a gap"),
    ],
)
def test_a_damaged_file_is_refused_as_the_reference_does(tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{path}: .*{message}"):
        read(path)
    with pytest.raises(Exception):  # noqa: B017, PT011 the reference has many
        safetensors.torch.load_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (made({"a": entry("F8_E4M3", (8,))}, TWO), "dtype 'F8_E4M3', expected one of F64"),
        (made({"a": entry(shape=(0, 2**61, 2**61), end=0)}), "needs dtype"),
        (made({"a": entry(shape=(1,) * 9 + (2,))}, TWO), "needs dtype"),
    ],
)
def test_what_no_model_needs_is_refused(tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read(path)
