"""Where the compiled CPU kernels are found.

The library is optional. It is built by ``pip install`` where there is a C compiler and lies beside this file; it has a plain
C ABI, so that neither torch's headers nor Python's are needed to build it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

ARGUMENTS = {
    "learned_optim_lstm_sequence": [integer, long, *[integer] * 3, *[pointer] * 8, integer],
    "learned_optim_step": [pointer, pointer, pointer, integer],
    "learned_optim_holds": [*[pointer] * 3, integer],
    "learned_optim_find": [*[pointer] * 4, integer],
    "learned_optim_touch": [pointer, pointer, integer],
    "learned_optim_limit_isa": [integer],
    "learned_optim_isa": [],
    "learned_optim_evaluate": [integer, long, pointer, pointer],
}
"""Every function of the library."""


def _load() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            library = ctypes.CDLL(str(path))
            for name, arguments in ARGUMENTS.items():
                getattr(library, name).argtypes = arguments
        except (OSError, AttributeError):
            continue
        return library
    return None


LIBRARY = _load()
"""The library, or None where it was not built, does not load or is of another version."""

AVAILABLE = LIBRARY is not None


def call(function: str, *arguments: object) -> None:
    """Call a function of the library that returns 0, or 1 when out of memory.

    Args:
        function: One of :data:`ARGUMENTS`.
        *arguments: What it takes.

    Raises:
        MemoryError: If the kernel could not allocate its scratch memory.
    """
    if getattr(LIBRARY, function)(*arguments):
        raise MemoryError("the compiled kernel could not allocate its scratch memory")
