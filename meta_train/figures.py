"""Figures from tables. The same table gives the same bytes; nothing here knows torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "LSTM": "#D55E00",
    "Adam": "#0072B2",
    "RMSprop": "#009E73",
    "NAG": "#CC79A7",
    "SGD": "#7F7F7F",
}
"""Okabe-Ito, by optimizer."""

STYLE: Any = {
    "svg.hashsalt": "learned-optim",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def learning_curves(rows: Sequence[dict[str, str]], path: Path, *, trained_to: int, title: str = "") -> None:
    """Draw mean loss against inner step, in the manner of the paper's Figure 4: learned solid, baselines dashed.

    Args:
        rows: ``curves.csv``; the band is one standard error.
        path: The picture; its ending decides the format.
        trained_to: Horizon in meta-training, marked by a vertical rule.
        title: Above the axes.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(row["optimizer"] for row in rows):
            of_name = [row for row in rows if row["optimizer"] == name]
            steps, mean, error = (
                [float(row[column]) for row in of_name] for column in ("inner_step", "mean", "standard_error")
            )
            learned = name.startswith("LSTM")
            colour = COLOURS[name.split(" ")[0]]
            label = "LSTM (learned)" if learned else f"{name} ({of_name[0]['setting'].replace(' momentum', ', momentum')})"
            axes.plot(steps, mean, color=colour, lw=2.6 if learned else 1.4, ls="-" if learned else "--", label=label)
            low = [m - e for m, e in zip(mean, error, strict=True)]
            high = [m + e for m, e in zip(mean, error, strict=True)]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        axes.axvline(trained_to, color="black", lw=0.8, ls=":")
        axes.annotate("meta-trained to here", (trained_to, 0.97), (-4, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="right", va="top", fontsize=8)  # fmt: skip
        axes.set(yscale="log", xlabel="inner step", ylabel="optimizee loss", title=title)
        axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93))
        _save(figure, path)


def update_probe(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draw what the rule does with simple gradients over time, beside Adam.

    Args:
        rows: ``probe.csv``.
        path: The picture.
    """
    names = list(dict.fromkeys(row["gradient"] for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        grid = figure.subplots(2, len(names), sharex=True, squeeze=False, height_ratios=(1, 2))
        for column, name in enumerate(names):
            of_name = [row for row in rows if row["gradient"] == name]
            steps = [int(row["inner_step"]) for row in of_name]
            above, below = grid[0][column], grid[1][column]
            above.plot(steps, [float(row["value"]) for row in of_name], color="black", lw=1)
            above.set(title=f"{name} gradient")
            for series, label, style in (("learned", "LSTM", "-"), ("adam", "Adam", "--")):
                values = [float(row[series]) for row in of_name]
                below.plot(steps, values, style, color=COLOURS[label], lw=1.8, label=label)
            below.axhline(0, color="black", lw=0.6)
            below.set(xlabel="inner step")
        grid[0][0].set(ylabel="gradient")
        grid[1][0].set(ylabel="update")
        grid[1][0].legend()
        _save(figure, path)


def training_process(runs: Mapping[str, Sequence[dict[str, float]]], path: Path, *, label: str) -> None:
    """Draw meta-loss and validation figure over outer steps.

    Args:
        runs: By name: the records of ``metrics.jsonl``.
        path: The picture.
        label: What the figures measure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for index, (name, records) in enumerate(runs.items()):
            colour = list(COLOURS.values())[index % len(COLOURS)]
            window = max(len(records) // 60, 1)
            chunks = [records[i : i + window] for i in range(0, len(records), window)]
            steps = [chunk[-1]["step"] for chunk in chunks]
            axes.plot(steps, [sum(r["meta_loss"] for r in chunk) / len(chunk) for chunk in chunks], color=colour, alpha=0.4)
            validated = [record for record in records if "validation" in record]
            axes.plot(*_columns(validated, "step", "validation"), "o-", ms=3, color=colour, label=name)
        _scale(axes, label)
        axes.set(xlabel="outer step", ylabel=label)
        axes.legend(title="validation (dots), training (line)")
        _save(figure, path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the records of a run.

    Args:
        path: ``metrics.jsonl``.

    Returns:
        One dict an outer step.
    """
    return [json.loads(line) for line in path.read_text().splitlines()]


def _columns(records: Sequence[dict[str, float]], *names: str) -> list[list[float]]:
    return [[record[name] for record in records] for name in names]


def _scale(axes: Axes, label: str) -> None:
    if not label.startswith("log"):
        axes.set_yscale("log")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, metadata=metadata, dpi=160)
