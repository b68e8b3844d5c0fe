"""What can be said of weights without running them: for model cards and the command line."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from typing import Any

import torch

from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import layout
from learned_optim.weights.weights import Weights

ADAM_BYTES = 8
"""Adam's optimizer state per parameter: two moments in float32."""


def bytes_per_parameter(
    rule: UpdateRule,
    state_dtype: torch.dtype = torch.float32,
    moment_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> int:
    """Return the optimizer state of one real model parameter, in bytes.

    Args:
        rule: That steps it.
        state_dtype: As for :func:`~learned_optim.rules.storage.layout`.
        moment_dtype: As there.
        compute_dtype: As there.

    Returns:
        Bytes; every tensor has 4 more, its count of steps.
    """
    entries = layout(rule, state_dtype, moment_dtype, compute_dtype).values()
    return sum(math.prod(entry.trailing) * entry.dtype.itemsize for entry in entries)


def license_of(weights: Weights) -> str:
    """Return the licence that the metadata states; ``"mit"`` for bundled weights, else ``"unknown"``."""
    return weights.metadata.get("license") or ("mit" if weights.fingerprint in _bundled() else "unknown")


@functools.cache
def _bundled() -> frozenset[str]:
    from learned_optim.weights.registry import available_weights, resolve_weights

    return frozenset(resolve_weights(name).fingerprint for name in available_weights())


def training_facts(recipe: str) -> dict[str, str]:
    """Return what a recipe says of the tasks and horizon of meta-training, in words.

    Args:
        recipe: TOML; may be empty, or of another version.

    Returns:
        Fact by name; those that the recipe does not state are missing, all of them where Python reads no TOML (3.10).
    """
    tables = _parsed(recipe)
    task, inner, outer = (_table(tables, name) for name in ("task", "inner", "outer"))
    facts: dict[str, str] = {}
    if "name" in task:
        settings = ", ".join(f"{key} = {value}" for key, value in task.items() if key != "name")
        facts["task distribution"] = f"{task['name']} ({settings})" if settings else str(task["name"])
    if horizon := inner.get("horizon"):
        ends = dict.fromkeys(horizon if isinstance(horizon, list) else [horizon])
        facts["horizon"] = f"{' to '.join(f'{end:,}' if isinstance(end, int) else str(end) for end in ends)} inner steps"
    stages = tables.get("stages")
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    for table, key in ((inner, "truncation"), (outer, "steps"), (outer, "objective")):
        values = [str(part[key]) for part in (table, *stages) if key in part]
        if values:
            facts["outer steps" if key == "steps" else key] = ", then ".join(values)
    return facts


def _parsed(recipe: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib

        with contextlib.suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(recipe)
    return {}


def _table(tables: dict[str, Any], name: str) -> dict[str, Any]:
    found = tables.get(name)
    return found if isinstance(found, dict) else {}
