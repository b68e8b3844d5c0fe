"""What recording and guarding cost: 100 steps with and without a Recorder that samples one of them, and with guard=True.

python -m benchmarks.recorder [--coordinates N]
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.timing import side_by_side, write_table
from learned_optim import LearnedOptimizer, Recorder

STEPS = 100


def run_of(weights: str, coordinates: int, recorded: bool, guard: bool = False) -> Callable[[], object]:
    """Return a function that takes the steps."""
    param = nn.Parameter(torch.randn(coordinates))
    param.grad = torch.randn(coordinates)
    optimizer = LearnedOptimizer([param], weights=weights, guard=guard)
    if recorded:
        Recorder(optimizer, every=STEPS)

    def run() -> None:
        for _ in range(STEPS):
            optimizer.step()

    return run


def main() -> None:
    """Time both side by side and print what is added to the optimizer's own time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinates", type=int, nargs="+", default=[100, 10_000, 200_000])
    rows = []
    for count in parser.parse_args().coordinates:
        for weights in ("default", "quadratic"):
            contestants = {
                "plain": run_of(weights, count, recorded=False),
                "recorder, every=100": run_of(weights, count, recorded=True),
                "guard": run_of(weights, count, recorded=False, guard=True),
            }
            seconds = side_by_side(contestants, repeats=3 if count > 50_000 else 8)
            for name in ("recorder, every=100", "guard"):
                added = 100 * (seconds[name] / seconds["plain"] - 1)
                print(f"{weights:<12}{count:>10,} coordinates  {name:<22}{added:>6.1f} % added to a step")
                rows.append({"contestant": name, "weights": weights, "coordinates": count, "percent_added": round(added, 1)})
    write_table("recorder", rows)


if __name__ == "__main__":
    main()
