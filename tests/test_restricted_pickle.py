"""The pickle machine: what plain pickles say, and nothing that a hostile one asks for."""

import os
import pickle
import time
from collections import OrderedDict

import pytest

from clip.checkpoints import CheckpointError
from clip.checkpoints.restricted_pickle import Function, Instance, read_pickle

M = pickle


class Pointer:
    """What a storage is to PyTorch's pickles: something that lies outside."""


class Pickler(pickle._Pickler):  # the one in Python writes memo numbers beyond 255 as the one in C does
    def persistent_id(self, value):
        return ("outside", 7) if isinstance(value, Pointer) else None


def dumps(value, tmp_path):
    path = tmp_path / "pickle"
    with path.open("wb") as file:
        Pickler(file, protocol=2).dump(value)
    return path.read_bytes()


def no_global(name):
    raise CheckpointError(f"refused {name}")


def no_pointer(persistent_id):
    raise CheckpointError(f"refused {persistent_id}")


def read(data, find_global=no_global, find_persistent=no_pointer):
    return read_pickle(data, find_global, find_persistent)[0]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, False],
        [0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, -(2**70)],
        [0.1, -0.0, float("inf")],
        ["", "naïve", "\U0001f600", "x" * 300],
        [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        {"a": [{}], 1: 2, None: 3.5, False: "b"},
        {str(n): [n] for n in range(3000)},  # several batches, and more than 256 memos
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_are_what_pickle_makes_of_them(value, tmp_path):
    found = read(dumps(value, tmp_path))
    assert found == value
    assert repr(found) == repr(value)  # -0.0, and True is not 1


def test_what_was_one_object_is_one_object_again(tmp_path):
    inner = [1]
    found = read(dumps([inner, inner, (inner,)], tmp_path))
    assert found[0] is found[1] is found[2][0]


def test_a_list_may_hold_itself():
    data = M.EMPTY_LIST + M.BINPUT + b"\0" + M.BINGET + b"\0" + M.APPEND + M.STOP
    found = read(data)
    assert found[0] is found


def test_names_come_from_the_table_and_only_its_functions_are_called(tmp_path):
    def find(name):
        assert name == "collections.OrderedDict"
        return Function(lambda arguments: {"called with": arguments})

    assert read(dumps(OrderedDict(a=1), tmp_path), find) == {"called with": (), "a": 1}


def test_pointers_are_resolved_by_the_caller(tmp_path):
    found = read(dumps([Pointer(), 1], tmp_path), find_persistent=lambda persistent_id: {persistent_id})
    assert found == [{("outside", 7)}, 1]


def test_of_an_object_only_the_attributes_are_kept():
    data = b"c__torch__.a\nB\n" + M.EMPTY_TUPLE + M.NEWOBJ
    data += M.EMPTY_DICT + M.BINUNICODE + b"\x01\0\0\0x" + M.BININT1 + b"\x05" + M.SETITEM + M.BUILD + M.STOP
    found = read(data, lambda name: Instance)
    assert type(found) is Instance
    assert found.attributes == {"x": 5}


def test_pickles_may_follow_each_other(tmp_path):
    first, second = dumps([1], tmp_path), dumps("two", tmp_path)
    value, end = read_pickle(first + second, no_global, no_pointer)
    assert (value, end) == ([1], len(first))
    assert read_pickle(first + second, no_global, no_pointer, end) == ("two", len(first + second))


class Runs:
    """When unpickled by `pickle`, makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_code_is_run(tmp_path):
    folder = tmp_path / "made"
    data = dumps(Runs(folder), tmp_path)
    with pytest.raises(CheckpointError, match=r"refused (posix|nt).mkdir"):
        read(data)
    with pytest.raises(CheckpointError, match="calls what is no function"):
        read(data, lambda name: os.mkdir)
    assert not folder.exists()


ONE, DEEP = M.BININT1 + b"\x01", 200_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends"),
        (M.EMPTY_LIST, "ends"),
        (M.BININT + b"\0\0", "ends"),
        (M.BINUNICODE + b"\xff\xff\xff\xff" + b"a" + M.STOP, "ends"),
        (M.LONG1 + b"\xff\1" + M.STOP, "ends"),
        (b"cno newline", "ends"),
        (b"cno\nsecond newline", "ends"),
        (M.BINUNICODE + b"\2\0\0\0\xff\xfe" + M.STOP, "UTF-8"),
        (b"c\xff\xfe\nx\n" + M.STOP, "UTF-8"),
        (M.STOP, "never put"),
        (M.BINGET + b"\5" + M.STOP, "never put"),
        (M.LONG_BINGET + b"\xff\xff\xff\x7f" + M.STOP, "never put"),
        (M.BINPUT + b"\0" + M.STOP, "never put"),
        (ONE + M.TUPLE2 + M.STOP, "never put"),
        (ONE + M.TUPLE + M.STOP, "never put"),
        (M.BINPERSID + M.STOP, "never put"),
        (ONE + ONE + M.APPEND + M.STOP, "appends to a int"),
        (ONE + M.MARK + ONE + ONE + M.SETITEMS + M.STOP, "no dict"),
        (M.EMPTY_DICT + M.MARK + ONE + M.SETITEMS + M.STOP, "no dict"),
        (M.EMPTY_DICT + M.EMPTY_TUPLE + ONE + M.SETITEM + M.STOP, "plain values"),
        (M.EMPTY_DICT + M.EMPTY_LIST + ONE + M.SETITEM + M.STOP, "plain values"),
        (ONE + M.EMPTY_TUPLE + M.REDUCE + M.STOP, "no function"),
        (ONE + M.EMPTY_TUPLE + M.NEWOBJ + M.STOP, "no class"),
        (ONE + ONE + M.BUILD + M.STOP, "attributes of a int"),
        (M.PROTO + b"\4" + ONE + M.STOP, "protocol 4"),
        (b"S'\\q'\n" + M.STOP, "instruction b'S'"),  # with a bad escape, at which Python would warn
        (b"\x00" + M.STOP, "instruction"),
        (M.EXT1 + b"\1" + M.STOP, "instruction"),
        (b"i" + b"os\nsystem\n" + M.STOP, "instruction b'i'"),
        # a tuple as key, nested so deep that its hash would overflow the stack, or so wide that it would never end
        (M.EMPTY_DICT + M.EMPTY_TUPLE + M.TUPLE1 * DEEP + ONE + M.SETITEM + M.STOP, "plain values"),
        (M.EMPTY_DICT + ONE + (M.BINPUT + b"\0" + M.BINGET + b"\0" + M.TUPLE2) * 60 + ONE + M.SETITEM, "plain values"),
        # integers that all have one hash
        (M.EMPTY_DICT + M.LONG1 + b"\x09" + (5 * (2**61 - 1)).to_bytes(9, "little") + ONE + M.SETITEM, "plain values"),
    ],
)
def test_a_damaged_or_hostile_pickle_is_one_clear_error(data, message):
    with pytest.raises(CheckpointError, match=message):
        read(data)


def test_a_huge_memo_number_costs_nothing():
    data = ONE + M.LONG_BINPUT + b"\xff\xff\xff\xff" + M.STOP
    assert read(data) == 1


@pytest.mark.parametrize(
    "data",
    [
        M.EMPTY_TUPLE + M.TUPLE1 * DEEP + M.STOP,
        (M.EMPTY_LIST * DEEP) + M.APPEND * (DEEP - 1) + M.STOP,
        b"cA\nB\n" + M.BINPUT + b"\0" + M.EMPTY_TUPLE + M.NEWOBJ + M.STOP,
        ONE + (M.BINPUT + b"\0" + M.BINGET + b"\0" + M.TUPLE2) * 10_000 + M.STOP,  # 2**10000 leaves
    ],
    ids=["tuples", "lists", "objects", "laughs"],
)
def test_depth_and_sharing_cost_no_more_than_the_pickle_is_long(data):
    start = time.perf_counter()
    read(data, lambda name: Instance)  # what was built is dropped here, too
    assert time.perf_counter() - start < 5
