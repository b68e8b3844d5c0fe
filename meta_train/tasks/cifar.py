"""CIFAR-10: small convolutional nets with batch norm, the paper's third experiment."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.tasks.images import CIFAR10, read_images
from meta_train.tasks.task import Count, NotNegative, Optimizee, Params, Task, seeded

Labels = tuple[Annotated[int, msgspec.Meta(ge=0, le=9)], ...]


class Cifar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="cifar"):
    """Cross entropy of a convolutional net on minibatches of photos, pixels from 0 to 1.

    Each convolution is followed by batch norm over the minibatch, ReLU and 2 x 2 max-pooling; then come dense layers with
    batch norm and ReLU, and a readout.

    Args:
        half: Half of the training photos: meta-train on one and judge on the other.
        labels: Classes that are kept, as the net's outputs in this order; CIFAR-5 and CIFAR-2 keep five and two.
        side: Side of the photos in pixels; smaller photos are means of neighbours, and cost less.
        channels: Channels of each convolution.
        kernel: Side of the convolutions' kernels, odd.
        dense: Units of each dense layer before the readout.
        batch: Photos in a minibatch, drawn with replacement.
        initial_std: Weights start as Gaussians of this size; batch norm at one and zero.
        problems: Nets side by side, P.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.3; sizes of the convolutions as in DeepMind's code.
    """

    half: Literal["first", "second"] = "first"
    labels: Labels = tuple(range(10))
    side: Literal[8, 16, 32] = 32
    channels: tuple[Count, ...] = (16, 16, 16)
    kernel: Count = 5
    dense: tuple[Count, ...] = (32,)
    batch: Count = 128
    initial_std: NotNegative = 0.01
    problems: Count = 1

    def __post_init__(self) -> None:
        """Refuse options that make no net.

        Raises:
            ValueError: If a class is named twice, fewer than two are named, or the kernel's side is even.
        """
        if len(set(self.labels)) < max(len(self.labels), 2):
            raise ValueError(f"labels must name at least two different classes, got {list(self.labels)}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    def sample(self, seed: int) -> Optimizee:
        """Return fresh nets, with the photos of the Hub.

        Args:
            seed: Decides initialisation and minibatches.

        Returns:
            P problems whose parameters are named ``conv0.weight`` and so on, ``dense0.weight`` and so on.
        """
        return self.sample_from(*_photos(self.half, self.labels, self.side, None), seed)

    def on(self, data: Path) -> Task:
        """Return the task with the photos of a directory.

        Args:
            data: Directory with ``uoft-cs/cifar10``; without, the Hub is asked.

        Returns:
            The task.
        """
        return _Local(self, data)

    def sample_from(self, images: Tensor, labels: Tensor, seed: int) -> Optimizee:
        """Return fresh nets for given images.

        Args:
            images: ``(N, colours, side, side)``, uint8; the side is a multiple of 2 to the number of convolutions.
            labels: ``(N,)``, positions in :attr:`labels`.
            seed: Decides initialisation and minibatches.

        Returns:
            The optimizee.
        """
        generator, shape = seeded(seed), (self.problems, self.batch)

        def normal(*sizes: int) -> Tensor:
            return self.initial_std * torch.randn(self.problems, *sizes, generator=generator)

        params: Params = {}
        for layer, (below, above) in enumerate(itertools.pairwise([images.shape[1], *self.channels])):
            params[f"conv{layer}.weight"] = normal(above, below, self.kernel, self.kernel)
            params |= self._norm(f"conv{layer}", above)
        side = images.shape[2] // 2 ** len(self.channels)
        sizes = [self.channels[-1] * side**2, *self.dense, len(self.labels)]
        for layer, (below, above) in enumerate(itertools.pairwise(sizes)):
            params[f"dense{layer}.weight"] = normal(below, above)
            params |= self._norm(f"dense{layer}", above)
        # The readout has a bias and no norm.
        readout = f"dense{len(self.dense)}"
        del params[f"{readout}.gain"]

        def losses(params: Params) -> Tensor:
            index = torch.randint(len(images), shape, generator=generator)
            x = images[index].to(params["dense0.weight"].dtype) / 255
            logits = self.logits(params, x)
            return F.cross_entropy(logits.flatten(0, 1), labels[index].flatten(), reduction="none").view(shape).mean(1)

        return Optimizee(params, losses, generator)

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Run the nets.

        Args:
            params: Named as :meth:`sample` does.
            x: ``(P, B, colours, side, side)``.

        Returns:
            ``(P, B, classes)``.
        """
        problems, batch = x.shape[:2]
        # All problems in one convolution: each is a group of channels.
        x = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        for layer in range(len(self.channels)):
            x = F.conv2d(x, params[f"conv{layer}.weight"].flatten(0, 1), padding=self.kernel // 2, groups=problems)
            # Max-pooling and ReLU commute; pooling first leaves ReLU fewer numbers.
            x = F.max_pool2d(_normalise(x, params, f"conv{layer}"), 2).relu()
        x = x.reshape(batch, problems, -1).transpose(0, 1)
        for layer in range(len(self.dense)):
            x = (x @ params[f"dense{layer}.weight"]).transpose(0, 1).flatten(1)
            x = _normalise(x, params, f"dense{layer}").relu().unflatten(1, (problems, -1)).transpose(0, 1)
        readout = f"dense{len(self.dense)}"
        return x @ params[f"{readout}.weight"] + params[f"{readout}.bias"].unsqueeze(1)

    def _norm(self, layer: str, size: int) -> Params:
        return {f"{layer}.gain": torch.ones(self.problems, size), f"{layer}.bias": torch.zeros(self.problems, size)}


def _normalise(x: Tensor, params: Params, layer: str) -> Tensor:
    """Batch norm over the minibatch of ``(B, P * size, ...)``, without running statistics."""
    gain, bias = params[f"{layer}.gain"].flatten(), params[f"{layer}.bias"].flatten()
    return F.batch_norm(x, None, None, gain, bias, training=True)


@functools.cache
def _photos(half: str, labels: Labels, side: int, data: Path | None) -> tuple[Tensor, Tensor]:
    """Read the photos of some classes in one half of the data, at a size, and their positions among the classes."""
    images, classes = read_images(CIFAR10, data, "train")
    matches = classes.unsqueeze(1) == torch.tensor(labels)
    kept = matches.any(1)
    kept[slice(len(kept) // 2, None) if half == "first" else slice(len(kept) // 2)] = False
    pixels = images.shape[2] // side
    photos = F.avg_pool2d(images[kept].float(), pixels).round().byte() if pixels > 1 else images[kept]
    return photos, matches[kept].int().argmax(1)


@dataclass(frozen=True)
class _Local:
    """A :class:`Cifar` with the photos of a directory."""

    task: Cifar
    data: Path

    def sample(self, seed: int) -> Optimizee:
        """Return fresh nets."""
        task = self.task
        return task.sample_from(*_photos(task.half, task.labels, task.side, self.data), seed)
