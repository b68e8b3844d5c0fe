"""A run directory: recipe, environment, metrics, cost, checkpoint, weights of one meta-training run, safe against any kill.

Everything is written to a temporary file and moved into place. A run that is killed at any moment and started again ends
with the same bits (same torch, same number of threads): the checkpoint holds the whole state, and metrics written after it
are dropped on resuming.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from learned_optim.weights import Weights, resolve_weights, write_weights
from meta_train.outer_loop import MetaTraining, OuterStep
from meta_train.parts import AnyRule, members
from meta_train.recipe import parse_recipe

RECIPE, ENVIRONMENT, METRICS, CHECKPOINT = "recipe.toml", "environment.json", "metrics.jsonl", "checkpoint.pt"
BEST, LAST = "best.safetensors", "last.safetensors"
COST = "cost.json"


def of_part(name: str, part: str) -> str:
    """Name the weight file of one part of a model; a rule that moves everything is the part ``""``."""
    return name.replace(".safetensors", f"-{part}.safetensors") if part else name


class RunDir:
    """Open or resume a run.

    Args:
        path: The directory; created if missing.
        recipe_text: TOML of the recipe. Comments may differ from those of a run that is resumed, values may not.
        data: Directory of real data, for tasks that need it.

    Raises:
        ValueError: If the directory holds a run of another recipe, or its files do not belong together.
    """

    def __init__(self, path: str | Path, recipe_text: str, data: Path | None = None) -> None:
        self.path = Path(path)
        recipe = parse_recipe(recipe_text)
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        kept = self.path / RECIPE
        self.recipe_text = kept.read_text() if kept.exists() else recipe_text
        if parse_recipe(self.recipe_text) != recipe:
            raise ValueError(f"{self.path} holds a run of another recipe; choose another --out or remove it")
        # The recipe comes last: where it stands, everything before it does too.
        if not (self.path / ENVIRONMENT).exists():
            write_atomically(self.path / ENVIRONMENT, (json.dumps(environment(), indent=2) + "\n").encode())
        if not kept.exists():
            write_atomically(kept, recipe_text.encode())
        self.run = MetaTraining(recipe, data=data)
        if (self.path / CHECKPOINT).exists():
            try:
                self.run.load_state_dict(torch.load(self.path / CHECKPOINT, weights_only=True))
            except KeyError as error:
                raise ValueError(
                    f"{self.path / CHECKPOINT} lacks {error}: another version of meta_train wrote it; "
                    "go on with that version, or begin again in another --out"
                ) from error
        self._validations = self._keep_metrics_up_to(self.run.step)
        self._clock = time.perf_counter()

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
                self._checkpoint()
            yield record
        if not (self.path / of_part(LAST, next(iter(members(self.run.rule))))).exists():
            self._checkpoint()

    @property
    def best_files(self) -> list[Path]:
        """Where the best weights are kept: one file, or one for each part of a model."""
        return [self.path / of_part(BEST, part) for part in members(self.run.rule)]

    def changes_since_start(self) -> list[str]:
        """List what differs from where this run was started and may change the last bits: torch, processor, threads."""
        before, now = json.loads((self.path / ENVIRONMENT).read_text()), environment()
        return [f"{k} {before[k]} -> {now[k]}" for k in ("torch", "processor", "threads") if before[k] != now[k]]

    def _write(self, file: str, rule: AnyRule, name: str, step: int, validation: float, final: float | None = None) -> None:
        """Write a rule of this run, or each of its parts, with recipe and provenance."""
        kept = json.loads((self.path / ENVIRONMENT).read_text())
        provenance = {"commit": kept["commit"], "torch": kept["torch"], "outer_steps": str(step)}
        provenance["validation"] = f"{validation:.6g}"
        if final is not None:
            provenance["final_validation"] = f"{final:.6g}"
        if start := self.run.recipe.start:
            provenance["start"] = resolve_weights(start).fingerprint
        for part, one in members(rule).items():
            about = {**provenance, "part": part} if part else provenance
            write_weights(self.path / of_part(file, part), Weights(one, name, self.recipe_text, about))

    def _checkpoint(self) -> None:
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
        write_atomically(self.path / CHECKPOINT, buffer.getvalue())

    def _add_cost(self) -> None:
        """Count the time since the last checkpoint, whatever it was spent on, and the most memory any process held."""
        now, path = time.perf_counter(), self.path / COST
        before = json.loads(path.read_text()) if path.exists() else {"minutes": 0.0, "peak_memory_mib": 0.0}
        minutes = round(before["minutes"] + (now - self._clock) / 60, 3)
        self._clock = now
        peak = max(before["peak_memory_mib"], round(peak_memory() / 2**20, 1))
        write_atomically(path, (json.dumps({"minutes": minutes, "peak_memory_mib": peak}) + "\n").encode())

    def _keep_metrics_up_to(self, step: int) -> list[dict[str, Any]]:
        """Drop what was recorded after the checkpoint; return the records that validated."""
        path = self.path / METRICS
        lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() else []
        if len(lines) < step:
            raise ValueError(
                f"{path} has {len(lines)} records, the checkpoint beside it {step} steps; restore or remove them"
            )
        write_atomically(path, "".join(lines).encode())
        return [record for record in map(json.loads, lines) if "validation" in record]

    def _remove_leftovers(self) -> None:
        """Remove temporary files of a process that was killed while it wrote."""
        for path in self.path.iterdir():
            if re.fullmatch(r"\..+\.\d+", path.name):
                path.unlink(missing_ok=True)


def training_table(runs: Iterable[str | Path], rows_per_run: int = 100) -> list[dict[str, str | int | float]]:
    """Summarise the metrics of runs as one small table.

    Args:
        runs: Run directories.
        rows_per_run: Each row is the mean meta-loss over as many outer steps as that takes, and any validation in them;
            imitation is left out.

    Returns:
        Rows with ``run``, ``outer_step``, ``meta_loss``, ``validation`` (empty where there was none) and ``measure``.

    Raises:
        ValueError: If a directory holds no run, or the runs measure different things.
    """
    rows: list[dict[str, str | int | float]] = []
    for path in map(Path, runs):
        if not (path / METRICS).exists() or not (path / RECIPE).exists():
            raise ValueError(f"{path} is no run directory: it holds no {RECIPE} and {METRICS}")
        recipe = parse_recipe((path / RECIPE).read_text())
        measure = "optimizee loss" if recipe.outer.objective == "mean" else "log(loss / initial loss)"
        if rows and rows[0]["measure"] != measure:
            raise ValueError(f"{path} measures {measure!r}, the runs before it {rows[0]['measure']!r}; draw them apart")
        records = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
        # While a teacher is imitated, the meta-loss is a distance from it.
        records = records[recipe.imitation.steps if recipe.imitation else 0 :]
        window = max(recipe.steps // rows_per_run, 1)
        for chunk in (records[start : start + window] for start in range(0, len(records), window)):
            meta_loss = sum(record["meta_loss"] for record in chunk) / len(chunk)
            validation = next((f"{r['validation']:.6g}" for r in reversed(chunk) if "validation" in r), "")
            row: dict[str, str | int | float] = {"run": path.name, "outer_step": chunk[-1]["step"]}
            rows.append({**row, "meta_loss": f"{meta_loss:.6g}", "validation": validation, "measure": measure})
    return rows


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader or a kill sees either the old one or the whole new one.

    Args:
        path: The file.
        data: Its new content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def peak_memory() -> int:
    """Return the most bytes that this process has held in memory at once; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def environment() -> dict[str, Any]:
    """Describe where a figure comes from: versions, processor, threads and commit; no names of machines or people.

    Returns:
        Plain values for JSON.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    vector = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{names[0] if names else 'unknown'}, {vector}"


_CODE = (":/", ":(exclude,top)docs/results")
"""Everything but the tables, which an evaluation that asks is busy writing."""


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *_CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _plain(record: OuterStep) -> dict[str, Any]:
    values = {name: value for name, value in vars(record).items() if value is not None}
    return values if record.validation is not None else {k: v for k, v in values.items() if k != "is_best"}
