"""Every figure that the tables of an evaluation, or the metrics of runs, can give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from meta_train.evidence import figures
from meta_train.judging.arena_report import size_table
from meta_train.provenance import read_environment
from meta_train.rows import is_learned, read_rows, write_rows
from meta_train.training.run_dir import training_table


def draw(results: Path, runs: Sequence[Path] = ()) -> Iterator[Path]:
    """Draw figures beside tables.

    Args:
        results: Directory written by ``evaluate``; created if missing where there are runs.
        runs: Run directories, whose metrics become ``training.csv``.

    Yields:
        Each file as soon as it is written.
    """
    training = results / "training.csv"
    if runs:
        rows = training_table(runs)
        results.mkdir(parents=True, exist_ok=True)
        write_rows(training, rows)
        yield training
    if training.exists():
        figures.training_process(read_rows(training), training.with_suffix(".svg"))
        yield training.with_suffix(".svg")
        if not (results / "curves.csv").exists():
            return
    yield from _of_curves(results)


def _of_curves(results: Path) -> Iterator[Path]:
    drawn, picture = _drawn(results), results / "curves.svg"
    if "task" in drawn[0]:
        figures.suite_curves(drawn, picture)
        yield picture
        return
    probe = read_rows(results / "probe.csv")
    about = {"task": "", "trained_to": None, **read_environment(results / "environment.json")}
    longest = max(int(row["inner_step"]) for row in drawn)
    trained_to = about["trained_to"] if about["trained_to"] and about["trained_to"] < longest else None
    figures.learning_curves(drawn, picture, trained_to=trained_to, title=about["task"])
    yield picture
    figures.update_probe(probe, results / "probe.svg")
    yield results / "probe.svg"
    yield from _of_variants(results)


def _drawn(results: Path) -> list[dict[str, str]]:
    """Read the curves that are drawn: of several weights the first, and the default."""
    rows = read_rows(results / "curves.csv")
    if "task" in rows[0]:
        return rows
    ours = list(dict.fromkeys(row["optimizer"] for row in rows if is_learned(row)))
    return [row for row in rows if row["optimizer"] not in ours[1:] or row["optimizer"] == figures.DEFAULT]


def _of_variants(results: Path) -> Iterator[Path]:
    """Draw what evaluations in subdirectories say of other optimizees; any below those go into the grid of sizes alone."""
    variants = [path.parent for path in sorted(results.glob("*/curves.csv"))]
    if not variants:
        return
    curves = {path.name: _drawn(path) for path in variants}
    grid = size_table(path.parent for path in sorted(results.rglob("curves.csv")))
    if grid:
        write_rows(results / "grid.csv", grid)
        yield results / "grid.csv"
    figures.variant_curves(curves, results / "variants.svg")
    yield results / "variants.svg"
    if grid:
        figures.size_grid(read_rows(results / "grid.csv"), results / "grid.svg")
        yield results / "grid.svg"
