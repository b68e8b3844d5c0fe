"""Tables, and the files they are kept in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from meta_train.files import write_atomically
from meta_train.provenance import environment

Row = dict[str, str | int | float]
Rows = list[Row]

LEARNED = "LSTM"
"""How tables call a learned rule, before its name."""


def is_learned(row: Mapping[str, Any], column: str = "optimizer") -> bool:
    """Return whether a row is of a learned rule.

    Tables have no column for it, because the committed ones stay as they are: a learned rule is labelled ``LSTM (name)``,
    and no baseline is called so.

    Args:
        row: Of any table.
        column: The column of labels.

    Returns:
        True for a learned rule.
    """
    return str(row[column]).startswith(f"{LEARNED} (")


def rounded(value: Tensor | float, digits: int = 6) -> float:
    """Return a number to some significant digits, as tables have it."""
    return float(f"{float(value):.{digits}g}")


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as CSV, atomically.

    Args:
        path: The file.
        rows: At least one; all with the same columns.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV written by :func:`write_rows`.

    Args:
        path: The file.

    Returns:
        One dict a row, every value a string.
    """
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_judgement(judgement: object, out: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write the tables of a judgement and where they were made.

    Args:
        judgement: A dataclass whose every field is a table, such as :class:`~meta_train.judging.arena_report.Judgement`.
        out: Directory; created if missing.
        about: Anything else that a reader needs to make them again, for ``environment.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in vars(judgement).items():
        if rows:
            write_rows(out / f"{name}.csv", rows)
    write_atomically(out / "environment.json", (json.dumps({**environment(), **(about or {})}, indent=2) + "\n").encode())
