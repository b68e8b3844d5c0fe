"""Facts about weights that need no step: memory, and what the recipe says of meta-training."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any

import torch

from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import layout
from learned_optim.weights.text import one_line

MAX_RECIPE = 2**16
MAX_LINE = 1000
LARGEST = 10**18
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
        rule: The rule that steps the parameter.
        state_dtype: Dtype of the LSTM memory, as for :func:`~learned_optim.rules.storage.layout`.
        moment_dtype: Dtype of the moments, as for the same function.
        compute_dtype: Dtype in which the rule computes.

    Returns:
        Bytes for one entry of a parameter; each whole tensor needs 4 more, for its count of steps.
    """
    entries = layout(rule, state_dtype, moment_dtype, compute_dtype).values()
    return sum(math.prod(entry.trailing) * entry.dtype.itemsize for entry in entries)


def training_facts(recipe: str, given: str = "") -> dict[str, str]:
    """Return what a recipe says of the tasks and horizon of meta-training, in printable words.

    Args:
        recipe: TOML; may be empty, or of another version.
        given: The task, where the provenance says that it is another than the recipe's.

    Returns:
        Fact by name. A fact that the recipe does not state is missing; Python 3.10 reads no TOML, so all are missing there.
    """
    tables = _parsed(recipe)
    task, inner, outer = (_table(tables, name) for name in ("task", "inner", "outer"))
    facts: dict[str, str] = {}
    if given:
        facts["task distribution"] = one_line(given)
    elif "name" in task:
        settings = ", ".join(f"{key} = {one_line(value)}" for key, value in task.items() if key != "name")
        facts["task distribution"] = f"{one_line(task['name'])} ({settings})" if settings else one_line(task["name"])
    if horizon := inner.get("horizon"):
        ends = dict.fromkeys(map(_number, horizon if isinstance(horizon, list) else [horizon]))
        facts["horizon"] = f"{' to '.join(ends)} inner steps"
    stages = tables.get("stages")
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    for table, key in ((inner, "truncation"), (outer, "steps"), (outer, "objective")):
        values = [one_line(part[key]) for part in (table, *stages) if key in part]
        if values:
            facts["outer steps" if key == "steps" else key] = ", then ".join(values)
    return facts


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) < LARGEST else one_line(value)


def _parsed(recipe: str) -> dict[str, Any]:
    """Parse a recipe; one that no honest writer makes counts as empty, for ``tomllib`` is slow on some of these."""
    if len(recipe) > MAX_RECIPE or any(len(line) > MAX_LINE for line in recipe.splitlines()):
        return {}
    if sys.version_info >= (3, 11):
        import tomllib

        # A TOMLDecodeError is a ValueError, and so is an integer of too many digits.
        with contextlib.suppress(ValueError, RecursionError):
            return tomllib.loads(recipe)
    return {}


def _table(tables: dict[str, Any], name: str) -> dict[str, Any]:
    found = tables.get(name)
    return found if isinstance(found, dict) else {}
