"""What thousands of small tensors cost a step beside one tensor of as many coordinates, in turns in one run.

    python -m benchmarks.small_tensors [--threads N]

Twice: with nothing else in between, and with 64 MiB written before each step, as a forward and backward pass might, so that
the processor's nearer caches hold nothing of the optimizer's. Beside the rules, fused Adam.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from benchmarks.step_time import RULES, stepper
from benchmarks.timing import side_by_side, write_table
from learned_optim import LearnedOptimizer

COORDINATES, TENSORS = 128_000, 2_000
WRITTEN = 64 * 2**20
"""Bytes between two steps."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    **{name: partial(LearnedOptimizer, weights=rule) for name, rule in RULES.items()},
    "Adam, fused": partial(Adam, fused=True),
}


def main() -> None:
    """Time every optimizer on both models, print ratios and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    torch.set_num_threads(parser.parse_args().threads)
    elsewhere = torch.empty(WRITTEN // 4)
    conditions: dict[str, Callable[[], Tensor] | None] = {
        "nothing": None,
        f"{WRITTEN // 2**20} MiB": lambda: elsewhere.fill_(0.0),
    }
    rows = []
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(0)
        models = {many: [COORDINATES // many] * many for many in (1, TENSORS)}
        for between, before in conditions.items():
            steps = {str(many): stepper(make, shapes) for many, shapes in models.items()}
            seconds = side_by_side(steps, repeats=100, before=before)
            for many, value in seconds.items():
                ratio = value / seconds["1"]
                print(f"{name:<12} {int(many):>5,} tensors, {between:<8} written in between {ratio:>6.2f} x one tensor")
                nanoseconds = f"{value / COORDINATES * 1e9:.4g}"
                row = {"optimizer": name, "tensors": many, "between": between, "ns_per_coordinate": nanoseconds}
                rows.append({**row, "times_one_tensor": f"{ratio:.3g}"})
    write_table("small_tensors", rows)


if __name__ == "__main__":
    main()
