"""One training run of a judged optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from meta_train.judging.baselines import MakeOptimizer
from meta_train.tasks.case import Case, JudgingTask


@dataclass(frozen=True)
class Outcome:
    """What one run found.

    Args:
        losses: Training loss of the minibatch before each inner step, ``(T,)``; infinite from where it diverged.
        held_out: Held-out loss after each horizon it reached, by horizon.
    """

    losses: Tensor
    held_out: dict[int, float] = field(default_factory=dict)


def train_case(
    task: JudgingTask,
    make_optimizer: MakeOptimizer,
    horizon: int,
    seed: int,
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
) -> Outcome:
    """Train one model, as any training loop would.

    Known flaw, kept because every committed figure depends on it: a task that draws its data from a generator at ``seed``,
    as all held-out kinds do, draws them from the numbers that initialise the module, so the two are correlated; and
    minibatches come from the stream that initialises the module of the next seed (docs/judging.md).

    Args:
        task: What to train.
        make_optimizer: From parameters to optimizer.
        horizon: Inner steps.
        seed: Decides initialisation and minibatches, and the data of tasks that are made from it.
        schedule: From optimizer and horizon to a schedule of the rate.

    Returns:
        Losses and held-out losses.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = task.make(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = make_optimizer(case.module.parameters())
    scheduler = schedule(optimizer, horizon) if schedule else None
    losses, held_out = torch.full((horizon,), math.inf), {}
    for step in range(horizon):
        optimizer.zero_grad()
        loss = case.loss(case.module, case.next_batch(generator))
        losses[step] = value = loss.item()
        if not math.isfinite(value):
            losses[step:] = math.inf
            break
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        if step + 1 in task.horizons and case.held_out:
            held_out[step + 1] = _held_out_loss(case, optimizer)
    return Outcome(losses, held_out)


@torch.no_grad()
def _held_out_loss(case: Case, optimizer: Optimizer) -> float:
    """Return the mean loss over the held-out examples, with module and optimizer in evaluation mode if they have one."""
    averaged = getattr(optimizer, "eval", None)  # Schedule-free optimizers evaluate at another point than they train.
    case.module.eval()
    if averaged:
        averaged()
    total = sum(float(case.loss(case.module, batch)) for batch in case.held_out) / len(case.held_out)
    case.module.train()
    if averaged:
        optimizer.train()  # type: ignore[attr-defined]
    return total
