"""From what a user writes to loaded weights: bundled name, Hub id, file, rule."""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
import weakref
from os import PathLike
from pathlib import Path

from learned_optim.modes import outside_modes
from learned_optim.rules import UpdateRule
from learned_optim.weights.errors import WeightsError, WeightsNotFoundError
from learned_optim.weights.file_format import FILE, PICKLES, SUFFIX, from_bytes, read_bytes, weight_file
from learned_optim.weights.weights import Weights

BUNDLED = Path(__file__).parent
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)

_parsed: weakref.WeakValueDictionary[tuple[bytes, str], Weights] = weakref.WeakValueDictionary()


@functools.cache
def available_weights() -> tuple[str, ...]:
    """List the names of the weights that come with the package.

    Returns:
        Names, in alphabetical order.
    """
    return tuple(sorted(path.stem for path in BUNDLED.glob(f"*{SUFFIX}")))


def resolve_weights(
    weights: str | PathLike[str] | UpdateRule | Weights,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Weights:
    """Load weights from whatever names them.

    A string is taken for the first of these that it is: a bundled name, a file or a directory with a
    ``model.safetensors``, a Hub id. Weights from the Hub are named by their commit, ``"owner/repo@commit"``, so that a
    checkpoint tells exactly what it needs even if a branch has moved on.

    Args:
        weights: A bundled name; a file, or a directory that holds a ``model.safetensors``; ``"owner/repo"`` or
            ``"owner/repo@revision"`` on the Hub; a rule; or weights.
        revision: Hub revision (branch, tag or commit), if not given in ``weights``. A full commit hash needs no network
            once cached.
        token: Hub token; True demands the one that ``hf auth login`` saved, False sends none.
        cache_dir: Hub cache.
        local_files_only: Never use the network.
        force_download: Fetch again even if cached.

    Returns:
        The weights; the same object for the same weights, however often they are loaded.

    Raises:
        WeightsNotFoundError: If nothing has that name, or it is on the Hub and cannot be reached.
        WeightsError: If what has that name is not usable, or ``revision`` makes no sense with it.
        TypeError: If ``weights`` is something else.
    """
    if isinstance(weights, (Weights, UpdateRule)):
        loaded = weights if isinstance(weights, Weights) else Weights(weights)
        _refuse_revision(revision, loaded.name)
        return loaded.shared()
    if not isinstance(weights, (str, PathLike)):
        raise TypeError(
            f"weights must be a name, a path, an UpdateRule or Weights, got {type(weights).__name__}: {weights!r}"
        )
    name = os.fspath(weights)
    if isinstance(weights, str) and name in available_weights():
        _refuse_revision(revision, name)
        return _bundled(name)
    on_hub = HUB_ID.fullmatch(name)
    if _is_path(weights, maybe_on_hub=on_hub is not None):
        _refuse_revision(revision, name)
        path = weight_file(name)
        return _load(path, name, source=str(path))
    if on_hub is None:
        raise WeightsNotFoundError(_unknown(name))
    if revision and on_hub["revision"] and revision != on_hub["revision"]:
        raise WeightsError(
            f"{name!r} names revision {on_hub['revision']!r}, but revision={revision!r} was given too; give one of them"
        )
    from learned_optim.weights.hub import download

    path, pinned = download(
        on_hub["repo"],
        on_hub["revision"] or revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    return _load(path, pinned, source=f"{FILE} of {pinned}")


@functools.cache
def _bundled(name: str) -> Weights:
    return _load(BUNDLED / f"{name}{SUFFIX}", name, source=f"bundled weights {name!r}")


def _load(path: Path, name: str, source: str) -> Weights:
    """Read a file, but parse only content that no living weights were made of: a changed file is never missed."""
    data = read_bytes(path)
    key = hashlib.sha256(data).digest(), name
    weights = _parsed.get(key)
    if weights is None:
        weights = outside_modes(lambda: from_bytes(data, source)).called(name).shared()
        _parsed[key] = weights
    return weights


def _is_path(weights: str | PathLike[str], *, maybe_on_hub: bool) -> bool:
    if isinstance(weights, PathLike) or weights.endswith((SUFFIX, *PICKLES)) or os.path.isfile(weights):
        return True
    # A directory that happens to be called like a Hub id must not hide it.
    return os.path.isdir(weights) and (not maybe_on_hub or os.path.isfile(os.path.join(weights, FILE)))


def _refuse_revision(revision: str | None, name: str) -> None:
    if revision is not None:
        raise WeightsError(f"revision={revision!r} is for weights on the Hub, and {name!r} is not there; leave it out")


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, available_weights(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"unknown weights {name!r}; {hint}bundled are {', '.join(available_weights())}; otherwise give 'owner/repo' or "
        f"'owner/repo@revision' on the Hugging Face Hub, or the path of a {SUFFIX} file"
    )
