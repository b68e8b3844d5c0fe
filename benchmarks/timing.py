"""What the benchmarks share: alternate the contestants, keep each one's fastest run, write a table with its environment."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from meta_train.provenance import environment
from meta_train.rows import Rows, write_rows

HERE = Path(__file__).parent
_SHORTEST = 2e-3  # Seconds; what takes less is called several times, so that the clock does not tell.


def side_by_side(
    contestants: Mapping[str, Callable[[], object]], repeats: int, before: Callable[[], object] | None = None
) -> dict[str, float]:
    """Return the fastest time of each contestant in seconds; they take turns, so that a busy moment hits all alike.

    Args:
        contestants: What to time, by name.
        repeats: Turns.
        before: Called before each turn and not timed; a turn is one call then.

    Returns:
        Seconds a call, by name.
    """
    fastest = dict.fromkeys(contestants, float("inf"))
    calls = {name: 1 if before else _calls_worth_timing(run) for name, run in contestants.items()}
    for _ in range(repeats):
        for name, run in contestants.items():
            if before:
                before()
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            fastest[name] = min(fastest[name], (time.perf_counter() - start) / calls[name])
    return fastest


def _calls_worth_timing(run: Callable[[], object]) -> int:
    run()  # The first call warms up.
    start = time.perf_counter()
    run()
    return max(1, round(_SHORTEST / (time.perf_counter() - start)))


def write_table(name: str, rows: Rows, folder: Path = HERE) -> None:
    """Write ``name.csv``, by default beside the benchmarks, every row with where it was measured."""
    where = {key: value for key, value in environment().items() if key in ("torch", "processor", "threads", "commit")}
    write_rows(folder / f"{name}.csv", [{**row, **where} for row in rows])
