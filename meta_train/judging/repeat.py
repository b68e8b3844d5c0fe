"""The validation that chose weights, again: by the recipe inside them, beside the figure that they carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meta_train.judging.contestants import AnyWeights, of_all_parts
from meta_train.training.outer_loop import MetaTraining
from meta_train.training.parts import Parts, members
from meta_train.training.recipe import parse_recipe
from meta_train.workers import Each

TOLERANCE = 0.03
"""Share of a figure that rounding may change: optimizees are the same everywhere, their last digits are not, and thousands
of steps magnify those. Between two processors the figures of ``default`` differed by 0.3 and 1.0 per cent."""


@dataclass(frozen=True)
class Repeated:
    """A validation figure, as it was and as it is.

    Args:
        name: As in the weights' metadata: ``"validation"`` or ``"final_validation"``.
        kept: What the weights carry, to six digits.
        now: What was found.
    """

    name: str
    kept: str
    now: float

    @property
    def agrees(self) -> bool:
        """Return whether the two differ by no more than rounding may explain."""
        return abs(self.now - float(self.kept)) <= TOLERANCE * abs(float(self.kept))

    @property
    def verdict(self) -> str:
        """Return how the two compare, in words."""
        if f"{self.now:.6g}" == self.kept:
            return "equal"
        return f"{'agrees within' if self.agrees else 'DIFFERS by more than'} {TOLERANCE:.0%}"


def repeat_validation(weights: AnyWeights, data: Path | None = None, each: Each = map) -> Iterator[Repeated]:
    """Validate weights as their run did, over each set of horizons of which they carry a figure.

    Args:
        weights: Published weights, or those of all parts of a model.
        data: Directory of real data, for tasks that need it.
        each: Goes over episodes, as :class:`MetaTraining` says.

    Yields:
        Each figure, as soon as it is known.

    Raises:
        ValueError: If the weights carry no recipe or no figure, or only some parts of a model are there.
    """
    one = of_all_parts(weights)[0]
    if not one.recipe or "validation" not in one.metadata:
        raise ValueError(
            f"{weights.name} does not say how it was validated: only what `publish` wrote holds recipe and figure"
        )
    run = MetaTraining(parse_recipe(one.recipe), data=data, each=each)
    rules = {part.metadata.get("part", ""): part.rule for part in of_all_parts(weights)}
    parts = members(run.rule)
    if missing := [part for part in parts if part not in rules]:
        raise ValueError(f"{weights.name} was validated together with {', '.join(missing)}; name all parts, joined by +")
    rule = Parts({part: rules[part] for part in parts}) if isinstance(run.rule, Parts) else one.rule
    for name in ("validation", "final_validation"):
        if name in one.metadata:
            yield Repeated(name, one.metadata[name], run.validation_figure(rule, final=name == "final_validation"))
