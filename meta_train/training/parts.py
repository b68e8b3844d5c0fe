"""One rule for a whole model, or rules of one configuration that share it, each with meta-parameters of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim.rules import UpdateRule


class Parts(nn.Module):
    """Rules that share a model: each moves the parameters whose names begin with the name of its part.

    All have one configuration, so coordinates of every part have the same inputs and the same memory; only the updates
    differ. A rule that moves the whole model is the part ``""``, since every name begins with nothing.

    Args:
        rules: One rule for each part; at least one.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.3: one rule for convolutions, one for dense layers.
    """

    def __init__(self, rules: Mapping[str, UpdateRule]) -> None:
        super().__init__()
        self.names = tuple(rules)
        self.rules = nn.ModuleList(rules.values())
        self._register_load_state_dict_pre_hook(_under_rules)

    @classmethod
    def whole(cls, rule: UpdateRule) -> Parts:
        """Return one rule as the only part of a model."""
        return cls({"": rule})

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self.names)

    def __iter__(self) -> Iterator[UpdateRule]:
        """Return the rules in the order of the parts."""
        return (rule for rule in self.rules if isinstance(rule, UpdateRule))

    def items(self) -> Iterator[tuple[str, UpdateRule]]:
        """Return the name and the rule of every part."""
        return zip(self.names, self, strict=True)

    @property
    def shared(self) -> UpdateRule:
        """Any rule, for what all of them share: configuration, dtype, device, inputs and memory."""
        return next(iter(self))

    def owners(self, names: Iterable[str]) -> Tensor:
        """Return the position of the part that each named parameter belongs to, as :func:`part_of` does."""
        return torch.tensor([part_of(self.names, name) for name in names])


def _under_rules(state: dict[str, Any], prefix: str, *_: object) -> None:
    """Rename the meta-parameters of a checkpoint that holds one rule without its part."""
    for name in [name for name in state if not name.startswith(f"{prefix}rules.")]:
        state[f"{prefix}rules.0.{name.removeprefix(prefix)}"] = state.pop(name)


def part_of(parts: Iterable[str], name: str) -> int:
    """Return which part a parameter belongs to.

    Args:
        parts: Beginnings of names.
        name: Of the parameter.

    Returns:
        The position of its part.

    Raises:
        ValueError: If its name begins as none, or as several.
    """
    parts = tuple(parts)
    owners = [position for position, part in enumerate(parts) if name.startswith(part)]
    if len(owners) != 1:
        which = " and ".join(repr(parts[owner]) for owner in owners) or "none"
        raise ValueError(f"the parameter {name!r} must belong to one of the parts {', '.join(parts)}; it begins as {which}")
    return owners[0]
