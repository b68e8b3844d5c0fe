"""``base`` and ``start`` in a recipe: the bundled weights that a run goes on from."""

from __future__ import annotations

import sys
from typing import Any

from learned_optim.weights import Weights, available_weights, resolve_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def with_base(values: dict[str, Any]) -> dict[str, Any]:
    """Put in what ``base = "default"`` in ``[rule]`` stands for.

    ``[rule]`` and ``[use]`` come from the recipe in the bundled weights, and ``start`` is their name. What the recipe
    itself says stands before them.

    Args:
        values: The recipe, as TOML gives it.

    Returns:
        The recipe without ``base``; the same values where it has none.

    Raises:
        ValueError: If no bundled weights have that name, or the fingerprint that stands behind it.
    """
    rule = values.get("rule")
    if not isinstance(rule, dict) or "base" not in rule:
        return values
    base = rule["base"]
    if not _is_bundled(base):
        raise ValueError(f"base must be the name of bundled weights: one of {', '.join(available_weights())}; got {base!r}")
    source = tomllib.loads(start_weights(base).recipe)
    own = {name: value for name, value in rule.items() if name != "base"}
    merged = {**values, "rule": {**source["rule"], **own}, "start": values.get("start", base)}
    use = values.get("use", {})
    if isinstance(use, dict):
        merged["use"] = {**source.get("use", {}), **use}
    return merged


def start_weights(name: str) -> Weights:
    """Return the weights that a recipe goes on from.

    Args:
        name: A bundled name, which may be pinned: ``"default@<fingerprint>"``. Bundled weights of another name serve too, if
            they have the fingerprint: a later version may have renamed them.

    Returns:
        The weights.

    Raises:
        ValueError: If no bundled weights have the fingerprint.
        WeightsError: If nothing has that name.
    """
    bundled, _, fingerprint = name.partition("@")
    if not _is_bundled(name) or not fingerprint:
        return resolve_weights(name)
    for other in (bundled, *available_weights()):
        if (weights := resolve_weights(other)).fingerprint == fingerprint:
            return weights
    now = resolve_weights(bundled).fingerprint
    raise ValueError(
        f"the recipe goes on from {bundled!r} with the fingerprint {fingerprint[:12]}, and here {bundled!r} has {now[:12]}: "
        "use the version of learned-optim that the recipe is of, or leave out the fingerprint to go on from other weights"
    )


def _is_bundled(name: object) -> bool:
    return isinstance(name, str) and name.partition("@")[0] in available_weights()
