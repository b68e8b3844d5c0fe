"""The names of tasks in a recipe: names of tasks of this package, and paths of a user's own tasks."""

from __future__ import annotations

import typing
from typing import Any

from meta_train.tasks import TaskRecipe
from meta_train.tasks.held_out import HeldOut
from meta_train.tasks.own import OWN, is_path

NAMES = tuple(sorted(str(task.__struct_config__.tag) for task in typing.get_args(TaskRecipe)))
"""Tags of the tasks that a recipe can name; the tag of an own task is not one of the names."""


def with_task_names(values: dict[str, Any]) -> dict[str, Any]:
    """Put own tasks into the form of all others: a known name beside options.

    Args:
        values: The recipe, as TOML gives it.

    Returns:
        The recipe, in which the ``name = "package.module:Class"`` of a task and its options are an
        :class:`~meta_train.tasks.own.OwnTask`.

    Raises:
        ValueError: If a task has an unknown name; the message lists the valid ones.
    """
    changed = dict(values)
    if isinstance(task := values.get("task"), dict):
        changed["task"] = _named(task, "$.task", NAMES)
    validation = values.get("validation")
    if isinstance(validation, dict) and isinstance(task := validation.get("task"), dict):
        names = (*NAMES, str(HeldOut.__struct_config__.tag))
        changed["validation"] = {**validation, "task": _named(task, "$.validation.task", names)}
    return changed


def _named(task: dict[str, Any], place: str, names: tuple[str, ...]) -> dict[str, Any]:
    name = task.get("name")
    if is_path(name):
        return {"name": OWN, "path": name, "options": {key: value for key, value in task.items() if key != "name"}}
    valid = [one for one in names if one != OWN]
    if "name" in task and name not in valid:
        raise ValueError(
            f"the recipe does not fit: Invalid value {name!r} - at `{place}.name`; a task is one of {', '.join(valid)}, "
            "or one of your own as package.module:Class"
        )
    return task
