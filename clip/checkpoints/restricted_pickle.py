"""A pickle, read without running it.

A pickle is a program for a small stack machine, and two of its instructions reach out into Python: GLOBAL imports
whatever it names, REDUCE calls it. So to load an unknown `.pt` with `pickle` is to run its author's code. This machine
has no such reach. GLOBAL looks a name up in a table that the caller gives; REDUCE calls what stands in that table and
nothing else; of objects of other classes only the bare attributes are kept (:class:`Instance`).

    GLOBAL  torch._utils _rebuild_tensor_v2   push table["torch._utils._rebuild_tensor_v2"]
    ...                                       push the arguments
    REDUCE                                    pop both, call, push the result

It knows the thirty-odd instructions of protocol 2 that PyTorch's two picklers (Python's, and TorchScript's in C++)
write; the standard library's `pickletools` describes them. Python's own `pickle.Unpickler` with `find_class` overridden
would be shorter, but a file of a few bytes makes it allocate gigabytes (LONG_BINPUT with a large index). Here the cost
is bounded by the length of the pickle: no instruction makes more than it reads or takes from the stack, and only plain
values may be keys of a dict, so that no hash walks a tree.
"""

import pickle
import struct
from collections.abc import Callable
from typing import NamedTuple

from .mapped_file import CheckpointError


class Instance:
    """An object of a class that was never imported: what is left of it are its attributes."""

    __slots__ = ("attributes",)

    def __init__(self):
        self.attributes: dict[object, object] = {}


class Function(NamedTuple):
    """What REDUCE may call: a function of the tuple of arguments."""

    call: Callable[[tuple[object, ...]], object]


def read_pickle(
    data: bytes,
    find_global: Callable[[str], object],
    find_persistent: Callable[[object], object],
    start: int = 0,
) -> tuple[object, int]:
    """Build the object that a pickle describes.

    Parameters
    ----------
    data : bytes
    find_global : callable
        From a dotted name to a :class:`Function`, the class :class:`Instance`, or any value; raises for other names.
    find_persistent : callable
        From a persistent id (PyTorch's way to point at a storage) to the value it stands for.
    start : int
        Where in `data` the pickle begins.

    Returns
    -------
    object, int
        The object, made of plain values, tuples, lists, dicts, `Instance`s and what the two callables returned; and
        where the pickle ends.

    Raises
    ------
    CheckpointError
        If `data` is cut short or damaged or holds another instruction.
    """
    machine = _Machine(data, start, find_global, find_persistent)
    try:
        return machine.run(), machine.position
    except (IndexError, KeyError):  # an empty stack, an unknown memo
        raise machine.damaged("takes what was never put there") from None


def _is_plain(key: object) -> bool:
    """Whether a value may be a dict's key: longer integers can be chosen so that all hashes collide."""
    return key.bit_length() < 61 if type(key) is int else type(key) in (str, float, bool, type(None))


class _Machine:
    def __init__(
        self,
        data: bytes,
        start: int,
        find_global: Callable[[str], object],
        find_persistent: Callable[[object], object],
    ):
        self.data = data
        self.position = start
        self.find_global = find_global
        self.find_persistent = find_persistent
        self.stack: list[object] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        stack, push, memo = self.stack, self.stack.append, self.memo
        while True:
            match self.take(1):
                # plain values
                case pickle.NONE:
                    push(None)
                case pickle.NEWTRUE:
                    push(True)
                case pickle.NEWFALSE:
                    push(False)
                case pickle.BININT:
                    push(self.number("<i"))
                case pickle.BININT1:
                    push(self.number("<B"))
                case pickle.BININT2:
                    push(self.number("<H"))
                case pickle.LONG1:
                    push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))
                case pickle.BINFLOAT:
                    push(self.number(">d"))
                case pickle.BINUNICODE:
                    push(self.text(self.take(self.number("<I"))))

                # containers
                case pickle.EMPTY_TUPLE:
                    push(())
                case pickle.TUPLE1:
                    push(self.pop(1))
                case pickle.TUPLE2:
                    push(self.pop(2))
                case pickle.TUPLE3:
                    push(self.pop(3))
                case pickle.MARK:
                    self.marks.append(len(stack))
                case pickle.TUPLE:
                    push(self.pop_to_mark())
                case pickle.EMPTY_LIST:
                    push([])
                case pickle.APPEND:
                    self.append(self.pop(1))
                case pickle.APPENDS:
                    self.append(self.pop_to_mark())
                case pickle.EMPTY_DICT:
                    push({})
                case pickle.SETITEM:
                    self.set_items(self.pop(2))
                case pickle.SETITEMS:
                    self.set_items(self.pop_to_mark())

                # what was built before
                case pickle.BINPUT:
                    memo[self.number("<B")] = stack[-1]
                case pickle.LONG_BINPUT:
                    memo[self.number("<I")] = stack[-1]
                case pickle.BINGET:
                    push(memo[self.number("<B")])
                case pickle.LONG_BINGET:
                    push(memo[self.number("<I")])

                # the world outside
                case pickle.GLOBAL:
                    push(self.find_global(f"{self.line()}.{self.line()}"))
                case pickle.BINPERSID:
                    push(self.find_persistent(stack.pop()))
                case pickle.REDUCE:
                    push(self.reduce(*self.pop(2)))
                case pickle.NEWOBJ:
                    push(self.new(*self.pop(2)))
                case pickle.BUILD:
                    self.build(stack.pop())

                case pickle.PROTO:
                    if (protocol := self.number("<B")) != 2:
                        raise self.damaged(f"has protocol {protocol}; PyTorch's files have 2")
                case pickle.STOP:
                    return stack.pop()
                case other:
                    raise self.damaged(f"holds the instruction {other!r}, which PyTorch's files do not need")

    # -- the program --------------------------------------------------------------------------------------------------

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        start = self.position
        self.position += length
        if self.position > len(self.data):
            raise self.damaged("ends in the middle or is far longer than a model's; the file is truncated or damaged")
        return self.data[start : self.position]

    def number(self, layout: str) -> int | float:
        """The next number, laid out as the `struct` format string says."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """The text up to the next newline."""
        end = self.data.find(b"\n", self.position)
        if end < 0:
            end = len(self.data)  # one byte too far: `take` refuses
        return self.text(self.take(end + 1 - self.position)[:-1])

    def text(self, encoded: bytes) -> str:
        try:
            return encoded.decode()
        except UnicodeDecodeError:
            raise self.damaged("holds text that is not UTF-8") from None

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"its pickle {what} (near byte {self.position})")

    # -- the stack ----------------------------------------------------------------------------------------------------

    def pop(self, count: int) -> tuple[object, ...]:
        """The top `count` values, lowest first."""
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> tuple[object, ...]:
        """The values above the last mark, lowest first."""
        height = self.marks.pop()
        values = tuple(self.stack[height:])
        del self.stack[height:]
        return values

    def append(self, values: tuple[object, ...]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise self.damaged(f"appends to a {type(target).__name__}")
        target.extend(values)

    def set_items(self, values: tuple[object, ...]) -> None:
        target, keys = self.stack[-1], values[::2]
        if type(target) is not dict or len(values) % 2 or not all(map(_is_plain, keys)):
            raise self.damaged("sets items of what is no dict, or under keys that are no plain values")
        target.update(zip(keys, values[1::2], strict=True))

    # -- calls and objects --------------------------------------------------------------------------------------------

    def reduce(self, function: object, arguments: object) -> object:
        if type(function) is not Function or type(arguments) is not tuple:
            raise self.damaged("calls what is no function")
        return function.call(arguments)

    def new(self, cls: object, arguments: object) -> Instance:
        if cls is not Instance or arguments != ():
            raise self.damaged("makes an object of what is no class")
        return Instance()

    def build(self, state: object) -> None:
        """Set an object's attributes. Those of a dict (an OrderedDict's `_metadata`) are of no use here."""
        target = self.stack[-1]
        if type(target) is Instance and type(state) is dict:
            target.attributes = state
        elif type(target) is not dict:
            raise self.damaged(f"sets attributes of a {type(target).__name__}")
