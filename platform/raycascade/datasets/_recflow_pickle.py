"""Reads RecFlow's pickle files without executing them, a batch of requests at a time.

The files come from the internet, and a pickle is a program. This reader knows only the instructions that a dictionary
of integer arrays consists of (protocols 2 to 5), and of the names in a file only those below, each with a stand-in of
its own: no named module is imported, nothing found in a file is called. Everything else is refused.

Requests are handed on as they are read and then forgotten, so that memory does not grow with the file. A file that
refers back to an array of an earlier batch is read again with everything kept.
"""

import io
import re
import struct
from collections.abc import Callable, Iterator

import numpy as np

from raycascade import storage
from raycascade.errors import DataError

Pairs = list[tuple[object, object]]
NUMBER = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|\?)")
LONGEST_KEPT = 64  # characters of text, or bytes, that later batches may refer to
BUFFER_BYTES = 1 << 20
PAIRS_AT_A_TIME = 256
DAMAGE = (struct.error, IndexError, KeyError, TypeError, ValueError, OverflowError, MemoryError, RecursionError)
ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
NUMERIC_MODULES = ("numpy.core.numeric", "numpy._core.numeric")
BUILTINS = ("builtins", "__builtin__")
FACTORIES = ("defaultdict_tuple", "defaultdict_str")  # functions of the authors, wherever they were defined


class _Refused(Exception):
    """What the file holds is no dictionary of integer arrays."""


class _Forgotten(Exception):
    """The file refers to something of an earlier batch."""


class _Dtype:
    """A number type; its byte order arrives after it is made."""

    def __init__(self, text: object, *_: object) -> None:
        if not isinstance(text, str) or not NUMBER.fullmatch(text):
            raise _Refused(f"arrays of type {text!r} are not allowed in a RecFlow pickle")
        self.value = np.dtype(text)

    def build(self, state: object) -> None:
        """`state`: (version, byte order, ...)."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise _Refused("a number type is damaged")
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array; its values arrive after it is made."""

    def __init__(self, *_: object) -> None:
        self.values = np.zeros(0, np.int8)

    def build(self, state: object) -> None:
        """`state`: (version, shape, type, is Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("an array is damaged")
        self.fill(state[4], state[2], state[1], "F" if state[3] else "C")

    def fill(self, data: object, dtype: object, shape: object, order: object) -> "_Array":
        """Numbers from bytes."""
        if not (isinstance(data, bytes | bytearray) and isinstance(dtype, _Dtype) and isinstance(shape, tuple)):
            raise _Refused("an array does not hold plain numbers")
        self.values = np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")
        return self


class _Name:
    """Something a file names and may pass on, but which makes nothing."""

    def __call__(self, *_: object) -> object:
        raise _Refused("a name is used in a way that no RecFlow pickle does")


def _latin1(text: object, encoding: object = "") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused(f"the encoding {encoding!r} is not allowed in a RecFlow pickle")
    return text.encode("latin1")


def _scalar(dtype: object, data: object) -> object:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != dtype.value.itemsize:
        raise _Refused("a number is damaged")
    return np.frombuffer(data, dtype.value)[0].item()


def _from_buffer(data: object, dtype: object, shape: object, order: object = "C") -> _Array:
    return _Array().fill(data, dtype, shape, order)


def _empty_bytes(*arguments: object) -> bytes:
    if arguments:
        raise _Refused("bytes are made in a way that no RecFlow pickle does")
    return b""


def _plain_dict(*_: object) -> dict[object, object]:
    """A defaultdict becomes a plain dictionary: a missing request is missing."""
    return {}


def _allowed(module: str, name: str) -> Callable[..., object] | None:
    """The stand-in of a name; None if it is not allowed."""
    if name in FACTORIES:
        return _plain_dict
    if (module, name) == ("numpy", "ndarray"):
        return _Name()
    if (module, name) == ("numpy", "dtype"):
        return _Dtype
    if module in ARRAY_MODULES:
        return {"_reconstruct": _Array, "scalar": _scalar}.get(name)
    if module in NUMERIC_MODULES and name == "_frombuffer":
        return _from_buffer
    if (module, name) == ("collections", "defaultdict"):
        return _plain_dict
    if (module, name) == ("_codecs", "encode"):
        return _latin1
    if module in BUILTINS:
        names = dict.fromkeys(("str", "unicode", "tuple", "int", "list"), _Name())
        return {"dict": _plain_dict, "bytes": _empty_bytes, **names}.get(name)
    return None


def read_pairs(uri: str) -> Iterator[Pairs]:
    """The (key, value) pairs of the dictionary in a pickle file, some at a time, in their order. Values are numbers,
    text, tuples, lists, dictionaries and NumPy arrays of numbers. DataError in one line for anything else."""
    done = 0
    try:
        for forgetful in (True, False):
            skipped = 0
            try:
                for pairs in _read(uri, forgetful=forgetful):
                    fresh = pairs[max(0, done - skipped):]
                    skipped += len(pairs)
                    done = max(done, skipped)
                    if fresh:
                        yield fresh
                return
            except _Forgotten:
                continue
    except _Refused as error:
        raise DataError(f"{uri}: {error}; the file may be corrupt or hostile: download it again, from its authors"
                        "") from None
    except DAMAGE as error:
        raise DataError(f"{uri}: cannot be read as a pickle ({type(error).__name__}: {str(error)[:100]}); download it "
                        "again") from None


def _read(uri: str, *, forgetful: bool) -> Iterator[Pairs]:
    filesystem, path = storage.resolve(uri)
    with filesystem.open_input_file(path) as source:
        size = source.size()
        with io.BufferedReader(source, BUFFER_BYTES) as stream:  # type: ignore[type-var]
            yield from _Machine(stream, uri, size=size, forgetful=forgetful).run()


class _Machine:
    """The stack, the marks in it and the memo of a pickle being read."""

    def __init__(self, stream: io.BufferedReader, uri: str, *, size: int, forgetful: bool) -> None:
        self._stream, self._uri, self._size, self._forgetful = stream, uri, size, forgetful
        self._stack: list[object] = []
        self._below: list[list[object]] = []  # stacks below the marks
        self._memo: dict[int, object] = {}
        self._num_memos = 0
        self._pairs: list[tuple[object, object]] = []
        self._handlers = self._sized() | self._fixed()

    def run(self) -> Iterator[Pairs]:
        """The pairs of the dictionary that the file is."""
        read, handlers = self._stream.read, self._handlers
        while (code := read(1)) != b".":
            handler = handlers.get(code)
            if handler is None:
                raise _Refused(f"the instruction {code!r} is not allowed in a RecFlow pickle" if code else
                               "the file ends in the middle")
            handler()
            if len(self._pairs) >= PAIRS_AT_A_TIME and not self._below:
                yield self._flush()
        if self._below or len(self._stack) != 1 or not isinstance(self._stack[0], dict):
            raise _Refused("the file does not hold a dictionary")
        if self._pairs:
            yield self._flush()

    def _flush(self) -> Pairs:
        pairs, self._pairs = [(_plain(key), _plain(value)) for key, value in self._pairs], []
        if self._forgetful:
            self._memo = {place: value for place, value in self._memo.items() if _is_lasting(value)}
        return pairs

    # ---- instructions, by what they are made of
    def _fixed(self) -> dict[bytes, Callable[[], None]]:
        def push(value: object) -> Callable[[], None]:
            return lambda: self._stack.append(value)

        def tuple_of(size: int) -> Callable[[], None]:
            return lambda: self._stack.append(tuple(self._pop(size)))

        return {
            b"(": self._mark, b"}": lambda: self._stack.append({}), b"]": lambda: self._stack.append([]),
            b")": push(()), b"N": push(None), b"\x88": push(True), b"\x89": push(False),
            b"t": self._tuple, b"\x85": tuple_of(1), b"\x86": tuple_of(2), b"\x87": tuple_of(3),
            b"s": lambda: self._set_items(self._pop(2)), b"u": lambda: self._set_items(self._to_mark()),
            b"a": lambda: self._extend(self._pop(1)), b"e": lambda: self._extend(self._to_mark()),
            b"R": self._reduce, b"b": self._build, b"c": self._global, b"\x93": self._stack_global,
            b"\x94": lambda: self._put(self._num_memos), b"\x80": lambda: self._check_protocol(self._take(1)[0]),
            b"\x95": lambda: self._discard(self._take(8)),
        }

    def _sized(self) -> dict[bytes, Callable[[], None]]:
        def number(size: int, form: str) -> Callable[[], None]:
            unpack = struct.Struct(form).unpack
            return lambda: self._stack.append(unpack(self._take(size))[0])

        def pushed(size: int, change: Callable[[bytes], object]) -> Callable[[], None]:
            def push() -> None:
                length = int.from_bytes(read(size), "little")
                self._stack.append(change(self._take(length)))

            return push

        def whole(data: bytes) -> int:
            return int.from_bytes(data, "little", signed=True)

        def byte() -> None:
            self._stack.append(read(1)[0])

        text, read, places = bytes.decode, self._stream.read, struct.Struct("<I").unpack
        return {
            b"J": number(4, "<i"), b"K": byte, b"M": number(2, "<H"), b"G": number(8, ">d"),
            b"\x8a": pushed(1, whole), b"\x8b": pushed(4, whole),
            b"X": pushed(4, text), b"\x8c": pushed(1, text), b"\x8d": pushed(8, text),
            b"B": pushed(4, bytes), b"C": pushed(1, bytes), b"\x8e": pushed(8, bytes), b"\x96": pushed(8, bytes),
            b"q": lambda: self._put(read(1)[0]), b"r": lambda: self._put(places(read(4))[0]),
            b"h": lambda: self._get(read(1)[0]), b"j": lambda: self._get(places(read(4))[0]),
        }

    def _take(self, size: int) -> bytes:
        if size > self._size or len(data := self._stream.read(size)) < size:
            raise _Refused("the file ends in the middle")
        return data

    def _discard(self, _: object) -> None:
        """What an instruction brings and this reader does not need."""

    def _check_protocol(self, protocol: int) -> None:
        if not 2 <= protocol <= 5:
            raise _Refused(f"pickle protocol {protocol} is not allowed; files have 2 to 5")

    # ---- stack and memo
    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[object]:
        above, self._stack = self._stack, self._below.pop()
        return above

    def _tuple(self) -> None:
        values = tuple(self._to_mark())
        self._stack.append(values)

    def _pop(self, count: int) -> list[object]:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        taken = self._stack[len(self._stack) - count:]
        del self._stack[len(self._stack) - count:]
        return taken

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]
        if place >= self._num_memos:
            self._num_memos = place + 1

    def _get(self, place: int) -> None:
        try:
            self._stack.append(self._memo[place])
        except KeyError:
            if self._forgetful and place < self._num_memos:
                raise _Forgotten from None
            raise

    def _set_items(self, flat: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise _Refused("something that is no dictionary gets entries")
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        if not self._below and len(self._stack) == 1:
            self._pairs += pairs
        else:
            target.update(pairs)

    def _extend(self, values: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise _Refused("something that is no list gets entries")
        target += values

    # ---- names
    def _global(self) -> None:
        module, name = (self._stream.readline(LONGEST_KEPT * 4)[:-1].decode() for _ in range(2))
        self._push_name(module, name)

    def _stack_global(self) -> None:
        module, name = self._pop(2)
        self._push_name(str(module), str(name))

    def _push_name(self, module: str, name: str) -> None:
        allowed = _allowed(module, name)
        if allowed is None:
            raise DataError(f"{module}.{name} is not allowed in a RecFlow pickle ({self._uri}); the file may be "
                            "corrupt or hostile: download it again, from its authors")
        self._stack.append(allowed)

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if not callable(function) or not isinstance(arguments, tuple):
            raise _Refused("something that makes nothing is used to make something")
        self._stack.append(function(*arguments))

    def _build(self) -> None:
        (state,) = self._pop(1)
        target = self._stack[-1]
        if not isinstance(target, _Dtype | _Array):
            raise _Refused("something that is no array gets a state")
        target.build(state)


def _is_lasting(value: object) -> bool:
    """Names, number types and short words are what later requests share with earlier ones."""
    short = isinstance(value, str | bytes) and len(value) <= LONGEST_KEPT
    return short or callable(value) or isinstance(value, _Dtype)


def _plain(value: object) -> object:
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(inner) for inner in value)
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise _Refused("the file holds a name where a value belongs")
