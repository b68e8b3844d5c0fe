"""The choice of the arena that judges weights: a named arena, or an arena made of any task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from meta_train.judging.arenas import ARENAS, HORIZONS, Arena
from meta_train.judging.baselines import ANY, UNTUNED
from meta_train.judging.contestants import Learned
from meta_train.tasks import ImportedTask, Optimizee, OwnTask, Task
from meta_train.tasks.own import NotNamedError, is_path
from meta_train.tasks.task import OnData, Params, with_data
from meta_train.training.recipe import Recipe, parse_recipe, read_recipe

SPLITS: Mapping[str, Mapping[str, str]] = {"half": {"first": "second"}, "split": {"train": "test"}}
"""The parts of real data that rules are meta-trained on, and those that they are judged on, by the task's field."""


@dataclass(frozen=True)
class FirstProblem:
    """The first problem of every optimizee of a task, as an optimizer in use has one model.

    Args:
        task: A task that may sample several problems side by side.
    """

    task: Task

    def on(self, data: Path) -> FirstProblem:
        """Return the task with real data, where it needs any."""
        return replace(self, task=with_data(self.task, data)) if isinstance(self.task, OnData) else self

    def sample(self, seed: int) -> Optimizee:
        """Return the optimizee of a seed, with one problem.

        Args:
            seed: Seed for the task.

        Returns:
            The optimizee; the further problems stay where they start.
        """
        every = self.task.sample(seed)
        if every.num_problems == 1:
            return every
        rest = {name: value[1:] for name, value in every.params.items()}

        def losses(params: Params) -> Tensor:
            together = {name: torch.cat([value, rest[name].to(value.dtype)]) for name, value in params.items()}
            return every.losses(together)[:1]

        return Optimizee({name: value[:1] for name, value in every.params.items()}, losses, every.generator)


def choose_arena(asked: str, rules: Sequence[Learned]) -> tuple[str, Arena]:
    """Choose the arena that judges weights.

    Nothing that a weight file names is imported: the user must name an own task, or a recipe file that names it.

    Args:
        asked: The name of an arena, the ``package.module:Class`` of an own task, a recipe file; or empty, for the task in
            the recipe that the first weights carry.
        rules: The rules to judge.

    Returns:
        The arena's name and the arena.

    Raises:
        NotNamedError: If only own code could tell what the weights are for.
        ValueError: If there is no such arena, or the weights do not name their task.
    """
    if asked in ARENAS:
        return asked, ARENAS[asked]
    if asked.endswith(".toml"):
        recipe = read_recipe(asked)
        return _of_recipe(recipe.importing(recipe.own_tasks))
    weights = rules[0].first
    carried = parse_recipe(weights.recipe) if weights.recipe else None
    if is_path(asked):
        own = carried.task if carried and isinstance(carried.task, OwnTask) else None
        if carried and own and own.path == asked:
            return _of_recipe(carried.importing([asked]))
        return asked, any_arena(OwnTask(asked).imported(), HORIZONS[0])
    if asked:
        raise ValueError(f"there is no task {asked!r}; {CHOICES}")
    if carried is None:
        raise ValueError(f"{weights.name} carries no recipe, so choose a task: --task {', '.join(ARENAS)}")
    if given := weights.metadata.get("task"):
        raise ValueError(f"the task of {weights.name} was {given}; name it: --task package.module:Class")
    if isinstance(carried.task, OwnTask):
        raise NotNamedError(carried.task.path)
    return _of_recipe(carried)


CHOICES = (
    f"choose one of {', '.join(ARENAS)}, or name your own as package.module:Class, or a recipe's file for the task in it"
)


def any_arena(task: Task, horizon: int) -> Arena:
    """Make an arena of any task. Grids of the baselines grow until no best rate lies at an edge.

    Args:
        task: Samples optimizees.
        horizon: Inner steps.

    Returns:
        The arena; its final loss is the mean of the last tenth.
    """
    return Arena(
        FirstProblem(task), ANY, UNTUNED, tuning=5, last=max(horizon // 10, 1), horizons=(horizon,), grids_grow=True
    )


def _of_recipe(recipe: Recipe) -> tuple[str, Arena]:
    task, horizon = recipe.task, recipe.validation.horizon
    longest = max(horizon) if isinstance(horizon, tuple) else horizon
    if isinstance(task, ImportedTask):
        return task.path, any_arena(task, longest)
    for field, parts in SPLITS.items():
        if (part := getattr(task, field, "")) in parts:
            task = msgspec.structs.replace(task, **{field: parts[part]})
    named = next((name for name, arena in ARENAS.items() if arena.task == task), None)
    if named:
        return named, ARENAS[named]
    return str(task.__struct_config__.tag), any_arena(task, longest)
