"""Where weights are, by what a user writes: a bundled name, a file, an id on the Hub."""

from __future__ import annotations

import difflib
import functools
import os
import re
from os import PathLike
from pathlib import Path

from learned_optim.weights.file_format import FILE, PICKLES, SUFFIX

BUNDLED = Path(__file__).parent
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)


@functools.cache
def available_weights() -> tuple[str, ...]:
    """List the names of the weights that come with the package.

    Returns:
        Names, in alphabetical order.
    """
    return tuple(sorted(path.stem for path in BUNDLED.glob(f"*{SUFFIX}")))


def bundled_file(name: str) -> Path:
    """Return the file of bundled weights."""
    return BUNDLED / f"{name}{SUFFIX}"


def is_path(weights: str | PathLike[str], *, maybe_on_hub: bool) -> bool:
    """Return whether weights are named by a path.

    Args:
        weights: What the user wrote.
        maybe_on_hub: Whether it could be a Hub id too; a directory that happens to have its name must not hide it.

    Returns:
        True for a path object, a name with the suffix of a file, and what exists.
    """
    if isinstance(weights, PathLike) or weights.endswith((SUFFIX, *PICKLES)) or os.path.isfile(weights):
        return True
    return os.path.isdir(weights) and (not maybe_on_hub or os.path.isfile(os.path.join(weights, FILE)))


def unknown(name: str) -> str:
    """Say that nothing has a name, and what would have one."""
    close = difflib.get_close_matches(name, available_weights(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"unknown weights {name!r}; {hint}bundled are {', '.join(available_weights())}; otherwise give 'owner/repo' or "
        f"'owner/repo@revision' on the Hugging Face Hub, or the path of a {SUFFIX} file"
    )
