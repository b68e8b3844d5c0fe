"""What recording and guarding cost: 100 steps with and without a Recorder that samples one of them, and with guard=True.

python -m benchmarks.recorder
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.timing import side_by_side, write_table
from learned_optim import LearnedOptimizer, Recorder

STEPS = 100


def run_of(weights: str, shapes: list[int], recorded: bool = False, guard: bool = False) -> Callable[[], object]:
    """Return a function that takes the steps."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = LearnedOptimizer(params, weights=weights, guard=guard)
    if recorded:
        Recorder(optimizer, every=STEPS)

    def run() -> None:
        for _ in range(STEPS):
            optimizer.step()

    return run


MODELS = {
    "1 x 100": [100],
    "100 x 100": [100] * 100,
    "1 x 200,000": [200_000],
}
"""Parameters, and coordinates in each."""


def main() -> None:
    """Time all side by side and print what is added to the optimizer's own time."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for model, shapes in MODELS.items():
        for weights in ("default", "quadratic"):
            contestants = {
                "plain": run_of(weights, shapes),
                "recorder": run_of(weights, shapes, recorded=True),
                "guard": run_of(weights, shapes, guard=True),
            }
            seconds = side_by_side(contestants, repeats=3 if sum(shapes) > 50_000 else 8)
            for name in ("recorder", "guard"):
                added = round(100 * (seconds[name] / seconds["plain"] - 1), 1)
                print(f"{weights:<12}{model:<14}{name:<12}{added:>6.1f} % added to a step")
                rows.append({"contestant": name, "weights": weights, "parameters": model, "percent_added": added})
    write_table("recorder", rows)


if __name__ == "__main__":
    main()
