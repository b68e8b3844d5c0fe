"""What one episode contributes to an outer step, wherever it is computed: in this process, or in another."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learned_optim.rules import UpdateRule
from meta_train.tasks import Optimizee, Task, derive_seed, seeded
from meta_train.training.meta_gradient import (
    Objective,
    backpropagate,
    imitate,
    unroll,
)
from meta_train.training.parts import Parts
from meta_train.training.recipe import Evolution, OuterLoop, Phase
from meta_train.training.roll_out import (
    Carry,
    Sample,
    no_coordinate,
    roll_out,
    sample_coordinates,
    start_episode,
)


class Episode:
    """One optimizee on its way from start to horizon.

    An episode travels to another process as its seed, its carry and the state of its generator; that process samples the
    optimizee again.

    Args:
        task: Where the optimizee comes from.
        seed: Seed of the optimizee and of the horizon.
        horizon: Inner steps to take.
        carry: Where the episode stands; None before the start.
        generator: State of the optimizee's generator at that point.
    """

    def __init__(
        self, task: Task, seed: int, horizon: int, carry: Carry | None = None, generator: Tensor | None = None
    ) -> None:
        self.task, self.seed, self.horizon, self.carry, self._generator = task, seed, horizon, carry, generator

    @classmethod
    def from_state(cls, task: Task, state: dict[str, Any]) -> Episode:
        """Return the episode from which :meth:`state_dict` made a state."""
        return cls(task, state["seed"], state["horizon"], Carry(**state["carry"]), state["generator"])

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on bit for bit, as tensors and plain values."""
        return {"seed": self.seed, "horizon": self.horizon, "generator": self.generator, "carry": vars(self.carry)}

    def __reduce__(self) -> tuple[type[Episode], tuple[Any, ...]]:
        """Return the constructor and its arguments, for pickle."""
        return Episode, (self.task, self.seed, self.horizon, self.carry, self.generator)

    @functools.cached_property
    def optimizee(self) -> Optimizee:
        """The optimizee, which is sampled at first use."""
        optimizee = self.task.sample(self.seed)
        if self._generator is not None:
            optimizee.generator.set_state(self._generator)
        return optimizee

    @property
    def generator(self) -> Tensor | None:
        """State of the optimizee's generator."""
        return self.optimizee.generator.get_state() if "optimizee" in vars(self) else self._generator


@dataclass(frozen=True)
class GradientEstimate:
    """One episode's estimate of the meta-gradient in one outer step.

    Args:
        meta_loss: As :class:`~meta_train.training.outer_loop.OuterStep` has it.
        grads: The meta-gradient, in the order of the rule's parameters.
        episode: The episode at its new place; None if it has ended.
    """

    meta_loss: float
    grads: list[Tensor | None]
    episode: Episode | None = None


def truncation(rule: Parts, teacher: UpdateRule | None, phase: Phase, episode: Episode) -> GradientEstimate:
    """Take the inner steps of one truncation, and differentiate them.

    Args:
        rule: The rule before the outer step; its ``.grad`` is not kept.
        teacher: Takes the inner steps while the rule imitates it.
        phase: Says how to train.
        episode: The episode to go on with.

    Returns:
        The episode's estimate.
    """
    inner, outer, imitates = phase
    rule.zero_grad()
    carry = episode.carry or start_episode(rule, episode.optimizee, teacher=teacher if imitates else None)
    length = min(inner.truncation, episode.horizon - carry.step)
    objective = OBJECTIVES[outer.objective](outer)
    distance = None
    if outer.second_derivatives and not imitates:
        losses, reached = unroll(rule, episode.optimizee, carry, length, objective, second_derivatives=True)
    else:
        chosen = _coordinates(episode, carry, outer)
        record, reached = roll_out(rule, episode.optimizee, carry, length, chosen, teacher if imitates else None)
        losses = record.losses
        if imitates:
            distance = imitate(rule, record)
        elif losses.isfinite().all():
            backpropagate(rule, record, objective(losses, carry.initial_loss), outer.discount)
    episode.carry = reached
    finished = reached.step >= episode.horizon or not bool(losses.isfinite().all())
    return GradientEstimate(
        meta_loss(outer, losses, carry.initial_loss) if distance is None else distance,
        [parameter.grad for parameter in rule.parameters()],
        None if finished else episode,
    )


def _coordinates(episode: Episode, carry: Carry, outer: OuterLoop) -> Sample | None:
    if outer.coordinates == 0:
        return None
    generator = seeded(derive_seed(episode.seed, "coordinates", carry.step))
    return sample_coordinates(episode.optimizee, outer.coordinates, generator, by_tensor=outer.sampling == "tensors")


def antithetic_pair(rule: Parts, outer: OuterLoop, evolution: Evolution, episode: Episode) -> GradientEstimate:
    """Run a whole episode with meta-parameters moved either way, and estimate the meta-gradient.

    Args:
        rule: The rule before the outer step.
        outer: Names the objective.
        evolution: How far to move, and which meta-parameters.
        episode: An episode that has not begun.

    Returns:
        The episode's estimate.
    """
    generator = seeded(derive_seed(episode.seed, "evolution"))
    moves = {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in rule.named_parameters()
        if evolution.only in name
    }
    figures = []
    for size in (evolution.noise, -evolution.noise):
        moved = copy.deepcopy(rule)
        with torch.no_grad():
            for name, move in moves.items():
                moved.get_parameter(name).add_(move, alpha=size)
        figures.append(whole_episode(moved, episode.task.sample(episode.seed), episode.horizon, outer))
    forth, back = figures
    slope = (forth - back) / (2 * evolution.noise)
    return GradientEstimate(
        (forth + back) / 2, [slope * moves[name] if name in moves else None for name, _ in rule.named_parameters()]
    )


def whole_episode(rule: Parts, optimizee: Optimizee, horizon: int, outer: OuterLoop) -> float:
    """Return how good a rule is on one optimizee; lower is better.

    Args:
        rule: The rule to judge.
        optimizee: Freshly sampled.
        horizon: Inner steps.
        outer: Says what the objective is.

    Returns:
        The mean loss for the mean objective. For the others, the mean of ``log(loss / initial loss)`` around a fifth of the
        horizon and at its end, since a rule must be good early and late; for the last objective, at its end alone.
    """
    carry = start_episode(rule, optimizee)
    record, _ = roll_out(rule, optimizee, carry, horizon, no_coordinate())
    losses = record.losses
    if outer.objective != "mean":
        early, late = (losses[int(0.9 * end) : end] for end in (max(horizon // 5, 1), horizon))
        losses = torch.stack((early.mean(0), late.mean(0)))
    return meta_loss(outer, losses, carry.initial_loss)


def meta_loss(outer: OuterLoop, losses: Tensor, initial: Tensor) -> float:
    """Return the scalar whose derivative by the losses an objective's weights are.

    Args:
        outer: Names the objective.
        losses: ``(K, P)``.
        initial: ``(P,)``.

    Returns:
        The mean loss, or the mean of ``log(loss / initial loss)``.
    """
    if outer.objective == "mean":
        return float(losses.mean())
    ratio = (_last_tenth(losses) if outer.objective == "last" else losses) / initial
    return float(ratio.clamp(min=max(outer.loss_floor, 1e-12)).log().mean())


def _mean_objective(outer: OuterLoop) -> Objective:
    return lambda losses, initial: torch.full_like(losses, 1 / losses.numel())


def _log_objective(outer: OuterLoop) -> Objective:
    def weights(losses: Tensor, initial: Tensor) -> Tensor:
        return 1 / (losses.clamp(min=1e-12).maximum(outer.loss_floor * initial) * losses.numel())

    return weights


def _relative_objective(outer: OuterLoop) -> Objective:
    def weights(losses: Tensor, initial: Tensor) -> Tensor:
        level = losses.mean(0, keepdim=True).clamp(min=1e-12).maximum(outer.loss_floor * initial)
        return (1 / (level * losses.numel())).expand_as(losses)

    return weights


def _last_objective(outer: OuterLoop) -> Objective:
    relative = _relative_objective(outer)

    def weights(losses: Tensor, initial: Tensor) -> Tensor:
        result = torch.zeros_like(losses)
        _last_tenth(result).copy_(relative(_last_tenth(losses), initial))
        return result

    return weights


def _last_tenth(losses: Tensor) -> Tensor:
    return losses[-max(len(losses) // 10, 1) :]


OBJECTIVES = {"mean": _mean_objective, "log": _log_objective, "relative": _relative_objective, "last": _last_objective}
