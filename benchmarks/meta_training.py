"""Outer steps per second: the one-pass meta-gradient against the straightforward way, same rule, task and process.

    python -m benchmarks.meta_training

The straightforward way calls ``loss.backward(retain_graph=True)`` at each inner step through the growing graph to get the
gradient, then backpropagates the summed losses. Both take one truncation of 20 inner steps of the paper's quadratics with
the paper's 2 x 20 LSTM.
"""

import torch

from benchmarks.timing import side_by_side, write_table
from learned_optim import build_rule
from meta_train.meta_gradient import backpropagate, roll_out, start_episode, unroll
from meta_train.tasks import Quadratic

TRUNCATION = 20


def main() -> None:
    """Time the ways side by side."""
    torch.manual_seed(0)
    rule = build_rule("paper", input_scale=128.0, output_scale=0.1)
    optimizee = Quadratic().sample(0)
    carry = start_episode(rule, optimizee)
    weights = torch.full((TRUNCATION, 1), 1 / TRUNCATION)

    def straightforward() -> None:
        params, memory, total = carry.params.clone().requires_grad_(), carry.memory, torch.zeros(())
        for step in range(1, TRUNCATION + 1):
            params.retain_grad()
            loss = optimizee.losses(optimizee.unflatten(params)).sum()
            loss.backward(retain_graph=True)
            assert params.grad is not None
            total = total + loss
            update, memory, _ = rule(params.grad.detach().flatten(), memory, torch.tensor(float(step)), None)
            params = params + update.view_as(params)
        rule.zero_grad()
        (total / TRUNCATION).backward()

    def one_pass(coordinates: int) -> None:
        chosen = torch.randperm(carry.params.numel())[:coordinates] if coordinates else None
        record, _ = roll_out(rule, optimizee, carry, TRUNCATION, chosen)
        backpropagate(rule, record, weights)

    ways = {
        "straightforward": straightforward,
        "autograd unroll": lambda: unroll(rule, optimizee, carry, TRUNCATION, lambda losses, _: weights),
        "one pass, every coordinate": lambda: one_pass(0),
        "one pass, a quarter of the coordinates": lambda: one_pass(320),
    }
    seconds = side_by_side(ways, repeats=12)
    slowest = seconds["straightforward"]
    for name, value in seconds.items():
        print(f"{name:<42}{1 / value:>8.1f} outer steps/s{slowest / value:>8.1f} x")
    write_table(
        "meta_training",
        [{"way": name, "speed_up": round(slowest / value, 2)} for name, value in seconds.items()],
    )


if __name__ == "__main__":
    main()
