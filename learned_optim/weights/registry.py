"""From what a user writes to loaded weights: bundled name, Hub id, file, rule."""

from __future__ import annotations

import difflib
import functools
import re
from os import PathLike
from pathlib import Path

from learned_optim.rules import UpdateRule
from learned_optim.weights.errors import WeightsError
from learned_optim.weights.file_format import read_weights
from learned_optim.weights.weights import Weights

BUNDLED = Path(__file__).parent
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@functools.cache
def available_weights() -> tuple[str, ...]:
    """List the names of the weights that come with the package.

    Returns:
        Names, in alphabetical order.
    """
    return tuple(sorted(path.stem for path in BUNDLED.glob("*.safetensors")))


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

    Args:
        weights: A bundled name; a file; ``"owner/repo"`` or ``"owner/repo@revision"`` on the Hub; a rule; or weights.
        revision: Hub revision, if not given in ``weights``. A full commit hash needs no network once cached.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Never use the network.
        force_download: Fetch again even if cached.

    Returns:
        The weights; the same object for the same weights, however often they are loaded.

    Raises:
        WeightsError: If nothing has that name or what has it cannot be read; the message says what to do.
    """
    if isinstance(weights, Weights):
        return Weights.shared(weights)
    if isinstance(weights, UpdateRule):
        return Weights.shared(Weights(weights))
    name = str(weights)
    if name in available_weights():
        return _bundled(name)
    if isinstance(weights, PathLike) or name.endswith(".safetensors") or Path(name).exists():
        path = Path(weights)
        return Weights.shared(read_weights(path / "model.safetensors" if path.is_dir() else path, name))
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise WeightsError(_unknown(name))
    if revision and match["revision"] and revision != match["revision"]:
        raise WeightsError(f"{name!r} names revision {match['revision']!r}, but revision={revision!r} was given too")
    from learned_optim.weights.hub import download

    path = download(
        match["repo"],
        match["revision"] or revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    return Weights.shared(read_weights(path, name))


@functools.cache
def _bundled(name: str) -> Weights:
    return Weights.shared(read_weights(BUNDLED / f"{name}.safetensors", name))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, available_weights(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"unknown weights {name!r}; {hint}bundled are {', '.join(available_weights())}; otherwise give 'owner/repo' or "
        "'owner/repo@revision' on the Hugging Face Hub, or the path of a .safetensors file"
    )
