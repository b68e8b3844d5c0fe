"""What recording and guarding cost: 500 steps with and without a Recorder that samples every 100th, and with guard=True.

    python -m benchmarks.recorder

The first rows are of a whole training step, forward and backward pass included; the others of the optimizer's step alone.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import side_by_side, write_table
from learned_optim import LearnedOptimizer, Recorder

EVERY, STEPS = 100, 500


def run_of(weights: str, shapes: list[int], recorded: bool = False, guard: bool = False) -> Callable[[], object]:
    """Return a function that takes the steps; without shapes, it trains a net of 784-20-10 units on 128 examples."""
    model = nn.Sequential(nn.Linear(784, 20), nn.Sigmoid(), nn.Linear(20, 10))
    inputs, labels = torch.randn(128, 784), torch.randint(0, 10, (128,))
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes] or list(model.parameters())
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = LearnedOptimizer(params, weights=weights, guard=guard)
    if recorded:
        Recorder(optimizer, every=EVERY)

    def run() -> None:
        for _ in range(STEPS):
            if not shapes:
                optimizer.zero_grad()
                cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    return run


MODELS: dict[str, list[int]] = {
    "training 784-20-10": [],
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
            seconds = side_by_side(contestants, repeats=3)
            for name in ("recorder", "guard"):
                added = round(100 * (seconds[name] / seconds["plain"] - 1), 1)
                print(f"{weights:<12}{model:<20}{name:<12}{added:>6.1f} % added")
                rows.append({"contestant": name, "weights": weights, "parameters": model, "percent_added": added})
    write_table("recorder", rows)


if __name__ == "__main__":
    main()
