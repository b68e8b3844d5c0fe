"""Who is judged: learned rules beside settings of ordinary optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from learned_optim import LearnedOptimizer
from learned_optim.weights import Weights, resolve_weights
from meta_train.judging.baselines import MakeOptimizer, Setting
from meta_train.training.parts import part_of

LEARNED = "LSTM"
"""How tables call a learned rule, before its name."""


@dataclass(frozen=True, eq=False)
class WeightsOfParts:
    """Weights that share a model.

    Args:
        name: In tables.
        weights: By the beginning of the names of the parameters that they move.
    """

    name: str
    weights: Mapping[str, Weights]

    @property
    def fingerprint(self) -> str:
        """The fingerprints of all, joined by ``+``."""
        return "+".join(weights.fingerprint for weights in self.weights.values())

    def make(self, params: ParamsT) -> Optimizer:
        """Build the shipped optimizer, with a group for each part.

        Args:
            params: Named parameters.

        Returns:
            The optimizer.
        """
        groups: list[dict[str, Any]] = [{"params": [], "weights": weights} for weights in self.weights.values()]
        for name, param in dict(params).items():  # type: ignore[arg-type]
            groups[part_of(self.weights, name)]["params"].append((name, param))
        return LearnedOptimizer(groups)


AnyWeights = Weights | WeightsOfParts


def of_all_parts(learned: AnyWeights) -> tuple[Weights, ...]:
    """Return the weights of every part of a model."""
    return tuple(learned.weights.values()) if isinstance(learned, WeightsOfParts) else (learned,)


Contestant = Setting | AnyWeights


def learned_with(weights: AnyWeights) -> MakeOptimizer:
    """Return a maker of the shipped optimizer with the given weights."""
    if isinstance(weights, WeightsOfParts):
        return weights.make

    def make(params: ParamsT) -> Optimizer:
        return LearnedOptimizer(params, weights=weights)

    return make


def load_contestants(names: Sequence[str]) -> list[AnyWeights]:
    """Load weights under short names.

    Args:
        names: Bundled names, files or Hub ids; those of a model's parts joined by ``+``.

    Returns:
        One contestant a name.

    Raises:
        ValueError: If two have the same name, or one that moves a whole model is joined with others.
    """
    loaded = [_contestant([name] if Path(name).exists() else name.split("+")) for name in names]
    refuse_repeated([one.name for one in loaded])
    return loaded


def refuse_repeated(labels: Sequence[str]) -> None:
    """Refuse names that a table could not tell apart.

    Args:
        labels: The names.

    Raises:
        ValueError: If two are the same.
    """
    if len(set(labels)) < len(labels):
        raise ValueError(f"weights need different names to share a table, got {', '.join(labels)}; publish them first")


def _contestant(names: Sequence[str]) -> AnyWeights:
    loaded = [
        Weights(one.rule, Path(name).stem if name.endswith(".safetensors") else name, one.recipe, one.metadata)
        for name, one in zip(names, map(resolve_weights, names), strict=True)
    ]
    if len(loaded) == 1:
        return loaded[0]
    if whole := [one.name for one in loaded if "part" not in one.metadata]:
        raise ValueError(f"{whole[0]} moves a whole model; only weights that were meta-trained as parts of one go together")
    together = {one.metadata["part"]: one for one in loaded}
    shared = list(dict.fromkeys(one.name.removesuffix(f"-{part}") for part, one in together.items()))
    return WeightsOfParts("+".join(shared), together)
