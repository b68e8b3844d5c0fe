"""The modules that rules are judged on: ordinary PyTorch, in sizes for quick experiments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module], norm: bool = False) -> nn.Sequential:
    """Return dense layers with an activation between them, and with ``norm`` a layer norm before it."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), *([nn.LayerNorm(outputs)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def conv_net(channels: Sequence[int], side: int, classes: int, batch_norm: bool) -> nn.Sequential:
    """Return 3x3 convolutions, each followed by max-pooling, and a dense readout."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm))
        layers += [*([nn.BatchNorm2d(outputs)] if batch_norm else []), nn.ReLU(), nn.MaxPool2d(2)]
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side * side, classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


def residual_net(channels: Sequence[int], classes: int) -> nn.Sequential:
    """Return a stem that halves an RGB image, residual blocks that halve it where channels grow, and a dense readout."""
    first = channels[0]
    layers: list[nn.Module] = [nn.Conv2d(3, first, 3, 2, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    for inputs, outputs in itertools.pairwise((first, *channels)):
        layers.append(ResidualBlock(inputs, outputs, 1 if inputs == outputs else 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


class Block(nn.Module):
    """Pre-norm attention and a two-layer net.

    Args:
        width: Model size.
        heads: Attention heads.
        causal: Attend only to earlier positions.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, width)`` to itself."""
        batch, length, width = x.shape
        split = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(self.norm1(x)).view(split).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """A causal transformer over symbols.

    Args:
        symbols: Size of the alphabet.
        length: Longest sequence.
        width: Model size.
        depth: Blocks.
        heads: Attention heads.
    """

    def __init__(self, symbols: int, length: int, width: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        """Map ``(B, T)`` to logits ``(B, T, symbols)``."""
        return self.readout(self.norm(self.blocks(self.embed(symbols) + self.position)))


class VisionTransformer(nn.Module):
    """A transformer over patches of an image, with mean pooling.

    Args:
        side: Height and width of the image.
        channels: Channels of the image.
        patch: Side of a patch.
        width: Model size.
        depth: Blocks.
        classes: Outputs.
    """

    def __init__(self, side: int, channels: int, patch: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, channels, side, side)`` to logits ``(B, classes)``."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.readout(self.norm(self.blocks(x)).mean(1))


class CharLSTM(nn.Module):
    """A one-layer LSTM over symbols.

    Args:
        symbols: Size of the alphabet.
        width: Embedding and hidden size.
    """

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(symbols, width), nn.LSTM(width, width, batch_first=True)
        self.readout = nn.Linear(width, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        """Map ``(B, T)`` to logits ``(B, T, symbols)``."""
        return self.readout(self.lstm(self.embed(symbols))[0])
