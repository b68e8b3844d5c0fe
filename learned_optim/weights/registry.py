"""From what a user writes to loaded weights: bundled name, Hub id, file, rule."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from learned_optim.rules import UpdateRule
from learned_optim.weights.file_format import read_weights
from learned_optim.weights.weights import Weights

BUNDLED = Path(__file__).parent


def available_weights() -> list[str]:
    """List the names of the weights that come with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.safetensors"))


def resolve_weights(weights: str | PathLike[str] | UpdateRule | Weights, **hub_options: Any) -> Weights:
    """Load weights from whatever names them."""
    if isinstance(weights, Weights):
        return Weights.shared(weights)
    if isinstance(weights, UpdateRule):
        return Weights.shared(Weights(weights))
    if str(weights) in available_weights():
        return Weights.shared(read_weights(BUNDLED / f"{weights}.safetensors", str(weights)))
    return Weights.shared(read_weights(weights, str(weights)))
