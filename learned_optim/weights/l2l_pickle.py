"""Read the arrays of an ``.l2l`` file, which is a pickle, without running any of what it asks for.

Python's unpickler assembles what a file describes by looking up names and calling them. Here every lookup ends at one of
a handful of stand-ins that only take notes; neither NumPy nor dill, which wrote the file, is imported or needed.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from learned_optim.weights.errors import WeightsError

_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST
    LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL REDUCE BUILD
"""
OPCODES = frozenset(_OPCODES.split())
"""Constants, containers, references to what was read, and the two ways NumPy's arrays are described."""

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
        _check_opcodes(data, source)
        found = _Reader(data, source).load()
    except WeightsError:
        raise
    except Exception as error:  # Malformed pickles raise nearly anything.
        raise WeightsError(
            f"{source} is truncated, corrupt or not an .l2l file ({len(data):,} bytes: {error}); get it again"
        ) from error
    if type(found) is not dict or not all(type(variables) is dict for variables in found.values()):
        raise WeightsError(f"{source} does not hold {{module: {{variable: array}}}}, so it is no .l2l file")
    return {
        str(module): {str(name): _tensor(array, f"{source}: {module}.{name}") for name, array in variables.items()}
        for module, variables in found.items()
    }


def _check_opcodes(data: bytes, source: str) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise WeightsError(f"{source} is refused: its pickle uses {opcode.name}, which arrays have no need of")
        if "PUT" in opcode.name and argument is not None and argument > len(data):
            raise WeightsError(f"{source} is refused: its pickle numbers an object {argument}, to exhaust memory")


class _Notes:
    """Remembers how a NumPy dtype or array was described; ``BUILD`` adds its state."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _StandIn:
    """What a name in the pickle leads to. ``BUILD`` cannot change it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise ValueError("it changes a function")


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, source: str) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")  # Python 2 wrote bytes as str.
        self.source = source
        self.stand_ins: dict[str, Callable[..., Any]] = {
            "builtins.dict": dict,
            "collections.defaultdict": lambda *_: {},
            "_codecs.encode": lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),
            "numpy.dtype": lambda *arguments: _Notes("dtype", *arguments),
            "numpy.ndarray": self.refuse_call,
            "numpy.core.multiarray._reconstruct": lambda *_: _Notes("array"),
            "numpy.core._multiarray_umath._reconstruct": lambda *_: _Notes("array"),
            "numpy.core.numeric._frombuffer": _from_buffer,
            "dill._dill._create_array": _create_array,
            # Python 2 calls the type of dictionaries DictType.
            "dill._dill._load_type": lambda name: self.find_class("builtins", str(name).replace("DictType", "dict")),
            "dill._dill._import_module": lambda name: name,
            "dill._dill._get_attr": lambda module, name: self.find_class(module, name),
        }

    def find_class(self, module: str, name: str) -> _StandIn:
        """Return the stand-in for a name; refuse all others by name."""
        known = f"{RENAMED.get(module, module).replace('numpy._core', 'numpy.core')}.{name}"
        if known not in self.stand_ins:
            raise WeightsError(
                f"{self.source} is refused: it asks for {module}.{name}, which could run code and which arrays have no need "
                "of. Nothing was run; do not load this file in any other way"
            )
        return _StandIn(self.stand_ins[known])

    def refuse_call(self, *_: object) -> NoReturn:
        raise ValueError("numpy.ndarray is called directly")


def _create_array(_: object, arguments: object, state: tuple[Any, ...], attributes: object = None) -> _Notes:
    array = _Notes("array")
    array.state = state
    return array


def _from_buffer(buffer: bytes, dtype: _Notes, shape: tuple[int, ...], order: str) -> _Notes:
    array = _Notes("array")
    array.state = (1, shape, dtype, order == "F", buffer)
    return array


def _tensor(array: object, source: str) -> Tensor:
    """Turn a described array into a tensor."""
    try:
        assert isinstance(array, _Notes)
        _, shape, dtype, fortran, raw = array.state
        content = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        kind, order, shape = dtype.arguments[0], dtype.state[1], tuple(map(int, shape))
    except (AssertionError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise WeightsError(f"{source} is no array; this is no .l2l file") from error
    if kind != "f4" or order not in "<=":
        raise WeightsError(f"{source} is of type {order}{kind}; the original code writes float32, which is <f4")
    if min(shape, default=0) < 0 or len(content) != 4 * prod(shape):
        raise WeightsError(f"{source} has {len(content)} bytes, but shape {shape} needs {4 * prod(shape)}; get it again")
    flat = torch.tensor(struct.unpack(f"<{prod(shape)}f", content))
    if fortran:
        return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.reshape(shape)
