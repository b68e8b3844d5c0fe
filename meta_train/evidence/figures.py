"""Figures from tables. The same table gives the same bytes; nothing here knows torch."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from meta_train.files import write_atomically

COLOURS = {
    "LSTM": "#D55E00",
    "Adam": "#0072B2",
    "RMSprop": "#009E73",
    "NAG": "#CC79A7",
    "SGD": "#7F7F7F",
    "AdamW+cosine": "#56B4E9",
    "Muon": "#332288",
    "Muon+cosine": "#9970AB",
    "ScheduleFree": "#E69F00",
    "L-BFGS": "#F0E442",
}
"""By optimizer, most of them from Okabe and Ito."""

IN_SUITES = ("LSTM", "Adam", "AdamW+cosine", "Muon", "Muon+cosine", "ScheduleFree")
"""What panels of a suite show; more lines hide each other."""

DEFAULT = "LSTM (default)"
"""The default rule, drawn beside the one that was meta-trained on the task."""

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


class PlainNumbers(LogFormatter):
    """Writes 0.2 on a logarithmic axis, not 2 times a power of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick; empty where ticks are too close to name each."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def learning_curves(rows: Sequence[dict[str, str]], path: Path, *, trained_to: int | None, title: str = "") -> None:
    """Draw mean loss against inner step, in the manner of the paper's Figure 4: learned solid, baselines dashed.

    Args:
        rows: ``curves.csv``; the band is one standard error.
        path: The picture; its ending decides the format.
        trained_to: Horizon in meta-training, marked by a vertical rule; None if it is unknown or lies beyond the curves.
        title: Above the axes.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        _draw_curves(axes, rows)
        if trained_to is not None:
            axes.axvline(trained_to, color="black", lw=0.8, ls=":")
            axes.annotate(
                "meta-trained to here",
                (trained_to, 0.97),
                (-4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
            )
        axes.set(yscale="log", xlabel="inner step", ylabel="optimizee loss", title=title)
        axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93))
        _save(figure, path)


def _draw_curves(axes: Any, rows: Sequence[dict[str, str]]) -> None:
    """Draw one line with its band for each optimizer of ``curves.csv``."""
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        of_name = [row for row in rows if row["optimizer"] == name]
        steps, mean, error = _columns(of_name, "inner_step", "mean", "standard_error")
        learned, default = name.startswith("LSTM"), name == DEFAULT and name != rows[0]["optimizer"]
        colour = "black" if default else COLOURS[name.split(" ")[0]]
        label = "LSTM (learned)" if learned else f"{name} ({of_name[0]['setting'].replace(' momentum', ', momentum')})"
        label = "default, not trained on this task" if default else label
        axes.plot(steps, mean, color=colour, lw=2.6 if learned else 1.4, ls="-" if learned else "--", label=label)
        low = [m - e for m, e in zip(mean, error, strict=True)]
        high = [m + e for m, e in zip(mean, error, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)


def variant_curves(variants: Mapping[str, Sequence[dict[str, str]]], path: Path) -> None:
    """Draw learning curves on variants of a task side by side, in the manner of the paper's Figure 5.

    Args:
        variants: ``curves.csv`` of each, by name.
        path: The picture.
    """
    columns = min(len(variants), 4)
    lines = -(-len(variants) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 3.6 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, (name, rows) in zip(panels, variants.items(), strict=False):
            _draw_curves(axes, rows)
            axes.set(yscale="log", title=name)
            axes.legend(fontsize=7)
        for axes in panels[len(variants) :]:
            axes.axis("off")
        figure.supxlabel("inner step")
        figure.supylabel("optimizee loss")
        _save(figure, path)


def size_grid(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draw final loss against hidden units, a panel for each number of layers, in the manner of the paper's Figure 6.

    Optimizers that were not judged on every size are left out.

    Args:
        rows: ``grid.csv``.
        path: The picture.
    """
    depths = sorted({int(row["layers"]) for row in rows})
    judged = Counter(row["optimizer"] for row in rows)
    rows = [row for row in rows if judged[row["optimizer"]] == max(judged.values())]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(depths), 3.4), layout="constrained")
        panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
        for axes, depth in zip(panels, depths, strict=True):
            of_depth = sorted((row for row in rows if int(row["layers"]) == depth), key=lambda row: int(row["units"]))
            for name in dict.fromkeys(row["optimizer"] for row in of_depth):
                units, mean, error = _columns(
                    [r for r in of_depth if r["optimizer"] == name], "units", "mean", "standard_error"
                )
                learned = name.startswith("LSTM")
                colour = "black" if name == DEFAULT else COLOURS[name.split(" ")[0]]
                axes.errorbar(units, mean, error, color=colour, ls="-" if learned else "--", marker="o", ms=4, label=name)
            axes.set(xscale="log", yscale="log", xlabel="hidden units", title=f"{depth} hidden layer" + "s" * (depth > 1))
            axes.set_xticks(units, [f"{value:g}" for value in units])
            axes.set_xticks([], minor=True)
        panels[0].set(ylabel="loss at the first horizon")
        panels[-1].legend(fontsize=8)
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


def rule_responses(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draw what a rule learned, in three panels.

    Args:
        rows: ``responses.csv``.
        path: The picture.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        size, momentum, correlation = figure.subplots(1, 3)
        of_size = [row for row in rows if row["response"] == "step size"]
        for index, series in enumerate(dict.fromkeys(row["series"] for row in of_size)):
            shade = mpl.colormaps["viridis"](0.9 - 0.2 * index)
            chosen = [row for row in of_size if row["series"] == series]
            size.plot(*_columns(chosen, "x", "learned"), color=shade, label=f"{series}")
        size.legend(title="signal / noise", fontsize=8)
        size.set(xscale="log", yscale="log", xlabel="inner step", ylabel="step size, relative to Adam's")
        for axes, response in ((momentum, "momentum"), (correlation, "correlation")):
            chosen = [row for row in rows if row["response"] == response]
            for series, label, style in (("learned", "LSTM", "-"), ("adam", "Adam", "--")):
                axes.plot(*_columns(chosen, "x", series), style, color=COLOURS[label], lw=1.8, label=label)
            axes.legend()
        momentum.set(xlabel="steps since a gradient", ylabel="its share of the update")
        correlation.set(xlabel="correlation of successive gradients", ylabel="step size, relative to Adam's", yscale="log")
        _save(figure, path)


def training_process(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draw meta-loss and validation figure over outer steps.

    Args:
        rows: ``training.csv``.
        path: The picture.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(dict.fromkeys(row["run"] for row in rows)):
            colour = list(COLOURS.values())[index % len(COLOURS)]
            of_name = [row for row in rows if row["run"] == name]
            axes.plot(*_columns(of_name, "outer_step", "meta_loss"), color=colour, alpha=0.4)
            validated = [row for row in of_name if row["validation"]]
            axes.plot(*_columns(validated, "outer_step", "validation"), "o-", ms=3, color=colour, label=name)
        measure = rows[0]["measure"]
        axes.set(xlabel="outer step", ylabel=measure, yscale="linear" if measure.startswith("log") else "log")
        axes.legend(title="validation (dots), training (line)")
        _save(figure, path)


def _columns(rows: Sequence[dict[str, str]], *names: str) -> list[list[float]]:
    return [[float(row[name]) for row in rows] for name in names]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), metadata=metadata, dpi=160)
    write_atomically(path, picture.getvalue())


def suite_curves(rows: Sequence[dict[str, str]], path: Path, columns: int = 4) -> None:
    """Draw training loss against inner step for every task of a suite: learned solid, tuned dashed, untuned dotted.

    Args:
        rows: ``curves.csv`` of a suite; of its optimizers those of ``IN_SUITES`` are drawn.
        path: The picture.
        columns: Panels side by side.
    """
    rows = [row for row in rows if _without_rate(row["optimizer"]) in IN_SUITES]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = -(-len(tasks) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * columns, 2.3 * lines + 0.5), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        for axes, task in zip(panels, tasks, strict=False):
            of_task = [row for row in rows if row["task"] == task]
            for name in dict.fromkeys(row["optimizer"] for row in of_task):
                of_name = [row for row in of_task if row["optimizer"] == name]
                learned = name.startswith("LSTM")
                (handles[name],) = axes.plot(
                    *_columns(of_name, "inner_step", "loss"),
                    color=COLOURS[_without_rate(name)],
                    lw=2.2 if learned else 1.2,
                    ls="-" if learned else ":" if "(" in name else "--",
                )
            axes.set(xscale="log", yscale="log", title=task)
            axes.title.set_fontsize(9)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(PlainNumbers(labelOnlyBase=False))
                axis.set_minor_formatter(PlainNumbers(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
        for axes in panels[len(tasks) :]:
            axes.axis("off")
        figure.supxlabel("inner step")
        figure.supylabel("training loss")
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 5))
        _save(figure, path)


def _without_rate(name: str) -> str:
    """Return an optimizer's name without its rate in brackets, or how it was found."""
    return name.split(",")[0].split("(")[0].strip()
