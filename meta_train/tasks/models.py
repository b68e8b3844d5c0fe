"""Small models of many kinds, each holding P independent copies that run side by side.

Every parameter has a leading dimension P and every input is ``(P, B, ...)``, so that one batched matmul serves all copies:
``torch.func.vmap`` over ordinary modules computes the same and costs several times more at these sizes. Each copy is
initialised by itself, like the torch module of the same name, from torch's global generator.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Linear(nn.Module):
    """Affine map of the last dimension.

    Args:
        problems: P.
        inputs: Input size.
        outputs: Output size.
        bias: Add a bias.
    """

    def __init__(self, problems: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(problems, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(problems, 1, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(P, B, inputs)`` to ``(P, B, outputs)``."""
        return x @ self.weight if self.bias is None else torch.baddbmm(self.bias, x, self.weight)


class Norm(nn.Module):
    """Layer norm over the last dimension, or batch norm over the minibatch (without running statistics).

    Args:
        problems: P.
        size: Features.
        over_batch: Normalise each feature over the minibatch instead of each example over its features.
    """

    def __init__(self, problems: int, size: int, over_batch: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(problems, 1, size))
        self.bias = nn.Parameter(torch.zeros(problems, 1, size))
        self.over_batch = over_batch

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(P, B, size)``."""
        if self.over_batch:
            side_by_side = x.transpose(0, 1).flatten(1)
            normalised = F.batch_norm(side_by_side, None, None, training=True).unflatten(1, (len(x), -1)).transpose(0, 1)
        else:
            normalised = F.layer_norm(x, x.shape[-1:])
        return torch.addcmul(self.bias, normalised, self.weight)


def _norm(kind: str, problems: int, size: int) -> nn.Module:
    return nn.Identity() if kind == "none" else Norm(problems, size, over_batch=kind == "batch")


class Mlp(nn.Module):
    """Dense layers with an activation between them; no hidden layer makes it linear.

    Args:
        problems: P.
        sizes: Layer sizes from input to output.
        activation: A name in :data:`ACTIVATIONS`.
        norm: ``"none"``, ``"layer"`` or ``"batch"``, before each activation.
        residual: Add a skip connection around hidden layers of equal size.
    """

    def __init__(
        self,
        problems: int,
        sizes: Sequence[int],
        activation: str = "relu",
        norm: str = "none",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(problems, a, b) for a, b in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(_norm(norm, problems, size) for size in sizes[1:-1])
        self.activation = ACTIVATIONS[activation]
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(P, B, sizes[0])`` to ``(P, B, sizes[-1])``."""
        for layer, norm in zip(self.layers, self.norms, strict=False):
            y = self.activation(norm(layer(x)))
            x = x + y if self.residual and x.shape == y.shape else y
        return self.layers[-1](x)


class ConvNet(nn.Module):
    """3x3 convolutions with optional batch norm, pooling before each but the first, and a dense readout.

    Args:
        problems: P.
        channels: Channels from the input on.
        side: Height and width of the square input.
        classes: Outputs.
        activation: A name in :data:`ACTIVATIONS`.
        batch_norm: Normalise before each activation.
    """

    def __init__(
        self,
        problems: int,
        channels: Sequence[int],
        side: int,
        classes: int,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.convs = nn.ModuleList(Linear(problems, 9 * a, b, bias=not batch_norm) for a, b in pairs)
        self.norms = nn.ModuleList(_norm("batch" if batch_norm else "none", problems, b) for _, b in pairs)
        self.activation = ACTIVATIONS[activation]
        self.readout = Linear(problems, channels[-1] * (side // 2 ** (len(pairs) - 1)) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(P, B, side, side, C)``, channels last, to logits ``(P, B, classes)``."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            problems, batch, side = x.shape[:3]
            if index:
                side //= 2
                # A mean over two dimensions, with its gradient, takes twice as long.
                x = F.avg_pool2d(x.flatten(0, 1).movedim(3, 1), 2).movedim(1, 3).unflatten(0, (problems, batch))
            x = self.activation(norm(conv(_patches(x).view(problems, batch * side * side, -1))))
            x = x.view(problems, batch, side, side, -1)
        return self.readout(x.flatten(2))


def _patches(x: Tensor) -> Tensor:
    """Gather each pixel's 3x3 neighbourhood: ``(P, B, S, S, C)`` to ``(P, B, S, S, 9 * C)``, zeros outside."""
    # One lookup: nine slices, with the gradient of each, take three times as long.
    problems, batch, side, _, channels = x.shape
    pixels = F.pad(x.reshape(problems * batch, side * side, channels), (0, 0, 0, 1))
    return pixels.index_select(1, _neighbours(side)).view(problems, batch, side, side, 9 * channels)


@functools.cache
def _neighbours(side: int) -> Tensor:
    """Return the numbers of each pixel's neighbours, row by row; pixel ``side * side`` stands for the outside."""
    framed = F.pad(torch.arange(side * side).view(1, side, side), (1, 1, 1, 1), value=side * side)[0]
    windows = [framed[i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return torch.stack(windows, -1).flatten()


class Embedding(nn.Module):
    """A table of word vectors; looking up by a one-hot product is fastest for small vocabularies.

    Args:
        problems: P.
        vocabulary: Number of words.
        width: Size of a vector.
        std: Standard deviation of the initial entries.
    """

    def __init__(self, problems: int, vocabulary: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(problems, vocabulary, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(P, B, T)`` to ``(P, B, T, width)``."""
        one_hot = F.one_hot(tokens.flatten(1), self.weight.shape[1]).to(self.weight.dtype)
        return (one_hot @ self.weight).view(*tokens.shape, -1)


class TransformerBlock(nn.Module):
    """Pre-norm attention and a two-layer net.

    Args:
        problems: P.
        width: Model size.
        heads: Attention heads.
        causal: Attend only to earlier positions.
    """

    def __init__(self, problems: int, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = (Norm(problems, width, over_batch=False) for _ in range(2))
        self.qkv = Linear(problems, width, 3 * width)
        self.out = Linear(problems, width, width)
        self.up = Linear(problems, width, 4 * width)
        self.down = Linear(problems, 4 * width, width)

    def forward(self, x: Tensor, length: int) -> Tensor:
        """Map ``(P, B * T, width)`` to itself; sequences are ``length`` long."""
        problems, rows, width = x.shape
        split = (problems, rows // length, length, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(self.norm1(x)).view(split).permute(3, 0, 1, 4, 2, 5).unbind(0)
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(problems, rows, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyTransformer(nn.Module):
    """A causal transformer for next-word prediction.

    Args:
        problems: P.
        vocabulary: Number of words.
        length: Length of the sequences.
        width: Model size.
        heads: Attention heads.
        depth: Blocks.
    """

    def __init__(self, problems: int, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.token = Embedding(problems, vocabulary, width, std=0.05)
        self.position = nn.Parameter(0.02 * torch.randn(problems, 1, length, width))
        self.blocks = nn.ModuleList(TransformerBlock(problems, width, heads) for _ in range(depth))
        self.norm = Norm(problems, width, over_batch=False)
        self.readout = Linear(problems, width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map words ``(P, B, T)`` to logits ``(P, B * T, vocabulary)``."""
        x = (self.token(tokens) + self.position).flatten(1, 2)
        for block in self.blocks:
            x = block(x, tokens.shape[-1])
        return self.readout(self.norm(x))


class PatchTransformer(nn.Module):
    """Attention over the patches of an image, and a readout of their mean.

    Args:
        problems: P.
        side: Height and width of the square image, of one channel.
        patch: Height and width of a patch.
        width: Model size.
        heads: Attention heads.
        depth: Blocks.
        classes: Outputs.
    """

    def __init__(self, problems: int, side: int, patch: int, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patch, self.length = patch, (side // patch) ** 2
        self.embedding = Linear(problems, patch * patch, width)
        self.position = nn.Parameter(0.02 * torch.randn(problems, 1, self.length, width))
        self.blocks = nn.ModuleList(TransformerBlock(problems, width, heads, causal=False) for _ in range(depth))
        self.norm = Norm(problems, width, over_batch=False)
        self.readout = Linear(problems, width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(P, B, side, side, 1)`` to logits ``(P, B, classes)``."""
        problems, batch, side = x.shape[:3]
        tiles = x.view(problems, batch, side // self.patch, self.patch, side // self.patch, self.patch).transpose(3, 4)
        x = self.embedding(tiles.reshape(problems, batch * self.length, -1)).view(problems, batch, self.length, -1)
        x = (x + self.position).flatten(1, 2)
        for block in self.blocks:
            x = block(x, self.length)
        return self.readout(self.norm(x).view(problems, batch, self.length, -1).mean(2))


class TinyRecurrent(nn.Module):
    """A plain tanh or minimally gated recurrent net for next-word prediction.

    Args:
        problems: P.
        vocabulary: Number of words.
        width: Hidden units.
        gated: Interpolate between the old and the candidate state with a gate.
    """

    def __init__(self, problems: int, vocabulary: int, width: int, gated: bool) -> None:
        super().__init__()
        self.token = Embedding(problems, vocabulary, width, std=0.1)
        self.inputs = Linear(problems, width, 2 * width if gated else width)
        self.recurrent = Linear(problems, width, 2 * width if gated else width, bias=False)
        self.readout = Linear(problems, width, vocabulary)
        self.gated = gated

    def forward(self, tokens: Tensor) -> Tensor:
        """Map words ``(P, B, T)`` to logits ``(P, B * T, vocabulary)``."""
        problems, batch, length = tokens.shape
        x = self.inputs(self.token(tokens).flatten(1, 2)).view(problems, batch, length, -1)
        width = self.readout.weight.shape[1]
        hidden = x.new_zeros(problems, batch, width)
        outputs = []
        for step in x.unbind(2):
            total = torch.baddbmm(step, hidden, self.recurrent.weight)
            if self.gated:
                gate, candidate = total.chunk(2, -1)
                hidden = torch.lerp(hidden, torch.tanh(candidate), torch.sigmoid(gate))
            else:
                hidden = torch.tanh(total)
            outputs.append(hidden)
        return self.readout(torch.stack(outputs, 2).flatten(1, 2))
