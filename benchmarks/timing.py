"""What the benchmarks share: alternate the contestants, keep each one's fastest run, write a table with its environment."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from meta_train.evaluate import Rows, write_rows
from meta_train.run_dir import environment

HERE = Path(__file__).parent


def side_by_side(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the fastest time of each contestant in seconds; they take turns, so that a busy moment hits all alike."""
    fastest = dict.fromkeys(contestants, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if repeat:  # The first round warms up.
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest


def write_table(name: str, rows: Rows) -> None:
    """Write ``name.csv`` beside the benchmarks, every row with where it was measured."""
    where = {key: value for key, value in environment().items() if key in ("torch", "processor", "threads", "commit")}
    write_rows(HERE / f"{name}.csv", [{**row, **where} for row in rows])
