"""Where the compiled CPU kernels are found.

The library is optional. It is built by ``pip install`` where there is a C compiler and lies beside this file; it has a plain
C ABI, so that neither torch's headers nor Python's are needed to build it.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

ARGUMENTS = {
    "learned_optim_lstm_sequence": [integer, long, *[integer] * 3, *[pointer] * 8, integer],
    "learned_optim_step": [pointer, pointer, pointer, integer],
    "learned_optim_matrices": [pointer, long, integer],
    "learned_optim_matrix_scratch": [long, long],
    "learned_optim_limit_isa": [integer],
    "learned_optim_isa": [],
    "learned_optim_evaluate": [integer, long, pointer, pointer],
    "learned_optim_sources": [],
}
"""Every function of the library."""

SOURCES = Path(__file__).parent


def source_digest(folder: Path = SOURCES) -> str | None:
    """Return a digest of the kernels' sources, or None where they are not at hand: a wheel has only what was built of them.

    Args:
        folder: Where they would lie.

    Returns:
        As ``setup.py`` computes it.
    """
    sources = sorted(folder.glob("*.[ch]"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest() if sources else None


def load(digest: str | None) -> ctypes.CDLL | None:
    """Load the library that was built from sources of this digest; of any, if None.

    After ``git pull`` an older one may still lie there. It would take what it is handed for something else.

    Args:
        digest: From :func:`source_digest`.

    Returns:
        None if there is none that loads.
    """
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            library = ctypes.CDLL(str(path))
            for name, arguments in ARGUMENTS.items():
                getattr(library, name).argtypes = arguments
        except (OSError, AttributeError):
            continue
        library.learned_optim_sources.restype = ctypes.c_char_p
        library.learned_optim_matrix_scratch.restype = long
        if digest is None or library.learned_optim_sources().decode() == digest:
            return library
    return None


LIBRARY = load(source_digest())
"""The library, or None where it was not built, does not load or was built from other sources."""

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
