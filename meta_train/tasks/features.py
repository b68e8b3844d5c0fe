"""A pretrained network as a source of features: weights as safetensors, and a small description of what to do with them.

The description is a :class:`Network`: how pixels are prepared, the layers in order, and the layers of content and style. In
TOML, for the first layers of VGG with the weights of torchvision::

    scale = 1.0
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]
    content = "features.2"
    style = ["features.0", "features.2", "features.5"]

    layers = [
      {kind = "conv", name = "features.0", padding = 1},
      {kind = "conv", name = "features.2", padding = 1},
      {kind = "pool"},
      {kind = "conv", name = "features.5", padding = 1},
    ]

Layers with a name end in a ReLU, and their output is a feature map of that name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Features = dict[str, Tensor]
"""Feature maps by name, each ``(P, channels, height, width)``."""


class Conv(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="conv"):
    """A convolution and a ReLU, from tensors ``NAME.weight`` and ``NAME.bias``.

    Args:
        name: Name of the tensors and of the feature map.
        stride: Stride.
        padding: Zeros around the picture.
    """

    name: str
    stride: int = 1
    padding: int = 0


class Fire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="fire"):
    """SqueezeNet's module: squeeze by a 1x1 convolution, expand by a 1x1 and a 3x3 side by side, each with a ReLU.

    Args:
        name: Name of the feature map; the tensors are ``NAME.PART.weight`` and ``NAME.PART.bias``.
        parts: Names of the squeezing, the 1x1 and the 3x3 convolution.
    """

    name: str
    parts: tuple[str, str, str] = ("conv1x1_1", "conv1x1_2", "conv3x3_2")


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="pool"):
    """Max-pooling; windows that reach over the border count too.

    Args:
        size: Side of a window.
        stride: Stride.
    """

    size: int = 2
    stride: int = 2


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a feature extractor does with a picture.

    Args:
        layers: The layers in order; layers after the last one wanted are not run, and need no weights.
        content: Layer whose features are the content of a picture.
        style: Layers whose Gram matrices are its style.
        channels: Order of the colours in training.
        scale: A pixel value of 1 becomes this.
        mean: Subtracted after that, in the order of ``channels``.
        std: Divided by after that.
    """

    layers: tuple[Conv | Fire | Pool, ...]
    content: str
    style: tuple[str, ...]
    channels: Literal["RGB", "BGR"] = "RGB"
    scale: float = 255.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def wanted(self) -> frozenset[str]:
        """Layers whose features describe content or style."""
        return frozenset((self.content, *self.style))


SQUEEZENET = Network(
    layers=(Conv("conv1", stride=2), Pool(3, 2), Fire("fire2"), Fire("fire3")),
    content="fire3",
    style=("conv1", "fire2", "fire3"),
    channels="BGR",
    mean=(104.0, 117.0, 123.0),
)
"""The first layers of SqueezeNet v1.0 as its authors released it (Iandola et al. 2016, arXiv:1602.07360; Caffe conventions).

Deeper layers triple the cost, and at 64x64 the third already sees 27 pixels.
"""


def read_network(path: Path) -> Network:
    """Read a description.

    Args:
        path: A TOML file.

    Returns:
        The network.

    Raises:
        ValueError: If the description does not fit; the message names the place.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Network)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path} describes no network: {error}") from error


def feature_extractor(network: Network, path: Path) -> Callable[[Tensor], Features]:
    """Load a network.

    Args:
        network: What to do with a picture.
        path: Its weights, a safetensors file; tensors that no layer names are ignored.

    Returns:
        A function from pictures ``(P, 3, height, width)``, RGB from 0 (black) to 1 (white), to the feature maps.

    Raises:
        ValueError: If the file cannot be read, or it does not hold what the description names.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read a network from {path}: {error}") from error
    wanted = network.wanted
    named = [getattr(layer, "name", None) for layer in network.layers]
    if unknown := sorted(wanted.difference(named)):
        raise ValueError(f"content and style name layers that the description lacks: {', '.join(unknown)}")
    layers = network.layers[: 1 + max(index for index, name in enumerate(named) if name in wanted)]
    needed = [f"{part}.{kind}" for layer in layers for part in _convolutions(layer) for kind in ("weight", "bias")]
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}: the description does not fit it")
    return functools.partial(_extract, network, layers, tensors)


def _extract(
    network: Network, layers: Sequence[Conv | Fire | Pool], tensors: Mapping[str, Tensor], pictures: Tensor
) -> Features:
    mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    x = pictures.flip(1) if network.channels == "BGR" else pictures
    x = (network.scale * x - mean) / std
    found = {}
    for layer in layers:
        x = _run(layer, x, tensors)
        if not isinstance(layer, Pool) and layer.name in network.wanted:
            found[layer.name] = x
    return found


def _convolutions(layer: Conv | Fire | Pool) -> tuple[str, ...]:
    """Return the names of a layer's convolutions."""
    if isinstance(layer, Pool):
        return ()
    return (layer.name,) if isinstance(layer, Conv) else tuple(f"{layer.name}.{part}" for part in layer.parts)


def _run(layer: Conv | Fire | Pool, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    def convolve(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        weight, bias = (tensors[f"{name}.{kind}"].to(x) for kind in ("weight", "bias"))
        return F.conv2d(x, weight, bias, stride, padding).relu()

    if isinstance(layer, Pool):
        return F.max_pool2d(x, layer.size, layer.stride, ceil_mode=True)
    names = _convolutions(layer)
    if isinstance(layer, Conv):
        return convolve(x, names[0], layer.stride, layer.padding)
    squeezed = convolve(x, names[0])
    return torch.cat((convolve(squeezed, names[1]), convolve(squeezed, names[2], padding=1)), 1)
