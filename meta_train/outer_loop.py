"""Meta-training as a generator of outer steps. It prints nothing and writes no files; whoever iterates decides that."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learned_optim.weights import resolve_weights
from meta_train.meta_gradient import (
    Carry,
    Objective,
    Sample,
    backpropagate,
    imitate,
    no_coordinate,
    roll_out,
    sample_coordinates,
    start_episode,
    unroll,
)
from meta_train.parts import AnyRule, members
from meta_train.recipe import Evolution, Horizons, OuterLoop, Phase, Recipe
from meta_train.tasks import Optimizee, Task, seeded, with_data


@dataclass(frozen=True)
class OuterStep:
    """What one outer step did.

    Args:
        step: Outer steps so far, from 1.
        meta_loss: Mean over episodes: of the losses, or of ``log(loss / initial loss)``, as the objective says; while a
            teacher is imitated, the distance from it (:func:`~meta_train.meta_gradient.imitate`).
        grad_norm: Norm of the meta-gradient before clipping.
        lr: Rate used.
        validation: Validation figure, where this step validated; lower is better.
        is_best: Whether that figure is the best so far.
        final: Validation figure over the final horizons of the best so far, where a phase ends and the recipe has any.
    """

    step: int
    meta_loss: float
    grad_norm: float
    lr: float
    validation: float | None = None
    is_best: bool = False
    final: float | None = None


@dataclass(eq=False)
class Best:
    """The best meta-parameters so far.

    Args:
        rule: As it will be used.
        validation: Its figure; infinite before the first.
        step: Outer steps it took.
        final: Its figure over the recipe's final horizons, once a phase has ended with it.
    """

    rule: AnyRule
    validation: float = math.inf
    step: int = 0
    final: float | None = None


@dataclass
class Episode:
    """One optimizee on its way from start to horizon.

    Args:
        seed: Of the optimizee, and of the horizon.
        horizon: Inner steps to take.
        optimizee: Sampled from ``seed``.
        carry: Where it stands.
    """

    seed: int
    horizon: int
    optimizee: Optimizee
    carry: Carry


class MetaTraining:
    """The state of a meta-training run, complete enough to go on bit for bit.

    Args:
        recipe: What to do.
        task: Draw optimizees from here instead of from the recipe's task: any object with ``sample(seed)``.
        data: Directory of real data, for tasks that need it.
    """

    def __init__(self, recipe: Recipe, task: Task | None = None, data: Path | None = None) -> None:
        self.recipe = recipe
        self.phases = recipe.phases
        self.teacher = recipe.imitation.build_teacher() if recipe.imitation else None
        self.task: Task = with_data(recipe.task if task is None else task, data)
        self.validation_task: Task = with_data(recipe.validation.task, data) if recipe.validation.task else self.task
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.seed, "meta-parameters"))
            self.rule = recipe.build_rule()
        start = resolve_weights(recipe.start).rule.state_dict() if recipe.start else None
        for rule in members(self.rule).values():
            if start is not None:
                rule.load_state_dict(start)
                continue
            for layer in range(rule.lstm.num_layers):
                getattr(rule.lstm, f"bias_ih_l{layer}").data.view(4, -1)[1] += recipe.outer.forget_bias
            rule.readout.weight.data *= recipe.outer.readout
        self.average: AnyRule = copy.deepcopy(self.rule)
        self.outer_optimizer = torch.optim.AdamW(self.rule.parameters(), weight_decay=recipe.outer.weight_decay)
        self.step = 0
        self.episodes_started = 0
        self.episodes: list[Episode | None] = [None] * recipe.outer.episodes
        self.best = Best(self.in_use(self.rule))
        self.finalists: list[Best] = []

    def __iter__(self) -> Iterator[OuterStep]:
        """Take outer steps until the recipe's number is reached, from wherever this run stands.

        Yields:
            A record of each step. The run may be checkpointed whenever it has yielded.
        """
        while self.step < self.recipe.steps:
            yield self._outer_step()

    def _phase(self) -> tuple[int, Phase]:
        """Return how to train now, after the outer steps that were already taken so."""
        done = self.step
        for phase in self.phases:
            if done < phase.outer.steps:
                return done, phase
            done -= phase.outer.steps
        raise RuntimeError(f"all {self.recipe.steps} outer steps of the recipe have been taken")

    def _start_stage(self) -> None:
        for rule in (self.rule, self.average):
            rule.load_state_dict(self.best.rule.state_dict())
        self.outer_optimizer = torch.optim.AdamW(self.rule.parameters(), weight_decay=self.recipe.outer.weight_decay)
        self.episodes = [None] * len(self.episodes)

    def _outer_step(self) -> OuterStep:
        done, phase = self._phase()
        outer = phase.outer
        if done == 0 and self.step > 0:
            self._start_stage()
        objective = OBJECTIVES[outer.objective](outer)
        self.outer_optimizer.zero_grad()
        if outer.evolution:
            meta_losses = [self._antithetic_pair(phase, outer.evolution) for _ in range(outer.evolution.pairs)]
        else:
            meta_losses = [self._truncation(slot, phase, objective) for slot in range(outer.episodes)]
        for parameter in self.rule.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(meta_losses)
        norm = torch.nn.utils.clip_grad_norm_(self.rule.parameters(), outer.clip)
        lr = outer.lr * cosine(done / outer.steps, outer.final_lr)
        for group in self.outer_optimizer.param_groups:
            group["lr"] = lr
        if norm.isfinite():
            self.outer_optimizer.step()
        self.step += 1
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.rule.parameters(), strict=True):
                average.lerp_(parameter, 1 - outer.averaging)
        last = done + 1 == outer.steps
        validation = self._validate(last=last)
        is_best = validation is not None and validation <= self.best.validation
        if is_best and validation is not None:
            self.best = Best(self.in_use(self.average), validation, self.step)
        final = self._end_phase() if last and self.recipe.validation.final_horizon else None
        return OuterStep(self.step, sum(meta_losses) / len(meta_losses), float(norm), lr, validation, is_best, final)

    def _truncation(self, slot: int, phase: Phase, objective: Objective) -> float:
        """Advance one episode by a truncation, adding its meta-gradient; return its meta-loss."""
        inner, outer, imitates = phase
        episode = self.episodes[slot] or self._start(phase)
        carry = episode.carry
        length = min(inner.truncation, episode.horizon - carry.step)
        figure = None
        if imitates:
            chosen = self._coordinates(episode, outer)
            record, episode.carry = roll_out(self.rule, episode.optimizee, carry, length, chosen, self.teacher)
            losses, figure = record.losses, imitate(self.rule, record)
        elif outer.second_derivatives:
            losses, episode.carry = unroll(self.rule, episode.optimizee, carry, length, objective, second_derivatives=True)
        else:
            chosen = self._coordinates(episode, outer)
            record, episode.carry = roll_out(self.rule, episode.optimizee, carry, length, chosen)
            losses = record.losses
            if losses.isfinite().all():
                backpropagate(self.rule, record, objective(losses, carry.initial_loss), outer.discount)
        finished = episode.carry.step >= episode.horizon or not bool(losses.isfinite().all())
        self.episodes[slot] = None if finished else episode
        return meta_loss(outer, losses, carry.initial_loss) if figure is None else figure

    def _antithetic_pair(self, phase: Phase, evolution: Evolution) -> float:
        """Run an episode with meta-parameters moved either way, adding the estimated meta-gradient; return its meta-loss."""
        seed, horizon = self._draw(phase)
        generator = seeded(derive_seed(seed, "evolution"))
        named = [(name, parameter) for name, parameter in self.rule.named_parameters() if evolution.only in name]
        moves = {name: torch.randn(parameter.shape, generator=generator) for name, parameter in named}
        figures = []
        for size in (evolution.noise, -evolution.noise):
            moved = copy.deepcopy(self.rule)
            with torch.no_grad():
                for name, move in moves.items():
                    moved.get_parameter(name).add_(move, alpha=size)
            figures.append(whole_episode(moved, self.task.sample(seed), horizon, phase.outer))
        forth, back = figures
        for name, parameter in named:
            slope = (forth - back) / (2 * evolution.noise) * moves[name]
            parameter.grad = slope if parameter.grad is None else parameter.grad + slope
        return (forth + back) / 2

    def _draw(self, phase: Phase) -> tuple[int, int]:
        """Return the seed of the next episode and its horizon."""
        seed = derive_seed(self.recipe.seed, "train", self.episodes_started)
        self.episodes_started += 1
        shortest, longest = phase.inner.horizon
        return seed, round(math.exp(random.Random(seed).uniform(math.log(shortest), math.log(longest))))

    def _start(self, phase: Phase) -> Episode:
        seed, horizon = self._draw(phase)
        optimizee = self.task.sample(seed)
        teacher = self.teacher if phase.imitates else None
        return Episode(seed, horizon, optimizee, start_episode(self.rule, optimizee, teacher=teacher))

    def _coordinates(self, episode: Episode, outer: OuterLoop) -> Sample | None:
        if outer.coordinates == 0:
            return None
        generator = seeded(derive_seed(episode.seed, "coordinates", episode.carry.step))
        return sample_coordinates(episode.optimizee, outer.coordinates, generator, by_tensor=outer.sampling == "tensors")

    def _validate(self, *, last: bool) -> float | None:
        if self.step % self.recipe.validation.every and not last:
            return None
        return self.validation_figure(self.average)

    def _end_phase(self) -> float:
        """Give the best so far its figure over the final horizons; after the last phase, keep the best by that figure."""
        final = self.best.final
        if final is None:
            final = self.best.final = self.validation_figure(self.best.rule, final=True)
            self.finalists.append(self.best)
        if self.step == self.recipe.steps:
            self.best = min(reversed(self.finalists), key=lambda one: math.inf if one.final is None else one.final)
        return final

    def validation_figure(self, rule: AnyRule, *, final: bool = False) -> float:
        """Return the figure by which this run compares meta-parameters.

        Args:
            rule: Whose they are.
            final: Over the recipe's final horizons instead of those of every validation.

        Returns:
            As :func:`validate`, with the options that the recipe validates with.
        """
        validation = self.recipe.validation
        used = self.in_use(rule, **validation.use)
        return validate(used, self.validation_task, self.recipe, validation.final_horizon if final else None)

    def in_use(self, rule: AnyRule, **options: Any) -> AnyRule:
        """Return a copy of a rule of this run as it will be used: with the recipe's ``use``, and these options over it."""
        with torch.random.fork_rng(devices=[]):
            used = self.recipe.build_rule(**(self.recipe.use | options))
        used.load_state_dict(rule.state_dict())
        return used

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on bit for bit, as tensors and plain values."""
        return {
            "rule": self.rule.state_dict(),
            "average": self.average.state_dict(),
            "best": self._packed(self.best),
            "finalists": [self._packed(one) for one in self.finalists],
            "outer_optimizer": self.outer_optimizer.state_dict(),
            "step": self.step,
            "episodes_started": self.episodes_started,
            "episodes": [
                None
                if episode is None
                else {
                    "seed": episode.seed,
                    "horizon": episode.horizon,
                    "generator": episode.optimizee.generator.get_state(),
                    "carry": vars(episode.carry),
                }
                for episode in self.episodes
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of the same recipe.

        Args:
            state: The saved state.
        """
        self.rule.load_state_dict(state["rule"])
        self.average.load_state_dict(state["average"])
        self.best = self._unpacked(state["best"])
        self.finalists = [self._unpacked(one) for one in state["finalists"]]
        self.outer_optimizer.load_state_dict(state["outer_optimizer"])
        self.step = state["step"]
        self.episodes_started = state["episodes_started"]
        for slot, saved in enumerate(state["episodes"]):
            if saved is None:
                self.episodes[slot] = None
                continue
            optimizee = self.task.sample(saved["seed"])
            optimizee.generator.set_state(saved["generator"])
            self.episodes[slot] = Episode(saved["seed"], saved["horizon"], optimizee, Carry(**saved["carry"]))

    def _packed(self, best: Best) -> dict[str, Any]:
        return vars(best) | {"rule": best.rule.state_dict()}

    def _unpacked(self, saved: dict[str, Any]) -> Best:
        rule = self.in_use(self.rule)
        rule.load_state_dict(saved["rule"])
        return Best(**(saved | {"rule": rule}))


def validate(rule: AnyRule, task: Task, recipe: Recipe, horizon: Horizons | None = None) -> float:
    """Return the recipe's validation figure over whole episodes of fixed optimizees.

    Args:
        rule: The rule to judge.
        task: Where optimizees come from.
        recipe: Says how many, for how long, and what the objective is.
        horizon: For how long instead.

    Returns:
        Mean of :func:`whole_episode` over optimizees; infinite if any diverges. Lower is better.
    """
    total, horizon = 0.0, horizon or recipe.validation.horizon
    horizons = horizon if isinstance(horizon, tuple) else (horizon,)
    for index in range(recipe.validation.optimizees):
        optimizee = task.sample(derive_seed(0, "validation", index))
        total += whole_episode(rule, optimizee, horizons[index % len(horizons)], recipe.outer)
    return total / recipe.validation.optimizees if math.isfinite(total) else math.inf


def whole_episode(rule: AnyRule, optimizee: Optimizee, horizon: int, outer: OuterLoop) -> float:
    """Return how good a rule is on one optimizee; lower is better.

    Args:
        rule: The rule to judge.
        optimizee: Freshly sampled.
        horizon: Inner steps.
        outer: Says what the objective is.

    Returns:
        With the mean objective the mean loss. With the others the mean of ``log(loss / initial loss)`` around a fifth of the
        horizon and at its end, as a rule must be good early and late; with the last objective at its end alone.
    """
    carry = start_episode(rule, optimizee)
    record, _ = roll_out(rule, optimizee, carry, horizon, no_coordinate())
    losses = record.losses
    if outer.objective != "mean":
        early, late = (losses[int(0.9 * end) : end] for end in (max(horizon // 5, 1), horizon))
        losses = torch.stack((early.mean(0), late.mean(0)))
    return meta_loss(outer, losses, carry.initial_loss)


def meta_loss(outer: OuterLoop, losses: Tensor, initial: Tensor) -> float:
    """Return the scalar that an objective's weights are the derivative of.

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


def cosine(progress: float, final: float) -> float:
    """Return the factor of a cosine decay from 1 to ``final`` as ``progress`` goes from 0 to 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """Derive an independent seed, so that training, validation and evaluation never share an optimizee."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
