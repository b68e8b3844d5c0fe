"""Where weights lie: from what a user writes to a bundled name, a file or a repository on the Hub."""

from __future__ import annotations

import difflib
import functools
import os
import re
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from learned_optim.weights.errors import WeightsError, WeightsNotFoundError
from learned_optim.weights.file_format import FILE, PICKLES, SUFFIX, weight_file

BUNDLED = Path(__file__).parent
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)


PURPOSES = {
    "default": "models of many kinds, small and of middle size: start here",
    "default-v1": "checkpoints made with the first default, which sees no matrices",
    "cifar-conv": "convolutions of small nets on CIFAR-10, with their batch norm",
    "cifar-dense": "dense layers of small nets on CIFAR-10, with their batch norm",
    "mnist-mlp": "nets of one sigmoid layer on MNIST, as the 2016 paper has them",
    "mnist-modulated": "nets of one or two small layers on MNIST",
    "neural-art": "pictures under the loss of the 2016 paper's Neural Art",
    "quadratic": "the 2016 paper's quadratics",
}
"""What each of the bundled weights is for, in a few words."""


class LocalFile(NamedTuple):
    """Weights on this machine."""

    path: Path
    name: str
    source: str
    """What messages call the file."""


class HubFile(NamedTuple):
    """Weights on the Hugging Face Hub."""

    repo: str
    revision: str | None


@functools.cache
def available_weights() -> tuple[str, ...]:
    """List the names of the weights that come with the package.

    Returns:
        Names, in alphabetical order.
    """
    return tuple(sorted(path.stem for path in BUNDLED.glob(f"*{SUFFIX}")))


def bundled_file(name: str) -> LocalFile:
    """Return where weights of the package lie.

    Args:
        name: One of :func:`available_weights`.

    Returns:
        The file.
    """
    return LocalFile(BUNDLED / f"{name}{SUFFIX}", name, f"bundled weights {name!r}")


def locate(weights: str | PathLike[str], revision: str | None = None) -> LocalFile | HubFile:
    """Find out where named weights lie; nothing is read, and no request is made.

    Args:
        weights: A bundled name; a file, or a directory that holds a ``model.safetensors``; ``"owner/repo"`` or
            ``"owner/repo@revision"``.
        revision: Hub revision, if not given in ``weights``.

    Returns:
        A file, or a repository with a revision.

    Raises:
        WeightsNotFoundError: If ``weights`` is none of these.
        WeightsError: If ``revision`` makes no sense with it.
    """
    name = os.fspath(weights)
    if isinstance(weights, str) and name in available_weights():
        refuse_revision(revision, name)
        return bundled_file(name)
    on_hub = HUB_ID.fullmatch(name)
    if _is_path(weights, maybe_on_hub=on_hub is not None):
        refuse_revision(revision, name)
        path = weight_file(name)
        return LocalFile(path, name, str(path))
    if on_hub is None:
        raise WeightsNotFoundError(_unknown(name))
    if revision and on_hub["revision"] and revision != on_hub["revision"]:
        raise WeightsError(
            f"{name!r} names revision {on_hub['revision']!r}, but revision={revision!r} was given too; give one of them"
        )
    return HubFile(on_hub["repo"], on_hub["revision"] or revision)


def refuse_revision(revision: str | None, name: str) -> None:
    """Refuse a revision for weights that are not on the Hub.

    Args:
        revision: As a user gave it.
        name: What messages call the weights.

    Raises:
        WeightsError: If a revision was given.
    """
    if revision is not None:
        raise WeightsError(f"revision={revision!r} is for weights on the Hub, and {name!r} is not there; leave it out")


def _is_path(weights: str | PathLike[str], *, maybe_on_hub: bool) -> bool:
    if isinstance(weights, PathLike) or weights.endswith((SUFFIX, *PICKLES)) or os.path.isfile(weights):
        return True
    # A directory that happens to be called like a Hub id must not hide it.
    return os.path.isdir(weights) and (not maybe_on_hub or os.path.isfile(os.path.join(weights, FILE)))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, available_weights(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"unknown weights {name!r}; {hint}bundled are {', '.join(available_weights())}; otherwise give 'owner/repo' or "
        f"'owner/repo@revision' on the Hugging Face Hub, or the path of a {SUFFIX} file"
    )
