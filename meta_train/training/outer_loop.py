"""Meta-training as a generator of outer steps. It prints nothing and writes no files; the caller does."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from learned_optim.weights import Weights
from meta_train.tasks import ImportedTask, Task, derive_seed, with_data
from meta_train.training.base import start_weights
from meta_train.training.episodes import Episode, GradientEstimate, antithetic_pair, truncation, whole_episode
from meta_train.training.parts import Parts
from meta_train.training.recipe import Horizons, Phase, Recipe
from meta_train.workers import Each


@dataclass(frozen=True)
class OuterStep:
    """What one outer step did.

    Args:
        step: Outer steps so far, from 1.
        meta_loss: Mean over episodes of the losses, or of ``log(loss / initial loss)``, as the objective says. In an
            imitation, the distance from the teacher (:func:`~meta_train.training.meta_gradient.imitate`).
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
        rule: The rule with the options of its use.
        validation: Its validation figure; infinite before the first validation.
        step: Outer steps that the rule has taken.
        final: Its figure over the recipe's final horizons, once a phase has ended with this rule.
    """

    rule: Parts
    validation: float = math.inf
    step: int = 0
    final: float | None = None


class MetaTraining:
    """The state of a meta-training run, complete enough to go on bit for bit.

    Args:
        recipe: Describes the run.
        task: Draw optimizees from here instead of from the recipe's task: any object with ``sample(seed)``.
        data: Directory of real data, for tasks that need it.
        each: Goes over the episodes of an outer step and of a validation: ``map``, or the method of
            :class:`~meta_train.workers.Workers`, which needs a task that can be pickled. The results are the same.
    """

    def __init__(self, recipe: Recipe, task: Task | None = None, data: Path | None = None, each: Each = map) -> None:
        self.recipe, self.each = recipe, each
        self.given = task
        self.phases = recipe.phases
        self.teacher = recipe.imitation.build_teacher() if recipe.imitation else None
        self.task: Task = with_data(recipe.task if task is None else task, data)
        self.validation_task: Task = with_data(recipe.validation.task, data) if recipe.validation.task else self.task
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.seed, "meta-parameters"))
            self.rule = recipe.build_rule()
        start = start_weights(recipe.start).rule.state_dict() if recipe.start else None
        for rule in self.rule:
            if start is not None:
                rule.load_state_dict(start)
                continue
            for layer in range(rule.lstm.num_layers):
                getattr(rule.lstm, f"bias_ih_l{layer}").data.view(4, -1)[1] += recipe.outer.forget_bias
            rule.readout.weight.data *= recipe.outer.readout
        self.average = copy.deepcopy(self.rule)
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
        """Return the outer steps already taken in this phase, and the phase."""
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
        estimates = self._estimates(phase)
        self._set_mean_gradient(estimates)
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
        meta_loss = sum(estimate.meta_loss for estimate in estimates) / len(estimates)
        return OuterStep(self.step, meta_loss, float(norm), lr, validation, is_best, final)

    def _estimates(self, phase: Phase) -> list[GradientEstimate]:
        """Let every episode go on, and return the estimates of the meta-gradient."""
        if evolution := phase.outer.evolution:
            pair = functools.partial(antithetic_pair, self.rule, phase.outer, evolution)
            return list(self.each(pair, [self._draw(phase) for _ in range(evolution.pairs)]))
        under_way = [episode or self._draw(phase) for episode in self.episodes]
        estimates = list(self.each(functools.partial(truncation, self.rule, self.teacher, phase), under_way))
        self.episodes = [estimate.episode for estimate in estimates]
        return estimates

    def _draw(self, phase: Phase) -> Episode:
        """Return the next episode, which has not begun."""
        seed = derive_seed(self.recipe.seed, "train", self.episodes_started)
        self.episodes_started += 1
        shortest, longest = phase.inner.horizon
        horizon = math.exp(random.Random(seed).uniform(math.log(shortest), math.log(longest)))
        return Episode(self.task, seed, round(horizon))

    def _set_mean_gradient(self, estimates: Sequence[GradientEstimate]) -> None:
        for parameter, *every in zip(self.rule.parameters(), *(estimate.grads for estimate in estimates), strict=True):
            grads = [grad for grad in every if grad is not None]
            parameter.grad = sum(grads[1:], grads[0]) / len(estimates) if grads else None

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

    def validation_figure(self, rule: Parts, *, final: bool = False) -> float:
        """Return the figure by which this run compares meta-parameters.

        Args:
            rule: The rule that holds them.
            final: Use the recipe's final horizons, not the horizons of every validation.

        Returns:
            The figure of :func:`validate`, with the options that the recipe validates with.
        """
        validation = self.recipe.validation
        used = self.in_use(rule, **validation.use)
        horizon = validation.final_horizon if final else None
        return validate(used, self.validation_task, self.recipe, horizon, self.each)

    def in_use(self, rule: Parts, **options: Any) -> Parts:
        """Return a copy of a rule of this run as it will be used: with the recipe's ``use``, overridden by these options."""
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
            "episodes": [episode and episode.state_dict() for episode in self.episodes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the :meth:`state_dict` of a run with the same recipe.

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
        self.episodes = [saved and Episode.from_state(self.task, saved) for saved in state["episodes"]]

    def provenance(self) -> dict[str, str]:
        """Return what a weight file of this run must say about its task and its start, beside the recipe."""
        about: dict[str, str] = {}
        if self.given is not None:
            kind = type(self.given)
            about["task"] = f"{kind.__module__}:{kind.__qualname__}, given in Python and not by the recipe"
        elif isinstance(self.task, ImportedTask) and self.task.code:
            about["task_code"] = self.task.code
        if self.recipe.start:
            about["start"] = start_weights(self.recipe.start).fingerprint
        return about

    def weights(self, name: str, recipe_text: str = "") -> Weights:
        """Return the best rule so far as weights whose provenance is true.

        Args:
            name: Name of the weights.
            recipe_text: TOML of this run's recipe, to be kept with them.

        Returns:
            The weights, to be used or saved.
        """
        about = {"torch": torch.__version__, "outer_steps": str(self.best.step), "validation": f"{self.best.validation:.6g}"}
        (rule,) = self.best.rule
        return Weights(rule, name, recipe_text, {**about, **self.provenance()})

    def _packed(self, best: Best) -> dict[str, Any]:
        return vars(best) | {"rule": best.rule.state_dict()}

    def _unpacked(self, saved: dict[str, Any]) -> Best:
        rule = self.in_use(self.rule)
        rule.load_state_dict(saved["rule"])
        return Best(**(saved | {"rule": rule}))


def validate(rule: Parts, task: Task, recipe: Recipe, horizon: Horizons | None = None, each: Each = map) -> float:
    """Return the recipe's validation figure over whole episodes of fixed optimizees.

    Args:
        rule: The rule to judge.
        task: Where optimizees come from.
        recipe: Says how many, for how long, and what the objective is.
        horizon: Inner steps in place of the recipe's.
        each: Goes over the episodes.

    Returns:
        Mean of :func:`~meta_train.training.episodes.whole_episode` over optimizees; infinite if any
        diverges. Lower is better.
    """
    horizon = horizon or recipe.validation.horizon
    horizons = horizon if isinstance(horizon, tuple) else (horizon,)
    figures = each(functools.partial(_validated, rule, task, recipe, horizons), range(recipe.validation.optimizees))
    total = sum(figures, 0.0)
    return total / recipe.validation.optimizees if math.isfinite(total) else math.inf


def _validated(rule: Parts, task: Task, recipe: Recipe, horizons: tuple[int, ...], index: int) -> float:
    """Return the figure of one optimizee; optimizees take the horizons in turn."""
    optimizee = task.sample(derive_seed(0, "validation", index))
    return whole_episode(rule, optimizee, horizons[index % len(horizons)], recipe.outer)


def cosine(progress: float, final: float) -> float:
    """Return the factor of a cosine decay from 1 to ``final`` as ``progress`` goes from 0 to 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
