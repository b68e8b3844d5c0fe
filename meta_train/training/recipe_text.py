"""Changes of a recipe's text that leave comments and everything else as they are."""

from __future__ import annotations

import re
import sys

from learned_optim.weights import available_weights, resolve_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def with_seed(text: str, seed: int) -> str:
    """Return the text of a recipe with another seed; comments and everything else stay.

    Args:
        text: TOML. A seed is replaced where it stands above the first table, and put first where there is none.
        seed: The new one.

    Returns:
        TOML.

    Raises:
        ValueError: If the text then says anything but the new seed and what it said before.
    """
    start = re.search(r"(?m)^\s*\[", text)
    head, rest = (text[: start.start()], text[start.start() :]) if start else (text, "")
    head, count = re.subn(r"(?m)^seed\s*=\s*[^\s#]+", f"seed = {seed}", head)
    changed = (head if count else f"seed = {seed}\n{head}") + rest
    if tomllib.loads(changed) != {**tomllib.loads(text), "seed": seed}:
        raise ValueError("the recipe's seed cannot be replaced where it stands; write `seed = 0` on a line of its own")
    return changed


def pinned(text: str) -> str:
    """Return the text of a recipe with the fingerprint of the bundled weights that it starts from.

    A later version may bundle other weights under the same name. Comments and everything else stay.

    Args:
        text: TOML that parses.

    Returns:
        TOML in which ``base`` and ``start`` say ``"NAME@FINGERPRINT"``.

    Raises:
        ValueError: If a name cannot be replaced where it stands.
    """
    for table, key in (("rule", "base"), ("", "start")):
        values = tomllib.loads(text)
        holder = values[table] if table else values
        name = holder.get(key)
        if not isinstance(name, str) or name not in available_weights():
            continue
        holder[key] = f"{name}@{resolve_weights(name).fingerprint}"
        places = re.finditer(rf"(\b{key}\"?\s*=\s*)([\"']){re.escape(name)}\2", text)
        changed = (f'{text[: one.start()]}{one[1]}"{holder[key]}"{text[one.end() :]}' for one in places)
        found = next((one for one in changed if tomllib.loads(one) == values), None)
        if found is None:
            raise ValueError(f'{key} cannot be replaced where it stands; write `{key} = "{name}"` on a line of its own')
        text = found
    return text
