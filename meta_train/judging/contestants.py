"""The contestants: learned rules beside settings of ordinary optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler
from torch.optim.optimizer import ParamsT

from learned_optim import LearnedOptimizer
from learned_optim.weights import Weights, resolve_weights
from meta_train.judging.baselines import MakeOptimizer, MakeSchedule, Setting
from meta_train.rows import LEARNED
from meta_train.training.parts import part_of


def _linear(optimizer: Optimizer, horizon: int) -> LRScheduler:
    return LinearLR(optimizer, 1.0, 0.0, horizon)


DECAYS: Mapping[str, MakeSchedule] = {"cosine": CosineAnnealingLR, "linear": _linear}
"""Schedules that users attach to any optimizer; both end at zero."""


@dataclass(frozen=True)
class Learned:
    """A learned rule with a factor on its update.

    Args:
        name: Name in tables.
        fingerprint: Fingerprint of the weights; ``+`` joins the fingerprints of several parts.
        lr: Factor on the update.
        weights: Weights by the prefix of the parameters that they move; ``""`` where one rule moves all.
        decay: Schedule of the rate, out of :data:`DECAYS`, or none.
    """

    name: str
    fingerprint: str
    lr: float = 1.0
    weights: Mapping[str, Weights] = field(default_factory=dict, compare=False, repr=False)
    decay: str = ""

    @property
    def schedule(self) -> MakeSchedule | None:
        """From optimizer and horizon to a schedule; None for a constant rate."""
        return DECAYS[self.decay] if self.decay else None

    @property
    def first(self) -> Weights:
        """The weights of the first part."""
        return next(iter(self.weights.values()))

    @property
    def names(self) -> str:
        """Names of all weights, as the command line takes them."""
        return "+".join(weights.name for weights in self.weights.values())

    @property
    def identity(self) -> str:
        """Everything that decides the runs of this rule, beside the rate."""
        return f"{self.fingerprint} {self.decay}" if self.decay else self.fingerprint

    @property
    def label(self) -> str:
        """Name in tables."""
        return f"{LEARNED} ({self.name})" + (f", lr={self.lr:g}" if self.lr != 1 else "")

    @property
    def text(self) -> str:
        """Hyperparameters, for tables: none."""
        return ""

    def make(self, params: ParamsT) -> Optimizer:
        """Build the shipped optimizer, with a group for each part of a model.

        Args:
            params: Parameters, with names where there are several parts.

        Returns:
            The optimizer.
        """
        if "" in self.weights:
            return LearnedOptimizer(params, lr=self.lr, weights=self.weights[""])
        groups: list[dict[str, Any]] = [{"params": [], "weights": weights} for weights in self.weights.values()]
        for name, param in dict(params).items():  # type: ignore[arg-type]
            groups[part_of(self.weights, name)]["params"].append((name, param))
        return LearnedOptimizer(groups, lr=self.lr)


Contestant = Setting | Learned
"""Both have ``make``, ``schedule``, ``lr``, ``label``, ``text`` and ``identity``."""


def learned(weights: Weights | str, lr: float = 1.0) -> Learned:
    """Make weights a contestant.

    Args:
        weights: Weights of a whole model, or their bundled name, file or Hub id.
        lr: Factor on the update.

    Returns:
        The contestant.
    """
    loaded = _named(weights) if isinstance(weights, str) else weights
    return Learned(loaded.name, loaded.fingerprint, lr, {"": loaded})


def learned_with(weights: Weights) -> MakeOptimizer:
    """Return a maker of the shipped optimizer with the given weights."""
    return learned(weights).make


def load_contestants(names: Sequence[str], lrs: Sequence[float] = (1.0,)) -> list[Learned]:
    """Load weights under short names.

    Args:
        names: Bundled names, files or Hub ids; ``+`` joins the names of a model's parts.
        lrs: Factors on the update.

    Returns:
        One contestant for each name and factor.

    Raises:
        ValueError: If two have the same name or factor, or ``+`` joins weights of a whole model with others.
    """
    if len(set(lrs)) < len(lrs):
        raise ValueError(f"--lr needs different factors, got {', '.join(f'{lr:g}' for lr in lrs)}")
    loaded = [_of_parts([name] if Path(name).exists() else name.split("+"), lr) for name in names for lr in lrs]
    labels = [one.label for one in loaded]
    if len(set(labels)) < len(labels):
        shown = ", ".join(label.removeprefix(f"{LEARNED} ") for label in labels)
        raise ValueError(f"weights need different names to share a table, got {shown}; publish them first")
    return loaded


def _named(name: str) -> Weights:
    one = resolve_weights(name)
    return Weights(one.rule, Path(name).stem if name.endswith(".safetensors") else name, one.recipe, one.metadata)


def _of_parts(names: Sequence[str], lr: float) -> Learned:
    loaded = [_named(name) for name in names]
    if len(loaded) == 1:
        return learned(loaded[0], lr)
    if whole := [one.name for one in loaded if "part" not in one.metadata]:
        raise ValueError(f"{whole[0]} moves a whole model; only weights that were meta-trained as parts of one go together")
    together = {one.metadata["part"]: one for one in loaded}
    shared = list(dict.fromkeys(one.name.removesuffix(f"-{part}") for part, one in together.items()))
    fingerprint = "+".join(weights.fingerprint for weights in together.values())
    return Learned("+".join(shared), fingerprint, lr, together)
