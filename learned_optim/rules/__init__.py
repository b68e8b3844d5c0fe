"""Update rules: the numerics, one file a family."""

import dataclasses
from collections.abc import Callable
from typing import Any

from learned_optim.rules.adam_modulation import AdamModulationConfig, AdamModulationRule, plain_adam
from learned_optim.rules.orthogonal import MatrixStage
from learned_optim.rules.paper import PaperRule, PaperRuleConfig, log_and_sign
from learned_optim.rules.rule import Encoded, Memory, RuleConfig, UpdateRule

RULE_FAMILIES: dict[str, tuple[Callable[..., UpdateRule], type[RuleConfig]]] = {
    PaperRule.family: (PaperRule, PaperRuleConfig),
    AdamModulationRule.family: (AdamModulationRule, AdamModulationConfig),
}


def build_rule(family: str, **config: Any) -> UpdateRule:
    """Build an untrained rule from its family's name and the fields of its configuration.

    Args:
        family: One of :data:`RULE_FAMILIES`.
        **config: Fields of that family's configuration; those left out take their defaults.

    Returns:
        The rule, its meta-parameters drawn from torch's global generator.

    Raises:
        ValueError: If the family or a field is unknown, or a value has no meaning.
    """
    if family not in RULE_FAMILIES:
        raise ValueError(f"unknown rule family {family!r}; this version knows {', '.join(sorted(RULE_FAMILIES))}")
    rule_class, config_class = RULE_FAMILIES[family]
    known = [field.name for field in dataclasses.fields(config_class)]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"rule family {family!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return rule_class(config_class(**config))


__all__ = [
    "RULE_FAMILIES",
    "AdamModulationConfig",
    "AdamModulationRule",
    "Encoded",
    "MatrixStage",
    "Memory",
    "PaperRule",
    "PaperRuleConfig",
    "RuleConfig",
    "UpdateRule",
    "build_rule",
    "log_and_sign",
    "plain_adam",
]
