"""TorchScript archives and `torch.save` files: read as PyTorch reads them, and refused when they lie."""

import io
import os
import pickle
import struct
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from archive import write_archive
from torch import nn

from clip.checkpoints import CheckpointError
from clip.checkpoints.archive import flatten, read_archive
from clip.checkpoints.mapped_file import map_file

GENERATOR = torch.Generator().manual_seed(0)
STATE_DICT = {
    "visual.conv1.weight": torch.randn(5, 3, 2, 2, generator=GENERATOR),
    "visual.bn1.running_mean": torch.randn(5, generator=GENERATOR),
    "visual.bn1.num_batches_tracked": torch.tensor(7),
    "transformer.resblocks.0.ln_1.weight": torch.randn(7, generator=GENERATOR),
    "transformer.resblocks.10.mlp.c_fc.weight": torch.randn(11, 7, generator=GENERATOR),
    "logit_scale": torch.tensor(2.5),
}


def read(path):
    with map_file(path) as file:
        return flatten(read_archive(file))


def torch_load(path):
    return torch.load(path, weights_only=True)


def jit_load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.load(str(path)).state_dict()


def jit_save(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert not found[name].requires_grad


# -- equal to PyTorch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
def test_an_archive_like_openais_holds_what_torch_jit_finds_in_it(tmp_path, half):
    path = tmp_path / "archive.pt"
    write_archive(STATE_DICT, path, half=half)
    found = read(path)
    assert_equal({name: found[name] for name in sorted(found)}, dict(sorted(jit_load(path).items())))
    assert set(found) == {*STATE_DICT, "input_resolution", "context_length", "vocab_size"}
    assert found["visual.conv1.weight"].dtype == (torch.float16 if half else torch.float32)


class Decorated(nn.Module):
    """A module with everything a scripted module can carry besides tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.sizes = [1, 2, 3]
        self.scales = [0.5, 1.5]
        self.flags = [True, False]
        self.names = {"a": 1}
        self.pairs: list[tuple[int, str]] = [(1, "a")]
        self.tensors = [torch.ones(2), torch.zeros(1)]
        self.device = torch.device("cpu")
        self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.sizes[0] + self.names["a"] + self.pairs[0][0] + len(self.scales) + len(self.flags) + len(self.tensors)
        return self.linear(x.to(self.device)) * n + self.mask.sum()


def test_attributes_that_are_no_tensors_are_passed_over(tmp_path):
    module = Decorated()
    jit_save(module, tmp_path / "scripted.pt")
    found = read(tmp_path / "scripted.pt")
    assert_equal({name: found[name] for name in sorted(found)}, dict(sorted(module.state_dict().items())))


class Masked(nn.Module):
    """Adds a tensor that is neither parameter nor buffer: tracing stores it among the archive's constants."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.mask = torch.randn(4, generator=GENERATOR)

    def forward(self, x):
        return self.linear(x) + self.mask


def test_a_traced_archive_with_constants_is_read(tmp_path):
    module, path = nn.Sequential(Masked(), nn.Linear(4, 2)), tmp_path / "traced.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, torch.zeros(1, 3)).save(str(path))
    with zipfile.ZipFile(path) as archive:
        assert "traced/constants/0" in archive.namelist()
    assert_equal(read(path), module.state_dict())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
class TestTorchSave:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "saved.pt"

    def save(self, value, path, zipped):
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        return torch_load(path)

    def test_a_state_dict_is_what_torch_load_returns(self, path, zipped):
        model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5))
        assert_equal(self.save(model.state_dict(), path, zipped), model.state_dict())
        assert_equal(read(path), model.state_dict())

    @pytest.mark.parametrize(
        "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    )
    def test_every_dtype_is_kept(self, path, zipped, dtype):
        tensor = torch.randn(3, 5, generator=GENERATOR).mul(20).abs().to(getattr(torch, dtype))
        saved = {"byte": torch.tensor([1], dtype=torch.uint8), "x": tensor}  # a byte, so that `x` lies at an odd place
        assert_equal(self.save(saved, path, zipped), saved)
        assert_equal(read(path), saved)

    def test_windows_on_one_storage_are_kept(self, path, zipped):
        base = torch.randn(4, 6, generator=GENERATOR)
        views = {"all": base, "transposed": base.T, "part": base[1:3, ::2], "one": base[3, 5], "again": base}
        self.save(views, path, zipped)
        found = read(path)
        assert_equal(found, views)
        assert found["all"].data_ptr() == found["again"].data_ptr()

    def test_parameters_are_their_numbers(self, path, zipped):
        parameter = nn.Parameter(torch.randn(3, generator=GENERATOR))
        self.save({"p": parameter}, path, zipped)
        assert_equal(read(path), {"p": parameter.detach()})

    def test_other_values_beside_tensors_are_passed_over(self, path, zipped):
        tensor = torch.ones(2)
        extra = {
            "step": 3,
            "lr": 1e-3,
            "size": torch.Size([1, 2]),
            "dtype": torch.float16,
            "none": None,
            "list": [tensor],
        }
        self.save({"x": tensor, **extra, "device": torch.device("cpu")}, path, zipped)
        assert_equal(read(path), {"x": tensor})

    def test_a_whole_pickled_module_is_refused_by_name(self, path, zipped):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the legacy form cannot store this module's source
            torch.save(Decorated(), path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"Decorated'.*torch\.save\(model\.state_dict\(\), \.\.\.\)"):
            read(path)

    def test_code_in_the_pickle_is_named_and_not_run(self, path, zipped):
        class Runs:
            def __reduce__(self):
                return os.mkdir, (str(path.parent / "made"),)

        torch.save({"x": torch.ones(1), "y": Runs()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"asks for '(posix|nt)\.mkdir'"):
            read(path)
        assert not (path.parent / "made").exists()

    @pytest.mark.parametrize("kept", [0, 1, 4, 30, 0.3, 0.6, 0.9, -1])
    def test_a_truncated_file_is_refused(self, path, zipped, kept):
        self.save(STATE_DICT, path, zipped)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
        with pytest.raises(CheckpointError, match=r"^\S+saved\.pt: .*(empty|truncated|damaged)"):
            read(path)


# -- a hand-made file: tensors that lie about their storage -----------------------------------------------------------


class Stored:
    """Pickles as a tensor whose parts may be anything."""

    def __init__(self, offset, size, stride, key="0", count=12, kind=torch.FloatStorage, more=()):
        self.id = ("storage", kind, key, "cpu", count, *more)
        self.window = (offset, size, stride)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Pointer(self.id), *self.window, False, OrderedDict())


class Pointer:
    def __init__(self, persistent_id):
        self.id = persistent_id


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Pointer) else None


def dumps(value):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def write_zip(path, entries, compression=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, content in entries:
            archive.writestr(name, content)
    return path


NUMBERS = struct.pack("<12f", *range(12))


def write_saved(path, value, *entries):
    return write_zip(path, [("any/data.pkl", dumps(value)), ("any/data/0", NUMBERS), *entries])


def test_a_hand_made_file_is_read(tmp_path):
    path = write_saved(tmp_path / "made.pt", {"x": Stored(1, (2, 3), (6, 2)), "y": Stored(11, (), ())})
    assert_equal(read(path), {"x": torch.tensor([[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]]), "y": torch.tensor(11.0)})


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (13,), (1,)),
        (12, (), ()),
        (11, (2,), (1,)),
        (0, (2, 3), (10, 2)),
        (0, (2**40,), (0,)),  # a terabyte from one number
        (0, (4, 4), (1, 1)),
        (0, (2,), (2**61,)),
        (0, (2**61, 2**61, 2**61), (1, 1, 1)),
        (2**61, (2,), (1,)),
        (0, (0, 2**61, 2**61), (1, 1, 1)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (-1, (2,), (1,)),
        (0, (2**70,), (0,)),
        (0, (2,), (2**70,)),
        (0, (2, 3), (1,)),
        (0, [2], [1]),
        (0, (2.0,), (1,)),
        (True, (2,), (1,)),
        (0, (1,) * 9, (1,) * 9),
        (None, (2,), (1,)),
    ],
)
def test_a_window_that_does_not_fit_its_storage_is_refused(tmp_path, offset, size, stride):
    path = write_saved(tmp_path / "made.pt", {"x": Stored(offset, size, stride)})
    with pytest.raises(CheckpointError, match=r"^\S+made\.pt: .*(do not fit its storage of 12|describes a tensor)"):
        read(path)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (Stored(0, (2,), (1,), count=13), "should have 52 bytes, the zip file has 48"),
        (Stored(0, (2,), (1,), count=11), "should have 44 bytes, the zip file has 48"),
        (Stored(0, (2,), (1,), count=-1), "do not fit"),
        (Stored(0, (2,), (1,), count=2**80), "should have"),
        (Stored(0, (2,), (1,), count="12"), "points at a storage"),
        (Stored(0, (2,), (1,), kind=torch.HalfStorage), "should have 24 bytes"),
        (Stored(0, (2,), (1,), kind=torch.ComplexFloatStorage), r"'torch\.ComplexFloatStorage'"),
        (Stored(0, (2,), (1,), kind="FloatStorage"), "points at a storage"),
        (Stored(0, (2,), (1,), key="1"), "storage '1' is missing"),
        (Stored(0, (2,), (1,), key="../data.pkl"), "missing"),
        (Stored(0, (2,), (1,), key=0), "points at a storage"),
        (Stored(0, (2,), (1,), more=[("view", 0, 2)]), "points at a storage"),
    ],
)
def test_a_storage_that_is_not_what_the_pickle_says_is_refused(tmp_path, stored, message):
    path = write_saved(tmp_path / "made.pt", {"x": stored})
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_one_storage_cannot_be_of_two_kinds(tmp_path):
    pair = {"x": Stored(0, (2,), (1,)), "y": Stored(0, (2,), (1,), kind=torch.IntStorage)}
    with pytest.raises(CheckpointError, match="points at a storage"):
        read(write_saved(tmp_path / "made.pt", pair))


# -- trees ------------------------------------------------------------------------------------------------------------


def refuse_tree(path, tree, message):
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        read(write_saved(path, tree))
    assert time.perf_counter() - start < 5


def test_names_are_joined_and_keep_their_order(tmp_path):
    tree = {"b": {"2": Stored(0, (), ()), "1": {"w": Stored(1, (), ())}}, "a": Stored(2, (), ())}
    assert_equal(
        read(write_saved(tmp_path / "made.pt", tree)),
        {"b.2": torch.tensor(0.0), "b.1.w": torch.tensor(1.0), "a": torch.tensor(2.0)},
    )


def test_names_that_are_no_strings_are_refused(tmp_path):
    refuse_tree(tmp_path / "made.pt", {"a": {0: Stored(0, (), ())}}, "expected names of tensors below 'a', got '0'")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    refuse_tree(tmp_path / "made.pt", {"a": {"b": Stored(0, (), ())}, "a.b": Stored(1, (), ())}, "two tensors named")


def test_a_tree_that_holds_itself_is_refused(tmp_path):
    tree = {"x": Stored(0, (), ())}
    tree["self"] = tree
    refuse_tree(tmp_path / "made.pt", tree, "expected names|modules and tensors")


def test_a_tree_of_shared_branches_is_refused(tmp_path):
    tree = {"x": Stored(0, (), ())}
    for _ in range(60):  # 2**60 tensors
        tree = {"l": tree, "r": tree}
    refuse_tree(tmp_path / "made.pt", tree, "more than 10000 modules and tensors")


def test_a_wide_branch_that_is_shared_is_refused(tmp_path):
    wide = dict.fromkeys(map(str, range(10_000)))
    refuse_tree(tmp_path / "made.pt", dict.fromkeys(map(str, range(10_000)), wide), "more than 10000")


def test_a_name_without_end_is_refused(tmp_path):
    refuse_tree(tmp_path / "made.pt", {"x" * 1000: Stored(0, (), ())}, "expected names")


# -- zip files that lie -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch.save(STATE_DICT, tmp_path / "saved.pt")
    return tmp_path / "saved.pt"


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Write the zip file again with `change(name, content)`, which returns a list of entries."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    return write_zip(path, [entry for name, content in entries for entry in change(name, content)], compression)


def patch(path, name, field, value):
    """Overwrite a field of an entry in the zip file's list of contents."""
    offset, layout = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<L"), "packed": (20, "<L"),
                      "size": (24, "<L"), "start": (42, "<L")}[field]  # fmt: skip
    data = bytearray(path.read_bytes())
    start = data.rindex(name.encode()) - 46
    assert data[start : start + 4] == b"PK\1\2"
    struct.pack_into(layout, data, start + offset, value)
    path.write_bytes(data)


def refuse(path, message):
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_a_damaged_weight_is_noticed(saved):
    number = STATE_DICT["visual.conv1.weight"].numpy().tobytes()
    data = bytearray(saved.read_bytes())
    data[data.index(number) + 5] ^= 1
    saved.write_bytes(data)
    refuse(saved, r"tensor 'visual\.conv1\.weight': the checksum of its zip entry 'saved/data/0' is wrong")


def test_a_file_written_without_checksums_is_read(saved):
    for name in ("data.pkl", "data/0", "data/1", "data/2", "data/3", "data/4", "data/5", "byteorder"):
        patch(saved, f"saved/{name}", "crc", 0)
    assert_equal(read(saved), STATE_DICT)


def test_the_names_in_the_zip_do_not_matter(saved):
    rewrite(saved, lambda name, content: [(name.replace("saved/", "a/b/"), content)])
    assert_equal(read(saved), STATE_DICT)


def test_a_compressed_pickle_is_read_and_a_compressed_storage_is_not(saved):
    rewrite(saved, lambda name, content: [(name, content)], zipfile.ZIP_DEFLATED)
    refuse(saved, "storage is compressed")
    path = write_zip(saved, [("a/data.pkl", dumps({"x": 1}))], zipfile.ZIP_DEFLATED)
    assert read(path) == {}


def test_a_pickle_that_unpacks_to_gigabytes_is_refused(saved):
    write_zip(saved, [("a/data.pkl", b"\0" * (64 << 20))], zipfile.ZIP_DEFLATED)
    refuse(saved, "has 67108864 bytes, far more")
    patch(saved, "a/data.pkl", "size", 1000)
    refuse(saved, "has 4194304 bytes, the zip file says 1000")


def test_a_zip_without_one_pickle_is_refused(saved):
    refuse(write_zip(saved.with_name("other.zip"), [("photo.jpg", b"")]), "one data.pkl.* found 0")
    rewrite(saved, lambda name, content: [(name, content), (name.replace("saved/", "again/"), content)])
    refuse(saved, "found 2")


def test_a_name_that_stands_twice_is_refused(saved):
    rewrite(saved, lambda name, content: [(name, content)] * (2 if name.endswith("data/0") else 1))
    refuse(saved, "several entries of one name")


def test_a_big_endian_file_is_refused(saved):
    rewrite(saved, lambda name, content: [(name, b"big" if name.endswith("byteorder") else content)])
    refuse(saved, "not little-endian")


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("saved/data/0", "flags", 1, "encrypted"),
        ("saved/data.pkl", "flags", 1, "encrypted"),
        ("saved/data.pkl", "method", 14, "another method"),
        ("saved/data.pkl", "method", 8, "cannot be decompressed|the zip file says"),
        ("saved/data.pkl", "size", 7, "the zip file says 7"),
        ("saved/data.pkl", "packed", 2**31, "far more than a model needs"),
        ("saved/data.pkl", "crc", 1, "checksum"),
        ("saved/data/0", "size", 8, "should have 240 bytes, the zip file has 8"),
        ("saved/data/0", "packed", 8, "should have"),
        ("saved/data/0", "start", 0, "checksum"),
        ("saved/data/0", "start", 5, "encrypted or damaged"),
        ("saved/data/0", "start", 2**31, "truncated or damaged"),
    ],
)
def test_a_lie_in_the_list_of_contents_is_noticed(saved, name, field, value, message):
    patch(saved, name, field, value)
    refuse(saved, message)


def test_a_list_of_contents_that_claims_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "directory.pt"
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    count = (8 << 20) // len(entry)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, count * len(entry), 4, 0)
    path.write_bytes(b"PK\3\4" + entry * count + end)
    start = time.perf_counter()
    refuse(path, "list of contents")
    assert time.perf_counter() - start < 0.5


# -- legacy streams that lie ------------------------------------------------------------------------------------------

MAGIC, SYSTEM = 0x1950A86A20F9469CFC6C, {"protocol_version": 1001, "little_endian": True}


def write_legacy(path, value, keys=("0",), counts=(12,), magic=MAGIC, system=SYSTEM):
    numbers = b"".join(struct.pack("<q", count) + NUMBERS for count in counts)
    path.write_bytes(b"".join(map(dumps, (magic, 1001, system, value, keys))) + numbers)
    return path


LEGACY = Stored(0, (3, 4), (4, 1), more=[None])


def test_a_hand_made_legacy_file_is_read(tmp_path):
    path = write_legacy(tmp_path / "made.pt", {"x": LEGACY}, ["0"])
    assert_equal(read(path), {"x": torch.arange(12.0).reshape(3, 4)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (11,)}, "12 elements, the file says 11"),
        ({"counts": (2**62,)}, "the file says"),
        ({"counts": (-12,)}, "the file says -12"),
        ({"counts": ()}, "truncated or damaged"),
        ({"keys": []}, "storage '0' is missing"),
        ({"keys": ["0", "1"], "counts": (12, 12)}, "names one that no tensor uses"),
        ({"keys": [[]]}, "names one that no tensor uses"),
        ({"keys": {"0": 0}}, "list of its storages"),
        ({"magic": 5}, "another pickle"),
        ({"system": {"little_endian": False}}, "not little-endian"),
        ({"system": None}, "not little-endian"),
    ],
)
def test_a_legacy_file_that_lies_is_refused(tmp_path, change, message):
    path = write_legacy(tmp_path / "made.pt", {"x": LEGACY}, **({"keys": ["0"]} | change))
    refuse(path, message)


def test_a_legacy_storage_that_is_cut_short_is_refused(tmp_path):
    path = write_legacy(tmp_path / "made.pt", {"x": LEGACY}, ["0"])
    path.write_bytes(path.read_bytes()[:-1])
    refuse(path, r"tensor 'x': needs bytes \d+ to \d+, but the file ends at")


def test_any_other_pickle_is_refused(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"x": 1}, protocol=2))
    refuse(path, "found another pickle")
    path.write_bytes(pickle.dumps({"x": 1}, protocol=4))
    refuse(path, "protocol 4")


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("script", [True, False], ids=["TorchScript", "torch.save"])
def test_weights_dropped_one_by_one_are_never_in_memory_together(tmp_path, script):
    path = tmp_path / "weights.pt"
    weights = {f"layer{n}.weight": torch.ones(1_000_000) for n in range(8)}  # 4 MB each
    write_archive(weights, path, half=False) if script else torch.save(weights, path)

    def resident():
        return int(Path("/proc/self/smaps").read_text().split(str(path))[1].split("Rss:")[1].split()[0])

    tensors = read(path)
    most = resident()
    assert most < 1_000  # KiB: the checksums' pages have been given back
    for name in [name for name in tensors if name in weights]:
        tensor = tensors.pop(name)
        assert tensor.sum() == 1_000_000
        most = max(most, resident())
        del tensor
    assert most < 6_000
