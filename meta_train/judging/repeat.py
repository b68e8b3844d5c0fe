"""Committed figures, made again: the tables of an arena, and the validation that chose weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from learned_optim.weights import Weights, available_weights
from meta_train.judging.arenas import ARENAS
from meta_train.judging.contestants import Learned
from meta_train.judging.trial import curves, measure
from meta_train.provenance import read_environment
from meta_train.rows import is_learned, read_rows
from meta_train.tasks import OwnTask, Task
from meta_train.tasks.own import NotNamedError, is_path
from meta_train.training.outer_loop import MetaTraining
from meta_train.training.parts import Parts
from meta_train.training.recipe import Recipe, parse_recipe, read_recipe
from meta_train.workers import Each

HONESTY = """\
The optimizees are the same as in the committed tables. With the same torch, processor and threads the figures are equal to
the last digit. Elsewhere rounding differs; expect agreement within two standard errors."""

TOLERANCE = 0.03
"""Share of a figure that rounding may change: optimizees are the same everywhere except for their last digits, and thousands
of steps magnify these. Between two processors the figures of ``default`` differed by 0.3 and 1.0 per cent."""


@dataclass(frozen=True)
class Repeated:
    """A validation figure, as published and as repeated.

    Args:
        name: As in the weights' metadata: ``"validation"`` or ``"final_validation"``.
        kept: The figure that the weights carry, to six digits.
        now: The figure of the repeated validation.
    """

    name: str
    kept: str
    now: float

    @property
    def agrees(self) -> bool:
        """Return whether the figures differ by no more than rounding may explain."""
        return abs(self.now - float(self.kept)) <= TOLERANCE * abs(float(self.kept))

    @property
    def verdict(self) -> str:
        """Return in words how the figures compare."""
        if f"{self.now:.6g}" == self.kept:
            return "equal"
        return f"{'agrees within' if self.agrees else 'DIFFERS by more than'} {TOLERANCE:.0%}"


def repeat_validation(weights: Learned, data: Path | None = None, each: Each = map, own: str = "") -> Iterator[Repeated]:
    """Validate weights as their run did, over each set of horizons for which they carry a figure.

    Nothing that a weight file names is imported, unless ``own`` names it too.

    Args:
        weights: Published weights, for the whole model or for all of its parts.
        data: Directory of real data, for tasks that need it.
        each: Goes over episodes, as :class:`MetaTraining` says.
        own: ``package.module:Class`` of the task in the weights' recipe, or a recipe file that names it.

    Yields:
        Each figure, as soon as it is known.

    Raises:
        ValueError: If the weights carry no recipe or no figure, or some parts of a model are missing.
    """
    one = weights.first
    if not one.recipe or "validation" not in one.metadata:
        raise ValueError(
            f"{weights.name} does not say how it was validated: only what `publish` wrote holds recipe and figure"
        )
    run = MetaTraining(*_recipe_and_task(one, own), data, each)
    rules = {part.metadata.get("part", ""): part.rule for part in weights.weights.values()}
    if missing := [part for part in run.rule.names if part not in rules]:
        raise ValueError(f"{weights.name} was validated together with {', '.join(missing)}; name all parts, joined by +")
    rule = Parts({part: rules[part] for part in run.rule.names})
    for name in ("validation", "final_validation"):
        if name in one.metadata:
            yield Repeated(name, one.metadata[name], run.validation_figure(rule, final=name == "final_validation"))


def _recipe_and_task(weights: Weights, own: str) -> tuple[Recipe, Task | None]:
    """Return the recipe in weights, with its allowed imports; and the task, where it is not the recipe's."""
    recipe = parse_recipe(weights.recipe)
    named = read_recipe(own).own_tasks if own.endswith(".toml") else (own,) if own else ()
    if given := weights.metadata.get("task"):
        if not is_path(own):
            raise ValueError(f"the task of {weights.name} was {given}; name it: --task package.module:Class")
        return recipe, OwnTask(own).imported()
    if foreign := [path for path in named if path not in recipe.own_tasks]:
        theirs = ", ".join(recipe.own_tasks) or "one of meta_train's, which needs no --task"
        raise ValueError(f"{weights.name} was not validated on {foreign[0]}; its task is {theirs}")
    if unnamed := [path for path in recipe.own_tasks if path not in named]:
        raise NotNamedError(unnamed[0])
    return recipe.importing(named), None


def verify(name: str, weights: Learned, results: Path, data: Path | None = None) -> Iterator[tuple[str, bool]]:
    """Evaluate weights again and compare with committed tables of an arena.

    Args:
        name: As the command line names the weights: bundled ones must be the ones of the tables.
        weights: The rule.
        results: Directory of the tables.
        data: Directory of real data, for tasks that need it.

    Yields:
        A line for the screen, and whether it agrees.

    Raises:
        ValueError: If there are no tables of these weights, or they are of a suite or an unknown arena.
    """
    if not (results / "summary.csv").exists():
        raise ValueError(f"there is no committed evidence for {weights.name!r}: {results.name}/summary.csv is missing")
    rows = read_rows(results / "summary.csv")
    if rows and "optimizer" not in rows[0]:
        raise ValueError(f"the tables in {results.name} are of a suite, not of a task; `evaluate --suite` makes them again")
    expected = [row for row in rows if is_learned(row) and row["optimizer"] == weights.label]
    if not expected:
        raise ValueError(f"the tables in {results.name} say nothing of {weights.name!r}; evaluate it under that name")
    about = read_environment(results / "environment.json", "task", "fingerprints")
    if about["task"] not in ARENAS:
        raise ValueError(f"the tables in {results.name} are of an unknown task {about['task']!r}")
    arena = ARENAS[about["task"]].on(data)
    yield HONESTY, True
    if about["fingerprints"].get(weights.name) != weights.fingerprint:
        other = "The committed tables were made with OTHER weights of that name: only their spread can be compared."
        yield other, name not in available_weights()
    fresh = curves(arena.task, weights.make, max(arena.horizons), "evaluation", int(expected[0]["n"]))
    for row in expected:
        now = float(measure(row["criterion"], fresh, int(row["horizon"]), arena.last).mean())
        committed, error = float(row["mean"]), float(row["standard_error"])
        within = abs(now - committed) <= 2 * error
        verdict = "DIFFERS by more than two standard errors"
        if within:
            verdict = "equal" if f"{now:.6g}" == f"{committed:.6g}" else "agrees within two standard errors"
        yield f"{row['horizon']:>4} steps  {row['criterion']:<6} committed {committed:.6g}, now {now:.6g}: {verdict}", within
