"""Synthetic data streams, and the 8x8 digits of scikit-learn: all the data that default rules are meta-trained on.

A stream is a function from a generator to a minibatch whose tensors have a leading dimension P, one entry for each problem.
The differences between the P problems (labels, teachers, chains) are drawn once, from the generator given at construction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Stream = Callable[[torch.Generator], tuple[Tensor, ...]]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits: images ``(1797, 64)``, standardised as a whole, and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32)
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def digit_stream(
    draw: torch.Generator, problems: int, batch: int, *, examples: int, scale: float, label_noise: float, flat: bool
) -> Stream:
    """Digits with labels permuted (and pixels too, if flat) for each problem.

    Args:
        draw: Decides permutations, the subset and the wrong labels.
        problems: P.
        batch: Examples in a minibatch.
        examples: Size of each problem's training set.
        scale: Factor on the pixels.
        label_noise: Share of labels that are wrong throughout.
        flat: Vectors ``(P, B, 64)`` instead of images ``(P, B, 8, 8, 1)``.

    Returns:
        Stream of (images, labels).
    """
    images, labels = digits()
    subset = torch.stack([torch.randperm(len(images), generator=draw)[:examples] for _ in range(problems)])
    x = images[subset] * scale
    if flat:
        pixels = torch.stack([torch.randperm(64, generator=draw) for _ in range(problems)])
        x = x.gather(2, pixels.unsqueeze(1).expand_as(x))
    else:
        x = x.view(problems, examples, 8, 8, 1)
    remap = torch.stack([torch.randperm(10, generator=draw) for _ in range(problems)])
    y = remap.gather(1, labels[subset])
    wrong = torch.rand(y.shape, generator=draw) < label_noise
    y = torch.where(wrong, torch.randint(0, 10, y.shape, generator=draw), y)
    rows = torch.arange(problems).unsqueeze(1)

    def next_batch(generator: torch.Generator) -> tuple[Tensor, ...]:
        index = torch.randint(0, examples, (problems, batch), generator=generator)
        return x[rows, index], y[rows, index]

    return next_batch


def cluster_stream(
    draw: torch.Generator, problems: int, batch: int, *, inputs: int, classes: int, modes: int, spread: float
) -> Stream:
    """An endless stream of classes that are unions of Gaussian clusters; ``spread`` sets how much they overlap.

    Args:
        draw: Decides the clusters.
        problems: P.
        batch: Examples in a minibatch.
        inputs: Dimension of an example.
        classes: Number of classes.
        modes: Clusters in each class.
        spread: Standard deviation within a cluster, against centres of norm about ``inputs ** 0.5``.

    Returns:
        Stream of (examples, labels), never the same example twice.
    """
    centres = torch.randn(problems, classes * modes, inputs, generator=draw)
    stretch = torch.exp(0.7 * torch.randn(problems, 1, inputs, generator=draw))
    rows = torch.arange(problems).unsqueeze(1)

    def next_batch(generator: torch.Generator) -> tuple[Tensor, ...]:
        mode = torch.randint(0, classes * modes, (problems, batch), generator=generator)
        noise = torch.randn(problems, batch, inputs, generator=generator)
        return (centres[rows, mode] + spread * noise) * stretch, mode % classes

    return next_batch


def regression_stream(
    draw: torch.Generator,
    problems: int,
    batch: int,
    *,
    inputs: int,
    hidden: int,
    tail: float,
    condition: float,
    noise: float,
    examples: int,
) -> Stream:
    """Regression on a random teacher: tabular-like inputs, ill-conditioned and heavy-tailed if asked.

    Args:
        draw: Decides the teachers and, for a finite set, the examples.
        problems: P.
        batch: Examples in a minibatch.
        inputs: Features.
        hidden: Hidden units of the tanh teacher; 0 makes it linear.
        tail: Log-normal spread of each example's size; 0 is Gaussian, 1 is heavy-tailed.
        condition: Ratio between the largest and the smallest feature's scale.
        noise: Standard deviation of the noise on a target of unit variance.
        examples: Size of a fixed training set; 0 always draws fresh examples.

    Returns:
        Stream of (features, target); the target has shape ``(P, B, 1)``.
    """
    exponents = torch.rand(problems, 1, inputs, generator=draw) - 0.5
    scales = torch.tensor(condition) ** exponents
    mix = torch.linalg.qr(torch.randn(problems, inputs, inputs, generator=draw)).Q
    first = torch.randn(problems, inputs, max(hidden, 1), generator=draw) * (2.0 / inputs**0.5)
    second = torch.randn(problems, max(hidden, 1), 1, generator=draw)

    def fresh(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = torch.randn(problems, count, inputs, generator=generator)
        size = torch.exp(tail * torch.randn(problems, count, 1, generator=generator))
        features = size * (z * scales) @ mix / scales.square().mean(-1, keepdim=True).sqrt()
        signal = features @ first
        target = (torch.tanh(signal) if hidden else signal) @ second
        return features, target + noise * spread * torch.randn(target.shape, generator=generator)

    spread = torch.ones(problems, 1, 1)
    spread = fresh(1024, draw)[1].std(1, keepdim=True).clamp(min=1e-6)
    if examples:
        x, y = fresh(examples, draw)
        rows = torch.arange(problems).unsqueeze(1)

        def next_batch(generator: torch.Generator) -> tuple[Tensor, ...]:
            index = torch.randint(0, examples, (problems, batch), generator=generator)
            return x[rows, index], y[rows, index] / spread

        return next_batch

    def next_fresh(generator: torch.Generator) -> tuple[Tensor, ...]:
        features, target = fresh(batch, generator)
        return features, target / spread

    return next_fresh


def language_stream(
    draw: torch.Generator, problems: int, batch: int, *, vocabulary: int, length: int, order: int, tokens: int
) -> Stream:
    """Text of a random Markov source whose words follow Zipf's law, so that most of an embedding is rarely used.

    Args:
        draw: Decides the sources and the corpora.
        problems: P.
        batch: Sequences in a minibatch.
        vocabulary: Number of words.
        length: Words in a sequence.
        order: 1 or 2 words of history decide the next one.
        tokens: Size of each corpus.

    Returns:
        Stream of (sequences ``(P, B, length)``, next words).
    """
    zipf = 1.0 / torch.arange(1, vocabulary + 1, dtype=torch.float32)
    histories = vocabulary if order == 1 else 4 * vocabulary
    chains = 64
    tilt = torch.exp(1.5 * torch.randn(problems, histories, vocabulary, generator=draw))
    table = zipf * tilt
    rows = torch.arange(problems).unsqueeze(1)
    previous = torch.zeros(problems, chains, dtype=torch.long)
    word = torch.randint(0, vocabulary, (problems, chains), generator=draw)
    columns = []
    for _ in range(max(tokens // chains, length + 2)):
        history = word if order == 1 else (4 * word + previous % 4)
        previous = word
        word = torch.multinomial(table[rows, history].view(-1, vocabulary), 1, generator=draw).view(problems, chains)
        columns.append(word)
    corpus = torch.stack(columns, -1)
    steps = torch.arange(length + 1)

    def next_batch(generator: torch.Generator) -> tuple[Tensor, ...]:
        chain = torch.randint(0, chains, (problems, batch, 1), generator=generator)
        start = torch.randint(0, corpus.shape[-1] - length, (problems, batch, 1), generator=generator)
        window = corpus[rows.unsqueeze(-1), chain, start + steps]
        return window[..., :-1], window[..., 1:]

    return next_batch
