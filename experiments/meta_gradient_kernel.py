"""What replaying a truncation costs per coordinate and inner step: ``nn.LSTM`` under autograd against the native kernel.

    python -m experiments.meta_gradient_kernel

Forward and backward, one thread. The time is the process's own processor time, so that a busy machine shows in caches and
clock rate but not in waiting; contestants take turns and the fastest of several runs counts.
"""

import time

import torch
from torch import nn

from learned_optim.backends.native.sequence import native_available, native_sequence
from learned_optim.rules.lstm import lstm_sequence

CASES = {"2 x 20, F=2": (2, 20, 2, 20, 1280), "1 x 8, F=7": (1, 8, 7, 32, 4096)}
"""Layers, hidden size, inputs, inner steps and coordinates."""
REPEATS = 8


def compare(layers: int, hidden: int, inputs: int, steps: int, count: int) -> dict[str, float]:
    """Return microseconds per coordinate-step of each way."""
    lstm = nn.LSTM(inputs, hidden, layers)
    x, seed = torch.randn(steps, count, inputs), torch.randn(steps, count, hidden)
    start = (torch.randn(count, layers * hidden).tanh(), torch.randn(count, layers * hidden))
    active = torch.rand(steps, count) > 0.1
    masked = seed * active.unsqueeze(-1)
    ways = {
        "torch, all active": lambda: (lstm_sequence(lstm, x, start)[0] * seed).sum().backward(),
        "native, all active": lambda: (native_sequence(lstm, x, start) * seed).sum().backward(),
        "native, a tenth held": lambda: (native_sequence(lstm, x, start, active) * masked).sum().backward(),
    }
    fastest = dict.fromkeys(ways, float("inf"))
    for repeat in range(REPEATS + 1):
        for name, run in ways.items():
            began = time.process_time()
            run()
            if repeat:  # The first round warms up.
                fastest[name] = min(fastest[name], time.process_time() - began)
    return {name: seconds / (steps * count) * 1e6 for name, seconds in fastest.items()}


def main() -> None:
    """Print one line per size and way."""
    if not native_available():
        raise SystemExit("the native kernels were not built")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for case, sizes in CASES.items():
        times = compare(*sizes)
        slowest = times["torch, all active"]
        for name, value in times.items():
            print(f"{case:<14}{name:<24}{value:>8.4f} us per coordinate-step{slowest / value:>8.2f} x")


if __name__ == "__main__":
    main()
