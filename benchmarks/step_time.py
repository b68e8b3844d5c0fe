"""What a learned step costs beside Adam's and beside stepping with ``nn.LSTM``.

python -m benchmarks.step_time [--coordinates N]
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from benchmarks.timing import side_by_side, write_table
from learned_optim import LearnedOptimizer, UpdateRule, build_rule

RULES = {
    "paper 2x20": ("paper", {"inputs": "log_and_sign", "output_scale": 0.1}),
    "default 1x8": ("adam-modulation", {}),
}


def stepper(make: Callable[[list[nn.Parameter]], Optimizer], coordinates: int) -> Callable[[], object]:
    """Return a function that steps one parameter of the given size."""
    param = nn.Parameter(torch.randn(coordinates))
    param.grad = torch.randn(coordinates)
    return make([param]).step


def lstm_stepper(rule: UpdateRule, coordinates: int) -> Callable[[], object]:
    """Return a function that runs only the rule's ``nn.LSTM`` for one step."""
    inputs = torch.randn(1, coordinates, rule.lstm.input_size)
    memory = torch.zeros(rule.lstm.num_layers, coordinates, rule.lstm.hidden_size)

    @torch.no_grad()
    def step() -> object:
        return rule.lstm(inputs, (memory, memory))

    return step


def main() -> None:
    """Time every contestant side by side and print nanoseconds a coordinate as ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinates", type=int, default=200_000)
    count = parser.parse_args().coordinates
    contestants: dict[str, Callable[[], object]] = {
        "Adam, fused": stepper(lambda params: Adam(params, fused=True), count),
        "Adam, foreach": stepper(lambda params: Adam(params, foreach=True), count),
    }
    for name, (family, config) in RULES.items():
        rule = build_rule(family, **config)
        for backend in ("reference", "native"):
            contestants[f"{name}, {backend}"] = stepper(
                lambda params, r=rule, b=backend: LearnedOptimizer(params, weights=r, backend=b), count
            )
        contestants[f"{name}, nn.LSTM alone"] = lstm_stepper(rule, count)
    size = 512
    a, b = torch.randn(size, size), torch.randn(size, size)
    source, target = torch.randn(2**24), torch.empty(2**24)
    contestants |= {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = side_by_side(contestants, repeats=8)
    gigaflops = 2 * size**3 / seconds.pop("matmul") / 1e9
    bandwidth = 2 * source.numel() * 4 / seconds.pop("copy") / 1e9
    fused = seconds["Adam, fused"]
    print(f"{count:,} coordinates; matmul {gigaflops:.0f} GFLOP/s, copy {bandwidth:.1f} GB/s")
    for name, value in seconds.items():
        print(f"{name:<30}{value / fused:>10.1f} x fused Adam")
    rows = [{"contestant": n, "coordinates": count, "times_fused_adam": round(v / fused, 2)} for n, v in seconds.items()]
    write_table("step_time", [{**row, "gflops": round(gigaflops), "gb_per_s": round(bandwidth, 1)} for row in rows])


if __name__ == "__main__":
    main()
