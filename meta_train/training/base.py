"""``base`` in a recipe's ``[rule]``: rule, options in use and start of bundled weights."""

from __future__ import annotations

import sys
from typing import Any

from learned_optim.weights import available_weights, resolve_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def with_base(values: dict[str, Any]) -> dict[str, Any]:
    """Put in what ``base = "default"`` in ``[rule]`` stands for.

    ``[rule]`` and ``[use]`` are those of the recipe in the bundled weights, and ``start`` is their name. What the recipe
    itself says stands before them.

    Args:
        values: The recipe, as TOML gives it.

    Returns:
        The recipe without ``base``; the same values where it has none.

    Raises:
        ValueError: If no bundled weights have that name.
    """
    rule = values.get("rule")
    if not isinstance(rule, dict) or "base" not in rule:
        return values
    base = rule["base"]
    if base not in available_weights():
        raise ValueError(f"base must be the name of bundled weights: one of {', '.join(available_weights())}; got {base!r}")
    source = tomllib.loads(resolve_weights(base).recipe)
    own = {name: value for name, value in rule.items() if name != "base"}
    merged = {**values, "rule": {**source["rule"], **own}, "start": values.get("start", base)}
    use = values.get("use", {})
    if isinstance(use, dict):
        merged["use"] = {**source.get("use", {}), **use}
    return merged
