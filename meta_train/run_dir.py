"""A run directory: recipe, environment, metrics, checkpoint and weights of one meta-training run, safe against any kill.

Everything is written to a temporary file and moved into place. A run that is killed at any moment and started again ends
with the same bits: the checkpoint holds the whole state, and metrics written after it are dropped on resuming.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from learned_optim.rules import UpdateRule
from learned_optim.weights import Weights, write_weights
from meta_train.outer_loop import MetaTraining, OuterStep
from meta_train.recipe import parse_recipe

RECIPE, ENVIRONMENT, METRICS, CHECKPOINT = "recipe.toml", "environment.json", "metrics.jsonl", "checkpoint.pt"
BEST, LAST = "best.safetensors", "last.safetensors"


class RunDir:
    """Open or resume a run.

    Args:
        path: The directory; created if missing.
        recipe_text: TOML of the recipe.

    Raises:
        ValueError: If the directory holds a run of another recipe.
    """

    def __init__(self, path: str | Path, recipe_text: str) -> None:
        self.path = Path(path)
        self.recipe_text = recipe_text
        recipe = parse_recipe(recipe_text)
        self.path.mkdir(parents=True, exist_ok=True)
        kept = self.path / RECIPE
        if kept.exists() and kept.read_text() != recipe_text:
            raise ValueError(f"{self.path} holds a run of another recipe; choose another --out or remove it")
        if not kept.exists():
            write_atomically(kept, recipe_text.encode())
            write_atomically(self.path / ENVIRONMENT, (json.dumps(environment(), indent=2) + "\n").encode())
        self.run = MetaTraining(recipe)
        if (self.path / CHECKPOINT).exists():
            self.run.load_state_dict(torch.load(self.path / CHECKPOINT, weights_only=True))
        self._drop_metrics_after(self.run.step)

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
            if record.step % checkpoint_every == 0 or record.step == self.run.recipe.outer.steps:
                self._checkpoint()
            yield record
        if not (self.path / LAST).exists():
            self._checkpoint()

    def weights(self, rule: UpdateRule, name: str) -> Weights:
        """Wrap a rule of this run with its recipe and provenance.

        Args:
            rule: The rule.
            name: Its name.

        Returns:
            Weights ready to be written.
        """
        kept = json.loads((self.path / ENVIRONMENT).read_text())
        provenance = {"commit": kept["commit"], "torch": kept["torch"], "outer_steps": str(self.run.step)}
        return Weights(rule, name, self.recipe_text, {**provenance, "validation": f"{self.run.best_validation:.6g}"})

    def _checkpoint(self) -> None:
        # Weights first: if the run is killed in between, the older checkpoint makes them again.
        write_weights(self.path / BEST, self.weights(self.run.best, "best"))
        if self.run.step == self.run.recipe.outer.steps:
            write_weights(self.path / LAST, self.weights(self.run.average, "last"))
        temporary = self.path / f".{CHECKPOINT}.{os.getpid()}"
        torch.save(self.run.state_dict(), temporary)
        temporary.replace(self.path / CHECKPOINT)

    def _drop_metrics_after(self, step: int) -> None:
        path = self.path / METRICS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        write_atomically(path, "".join(lines[:step]).encode())


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


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _plain(record: OuterStep) -> dict[str, Any]:
    values = {name: value for name, value in vars(record).items() if value is not None}
    return values if record.validation is not None else {k: v for k, v in values.items() if k != "is_best"}
