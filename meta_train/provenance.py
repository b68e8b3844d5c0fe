"""Where figures were made: versions, processor, threads and commit; no names of machines or people.

Finished runs are kept for later judgements, so each says where it was made: tables of kept runs must not claim them for the
code of another day.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

WHERE = ("torch", "processor", "commit")
"""What of an environment decides a figure, and stays with every finished run."""


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


@functools.cache
def here() -> dict[str, str]:
    """Return what stays with a finished run; asked once for each process, whose code does not change."""
    now = environment()
    return {name: now[name] for name in WHERE}


def elsewhere(finished: Iterable[Path]) -> list[dict[str, Any]]:
    """Tell where finished runs were made, if it was not all here.

    Args:
        finished: Their files, of a suite or of an arena.

    Returns:
        Each place with the number of its ``runs``, this one too; empty if there is no other. What files of an earlier
        version do not say is ``"unknown"``.
    """
    places = Counter(tuple(_origin(path).get(name, "unknown") for name in WHERE) for path in finished)
    if set(places) <= {tuple(here().values())}:
        return []
    return [{**dict(zip(WHERE, place, strict=True)), "runs": count} for place, count in sorted(places.items())]


def _origin(path: Path) -> Mapping[str, str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.metadata()
    kept = json.loads(path.read_text())
    return kept if isinstance(kept, dict) else {}


def read_environment(path: Path, *needed: str) -> dict[str, Any]:
    """Read an ``environment.json``.

    Args:
        path: The file.
        *needed: Keys it must have.

    Returns:
        What it says.

    Raises:
        ValueError: If it is no JSON object, or lacks a key.
    """
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; restore it") from error
    lacking = [key for key in needed if not isinstance(about, dict) or key not in about]
    if lacking or not isinstance(about, dict):
        raise ValueError(f"{path} does not say {', '.join(lacking) or 'anything'}; restore it")
    return about


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    vector = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{names[0] if names else 'unknown'}, {vector}"


_CODE = (
    ":/",
    ":(exclude,top)docs/results",
    ":(exclude,top)benchmarks/*.csv",
    ":(exclude,top)benchmarks/*.svg",
    ":(exclude,top)experiments/*.csv",
)
"""Everything but the tables and their figures, which an evaluation or a benchmark that asks is busy writing."""


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *_CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
