"""The only training loop of the judging: one optimizer trains one problem, an optimizee of a task or a case of a suite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.optim.optimizer import ParamsT

from meta_train.judging.baselines import MakeOptimizer, MakeSchedule
from meta_train.judging.readouts import Readout
from meta_train.tasks import Optimizee, Task, derive_seed
from meta_train.tasks.case import JudgingTask


@dataclass(frozen=True)
class Outcome:
    """The result of one run. A further measure is a further field: plain values that JSON can hold.

    Args:
        losses: Training loss of the minibatch before each inner step, and for an optimizee after the last too: ``(T,)`` or
            ``(T + 1,)`` in float64; infinite from the step where the run diverged.
        held_out: Held-out loss after each horizon that the run reached, by horizon.
        final_loss: Training loss after each horizon on fresh minibatches (:mod:`meta_train.judging.readouts`), and at the
            initial weights for horizon 0.
        averaged_loss: The same at averaged weights.
        averaged_held_out: Held-out loss at averaged weights.
    """

    losses: Tensor
    held_out: dict[int, float] = field(default_factory=dict)
    final_loss: dict[int, float] = field(default_factory=dict)
    averaged_loss: dict[int, float] = field(default_factory=dict)
    averaged_held_out: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """One model that waits for an optimizer.

    Args:
        params: Parameters, named or not.
        loss: Draws the next minibatch and returns its 0-dim loss.
        ends_with_loss: Whether the loss after the last step belongs to the losses.
        readout: Measures what the run would ship.
        horizons: Inner steps after which the readout measures.
    """

    params: ParamsT
    loss: Callable[[], Tensor]
    ends_with_loss: bool = False
    readout: Readout | None = None
    horizons: Sequence[int] = ()


def train(problem: Problem, make_optimizer: MakeOptimizer, horizon: int, schedule: MakeSchedule | None = None) -> Outcome:
    """Train one problem with a ``torch.optim`` optimizer, as an ordinary training loop does.

    Args:
        problem: Freshly initialised.
        make_optimizer: Maps parameters to an optimizer.
        horizon: Inner steps, T.
        schedule: Maps optimizer and horizon to a schedule of the rate.

    Returns:
        Losses and further measures.
    """
    optimizer = make_optimizer(problem.params)
    scheduler = schedule(optimizer, horizon) if schedule else None
    losses = torch.full((horizon + problem.ends_with_loss,), math.inf, dtype=torch.float64)
    readout = problem.readout
    measured: dict[str, dict[int, float]] = {"final_loss": {0: readout.start()}} if readout else {}

    def forward() -> Tensor:
        optimizer.zero_grad()
        return problem.loss()

    def closure() -> float:
        loss = forward()
        loss.backward()
        return loss.item()

    for step in range(len(losses)):
        loss = forward()
        value = loss.item()
        if not math.isfinite(value):
            break
        losses[step] = value
        if step == horizon:
            break
        loss.backward()
        optimizer.step(closure if isinstance(optimizer, LBFGS) else None)
        if scheduler:
            scheduler.step()
        if readout:
            readout.after_step()
            for name, loss_then in readout.look(optimizer).items() if step + 1 in problem.horizons else ():
                measured.setdefault(name, {})[step + 1] = loss_then
    return Outcome(losses, **measured)


def problem_of_optimizee(optimizee: Optimizee) -> Problem:
    """Make a problem of a freshly sampled optimizee.

    Args:
        optimizee: A single problem (P = 1).

    Returns:
        The problem; its parameters have names.

    Raises:
        ValueError: If the optimizee holds several problems, whose parameters would share an optimizer's state for a tensor.
    """
    if optimizee.num_problems != 1:
        raise ValueError(f"evaluate one problem at a time, got {optimizee.num_problems} side by side")
    params = {name: nn.Parameter(value[0].clone()) for name, value in optimizee.params.items()}

    def loss() -> Tensor:
        return optimizee.losses({name: value.unsqueeze(0) for name, value in params.items()}).sum()

    return Problem(params.items(), loss, ends_with_loss=True)


def problem_of_case(task: JudgingTask, seed: int) -> Problem:
    """Make a problem of a judging task.

    Initial weights, data, minibatches and the fresh minibatches of the readout come from streams of their own.

    Args:
        task: Makes the case.
        seed: Decides initialisation and minibatches, and the data of tasks that are made from it.

    Returns:
        The problem.
    """
    case = task.case(seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches"))
    return Problem(
        case.module.named_parameters(),
        lambda: case.loss(case.module, case.next_batch(generator)),
        readout=Readout(case, seed),
        horizons=task.horizons,
    )


def train_case(
    task: JudgingTask, make_optimizer: MakeOptimizer, horizon: int, seed: int, schedule: MakeSchedule | None = None
) -> Outcome:
    """Train one case of a judging task; :func:`problem_of_case` and :func:`train` explain the arguments."""
    return train(problem_of_case(task, seed), make_optimizer, horizon, schedule)


def curves(task: Task, make_optimizer: MakeOptimizer, horizon: int, purpose: str, count: int) -> Tensor:
    """Train fresh optimizees.

    Args:
        task: Samples them.
        make_optimizer: From parameters to optimizer.
        horizon: Inner steps, T.
        purpose: ``"tuning"`` or ``"evaluation"``: their optimizees are disjoint.
        count: Number of optimizees.

    Returns:
        Losses ``(count, T + 1)``; infinite from the step where a run diverged.
    """
    sampled = (task.sample(derive_seed(0, purpose, index)) for index in range(count))
    return torch.stack([train(problem_of_optimizee(one), make_optimizer, horizon).losses for one in sampled])


def measure(criterion: str, losses: Tensor, horizon: int, last: int = 1) -> Tensor:
    """Reduce each curve to one number.

    Args:
        criterion: ``"sum"`` or ``"final"``.
        losses: ``(count, >= horizon + 1)``.
        horizon: Inner steps to look at.
        last: Losses averaged into the final one.

    Returns:
        Tensor of shape ``(count,)``.
    """
    if criterion == "sum":
        return losses[:, :horizon].sum(1)
    return losses[:, horizon + 1 - last : horizon + 1].mean(1)


def smoothed_final(losses: Tensor, horizon: int) -> Tensor:
    """Return the mean of the last tenth of the losses up to a horizon."""
    return losses[horizon - max(horizon // 10, 1) : horizon].double().mean()


def spike(losses: Tensor, horizon: int) -> float:
    """Return the highest minibatch loss of the second half of a run over its median; infinite where the run diverged."""
    half = losses[horizon // 2 : horizon].double()
    if not half.isfinite().all():
        return math.inf
    median = float(half.median())
    return float(half.max()) / median if median else math.nan


def early_loss(outcome: Outcome, first: int = 5, last: int = 15) -> float:
    """Return the mean loss of steps 5 to 15 over the loss at the start: above 1, the first steps ruined the weights."""
    start = outcome.final_loss.get(0, math.nan)
    return float(outcome.losses[first - 1 : last].mean()) / start if start else math.nan
