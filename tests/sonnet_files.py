"""Files of the original code: its variables drawn at random, and written in each of the ways they come."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Variables = dict[str, dict[str, np.ndarray]]


def sonnet_variables(num_inputs: int = 2, hidden: int = 5, layers: int = 2, seed: int = 0) -> Variables:
    """Draw variables as the original code names and shapes them."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    found: Variables = collections.defaultdict(dict)
    below = num_inputs
    for layer in range(1, layers + 1):
        found[f"lstm_{layer}"] = {"w_gates": normal(below + hidden, 4 * hidden), "b_gates": normal(4 * hidden)}
        below = hidden
    found["linear"] = {"w": normal(hidden, 1), "b": normal(1)}
    return found


def changed(*, drop: str = "", **arrays: np.ndarray | None) -> Variables:
    variables = {**sonnet_variables()}
    variables.pop(drop, None)
    for name, array in arrays.items():
        module, _, variable = name.partition("__")
        variables[module] = {**variables.get(module, {}), variable: array}  # type: ignore[dict-item]
    return variables


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


RECONSTRUCT = {
    "direct": b"cnumpy.core.multiarray\n_reconstruct\n",
    "numpy 2": b"cnumpy._core.multiarray\n_reconstruct\n",
    "dill": (
        b"cdill._dill\n_get_attr\ncdill._dill\n_import_module\nU\x1cnumpy.core._multiarray_umath\x85RU\x0c_reconstruct\x86R"
    ),
}


def by_dill(variables: Variables, kind: str = "direct", load_type: bytes = b"dill.dill\n_load_type\nU\x08DictType") -> bytes:
    """Write what dill does at protocol 2, opcode by opcode; with the defaults, what the original wrote under Python 2."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    dtype = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"

    def array(value: np.ndarray) -> bytes:
        shape = b"".join(b"K" + bytes([size]) for size in value.shape) + {1: b"\x85", 2: b"\x86"}[value.ndim]
        raw = b"T" + value.nbytes.to_bytes(4, "little") + value.tobytes()
        state = b"(K\x01" + shape + dtype + b"\x89" + raw + b"t"
        empty = b"cnumpy\nndarray\nK\x00\x85U\x01b\x87"
        if kind == "create_array":
            return b"cdill._dill\n_create_array\n(" + RECONSTRUCT["direct"] + empty + state + b"NtR"
        return RECONSTRUCT[kind] + empty + b"R" + state + b"b"

    out = b"\x80\x02ccollections\ndefaultdict\nc" + load_type + b"\x85R\x85R("
    for module, found in variables.items():
        out += text(module) + b"}(" + b"".join(text(name) + array(value) for name, value in found.items()) + b"u"
    return out + b"u."


def as_safetensors(variables: Variables, path: Path, **metadata: str) -> Path:
    flat = {f"{module}.{name}": array for module, found in variables.items() for name, array in found.items()}
    save_file(flat, path, metadata or None)
    return path
