"""The mixture that default rules are meta-trained on: many kinds of small problems, without downloads.

The problems of the training decide how a rule generalises, so every draw varies architecture, width, depth, activation,
normalisation, initialisation, batch size, noise and conditioning. Real data sets stay unseen, for judging.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Annotated

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from meta_train.tasks.data import (
    Stream,
    cluster_stream,
    digit_stream,
    language_stream,
    regression_stream,
)
from meta_train.tasks.models import ACTIVATIONS, ConvNet, Mlp, PatchTransformer, TinyRecurrent, TinyTransformer
from meta_train.tasks.task import Count, Optimizee, Params, seeded

Batch = tuple[Tensor, ...]
Kind = Callable[[random.Random, torch.Generator, int, int], Optimizee]
"""Makes P problems from generators for their hyperparameters and their data, a seed, and P."""


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _batch_size(rng: random.Random, high: int = 256) -> int:
    return round(_log_uniform(rng, 8, high))


def _hidden(rng: random.Random) -> list[int]:
    return [round(_log_uniform(rng, 8, 48))] * rng.randint(1, 3)


def _dense(rng: random.Random, problems: int, inputs: int, outputs: int) -> Callable[[], nn.Module]:
    hidden = _hidden(rng)
    activation = rng.choice(list(ACTIVATIONS))
    norm = rng.choice(("none", "none", "none", "layer", "batch"))
    residual = rng.random() < 0.2
    return lambda: Mlp(problems, [inputs, *hidden, outputs], activation, norm, residual)


def _gain(rng: random.Random) -> float:
    return _log_uniform(rng, 0.5, 2.0)


def _classify(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch[1]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(len(labels), -1).mean(1)


def _regress(output: Tensor, batch: Batch) -> Tensor:
    return (output - batch[1]).square().flatten(1).mean(1)


def _reconstruct(output: Tensor, batch: Batch) -> Tensor:
    return (output - batch[0]).square().flatten(1).mean(1)


def _optimizee(
    make_module: Callable[[], nn.Module],
    losses: Callable[[Tensor, Batch], Tensor],
    stream: Stream,
    seed: int,
    gain: float = 1.0,
) -> Optimizee:
    """Make an optimizee of a module that holds P copies; ``gain`` scales its initial weight matrices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make_module()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 2 and parameter.shape[1] > 1:
                parameter.mul_(gain)
    generator = seeded(seed + 1)

    def all_losses(params: Params) -> Tensor:
        batch = stream(generator)
        return losses(functional_call(module, params, (batch[0],), tie_weights=False), batch)

    return Optimizee(dict(module.named_parameters()), all_losses, generator)


def digit_mlp(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Classify digits with a dense net."""
    stream = digit_stream(
        draw,
        problems,
        _batch_size(rng),
        examples=rng.choice((256, 1024, 1797)),
        scale=_log_uniform(rng, 0.3, 2.0),
        label_noise=rng.choice((0.0, 0.0, 0.1, 0.3)),
        flat=True,
    )
    return _optimizee(_dense(rng, problems, 64, 10), _classify, stream, seed, _gain(rng))


def digit_conv(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Classify digits with a convolutional net, with or without batch norm."""
    stream = digit_stream(
        draw,
        problems,
        _batch_size(rng, 32),
        examples=rng.choice((256, 1797)),
        scale=_log_uniform(rng, 0.3, 2.0),
        label_noise=rng.choice((0.0, 0.0, 0.1, 0.3)),
        flat=False,
    )
    channels = [1, *[round(_log_uniform(rng, 4, 10))] * rng.choice((1, 2, 2, 3))]
    activation = rng.choice(("relu", "relu", "gelu", "elu"))
    batch_norm = rng.random() < 0.6
    return _optimizee(lambda: ConvNet(problems, channels, 8, 10, activation, batch_norm), _classify, stream, seed)


def digit_attention(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Classify digits with attention over their patches."""
    stream = digit_stream(
        draw,
        problems,
        _batch_size(rng, 32),
        examples=rng.choice((256, 1797)),
        scale=_log_uniform(rng, 0.3, 2.0),
        label_noise=rng.choice((0.0, 0.0, 0.1, 0.3)),
        flat=False,
    )
    patch, width, depth = rng.choice((2, 2, 4)), rng.choice((8, 12, 16, 24)), rng.choice((1, 2, 2))
    return _optimizee(lambda: PatchTransformer(problems, 8, patch, width, 2, depth, 10), _classify, stream, seed)


def cluster_mlp(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Classify an endless stream of overlapping clusters."""
    inputs, classes = round(_log_uniform(rng, 4, 40)), rng.randint(2, 12)
    stream = cluster_stream(
        draw,
        problems,
        _batch_size(rng),
        inputs=inputs,
        classes=classes,
        modes=rng.randint(1, 6),
        spread=_log_uniform(rng, 0.2, 1.5),
    )
    return _optimizee(_dense(rng, problems, inputs, classes), _classify, stream, seed, _gain(rng))


def deep_narrow(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Classify with many thin layers, which take thousands of steps."""
    inputs, classes = round(_log_uniform(rng, 4, 20)), rng.randint(2, 8)
    stream = cluster_stream(
        draw, problems, _batch_size(rng), inputs=inputs, classes=classes, modes=rng.randint(2, 8), spread=0.4
    )
    sizes = [inputs, *[rng.randint(6, 16)] * rng.randint(4, 8), classes]
    activation = rng.choice(("relu", "tanh", "elu", "gelu"))
    norm = rng.choice(("none", "none", "layer", "batch"))
    residual = rng.random() < 0.5
    return _optimizee(lambda: Mlp(problems, sizes, activation, norm, residual), _classify, stream, seed)


def teacher_mlp(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Regress on a random teacher from tabular-like, often heavy-tailed features."""
    inputs = round(_log_uniform(rng, 3, 30))
    stream = regression_stream(
        draw,
        problems,
        _batch_size(rng),
        inputs=inputs,
        hidden=round(_log_uniform(rng, 2, 20)),
        tail=rng.choice((0.0, 0.0, 0.3, 0.8)),
        condition=_log_uniform(rng, 1, 30),
        noise=rng.choice((0.0, 0.05, 0.3)),
        examples=rng.choice((0, 0, 200, 1000)),
    )
    return _optimizee(_dense(rng, problems, inputs, 1), _regress, stream, seed, _gain(rng))


def linear_regression(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Fit a linear model to ill-conditioned, heavy-tailed features."""
    inputs = round(_log_uniform(rng, 5, 100))
    stream = regression_stream(
        draw,
        problems,
        _batch_size(rng),
        inputs=inputs,
        hidden=rng.choice((0, 0, 8)),
        tail=rng.choice((0.0, 0.3, 0.8, 1.2)),
        condition=_log_uniform(rng, 1, 300),
        noise=rng.choice((0.0, 0.1, 0.5)),
        examples=rng.choice((0, 500)),
    )
    return _optimizee(lambda: Mlp(problems, [inputs, 1]), _regress, stream, seed)


def logistic_regression(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Fit a softmax to digits or clusters."""
    if rng.random() < 0.5:
        stream = digit_stream(
            draw, problems, _batch_size(rng), examples=1797, scale=_log_uniform(rng, 0.1, 3), label_noise=0.1, flat=True
        )
        inputs, classes = 64, 10
    else:
        inputs, classes = round(_log_uniform(rng, 5, 60)), rng.randint(2, 10)
        stream = cluster_stream(
            draw, problems, _batch_size(rng), inputs=inputs, classes=classes, modes=2, spread=_log_uniform(rng, 0.5, 2)
        )
    return _optimizee(lambda: Mlp(problems, [inputs, classes]), _classify, stream, seed)


def autoencoder(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Squeeze digits through a narrow layer."""
    stream = digit_stream(
        draw,
        problems,
        _batch_size(rng, 128),
        examples=1797,
        scale=_log_uniform(rng, 0.3, 1),
        label_noise=0.0,
        flat=True,
    )
    width = round(_log_uniform(rng, 8, 24))
    sizes = [64, width, rng.randint(2, 8), width, 64] if rng.random() < 0.6 else [64, width, 64]
    activation = rng.choice(list(ACTIVATIONS))
    return _optimizee(lambda: Mlp(problems, sizes, activation), _reconstruct, stream, seed)


def word_transformer(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Predict the next word with a tiny transformer."""
    vocabulary, length = round(_log_uniform(rng, 12, 60)), rng.choice((8, 12, 16))
    stream = language_stream(
        draw,
        problems,
        _batch_size(rng, 24),
        vocabulary=vocabulary,
        length=length,
        order=rng.choice((1, 2)),
        tokens=rng.choice((2_000, 16_000)),
    )
    width, depth = rng.choice((8, 12, 16)), rng.choice((1, 1, 2))
    return _optimizee(lambda: TinyTransformer(problems, vocabulary, length, width, 2, depth), _classify, stream, seed)


def word_recurrent(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Predict the next word with a tiny recurrent net."""
    vocabulary, length = round(_log_uniform(rng, 12, 60)), rng.choice((6, 10))
    stream = language_stream(
        draw,
        problems,
        _batch_size(rng, 32),
        vocabulary=vocabulary,
        length=length,
        order=rng.choice((1, 2)),
        tokens=rng.choice((2_000, 16_000)),
    )
    width, gated = rng.randint(8, 24), rng.random() < 0.5
    return _optimizee(lambda: TinyRecurrent(problems, vocabulary, width, gated), _classify, stream, seed)


def noisy_quadratic(rng: random.Random, draw: torch.Generator, seed: int, problems: int) -> Optimizee:
    """Minimise an ill-conditioned quadratic whose gradient is noisy."""
    dimension = round(_log_uniform(rng, 5, 60))
    spectrum = torch.tensor(_log_uniform(rng, 1, 1e3)) ** (-torch.rand(problems, dimension, generator=draw))
    rotate = torch.linalg.qr(torch.randn(problems, dimension, dimension, generator=draw)).Q
    start = torch.randn(problems, dimension, generator=draw) * _log_uniform(rng, 0.1, 3.0)
    noise = rng.choice((0.0, 0.03, 0.3))
    generator = seeded(seed + 1)

    def losses(params: Params) -> Tensor:
        wobble = noise * torch.randn(problems, dimension, generator=generator)
        turned = torch.einsum("pij,pj->pi", rotate, params["x"])
        return (spectrum * (turned - wobble).square()).sum(-1) / 2

    return Optimizee({"x": start}, losses, generator)


KINDS: dict[str, tuple[Kind, float]] = {
    "digit-mlp": (digit_mlp, 0.11),
    "digit-conv": (digit_conv, 0.14),
    "digit-attention": (digit_attention, 0.08),
    "cluster-mlp": (cluster_mlp, 0.10),
    "deep-narrow": (deep_narrow, 0.08),
    "teacher-mlp": (teacher_mlp, 0.11),
    "linear-regression": (linear_regression, 0.07),
    "logistic-regression": (logistic_regression, 0.04),
    "autoencoder": (autoencoder, 0.08),
    "word-transformer": (word_transformer, 0.09),
    "word-recurrent": (word_recurrent, 0.05),
    "noisy-quadratic": (noisy_quadratic, 0.05),
}
"""Kinds of problems by name, with their share of the mixture."""


class Mixture(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="mixture"):
    """P problems side by side, of a random kind with random hyperparameters.

    Args:
        problems: Problems side by side, P.
        kinds: Names in :data:`KINDS` to draw from, in their relative shares; empty means all.
        reparametrise: Largest factor by which parameters are rescaled (:func:`rescale`), log-uniformly; 1 leaves them.
    """

    problems: Count = 4
    kinds: tuple[str, ...] = ()
    reparametrise: Annotated[float, msgspec.Meta(ge=1)] = 1.0

    def __post_init__(self) -> None:
        """Refuse kinds that do not exist.

        Raises:
            ValueError: If a name is not in :data:`KINDS`.
        """
        if unknown := [name for name in self.kinds if name not in KINDS]:
            raise ValueError(f"kinds has no {unknown[0]!r}; there are {', '.join(KINDS)}")

    def sample(self, seed: int) -> Optimizee:
        """Return P problems of one kind.

        Args:
            seed: Decides the kind, the hyperparameters, the data and the minibatches.

        Returns:
            The optimizee.
        """
        rng = random.Random(seed)
        names = self.kinds or tuple(KINDS)
        name = rng.choices(names, [KINDS[name][1] for name in names])[0]
        scale = _log_uniform(rng, 1 / self.reparametrise, self.reparametrise)
        optimizee = KINDS[name][0](rng, seeded(seed + 2), seed, self.problems)
        return optimizee if scale == 1 else rescale(optimizee, scale)


def rescale(optimizee: Optimizee, scale: float) -> Optimizee:
    """Return the same problem in other units: its parameters are ``theta / scale``.

    Args:
        optimizee: The problem; shares its generator with the result.
        scale: Factor on the parameters before the loss is computed.

    Returns:
        The optimizee in the new units.
    """
    return Optimizee(
        {name: value / scale for name, value in optimizee.params.items()},
        lambda params: optimizee.losses({name: value * scale for name, value in params.items()}),
        optimizee.generator,
    )
