"""MNIST: small dense classifiers of handwritten digits, the paper's second experiment."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.tasks.images import MNIST, read_images
from meta_train.tasks.models import ACTIVATIONS
from meta_train.tasks.task import Count, NotNegative, Optimizee, Params, Task, seeded

Choice = TypeVar("Choice", bound=str)

HALVES = {"first": range(30_000), "second": range(30_000, 60_000)}
"""Disjoint halves of the training images: one to meta-train on, one to judge on."""


Pixels = Literal["unit", "standard", "centred"]
Start = Literal["gaussian", "pytorch"]
Range = Annotated[tuple[Count, ...], msgspec.Meta(min_length=2, max_length=2)]
"""The least and the most."""


class Mnist(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="mnist"):
    """Cross entropy of a dense net on minibatches of digits.

    An option that names several values makes each optimizee draw one of them.

    Args:
        hidden: Units of each hidden layer.
        activation: Activation between layers.
        half: Half of the training images: meta-train on one and judge on the other.
        batch: Images in a minibatch, drawn with replacement; or the least and the most of a log-uniform draw.
        initial_std: Standard deviation of weights and biases at a ``"gaussian"`` start.
        problems: Nets side by side, P, each with an initialisation and minibatches of its own.
        pixels: ``"unit"`` leaves pixels from 0 to 1, ``"standard"`` subtracts the mean of all and divides by their standard
            deviation (0.1307 and 0.3081), ``"centred"`` subtracts each pixel's own mean.
        start: ``"gaussian"``, as the paper's code starts, or ``"pytorch"``, as ``nn.Linear`` does.
        units: The least and the most units of every hidden layer, drawn log-uniformly in place of ``hidden``'s.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.2; the ``"gaussian"`` start as in DeepMind's code.
    """

    hidden: tuple[Count, ...] = (20,)
    activation: Literal["sigmoid", "relu", "tanh"] = "sigmoid"
    half: Literal["first", "second"] = "first"
    batch: Count | Range = 128
    initial_std: NotNegative = 0.01
    problems: Count = 1
    pixels: tuple[Pixels, ...] = ("unit",)
    start: tuple[Start, ...] = ("gaussian",)
    units: Range | None = None

    def sample(self, seed: int) -> Optimizee:
        """Return fresh nets, with the digits of the Hub.

        Args:
            seed: Decides initialisation and minibatches.

        Returns:
            P problems with parameters ``weight0`` ``(P, 784, units)``, ``bias0`` ``(P, 1, units)`` and so on.
        """
        return self.sample_from(*read_images(MNIST, None, "train", HALVES[self.half]), seed)

    def on(self, data: Path) -> Task:
        """Return the task with the digits of a directory.

        Args:
            data: Directory with ``ylecun/mnist``; without, the Hub is asked.

        Returns:
            The task.
        """
        return _Local(self, data)

    def sample_from(self, images: Tensor, labels: Tensor, seed: int) -> Optimizee:
        """Return fresh nets for given images.

        Args:
            images: ``(N, height, width)``, uint8.
            labels: ``(N,)``.
            seed: Decides initialisation and minibatches.

        Returns:
            The optimizee.
        """
        generator = seeded(seed)
        pixels, start = _one_of(self.pixels, generator), _one_of(self.start, generator)
        batch = self.batch if isinstance(self.batch, int) else _between(self.batch, generator)
        hidden = self.hidden if self.units is None else (_between(self.units, generator),) * len(self.hidden)
        shape, sizes = (self.problems, batch), [images[0].numel(), *hidden, 10]
        params: Params = {}
        for layer, (below, above) in enumerate(itertools.pairwise(sizes)):
            for name, rows in (("weight", below), ("bias", 1)):
                size = (self.problems, rows, above)
                if start == "gaussian":
                    params[f"{name}{layer}"] = self.initial_std * torch.randn(size, generator=generator)
                else:
                    params[f"{name}{layer}"] = (2 * torch.rand(size, generator=generator) - 1) / below**0.5
        shift, factor = _normalisation(pixels, images)

        def losses(params: Params) -> Tensor:
            index = torch.randint(len(images), shape, generator=generator)
            x = images[index].flatten(2).to(params["weight0"].dtype) / 255
            x = x if pixels == "unit" else (x - shift) * factor
            for layer in range(len(sizes) - 1):
                x = ACTIVATIONS[self.activation](x) if layer else x
                x = torch.baddbmm(params[f"bias{layer}"], x, params[f"weight{layer}"])
            return F.cross_entropy(x.flatten(0, 1), labels[index].flatten(), reduction="none").view(shape).mean(1)

        return Optimizee(params, losses, generator)


def _one_of(choices: tuple[Choice, ...], generator: torch.Generator) -> Choice:
    """Draw a choice; where there is only one, nothing is drawn."""
    return choices[int(torch.randint(len(choices), (), generator=generator))] if len(choices) > 1 else choices[0]


def _between(ends: tuple[int, ...], generator: torch.Generator) -> int:
    """Draw a whole number log-uniformly, both ends included."""
    low, high = ends
    return min(int(low * ((high + 1) / low) ** float(torch.rand((), generator=generator))), high)


def _normalisation(pixels: Pixels, images: Tensor) -> tuple[Tensor | float, float]:
    """Return the number to subtract from pixels between 0 and 1, and the factor after that."""
    if pixels == "unit":
        return 0.0, 1.0
    return (_mean_image(images), 1.0) if pixels == "centred" else (0.1307, 1 / 0.3081)


@functools.lru_cache(maxsize=4)
def _mean_image(images: Tensor) -> Tensor:
    return images.flatten(1).double().mean(0).float() / 255


@dataclass(frozen=True)
class _Local:
    """An :class:`Mnist` with the digits of a directory."""

    task: Mnist
    data: Path

    def sample(self, seed: int) -> Optimizee:
        """Return fresh nets."""
        return self.task.sample_from(*read_images(MNIST, self.data, "train", HALVES[self.task.half]), seed)
