"""Outer steps per second: the one-pass meta-gradient against the straightforward way, same rule, task and process.

    python -m benchmarks.meta_training

The straightforward way calls ``loss.backward(retain_graph=True)`` at each inner step through the growing graph to get the
gradient, then backpropagates the summed losses. Both take one truncation of 20 inner steps of the paper's quadratics with
the paper's 2 x 20 LSTM.

Then one truncation of twelve problems of the default recipe: its inner steps by the fused kernel of the optimizer, and by
``nn.LSTM``; everything else is the same. Beside them the problems' own passes alone, which no way of stepping can undercut.

Last the recipe itself, some outer steps of it: by this process on one thread and on all, and by worker processes of one
thread each. All take the same steps.
"""

import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing import side_by_side, write_table
from learned_optim import build_rule
from learned_optim.rules.lstm import Carry
from meta_train.tasks import Quadratic, seeded
from meta_train.training.inner_steps import PlainSteps
from meta_train.training.meta_gradient import backpropagate, unroll
from meta_train.training.outer_loop import MetaTraining
from meta_train.training.parts import Parts
from meta_train.training.publish import WEIGHTS_DIR
from meta_train.training.recipe import read_recipe
from meta_train.training.roll_out import (
    loss_and_grad,
    roll_out,
    sample_coordinates,
    start_episode,
)
from meta_train.workers import Workers

TRUNCATION = 20
PROBLEMS = 12
OUTER_STEPS, WARM_UP = 40, 4


def main() -> None:
    """Time the ways side by side."""
    torch.manual_seed(0)
    rows = []
    of_one_step = (side_by_side(ways, repeats=12) for ways in (ways_on_quadratics(), ways_on_the_mixture()))
    for seconds in (*of_one_step, the_recipe()):
        slowest = next(iter(seconds.values()))
        for name, value in seconds.items():
            print(f"{name:<42}{1 / value:>8.1f} outer steps/s{slowest / value:>8.1f} x")
            rows.append({"way": name, "speed_up": round(slowest / value, 2)})
    write_table("meta_training", rows)


def ways_on_quadratics() -> dict[str, Callable[[], object]]:
    """Return ways to the meta-gradient, the straightforward one first."""
    rule = build_rule("paper", input_scale=128.0, output_scale=0.1)
    optimizee = Quadratic().sample(0)
    whole = Parts.whole(rule)
    carry = start_episode(whole, optimizee)
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
        chosen = sample_coordinates(optimizee, coordinates, seeded(0)) if coordinates else None
        record, _ = roll_out(whole, optimizee, carry, TRUNCATION, chosen)
        backpropagate(whole, record, weights)

    return {
        "straightforward": straightforward,
        "autograd unroll": lambda: unroll(whole, optimizee, carry, TRUNCATION, lambda losses, _: weights),
        "one pass, every coordinate": lambda: one_pass(0),
        "one pass, a quarter of the coordinates": lambda: one_pass(320),
    }


class LstmSteps(PlainSteps):
    """Inner steps by ``nn.LSTM``."""

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take an inner step."""
        rule = self.rule.shared

        def advance(features: Tensor, held: Carry, active: Tensor) -> tuple[Tensor, Carry]:
            hiddens, new = rule.recur(features.unsqueeze(0), held, fused=True)
            return hiddens[0], new

        scale = None if scales is None else scales[:, self.optimizee.tensor_index].flatten()
        time = self.params.new_tensor(float(step))
        update, self.memory, _ = rule(grad.flatten(), self.memory, time, scale, advance)
        self.params = self.params + update.view_as(self.params)


def ways_on_the_mixture() -> dict[str, Callable[[], object]]:
    """Return ways of an outer step of the default recipe, the one by ``nn.LSTM`` first."""
    recipe = read_recipe(WEIGHTS_DIR / "default.toml")
    rule, length = recipe.build_rule(), recipe.inner.truncation
    optimizees = [recipe.task.sample(seed) for seed in range(PROBLEMS)]
    carries = [start_episode(rule, optimizee) for optimizee in optimizees]

    def outer_step() -> None:
        for optimizee, carry in zip(optimizees, carries, strict=True):
            chosen = sample_coordinates(optimizee, recipe.outer.coordinates, seeded(0))
            record, _ = roll_out(rule, optimizee, carry, length, chosen)
            backpropagate(rule, record, torch.ones_like(record.losses))

    def by_lstm() -> None:
        with mock.patch("meta_train.training.roll_out.inner_steps", LstmSteps):
            outer_step()

    def passes_alone() -> None:
        for optimizee, carry in zip(optimizees, carries, strict=True):
            for _ in range(length):
                loss_and_grad(optimizee, carry.params)

    return {
        "mixture, inner steps by nn.LSTM": by_lstm,
        "mixture, inner steps by the kernel": outer_step,
        "mixture, its problems' own passes alone": passes_alone,
    }


def the_recipe() -> dict[str, float]:
    """Return the mean time of an outer step of the default recipe, by threads and by workers; they take it in turns."""
    recipe, threads = read_recipe(WEIGHTS_DIR / "default.toml"), torch.get_num_threads()
    count = min(threads, recipe.outer.episodes)
    with Workers(count) as workers:
        runs = {
            "recipe, one thread": (1, iter(MetaTraining(recipe))),
            f"recipe, {threads} threads": (threads, iter(MetaTraining(recipe))),
            f"recipe, {count} workers": (1, iter(MetaTraining(recipe, each=workers.map))),
        }
        seconds = dict.fromkeys(runs, 0.0)
        for step in range(-WARM_UP, OUTER_STEPS):
            for name, (own_threads, run) in runs.items():
                torch.set_num_threads(own_threads)
                start = time.perf_counter()
                next(run)
                seconds[name] += (time.perf_counter() - start) / OUTER_STEPS * (step >= 0)
    torch.set_num_threads(threads)
    return seconds


if __name__ == "__main__":
    main()
