"""What was measured of weights, as Markdown: the tables of every evaluation that knows their fingerprint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from learned_optim.weights import Weights
from meta_train.judging.arenas import ARENAS
from meta_train.rows import LEARNED, read_rows

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def evidence(weights: Weights, results: str | Path = RESULTS) -> str:
    """Collect the results of weights, for their model card.

    Weights are known by their fingerprint, not by their name: the tables of other weights of that name are left out.

    Args:
        weights: What was evaluated.
        results: A directory that ``python -m meta_train evaluate`` wrote, or one of such directories.

    Returns:
        Markdown, one section for each evaluation; empty if there is none.
    """
    sections = []
    for place, label, about in _evaluations(weights, results):
        name, rows = f"{LEARNED} ({label})", read_rows(place / "summary.csv")
        section = _of_suite(name, rows, about) if "suite" in about else _of_task(name, rows, about)
        picture = f"\n\n![Loss over inner steps, learned and tuned by hand]({_picture(place)})"
        sections.append(section + (picture if (place / "curves.svg").exists() else ""))
    return "\n\n".join(sections)


def evidence_figures(weights: Weights, results: str | Path = RESULTS) -> dict[str, bytes]:
    """Collect the figures that :func:`evidence` shows.

    Args:
        weights: What was evaluated.
        results: As for :func:`evidence`.

    Returns:
        Each picture by the name that the Markdown has for it.
    """
    places = [place for place, _, _ in _evaluations(weights, results)]
    return {_picture(place): (place / "curves.svg").read_bytes() for place in places if (place / "curves.svg").exists()}


def _picture(place: Path) -> str:
    return f"{place.resolve().name}.svg"


def _evaluations(weights: Weights, results: str | Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Find the evaluations of weights: each folder, the name that its tables have for them, and its environment."""
    for path in sorted([*Path(results).glob("environment.json"), *Path(results).glob("*/environment.json")]):
        about = json.loads(path.read_text())
        for label, fingerprint in about.get("fingerprints", {}).items():
            if weights.fingerprint in fingerprint.split("+") and {"suite", "task"} & set(about):
                yield path.parent, label, about


def comparison(rows: Sequence[Mapping[str, str]], last: int = 1) -> list[str]:
    """Set optimizers against each other on one task, each row an optimizer, each column a criterion at a horizon.

    Args:
        rows: Of ``summary.csv``.
        last: How many steps a final loss is the mean of.

    Returns:
        Lines of a Markdown table, learned optimizers first.
    """
    final = "loss at step {}" if last == 1 else f"mean of the last {last} of {{}} losses"
    heads = {"sum": "sum of {} losses", "final": final}
    cells = {(row["optimizer"], row["criterion"], row["horizon"]): row for row in rows}
    horizons = sorted({row["horizon"] for row in rows}, key=int)
    measured = {(criterion, horizon) for _, criterion, horizon in cells}
    columns = [column for horizon in horizons for criterion in heads if (column := (criterion, horizon)) in measured]
    names = sorted({row["optimizer"] for row in rows}, key=lambda name: (not name.startswith(LEARNED), name))
    head = _line("", *(heads[criterion].format(horizon) for criterion, horizon in columns))
    lines = [head, "|---" * (len(columns) + 1) + "|"]
    for name in names:
        shown = [cell(cells[name, criterion, horizon]) for criterion, horizon in columns]
        label = f"**{name}**, not tuned" if name.startswith(LEARNED) else f"{name}, tuned for each column"
        lines.append(_line(label, *shown))
    return lines


def where(about: Mapping[str, Any]) -> str:
    """Say where an evaluation was made.

    Args:
        about: Its ``environment.json``.

    Returns:
        A part of a sentence.
    """
    return f"{about['processor']}, torch {about['torch']}, commit {about['commit']}"


def _of_task(name: str, rows: Sequence[Mapping[str, str]], about: Mapping[str, Any]) -> str:
    shown = [row for row in rows if row["optimizer"] == name or not row["optimizer"].startswith(LEARNED)]
    count, horizon = shown[0]["n"], about["trained_to"]
    note = (
        f"Mean ± standard error over n = {count} fresh samples of the task; in brackets the ratio to the best baseline of "
        f"the column. Baselines are tuned on other samples.{f' Meta-trained to {horizon:,} steps.' if horizon else ''}"
    )
    return _section(about["task"], comparison(shown, about.get("last") or ARENAS[about["task"]].last), note, about)


def _of_suite(name: str, rows: Sequence[Mapping[str, str]], about: Mapping[str, Any]) -> str:
    lines = [_line("steps", "against", "final loss, ratio", "wins", "worst ratio"), "|---" * 5 + "|"]
    for row in rows:
        if row["rule"] == name:
            wins, worst = f"{row['wins']} of {row['tasks']}", f"{row['worst']} ({row['worst_task']})"
            lines.append(_line(row["horizon"], row["against"], f"{float(row['ratio']):.2f} x", wins, worst))
    note = "Geometric means over the tasks of the suite, the rule as it is; below 1 it is better than the baseline."
    return _section(f"suite {about['suite']}", lines, note, about)


def _section(title: str, lines: Sequence[str], note: str, about: Mapping[str, Any]) -> str:
    return "\n".join([f"### {title}", "", *lines, "", f"{note} {where(about)}. Command: `{about['command']}`."])


def cell(row: Mapping[str, str]) -> str:
    """Return a mean with its standard error, and the ratio to the best baseline where there is one."""
    shown = f"{float(row['mean']):.3g} ± {float(row['standard_error']):.2g}"
    return f"{shown} ({float(ratio):.2f} x)" if (ratio := row["ratio_to_best_baseline"]) else shown


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def read_evaluation(results: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Read the summary of an evaluation, and where it was made."""
    return read_rows(results / "summary.csv"), json.loads((results / "environment.json").read_text())
