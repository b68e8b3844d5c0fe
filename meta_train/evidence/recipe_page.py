"""The reference of recipes, ``docs/recipe.md``, made from the classes that read them.

``python -m meta_train.evidence.recipe_page`` writes it, and a test compares.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from learned_optim.rules.adam_modulation import AdamModulationConfig
from learned_optim.rules.paper import PaperRuleConfig
from meta_train.files import write_atomically
from meta_train.tasks import OwnTask, TaskRecipe
from meta_train.tasks.held_out import HeldOut
from meta_train.training import recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"

HEAD = """\
# Recipe reference

A recipe is a TOML file that describes one meta-training run. This page is generated from the code that reads recipes, so
it is complete. [Your own task](own-task.md) shows a whole recipe and how to run it. A misspelt key is an error, which names
its place.
"""

TABLES = {
    "The top": recipe.Recipe,
    "`[inner]`": recipe.InnerLoop,
    "`[outer]`": recipe.OuterLoop,
    "`evolution`, in `[outer]` or a stage": recipe.Evolution,
    "`[validation]`": recipe.Validation,
    "`[imitation]`": recipe.Imitation,
    "`[[stages]]`": recipe.Stage,
}
RULES = {'`family = "adam-modulation"`': AdamModulationConfig, '`family = "paper"`': PaperRuleConfig}


def page() -> str:
    """Return the page.

    Returns:
        Markdown.
    """
    parts = [HEAD]
    for title, kind in TABLES.items():
        parts.append(_section(f"## {title}", kind, _struct_rows(kind)))
    parts.append("## `[rule]`\n\n`family`, and the options of its rule; or `base` and what differs from those weights.\n")
    for title, config in RULES.items():
        parts.append(_section(f"### {title}", config, _dataclass_rows(config)))
    parts.append(
        '## `[task]`\n\n`name`, and the options of the task. A task of your own is `name = "package.module:Class"`, and its '
        "options are the keyword arguments of the class.\n"
    )
    for task in (*typing.get_args(TaskRecipe), HeldOut):
        if task is not OwnTask:
            title = f'### `name = "{task.__struct_config__.tag}"`' + (", for validation alone" if task is HeldOut else "")
            parts.append(_section(title, task, _struct_rows(task)))
    return "\n".join(parts)


def _section(title: str, kind: type, rows: Iterator[tuple[str, str, str]]) -> str:
    text = inspect.cleandoc(kind.__doc__ or "")
    about, meanings = _plain(text.split("\n\nArgs:")[0]), _meanings(text)
    lines = [f"| `{name}` | {what} | {default} | {meanings[name]} |" for name, what, default in rows]
    head = ["| key | value | default | meaning |", "|---|---|---|---|"] if lines else []
    return "\n".join([title, "", about, "", *head, *lines, ""])


def _struct_rows(kind: Any) -> Iterator[tuple[str, str, str]]:
    for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
        default = "empty" if field.default is msgspec.NODEFAULT else _value(field.default)
        default = "required" if field.required else default
        yield field.encode_name, _kind(field.type), default


def _dataclass_rows(kind: Any) -> Iterator[tuple[str, str, str]]:
    words = {
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "str": "text",
        "tuple[float, ...]": "list of numbers",
    }
    for field in dataclasses.fields(kind):
        yield field.name, words.get(str(field.type), f"`{field.type}`"), _value(field.default)


def _kind(found: Any) -> str:
    """Say in words what a field takes."""
    inspect_ = msgspec.inspect
    if isinstance(found, (inspect_.IntType, inspect_.FloatType)):
        return ("integer" if isinstance(found, inspect_.IntType) else "number") + _bounds(found)
    if isinstance(found, inspect_.LiteralType):
        return " or ".join(_value(value) for value in found.values)
    if isinstance(found, inspect_.UnionType):
        kinds = [one for one in found.types if not isinstance(one, inspect_.NoneType)]
        return (
            "a task"
            if all(isinstance(one, inspect_.StructType) for one in kinds[1:]) and len(kinds) > 2
            else (" or ".join(dict.fromkeys(map(_kind, kinds))))
        )
    if isinstance(found, inspect_.TupleType):
        return f"list of {len(found.item_types)}, each {_kind(found.item_types[0])}"
    if isinstance(found, (inspect_.VarTupleType, inspect_.ListType)):
        return f"list, each {_kind(found.item_type)}"
    if isinstance(found, inspect_.StructType):
        return "a task" if found.tag else "table"
    return {"BoolType": "true or false", "StrType": "text", "DictType": "table"}.get(type(found).__name__, "any")


def _bounds(found: Any) -> str:
    """Say the bounds of a number, as far as they tell anything."""
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    named = [(word, getattr(found, key)) for key, word in words.items() if getattr(found, key) is not None]
    return "".join(f" {word} {value:g}" for word, value in named if abs(value) < 1e6)


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if value == () or value == {} or value == "":
        return "empty"
    text = msgspec.json.encode(value).decode()
    return f"`{text}`"


def _meanings(text: str) -> dict[str, str]:
    """Return what a Google docstring says of each argument."""
    if "\n\nArgs:\n" not in text:
        return {}
    body = text.split("\n\nArgs:\n")[1].split("\n\n")[0]
    found = re.split(r"(?m)^    (\w+): ", body)[1:]
    return {name: _plain(" ".join(meaning.split())) for name, meaning in zip(found[::2], found[1::2], strict=True)}


def _plain(text: str) -> str:
    """Turn roles and double backticks of docstrings into Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``([^`]*)``", r"`\1`", text).replace("|", "\\|")


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
