"""Neural Art: the picture is the optimizee, pulled towards the content of a photo and the style of a painting.

The data are a folder ``neural_art`` with ``photos/*.jpg`` and ``styles/NAME.jpg``, and the file of the network.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from meta_train.tasks.features import SQUEEZENET, Features, Network, feature_extractor
from meta_train.tasks.task import Count, LossFunction, NotNegative, Optimizee, Params, Positive, Task, seeded

Split = Literal["train", "validation", "tuning", "test"]
SPLITS: dict[int, Split] = {0: "test", 1: "tuning", 2: "validation"}
"""Each of these gets one of every ten photos, in the order of their names; ``"train"`` gets the others."""


class NeuralArt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="neural-art"):
    """Gatys et al.'s neural art, with features of any network.

    The loss of a picture x, with features F_l of layer l, their Gram matrices G_l over positions, content c and style s::

        size^2 / 64^2 * (content_weight * |F(x) - F(c)|^2 / |F(c)|^2
                         + style_weight * mean_l |G_l(x) - G_l(s)|^2 / |G_l(s)|^2
                         + smooth * V(x))

    with V the mean squared difference of neighbouring pixels. Errors are relative, so neither the network nor a layer sets
    their size; the factor in front keeps the gradient of a pixel the same at every resolution. A picture starts as noise.

    Args:
        split: Photos to draw contents from; two splits share no photo.
        style: Name of the painting.
        size: Side of the picture.
        problems: Contents side by side, P.
        content_weight: Weight of the content.
        style_weight: Weight of the style.
        smooth: Weight of the total variation.
        stiffness: Smallest and largest factor on the loss of a content, drawn log-uniformly for each. With one
            factor alone a rule on raw gradients learns one step size, and another painting may need smaller steps.
        network: The network that gives the features.
        network_file: Weights of the network, in the folder of the data.

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.4; Gatys et al. 2015, arXiv:1508.06576. Departures: SqueezeNet
        for VGG, relative errors for absolute ones.
    """

    split: Split = "train"
    style: str = "starry_night"
    size: Count = 64
    problems: Count = 1
    content_weight: NotNegative = 30.0
    style_weight: NotNegative = 1000.0
    smooth: NotNegative = 300.0
    stiffness: tuple[Positive, Positive] = (1.0, 1.0)
    network: Network = SQUEEZENET
    network_file: str = "squeezenet_v1.0_imagenet.safetensors"

    def __post_init__(self) -> None:
        """Refuse an empty range.

        Raises:
            ValueError: If the smallest stiffness is above the largest.
        """
        if self.stiffness[0] > self.stiffness[1]:
            raise ValueError(f"stiffness must be [smallest, largest], got {list(self.stiffness)}")

    def sample(self, seed: int) -> Optimizee:
        """Refuse: the task needs pictures first.

        Args:
            seed: Seed of the optimizee.

        Raises:
            ValueError: Always.
        """
        raise ValueError("neural-art needs photos, paintings and a network: give --data DIR")

    def on(self, data: Path) -> Task:
        """Return the task with its pictures and its network.

        Args:
            data: Directory with a folder ``neural_art``.

        Returns:
            The task that can be sampled.
        """
        return _Studio(self, data / "neural_art")

    def loss(self, extract: Callable[[Tensor], Features], contents: Tensor, style: Tensor) -> LossFunction:
        """Return the losses of pictures.

        Args:
            extract: From :func:`~meta_train.tasks.features.feature_extractor`.
            contents: ``(P, 3, height, width)``, values 0 to 1.
            style: ``(1, 3, any height, any width)``.

        Returns:
            From ``{"picture": (P, 3, height, width)}`` to ``(P,)``.
        """
        layer = self.network.content
        with torch.no_grad():
            target, painting = extract(contents)[layer], extract(style)
            grams = {name: gram(painting[name]) for name in self.network.style}
        area = contents.shape[2] * contents.shape[3] / 64**2

        def losses(params: Params) -> Tensor:
            picture = params["picture"]
            found = extract(picture)
            content = _relative(found[layer], target)
            styles = torch.stack([_relative(gram(found[name]), wanted) for name, wanted in grams.items()]).mean(0)
            down, right = picture.diff(dim=2), picture.diff(dim=3)
            variation = down.square().mean((1, 2, 3)) + right.square().mean((1, 2, 3))
            return area * (self.content_weight * content + self.style_weight * styles + self.smooth * variation)

        return losses


def gram(features: Tensor) -> Tensor:
    """Return the mean over positions of products of channels.

    Args:
        features: ``(P, channels, height, width)``.

    Returns:
        ``(P, channels, channels)``.
    """
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def _relative(value: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance in units of the target, one for each entry of the leading dimension."""
    target = target.to(value)
    return (value - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)


def read_picture(path: Path, size: int | None = None, crop: tuple[float, float, float] = (1.0, 0.5, 0.5)) -> Tensor:
    """Read a square of a picture.

    Args:
        path: Any file that Pillow reads.
        size: Side of the result; None keeps the picture whole and as large as it is.
        crop: Side of the square as a share of the short side, and where it lies, from 0 (left, top) to 1 (right, bottom).

    Returns:
        ``(3, size, size)``, RGB, values 0 to 1.
    """
    import numpy as np
    from PIL import Image

    with Image.open(path) as file:
        picture = file.convert("RGB")
    if size is not None:
        share, across, along = crop
        side = share * min(picture.size)
        left, top = across * (picture.width - side), along * (picture.height - side)
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def start(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return grey noise to start from, ``(count, 3, height, width)``."""
    return 0.5 + 0.1 * torch.randn(count, 3, height, width, generator=generator)


class _Studio:
    """A :class:`NeuralArt` with its pictures at hand."""

    def __init__(self, task: NeuralArt, folder: Path) -> None:
        self.task, self.folder = task, folder
        names = sorted(folder.glob("photos/*.jpg"))
        self.photos = [path for index, path in enumerate(names) if SPLITS.get(index % 10, "train") == task.split]
        if not self.photos:
            raise ValueError(
                f"{folder / 'photos'} holds {len(names)} photos (*.jpg), none for {task.split}: give ten or more"
            )
        painting = folder / "styles" / f"{task.style}.jpg"
        if not painting.exists():
            raise ValueError(f"there is no painting {task.style}.jpg in {folder / 'styles'}")
        self.style = read_picture(painting, task.size).unsqueeze(0)
        self.extract = feature_extractor(task.network, folder / task.network_file)

    def __repr__(self) -> str:
        """Name everything that decides a sample: finished runs are kept under this name."""
        return f"{self.task!r} in {self.folder!r}"

    def sample(self, seed: int) -> Optimizee:
        """Return fresh contents, cut at random out of photos of the split, and fresh noise to start from."""
        rng, task = random.Random(seed), self.task
        contents = torch.stack(
            [
                read_picture(rng.choice(self.photos), task.size, (rng.uniform(0.6, 1.0), rng.random(), rng.random()))
                for _ in range(task.problems)
            ]
        )
        low, high = map(math.log, task.stiffness)
        stiffness = torch.tensor([math.exp(rng.uniform(low, high)) for _ in range(task.problems)])
        losses = task.loss(self.extract, contents, self.style)
        generator = seeded(seed)
        noise = start(task.problems, task.size, task.size, generator)
        return Optimizee({"picture": noise}, lambda params: stiffness * losses(params), generator)
