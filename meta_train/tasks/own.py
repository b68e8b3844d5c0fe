"""Tasks of a user's own code, which a recipe names ``package.module:Class``."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from meta_train.tasks.task import Optimizee, Task, with_data

OWN = "own"
"""Tag of an own task in a converted recipe; in TOML its ``name`` is the path itself."""


class OwnTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag=OWN):
    """A task of a user's own code, which has not been imported.

    Reading a recipe makes one of these. It cannot be sampled: a recipe may come from a weight file, and no weight file may
    make code run. :meth:`imported` imports it; call that only where the user named the task or gave the recipe file.

    Args:
        path: ``"package.module:Class"``.
        options: Keyword arguments of the class.
    """

    path: str
    options: dict[str, Any] = {}

    def imported(self) -> ImportedTask:
        """Import the module and call the class with the options.

        Returns:
            The task, under the name by which the recipe calls it.

        Raises:
            ValueError: If the module cannot be imported or has no such class, the class refuses the options, or the result
                has no ``sample``.
        """
        make, code = _class_of(self.path)
        try:
            task = make(**self.options)
        except TypeError as error:
            takes = ", ".join(inspect.signature(make).parameters) or "none"
            raise ValueError(f"the task {self.path} does not take its options: {error}; it takes {takes}") from error
        if not callable(getattr(task, "sample", None)):
            raise ValueError(f"{self.path} is no task: it needs a method sample(seed) that returns an Optimizee")
        return ImportedTask(self.path, self.options, code, task)

    def sample(self, seed: int) -> NoReturn:
        """Refuse: nothing has been imported.

        Args:
            seed: Seed of any optimizee.

        Raises:
            NotNamedError: Always.
        """
        raise NotNamedError(self.path)


class NotNamedError(ValueError):
    """Only a weight file names the user's own task, so the task is not imported.

    Args:
        path: ``"package.module:Class"``.
    """

    def __init__(self, path: str) -> None:
        super().__init__(
            f"the task is {path}, code of its maker's own, and nothing is imported because a weight file names it; "
            f"if you have that code and trust it, say --task {path}, or --task RECIPE.toml with its options"
        )


@dataclass(frozen=True)
class ImportedTask:
    """A task of a user's own code, ready to be sampled. Its ``repr`` says all that decides it.

    Args:
        path: ``"package.module:Class"``.
        options: Keyword arguments of the class.
        code: Digest of the module's source: finished runs do not serve changed code.
        task: The user's object.
        data: Whether the task has a directory of real data.
    """

    path: str
    options: dict[str, Any]
    code: str
    task: Task = field(repr=False, compare=False)
    data: bool = False

    def sample(self, seed: int) -> Optimizee:
        """Return the optimizee of a seed.

        Args:
            seed: Decides everything random.

        Returns:
            The optimizee that the user's task returns.

        Raises:
            ValueError: If the user's task returns anything else.
        """
        optimizee = self.task.sample(seed)
        if not isinstance(optimizee, Optimizee):
            raise ValueError(f"{self.path}.sample returned {type(optimizee).__name__}, not an Optimizee (module_optimizee)")
        return optimizee

    def on(self, data: Path) -> ImportedTask:
        """Return the task with the data of a directory, where it has a method ``on`` that takes one."""
        opened = with_data(self.task, data)
        return self if opened is self.task else replace(self, task=opened, data=True)


def is_path(name: object) -> bool:
    """Return whether a task's name is the path of a user's own task."""
    return isinstance(name, str) and ":" in name


@functools.cache
def _class_of(path: str) -> tuple[Callable[..., Any], str]:
    """Import what a path names, and digest its module's source."""
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ValueError(f"{path!r} names no task; write it as package.module:Class")
    if not {"", os.getcwd()} & set(sys.path):  # A script, unlike `python -m`, does not search the current directory.
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # The user's code may raise anything.
        raise ValueError(
            f"the task {path} cannot be imported: {type(error).__name__}: {error}; "
            "start from the directory that holds its package, or put that on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and hasattr(value, "sample")]
        raise ValueError(f"{module_name} has no class {name}; its tasks are {', '.join(classes) or 'none'}")
    file = getattr(module, "__file__", None)
    return found, hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""
