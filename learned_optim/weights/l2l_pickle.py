"""Read the arrays of an ``.l2l`` file, which is a pickle, without running any of what it asks for.

Python's unpickler assembles what a file describes by looking up names and calling them. Here a small machine follows the
file instead. It knows a few opcodes and a few names, and every name leads to a function below that only takes notes.
Neither NumPy nor dill, which wrote the file, is imported or needed.

Time and memory are bounded by the size of the file: keys are strings, so nothing is hashed or compared for long; raw data
are bytes of the file; and no value is ever walked by recursion.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from learned_optim.weights.errors import WeightsError
from learned_optim.weights.fingerprint import from_little_endian
from learned_optim.weights.text import one_line

_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST
    LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL REDUCE BUILD
"""
OPCODES = frozenset(_OPCODES.split())
"""Constants, containers, references to what was read, and the two ways NumPy's arrays are described."""

MAX_OPCODES = 20_000
"""A rule of the original code needs some hundreds."""

MAX_RANK = 8

RENAMED = {"__builtin__": "builtins", "dill.dill": "dill._dill"}
"""Modules since Python 2."""


def read_arrays(data: bytes, source: str) -> dict[str, dict[str, Tensor]]:
    """Parse a pickle of ``{module: {variable: array}}`` in float32, of any protocol, by pickle or dill.

    Args:
        data: The content of the file.
        source: What messages call it.

    Returns:
        Tensors in float32 by module and variable.

    Raises:
        WeightsError: If the content is not whole, is something else, or asks for anything but arrays, which is then named.
    """
    try:
        found = _Machine(data, source).run()
    except WeightsError:
        raise
    except Exception as error:  # Malformed pickles raise nearly anything.
        raise WeightsError(
            f"{source} is truncated, corrupt or not an .l2l file ({len(data):,} bytes: {one_line(error, 200)}); get it again"
        ) from error
    if type(found) is not dict or not all(type(variables) is dict for variables in found.values()):
        raise WeightsError(f"{source} does not hold {{module: {{variable: array}}}}, so it is no .l2l file")
    left = len(data)
    tensors: dict[str, dict[str, Tensor]] = {}
    for module, variables in found.items():
        tensors[module] = {}
        for name, array in variables.items():
            tensors[module][name] = tensor = _tensor(array, f"{source}: {one_line(f'{module}.{name}', 80)}", left)
            left -= 4 * tensor.numel()
    return tensors


class _Notes:
    """Remembers how a NumPy dtype or array was described; ``BUILD`` adds its state."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, *arguments: Any, state: Any = ()) -> None:
        self.kind, self.arguments, self.state = kind, arguments, state


class _Function(NamedTuple):
    """What a name in the pickle leads to."""

    call: Callable[..., Any]


_MARK = object()


class _Machine:
    """Follows the opcodes of one pickle."""

    def __init__(self, data: bytes, source: str) -> None:
        self.data, self.source = data, source
        self.left_to_encode = len(data)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.functions: dict[str, Callable[..., Any]] = {
            "builtins.dict": _no_function,
            "collections.defaultdict": lambda *_: {},
            "_codecs.encode": self.encode,
            "numpy.dtype": lambda *arguments: _Notes("dtype", *arguments),
            "numpy.ndarray": _refuse_call,
            "numpy.core.multiarray._reconstruct": lambda *_: _Notes("array"),
            "numpy.core._multiarray_umath._reconstruct": lambda *_: _Notes("array"),
            "numpy.core.numeric._frombuffer": _from_buffer,
            "dill._dill._create_array": _create_array,
            # Python 2 calls the type of dictionaries DictType.
            "dill._dill._load_type": lambda name: self.look_up("builtins", _text(name).replace("DictType", "dict")),
            "dill._dill._import_module": lambda name: _text(name),
            "dill._dill._get_attr": lambda module, name: self.look_up(_text(module), _text(name)),
        }

    def run(self) -> Any:
        """Return the value that the pickle describes."""
        opcodes: list[tuple[str, Any]] = []
        for opcode, argument, _ in pickletools.genops(io.BytesIO(self.data)):
            if opcode.name not in OPCODES:
                raise WeightsError(f"{self.source} is refused: its pickle uses {opcode.name}, which arrays have no need of")
            if len(opcodes) == MAX_OPCODES:
                raise WeightsError(f"{self.source} is refused: its pickle has more than {MAX_OPCODES:,} opcodes")
            opcodes.append((opcode.name, argument))
        for name, argument in opcodes:  # Only now: a foreign opcode is named before anything is followed.
            if name == "STOP":
                return self.stack.pop()
            self.take(name, argument)
        raise ValueError("it does not end")

    def take(self, name: str, argument: Any) -> None:
        """Follow one opcode."""
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in CONTAINERS:
            stack.append(CONTAINERS[name]())
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name.endswith("GET"):
            stack.append(self.memo[argument])
        elif name.endswith("PUT") or name == "MEMOIZE":
            number = len(self.memo) if name == "MEMOIZE" else argument
            if number > len(self.data):
                raise WeightsError(f"{self.source} is refused: its pickle numbers an object {number}, to exhaust memory")
            self.memo[number] = stack[-1]
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name.startswith("TUPLE"):
            items = self.since_mark() if name == "TUPLE" else [stack.pop() for _ in range(int(name[-1]))][::-1]
            stack.append(tuple(items))
        elif name in ("LIST", "DICT"):
            items = self.since_mark()
            stack.append(items if name == "LIST" else _with_items({}, items))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.since_mark()
            _checked(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self.since_mark()
            _with_items(_checked(stack[-1], dict), items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            attribute = stack.pop() if name == "STACK_GLOBAL" else argument.split(" ", 1)[1]
            module = stack.pop() if name == "STACK_GLOBAL" else argument.split(" ", 1)[0]
            stack.append(self.look_up(_text(module), _text(attribute)))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_checked(function, _Function).call(*_checked(arguments, tuple)))
        elif name == "BUILD":
            state, described = stack.pop(), stack[-1]
            if type(described) is _Function:
                raise ValueError("it changes a function")
            _checked(described, _Notes).state = state
        else:
            stack.append(argument)

    def since_mark(self) -> list[Any]:
        """Take everything off the stack down to the last mark."""
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def look_up(self, module: str, name: str) -> _Function:
        """Return the function for a name; refuse all others by name."""
        known = f"{RENAMED.get(module, module).replace('numpy._core', 'numpy.core')}.{name}"
        if known not in self.functions:
            raise WeightsError(
                f"{self.source} is refused: it asks for {one_line(f'{module}.{name}', 200)}, which could run code and which "
                "arrays have no need of. Nothing was run; do not load this file in any other way"
            )
        return _Function(self.functions[known])

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Return bytes that were written as text; all together are no more than the file."""
        self.left_to_encode -= len(_text(text))
        if encoding != "latin1" or self.left_to_encode < 0:
            raise ValueError("bytes are described in an unknown way")
        return _text(text).encode("latin1")


CONTAINERS: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
CONSTANTS = {"MARK": _MARK, "NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands in the place of a {kind.__name__}")
    return value


def _text(value: Any) -> str:
    text: str = _checked(value, str)
    return text


def _with_items(target: dict[str, Any], items: list[Any]) -> dict[str, Any]:
    """Add keys and values, which alternate; keys are strings."""
    if len(items) % 2:
        raise ValueError("a key has no value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_text(key)] = value
    return target


def _no_function(*arguments: object) -> dict[str, Any]:
    if arguments:
        raise ValueError("a dictionary is made of arguments")
    return {}


def _refuse_call(*_: object) -> NoReturn:
    raise ValueError("numpy.ndarray is called directly")


def _create_array(_: object, arguments: object, state: object, attributes: object = None) -> _Notes:
    return _Notes("array", state=state)


def _from_buffer(buffer: object, dtype: object, shape: object, order: object) -> _Notes:
    return _Notes("array", state=(1, shape, dtype, order == "F", buffer))


def _tensor(array: Any, source: str, most: int) -> Tensor:
    """Turn a described array into a tensor of at most so many bytes."""
    try:
        _, shape, dtype, fortran, raw = _checked(_checked(array, _Notes).state, tuple)
        kind, order = _text(_checked(dtype, _Notes).arguments[0]), _text(_checked(dtype.state, tuple)[1])
        content = raw.encode("latin1") if type(raw) is str else raw
        if type(content) not in (bytes, bytearray) or type(shape) is not tuple or len(shape) > MAX_RANK:
            raise ValueError("no data or no shape")
        if any(type(size) is not int or not 0 <= size <= most for size in shape):
            raise ValueError("no shape")
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise WeightsError(f"{source} is no array; this is no .l2l file") from error
    if kind != "f4" or order not in ("<", "="):
        described = one_line(f"{order}{kind}", 40)
        raise WeightsError(f"{source} is of type {described}; the original code writes float32, which is <f4")
    if len(content) != 4 * prod(shape):
        raise WeightsError(f"{source} has {len(content)} bytes, but shape {shape} needs {4 * prod(shape)}; get it again")
    if len(content) > most:
        raise WeightsError(f"{source} is refused: its arrays share data, and are larger than the file")
    if fortran:
        return from_little_endian(bytes(content), shape[::-1]).permute(*reversed(range(len(shape))))
    return from_little_endian(bytes(content), shape)
