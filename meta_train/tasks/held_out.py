"""Synthetic models outside the mixture, bigger and of other kinds: rules are selected on these.

Nothing here is downloaded. A choice between rules on these kinds leaves the real data unspent for judging.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import msgspec
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from meta_train.tasks.case import Batch, Case, JudgingTask, Loss, classification_loss, regression_loss
from meta_train.tasks.data import Stream, cluster_stream, digit_stream, language_stream, regression_stream
from meta_train.tasks.modules import CharLSTM, CharTransformer, VisionTransformer, conv_net, mlp
from meta_train.tasks.pretraining import fine_tuned, pretrained
from meta_train.tasks.task import Optimizee, derive_seed, module_optimizee, seeded

HORIZONS = (200, 1000)
FINE = (100, 400)
"""Horizons of fine-tuning."""
PRETRAINING_STEPS = 800


def _case(module: nn.Module, loss: Loss, stream: Stream) -> Case:
    """Take the one problem out of a stream of problems side by side."""

    def next_batch(generator: torch.Generator) -> Batch:
        inputs, targets = stream(generator)
        return inputs[0], targets[0]

    return Case(module, loss, next_batch)


def _images(seed: int, batch: int, label_noise: float = 0.0) -> Stream:
    """Digits as ``(1, B, 1, 16, 16)`` images."""
    stream = digit_stream(seeded(seed), 1, batch, examples=1797, scale=1.0, label_noise=label_noise, flat=False)

    def upsampled(generator: torch.Generator) -> tuple[Tensor, ...]:
        images, labels = stream(generator)
        return F.interpolate(images[0].permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").unsqueeze(0), labels

    return upsampled


def _wide_mlp(seed: int) -> Case:
    stream = cluster_stream(seeded(seed), 1, 64, inputs=96, classes=10, modes=12, spread=1.2)
    return _case(mlp([96, 256, 256, 10], nn.ReLU), classification_loss, stream)


def _deep_tanh(seed: int) -> Case:
    stream = digit_stream(seeded(seed), 1, 64, examples=1797, scale=1.0, label_noise=0.1, flat=True)
    return _case(mlp([64, *[48] * 6, 10], nn.Tanh), classification_loss, stream)


def _layer_norm_mlp(seed: int) -> Case:
    stream = cluster_stream(seeded(seed), 1, 16, inputs=40, classes=6, modes=8, spread=0.8)
    return _case(mlp([40, 128, 128, 6], nn.GELU, norm=True), classification_loss, stream)


def _conv(seed: int) -> Case:
    return _case(conv_net([1, 16, 32], 16, 10, batch_norm=False), classification_loss, _images(seed, 32, label_noise=0.1))


def _conv_batch_norm(seed: int) -> Case:
    return _case(conv_net([1, 16, 32, 32], 16, 10, batch_norm=True), classification_loss, _images(seed, 32, label_noise=0.1))


def _vision_transformer(seed: int) -> Case:
    return _case(VisionTransformer(16, 1, 4, 48, 2, 10), classification_loss, _images(seed, 32, label_noise=0.1))


def _transformer(seed: int) -> Case:
    stream = language_stream(seeded(seed), 1, 16, vocabulary=64, length=24, order=2, tokens=100_000)
    return _case(CharTransformer(64, 24, 64, 2), classification_loss, stream)


def _recurrent(seed: int) -> Case:
    stream = language_stream(seeded(seed), 1, 16, vocabulary=64, length=24, order=2, tokens=100_000)
    return _case(CharLSTM(64, 64), classification_loss, stream)


def _tabular(seed: int) -> Case:
    stream = regression_stream(seeded(seed), 1, 64, inputs=12, hidden=16, tail=0.5, condition=10.0, noise=0.1, examples=5000)
    return _case(mlp([12, 96, 96, 1], nn.SiLU), regression_loss, stream)


def _linear(seed: int) -> Case:
    stream = regression_stream(seeded(seed), 1, 32, inputs=30, hidden=0, tail=0.8, condition=30.0, noise=0.3, examples=4000)
    return _case(nn.Linear(30, 1), regression_loss, stream)


def _autoencoder(seed: int) -> Case:
    stream = digit_stream(seeded(seed), 1, 64, examples=1797, scale=1.0, label_noise=0.0, flat=True)

    def images_twice(generator: torch.Generator) -> tuple[Tensor, ...]:
        images = stream(generator)[0]
        return images, images

    return _case(mlp([64, 128, 12, 128, 64], nn.GELU), regression_loss, images_twice)


def _image_autoencoder(seed: int) -> Case:
    stream = digit_stream(seeded(seed), 1, 64, examples=1797, scale=1.0, label_noise=0.0, flat=False)

    def images_twice(generator: torch.Generator) -> tuple[Tensor, ...]:
        images = F.interpolate(stream(generator)[0][0].permute(0, 3, 1, 2), scale_factor=3, mode="bilinear")
        framed = F.pad((images - images.min()) / (images.max() - images.min()), (2, 2, 2, 2))
        pixels = (framed.flatten(1) - 0.3).unsqueeze(0) / 0.3
        return pixels, pixels

    return _case(mlp([784, 64, 16, 64, 784], nn.GELU), regression_loss, images_twice)


def _digits_by_heart(seed: int) -> Case:
    stream = digit_stream(seeded(seed), 1, 64, examples=1797, scale=1.0, label_noise=0.0, flat=True)
    return _case(mlp([64, 64, 64, 10], nn.ReLU), classification_loss, stream)


def _outliers(seed: int) -> Case:
    # The factor is in the gradient alone: the net after such an image is judged, not the loss of the image.
    case = _autoencoder(seed)

    def next_batch(generator: torch.Generator) -> Batch:
        images, _ = case.next_batch(generator)
        return images, torch.where(torch.rand(len(images), generator=generator) < 5e-5, 1e5, 1.0)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        images, weights = batch
        losses = (module(images) - images).square().mean(1)
        return (losses * weights).mean() - (losses * (weights - 1)).mean().detach()

    return Case(case.module, loss, next_batch)


@functools.cache
def _photos() -> Tensor:
    """Return the two photos that come with scikit-learn, ``(2, 3, 427, 640)``, standardised."""
    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    return (photos - photos.mean()) / photos.std()


def _places(seed: int, batch: int) -> Callable[[torch.Generator], Batch]:
    # Squares of 16 pixels, mirrored half of the time; the label is the field of the photos, one of 30.
    photos = _photos()
    _, _, height, width = photos.shape
    side, rows, columns = 16, 3, 5
    names = torch.randperm(len(photos) * rows * columns, generator=seeded(seed))

    def next_batch(generator: torch.Generator) -> Batch:
        photo = torch.randint(len(photos), (batch,), generator=generator)
        top = torch.randint(height - side, (batch,), generator=generator)
        left = torch.randint(width - side, (batch,), generator=generator)
        squares = torch.stack([photos[i, :, y : y + side, x : x + side] for i, y, x in zip(photo, top, left, strict=True)])
        mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        field = (photo * rows + top * rows // (height - side)) * columns + left * columns // (width - side)
        return torch.where(mirrored, squares.flip(-1), squares), names[field]

    return next_batch


def _photo_conv(seed: int) -> Case:
    return Case(conv_net([3, 8, 16, 32], 16, 30, batch_norm=True), classification_loss, _places(seed, 32))


def _photo_vit(seed: int) -> Case:
    return Case(VisionTransformer(16, 3, 4, 48, 2, 30), classification_loss, _places(seed, 32))


HELD_OUT_KINDS = tuple(
    JudgingTask(name, about, make, HORIZONS)
    for name, about, make in (
        ("wide-mlp", "96-256-256-10 ReLU on an endless stream of overlapping clusters, batch 64", _wide_mlp),
        ("deep-tanh", "six tanh layers of 48 on digits with 10 % wrong labels, batch 64", _deep_tanh),
        ("layer-norm-mlp", "40-128-128-6 GELU with layer norm on clusters, batch 16", _layer_norm_mlp),
        ("conv", "two convolutions on digits at 16x16 with 10 % wrong labels, batch 32", _conv),
        ("conv-bn", "three convolutions with batch norm on the same", _conv_batch_norm),
        ("vit", "a vision transformer, width 48, depth 2, on the same", _vision_transformer),
        ("transformer", "a causal transformer, width 64, depth 2, on a Markov source of order 2", _transformer),
        ("lstm", "an LSTM of 64 units on the same source", _recurrent),
        ("tabular", "12-96-96-1 SiLU on heavy-tailed, ill-conditioned features", _tabular),
        ("linear", "linear regression on heavy-tailed, ill-conditioned features, batch 32", _linear),
        ("autoencoder", "64-128-12-128-64 GELU on digits, batch 64", _autoencoder),
    )
)
"""The kinds that rules are selected on."""

LONG_KINDS = (
    JudgingTask(
        "image-autoencoder",
        "784-64-16-64-784 GELU on framed digits, batch 64",
        _image_autoencoder,
        (*HORIZONS, 5000),
    ),
    JudgingTask(
        "digits-by-heart",
        "64-64-64-10 ReLU on digits, batch 64, far beyond a training loss of zero",
        _digits_by_heart,
        (*HORIZONS, 5000, 20_000),
    ),
    JudgingTask(
        "outliers", "the autoencoder, and one image in 20,000 with 1e5 times the gradient", _outliers, (*HORIZONS, 5000)
    ),
    JudgingTask(
        "photo-conv", "three convolutions with batch norm, from where in a photo a square is", _photo_conv, (*HORIZONS, 5000)
    ),
    JudgingTask("photo-vit", "a vision transformer, width 48, depth 2, on the same", _photo_vit, (*HORIZONS, 5000)),
)
"""Kinds for faults that show only after thousands of steps: losses spike where a gradient is nearly all signal, almost zero,
or an outlier; and where a loss keeps falling, steps must not shrink too soon."""


@functools.lru_cache(maxsize=8)
def _trained_transformer(seed: int) -> dict[str, Tensor]:
    seed = derive_seed(seed, "pretraining")
    stream = language_stream(seeded(seed), 1, 16, vocabulary=64, length=24, order=2, tokens=100_000)
    before = _case(nn.Identity(), classification_loss, stream)
    return pretrained(lambda: CharTransformer(64, 24, 64, 2), before.loss, before.next_batch, seed + 1, PRETRAINING_STEPS)


def _fine_tuned_transformer(seed: int) -> Case:
    stream = language_stream(seeded(seed), 1, 16, vocabulary=64, length=24, order=2, tokens=5000)
    return _case(fine_tuned(CharTransformer(64, 24, 64, 2), _trained_transformer(seed)), classification_loss, stream)


@functools.lru_cache(maxsize=8)
def _trained_conv(seed: int) -> dict[str, Tensor]:
    seed = derive_seed(seed, "pretraining")
    digits = _images(seed, 32)

    def next_batch(generator: torch.Generator) -> Batch:
        images, labels = digits(generator)
        return images[0], labels[0]

    make = functools.partial(conv_net, [1, 16, 32], 16, 10, batch_norm=True)
    return pretrained(make, classification_loss, next_batch, seed + 1, PRETRAINING_STEPS)


def _fine_tuned_conv(seed: int) -> Case:
    # Grey squares of the photos, which the digits' convolutions have never seen; the readout of 30 fields is new.
    places = _places(seed, 32)

    def next_batch(generator: torch.Generator) -> Batch:
        squares, fields = places(generator)
        return squares.mean(1, keepdim=True), fields

    module = fine_tuned(conv_net([1, 16, 32], 16, 30, batch_norm=True), _trained_conv(seed))
    return Case(module, classification_loss, next_batch)


def _sigmoid_table(seed: int) -> Case:
    stream = regression_stream(seeded(seed), 1, 64, inputs=4, hidden=16, tail=0.5, condition=10.0, noise=0.1, examples=5000)
    return _case(mlp([4, 20, 20, 1], nn.Sigmoid), regression_loss, stream)


def _sigmoid_classes(seed: int) -> Case:
    stream = cluster_stream(seeded(seed), 1, 64, inputs=6, classes=4, modes=4, spread=0.4)
    return _case(mlp([6, 24, 4], nn.Sigmoid), classification_loss, stream)


def _larger_transformer(seed: int) -> Case:
    stream = language_stream(seeded(seed), 1, 16, vocabulary=128, length=32, order=2, tokens=200_000)
    return _case(CharTransformer(128, 32, 128, 4), classification_loss, stream)


_DECAYED = {kind.name: kind for kind in HELD_OUT_KINDS}
SHIPPED_KINDS = (
    JudgingTask(
        "fine-tuned-transformer",
        "the transformer, trained on one source, on 5,000 words of another",
        _fine_tuned_transformer,
        FINE,
    ),
    JudgingTask(
        "fine-tuned-digits", "two convolutions, trained on digits, on grey squares of photos", _fine_tuned_conv, FINE
    ),
    JudgingTask("sigmoid-table", "4-20-20-1 sigmoid on heavy-tailed, ill-conditioned features", _sigmoid_table, HORIZONS),
    JudgingTask(
        "sigmoid-classes", "6-24-4 sigmoid on an endless stream of overlapping clusters", _sigmoid_classes, HORIZONS
    ),
    JudgingTask(
        "larger-transformer",
        "a causal transformer, width 128, depth 4, on a Markov source of order 2",
        _larger_transformer,
        HORIZONS,
    ),
    _DECAYED["transformer"].decayed("cosine"),
    _DECAYED["tabular"].decayed("linear"),
)
"""What users do beside training from scratch at a constant rate, few inputs under sigmoids, and size.

No recipe is validated on these."""


class HeldOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="held-out"):
    """One problem of a random kind in :data:`HELD_OUT_KINDS`: for validation of default rules, never for training.

    Args:
        separate_streams: Draw initial weights and data from streams of their own. False draws both from the same random
            numbers, so they are correlated; the validation of older recipes needs that.
    """

    separate_streams: bool = False

    def sample(self, seed: int) -> Optimizee:
        """Return one problem.

        Args:
            seed: Decides the kind, the initialisation, the data and the minibatches.

        Returns:
            The optimizee.
        """
        kind = HELD_OUT_KINDS[random.Random(seed).randrange(len(HELD_OUT_KINDS))]
        minibatches = seed
        if self.separate_streams:
            case, minibatches = kind.case(seed), derive_seed(seed, "minibatches")
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                case = kind.make(seed)
        return module_optimizee(
            lambda: case.module,
            lambda module, batch: case.loss(module, (batch[0], batch[1])),
            lambda generator: tuple(value.unsqueeze(0) for value in case.next_batch(generator)),
            minibatches,
        )
