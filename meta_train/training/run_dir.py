"""A run directory: recipe, environment, metrics, cost, checkpoint, weights of one meta-training run, safe against any kill.

Everything is written to a temporary file and moved into place. A run that is killed at any moment and started again ends
with the same bits (same torch, same number of threads): the checkpoint holds the whole state, and metrics written after it
are dropped on resuming.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from learned_optim.weights import Weights, write_weights
from meta_train.files import lock, read_text, remove_leftovers, unlock, write_atomically
from meta_train.provenance import WHERE, environment, read_environment
from meta_train.tasks import Task
from meta_train.training.outer_loop import MetaTraining, OuterStep
from meta_train.training.parts import Parts
from meta_train.training.recipe import Recipe, parse_recipe
from meta_train.training.recipe_text import pinned
from meta_train.workers import Each

RECIPE, ENVIRONMENT, METRICS, CHECKPOINT = "recipe.toml", "environment.json", "metrics.jsonl", "checkpoint.pt"
BEST, LAST = "best.safetensors", "last.safetensors"
COST = "cost.json"

DIGEST_MARK = b"sha256:"
DIGEST_BYTES = len(DIGEST_MARK) + 32
"""What stands behind a checkpoint: a mark and the digest of all before it."""


def of_part(name: str, part: str) -> str:
    """Name the weight file of one part of a model; a rule that moves everything is the part ``""``."""
    return name.replace(".safetensors", f"-{part}.safetensors") if part else name


class RunDir:
    """Open or resume a run; as long as it lives no other process can.

    Args:
        path: The directory; created if missing.
        recipe_text: TOML of the recipe. To resume a run, comments may differ from its recipe, values may not.
        data: Directory of real data, for tasks that need it.
        each: Goes over episodes, as :class:`MetaTraining` says.
        task: Draw optimizees from here instead of from the recipe's task; the weights then say so. Without it, an own task
            that the recipe names is imported.

    Raises:
        ValueError: If another process has the run, or the directory holds one of another recipe, or its files cannot be
            read or do not belong together.
    """

    def __init__(
        self,
        path: str | Path,
        recipe_text: str,
        data: Path | None = None,
        each: Each = map,
        task: Task | None = None,
    ) -> None:
        self.path = Path(path)
        recipe_text = pinned(recipe_text) if parse_recipe(recipe_text).start else recipe_text
        self.path.mkdir(parents=True, exist_ok=True)
        lock(self.path)
        self._release = weakref.finalize(self, unlock, self.path)
        try:
            recipe = parse_recipe(recipe_text)
            self.run = MetaTraining(recipe if task else recipe.importing(recipe.own_tasks), task, data, each)
            self._keep_recipe(recipe, recipe_text)
            if (self.path / CHECKPOINT).exists():
                self._go_on_from(self.path / CHECKPOINT)
            self._validations = self._keep_metrics_up_to(self.run.step)
            self._clock = time.perf_counter()
        except BaseException:
            self._release()
            raise

    def _keep_recipe(self, recipe: Recipe, recipe_text: str) -> None:
        """Write recipe and environment, or compare them with the files of the run that is resumed."""
        kept = self.path / RECIPE
        self.recipe_text = read_text(kept) if kept.exists() else recipe_text
        if parse_recipe(pinned(self.recipe_text) if recipe.start else self.recipe_text) != recipe:
            raise ValueError(f"{self.path} holds a run of another recipe; choose another --out or remove it")
        # The recipe comes last: where it stands, everything before it does too.
        if not (self.path / ENVIRONMENT).exists():
            write_atomically(self.path / ENVIRONMENT, (json.dumps(self._environment(), indent=2) + "\n").encode())
        if not kept.exists():
            write_atomically(kept, recipe_text.encode())
        remove_leftovers(self.path, _is_own)
        read_environment(self.path / ENVIRONMENT, *WHERE, "threads")

    def _environment(self) -> dict[str, Any]:
        return environment() | self.run.provenance()

    def train(self, checkpoint_every: int = 100) -> Iterator[OuterStep]:
        """Run to the end of the recipe, keeping metrics, checkpoints and the best weights.

        Args:
            checkpoint_every: Outer steps between checkpoints.

        Yields:
            Every outer step, after it has been kept.
        """
        for record in self.run:
            with (self.path / METRICS).open("a") as metrics:
                metrics.write(json.dumps(_plain(record)) + "\n")
            if record.validation is not None:
                self._validations.append(_plain(record))
            if record.step % checkpoint_every == 0 or record.step == self.run.recipe.steps:
                self.checkpoint()
            yield record
        last = [self.path / of_part(LAST, part) for part in self.run.rule.names]
        best = self.best_files if math.isfinite(self.run.best.validation) else []
        if not all(map(_holds_something, [*last, *best])):  # Somebody removed or emptied one: the checkpoint has it.
            self.checkpoint()

    @property
    def best_files(self) -> list[Path]:
        """Where the best weights are kept: one file, or one for each part of a model."""
        return [self.path / of_part(BEST, part) for part in self.run.rule.names]

    def changes_since_start(self) -> list[str]:
        """List what differs from where this run was started and may change bits: torch, processor, threads, own code."""
        before, now = read_environment(self.path / ENVIRONMENT), self._environment()
        asked = [name for name in ("torch", "processor", "threads", "task", "task_code") if name in before | now]
        differs = [name for name in asked if before.get(name) != now.get(name)]
        return [f"{name} {before.get(name)} -> {now.get(name)}" for name in differs]

    def _write(self, file: str, rule: Parts, name: str, step: int, validation: float, final: float | None = None) -> None:
        """Write a rule of this run, or each of its parts, with recipe and provenance."""
        kept = read_environment(self.path / ENVIRONMENT)
        provenance = {"commit": kept["commit"], "torch": kept["torch"], "outer_steps": str(step)}
        provenance["validation"] = f"{validation:.6g}"
        if final is not None:
            provenance["final_validation"] = f"{final:.6g}"
        provenance |= self.run.provenance()
        for part, one in rule.items():
            about = {**provenance, "part": part} if part else provenance
            write_weights(self.path / of_part(file, part), Weights(one, name, self.recipe_text, about))

    def checkpoint(self) -> None:
        """Save the whole state, so that the run can resume from here, and the best weights."""
        # Weights first: if the run is killed in between, the older checkpoint makes them again.
        best = self.run.best
        if math.isfinite(best.validation):
            self._write(BEST, best.rule, "best", best.step, best.validation, best.final)
        if self.run.step == self.run.recipe.steps:
            validation = self._validations[-1]["validation"]
            self._write(LAST, self.run.in_use(self.run.average), "last", self.run.step, validation)
        self._add_cost()
        buffer = io.BytesIO()
        torch.save(self.run.state_dict(), buffer)
        with (self.path / METRICS).open("a") as metrics:
            os.fsync(metrics.fileno())
        data = buffer.getvalue()
        write_atomically(self.path / CHECKPOINT, data + DIGEST_MARK + hashlib.sha256(data).digest())

    def _add_cost(self) -> None:
        """Count the time since the last checkpoint, whatever it was spent on, and the most memory any process held."""
        now, path = time.perf_counter(), self.path / COST
        before = {"minutes": 0.0, "peak_memory_mib": 0.0} | costs(path)
        minutes = round(before["minutes"] + (now - self._clock) / 60, 3)
        self._clock = now
        peak = max(before["peak_memory_mib"], round(peak_memory() / 2**20, 1))
        write_atomically(path, (json.dumps({"minutes": minutes, "peak_memory_mib": peak}) + "\n").encode())

    def _go_on_from(self, checkpoint: Path) -> None:
        try:
            self.run.load_state_dict(read_checkpoint(checkpoint))
        except KeyError as error:
            raise ValueError(
                f"{checkpoint} lacks {error}: another version of meta_train wrote it; "
                "go on with that version, or begin again in another --out"
            ) from error

    def _keep_metrics_up_to(self, step: int) -> list[dict[str, Any]]:
        """Drop what was recorded after the checkpoint; return the records that validated."""
        path = self.path / METRICS
        lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() else []
        if len(lines) < step:
            raise ValueError(
                f"{path} has {len(lines)} records, the checkpoint beside it {step} steps; restore or remove them"
            )
        records = [_record(path, number, line) for number, line in enumerate(lines, 1)]
        write_atomically(path, "".join(lines).encode())
        return [record for record in records if "validation" in record]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state of a run.

    Args:
        path: Its checkpoint.

    Returns:
        The state, as it was written.

    Raises:
        ValueError: If the file is damaged or no checkpoint.
    """
    data = path.read_bytes()
    data, mark, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:-32], data[-32:]
    if mark != DIGEST_MARK:  # An earlier version wrote no digest.
        data += mark + digest
    elif hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path} is damaged: its digest is another; restore it, or remove it to begin again")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # Whatever the unpickler stumbles over: it promises no kind of error.
        raise ValueError(f"{path} cannot be read; restore it, or remove it to begin again") from error
    return state


def costs(path: Path) -> dict[str, float]:
    """Return what a run has cost so far, as far as its file says so: costs are not worth a lost run.

    Args:
        path: The file, which may be missing or damaged.

    Returns:
        ``minutes`` and ``peak_memory_mib``, or one of them, or neither.
    """
    try:
        found = json.loads(read_text(path))
        read = {name: found.get(name) for name in ("minutes", "peak_memory_mib")}
        numbers = {name: float(value) for name, value in read.items() if type(value) in (int, float)}
    except (OSError, ValueError, AttributeError, OverflowError, RecursionError):
        return {}
    return {name: value for name, value in numbers.items() if math.isfinite(value) and value >= 0}


def _holds_something(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _is_own(name: str) -> bool:
    """Return whether a run writes a file of this name."""
    weights = re.fullmatch(r"(best|last)(-[\w.]+)?\.safetensors", name)
    return weights is not None or name in (RECIPE, ENVIRONMENT, METRICS, CHECKPOINT, COST)


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    """Parse a line of metrics, whose outer step must be the number of the line."""
    try:
        record = json.loads(line)
        step = record["step"]
    except (ValueError, TypeError, KeyError):
        step = None
    if step != number:
        what = "no record" if step is None else f"that of outer step {step}"
        raise ValueError(f"line {number} of {path} is {what}: the file is not of this run alone; restore or remove it")
    return record


def training_table(runs: Iterable[str | Path], rows_per_run: int = 100) -> list[dict[str, str | int | float]]:
    """Summarise the metrics of runs as one small table.

    Args:
        runs: Run directories.
        rows_per_run: Each row covers ``steps / rows_per_run`` outer steps: their mean meta-loss and last validation.
            Imitation is left out.

    Returns:
        Rows with ``run``, ``outer_step``, ``meta_loss``, ``validation`` (empty where there was none) and ``measure``.

    Raises:
        ValueError: If a directory holds no run, or one without an outer step, or the runs measure different things.
    """
    rows: list[dict[str, str | int | float]] = []
    for path in map(Path, runs):
        if not (path / METRICS).exists() or not (path / RECIPE).exists():
            raise ValueError(f"{path} is no run directory: it holds no {RECIPE} and {METRICS}")
        recipe = parse_recipe(read_text(path / RECIPE))
        measure = "optimizee loss" if recipe.outer.objective == "mean" else "log(loss / initial loss)"
        if rows and rows[0]["measure"] != measure:
            raise ValueError(f"{path} measures {measure!r}, the runs before it {rows[0]['measure']!r}; draw them apart")
        lines = (path / METRICS).read_text().splitlines()
        records = [_record(path / METRICS, number, line) for number, line in enumerate(lines, 1)]
        # While a teacher is imitated, the meta-loss is a distance from it.
        records = records[recipe.imitation.steps if recipe.imitation else 0 :]
        if not records:
            raise ValueError(f"{path} has no outer step to draw yet; wait for its first")
        window = max(recipe.steps // rows_per_run, 1)
        for chunk in (records[start : start + window] for start in range(0, len(records), window)):
            meta_loss = sum(record["meta_loss"] for record in chunk) / len(chunk)
            validation = next((f"{r['validation']:.6g}" for r in reversed(chunk) if "validation" in r), "")
            row: dict[str, str | int | float] = {"run": path.name, "outer_step": chunk[-1]["step"]}
            rows.append({**row, "meta_loss": f"{meta_loss:.6g}", "validation": validation, "measure": measure})
    return rows


def peak_memory() -> int:
    """Return the most bytes that this process has held in memory at once; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def _plain(record: OuterStep) -> dict[str, Any]:
    values = {name: value for name, value in vars(record).items() if value is not None}
    return values if record.validation is not None else {k: v for k, v in values.items() if k != "is_best"}
