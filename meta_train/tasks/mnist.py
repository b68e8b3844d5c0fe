"""MNIST: small dense classifiers of handwritten digits, the paper's second experiment."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.tasks.images import MNIST, read_images
from meta_train.tasks.models import ACTIVATIONS
from meta_train.tasks.task import Count, NotNegative, Optimizee, Params, Task, seeded

HALVES = {"first": range(30_000), "second": range(30_000, 60_000)}
"""Disjoint halves of the training images: one to meta-train on, one to judge on."""


class Mnist(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="mnist"):
    """Cross entropy of a dense net on minibatches of digits, pixels from 0 to 1.

    Args:
        hidden: Units of each hidden layer.
        activation: Between layers.
        half: Of the training images; to meta-train on one and judge on the other.
        batch: Images in a minibatch, drawn with replacement.
        initial_std: Weights and biases start as Gaussians of this size.
        problems: Nets side by side, P, each with an initialisation and minibatches of its own.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.2; the initialisation is that of DeepMind's code.
    """

    hidden: tuple[Count, ...] = (20,)
    activation: Literal["sigmoid", "relu", "tanh"] = "sigmoid"
    half: Literal["first", "second"] = "first"
    batch: Count = 128
    initial_std: NotNegative = 0.01
    problems: Count = 1

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
        generator, shape = seeded(seed), (self.problems, self.batch)
        sizes = [images[0].numel(), *self.hidden, 10]
        params: Params = {}
        for layer, (below, above) in enumerate(itertools.pairwise(sizes)):
            for name, rows in (("weight", below), ("bias", 1)):
                start = torch.randn(self.problems, rows, above, generator=generator)
                params[f"{name}{layer}"] = self.initial_std * start

        def losses(params: Params) -> Tensor:
            index = torch.randint(len(images), shape, generator=generator)
            x = images[index].flatten(2).to(params["weight0"].dtype) / 255
            for layer in range(len(sizes) - 1):
                x = ACTIVATIONS[self.activation](x) if layer else x
                x = torch.baddbmm(params[f"bias{layer}"], x, params[f"weight{layer}"])
            return F.cross_entropy(x.flatten(0, 1), labels[index].flatten(), reduction="none").view(shape).mean(1)

        return Optimizee(params, losses, generator)


@dataclass(frozen=True)
class _Local:
    """An :class:`Mnist` with the digits of a directory."""

    task: Mnist
    data: Path

    def sample(self, seed: int) -> Optimizee:
        """Return fresh nets."""
        return self.task.sample_from(*read_images(MNIST, self.data, "train", HALVES[self.task.half]), seed)
