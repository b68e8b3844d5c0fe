"""One rule for a whole model, or rules of one configuration that share it, each with meta-parameters of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from learned_optim.rules import UpdateRule


class Parts(nn.Module):
    """Rules that share a model: each moves the parameters whose names begin as its part is called.

    All have one configuration, so coordinates of every part have the same inputs and the same memory; only what becomes of
    them differs.

    Args:
        rules: By part; at least one.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.3: one rule for convolutions, one for dense layers.
    """

    def __init__(self, rules: Mapping[str, UpdateRule]) -> None:
        super().__init__()
        self.names = tuple(rules)
        self.rules = nn.ModuleList(rules.values())


AnyRule = UpdateRule | Parts


def members(rule: AnyRule) -> dict[str, UpdateRule]:
    """Return rules by part; one that moves everything is the part ``""``, as every name begins with nothing."""
    if isinstance(rule, UpdateRule):
        return {"": rule}
    return {name: member for name, member in zip(rule.names, rule.rules, strict=True) if isinstance(member, UpdateRule)}


def first(rule: AnyRule) -> UpdateRule:
    """Return any member, for what all of them share: configuration, dtype, device, inputs and memory."""
    return next(iter(members(rule).values()))


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


def parts_of(rule: AnyRule, names: Iterable[str]) -> Tensor:
    """Return the position of the part that each named parameter belongs to, as :func:`part_of` does."""
    parts = tuple(members(rule))
    return torch.tensor([part_of(parts, name) for name in names])
