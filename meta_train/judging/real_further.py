"""Judging tasks on real data beside training small nets from scratch: fine-tuning, size, few inputs, schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from meta_train.judging.real import case_of_set, case_of_text, real_tasks
from meta_train.judging.real_data import Tensors
from meta_train.tasks.case import Batch, Case, JudgingTask, classification_loss, regression_loss
from meta_train.tasks.modules import CharTransformer, conv_net, mlp, residual_net
from meta_train.tasks.pretraining import fine_tuned, pretrained

FINE, SHORT = (100, 400), (200, 1000)
PRETRAINING_SEED, PRETRAINING_STEPS = 77, 1500
OLD_CLASSES = 7
"""Classes of CIFAR-10 for pretraining a net; fine-tuning uses 2,000 images of the other three."""
NEW_IMAGES = 2000
SLOW = ("SGD", "NAG", "RMSprop")
"""Baselines that are not worth hours on large models."""


def judging_tasks(data: Tensors, fingerprint: str) -> tuple[JudgingTask, ...]:
    """Return all judging tasks.

    Args:
        data: From :func:`~meta_train.judging.real_data.prepared`.
        fingerprint: Fingerprint of the data.

    Returns:
        The thirteen of :func:`~meta_train.judging.real.real_tasks`, six more, and two with a schedule on learned rules.
    """
    plain = real_tasks(data, fingerprint)
    named = {task.name: task for task in plain}
    further = (
        *_fine_tuning(data, fingerprint),
        JudgingTask(
            "char-gpt",
            "causal transformer of 3.2 M parameters, width 256, depth 4, 32 symbols, batch 16",
            lambda seed: case_of_text(data, 16, 32, CharTransformer(65, 32, 256, 4)),
            SHORT,
            fingerprint,
            without=SLOW,
        ),
        JudgingTask(
            "cifar-resnet",
            "residual net of 2.4 M parameters, channels 64-128-256-256, batch 32",
            lambda seed: case_of_set(
                data, "cifar", 32, residual_net((64, 128, 256, 256), 10), classification_loss, _pictures
            ),
            SHORT,
            fingerprint,
            without=SLOW,
        ),
        *(
            JudgingTask(f"{name}-sigmoid", about, _sigmoids(data, table, sizes), (200, 1000, 5000), fingerprint)
            for name, table, sizes, about in (
                ("kin40k", "kin", (8, 20, 20, 1), "8-20-20-1 sigmoid regression, batch 64"),
                ("california", "california", (8, 32, 1), "8-32-1 sigmoid regression, batch 64"),
            )
        ),
    )
    return (*plain, *further, named["char-transformer"].decayed("cosine"), named["mnist-relu"].decayed("linear"))


def _sigmoids(data: Tensors, table: str, sizes: tuple[int, ...]) -> Callable[[int], Case]:
    return lambda seed: case_of_set(data, table, 64, mlp(sizes, nn.Sigmoid), regression_loss, lambda x, y: (x, y))


def _pictures(x: Tensor, y: Tensor) -> Batch:
    return ((x.float() / 255 - 0.3) / 0.3).reshape(len(x), 3, 32, 32), y


def _fine_tuning(data: Tensors, fingerprint: str) -> tuple[JudgingTask, ...]:
    split = functools.cache(lambda: _split_by_class(data))

    def other_text() -> Tensors:
        return {"text": data["other_text"], "text_held_out": data["other_text_held_out"]}

    def transformer() -> nn.Module:
        return CharTransformer(65, 64, 96, 3)

    def conv(classes: int) -> nn.Module:
        return conv_net([3, 16, 32, 64], 32, classes, batch_norm=True)

    @functools.cache
    def trained_transformer() -> dict[str, Tensor]:
        before = case_of_text(data, 16, 64, nn.Identity())
        return pretrained(transformer, before.loss, before.next_batch, PRETRAINING_SEED, PRETRAINING_STEPS)

    @functools.cache
    def trained_conv() -> dict[str, Tensor]:
        before = case_of_set(split()[0], "cifar", 64, nn.Identity(), classification_loss, _pictures)
        make = functools.partial(conv, OLD_CLASSES)
        return pretrained(make, before.loss, before.next_batch, PRETRAINING_SEED, PRETRAINING_STEPS)

    def tuned_conv(seed: int) -> Case:
        module = fine_tuned(conv(10 - OLD_CLASSES), trained_conv())
        return case_of_set(split()[1], "cifar", 32, module, classification_loss, _pictures)

    return (
        JudgingTask(
            "fine-tuned-char",
            "causal transformer, width 96, depth 3, trained on Shakespeare, on 60,000 characters of Python's documentation",
            lambda seed: case_of_text(other_text(), 16, 64, fine_tuned(transformer(), trained_transformer())),
            FINE,
            fingerprint,
        ),
        JudgingTask(
            "fine-tuned-conv",
            "convolutions 16-32-64 with batch norm, trained on 7 classes of CIFAR-10, on 2,000 images of the other 3",
            tuned_conv,
            FINE,
            fingerprint,
        ),
    )


def _split_by_class(data: Tensors) -> tuple[Tensors, Tensors]:
    """Return images of the first classes, and some images of the others, with labels from 0."""
    old, new = dict[str, Tensor](), dict[str, Tensor]()
    for suffix in ("", "_held_out"):
        x, y = data[f"cifar_x{suffix}"], data[f"cifar_y{suffix}"]
        known = y < OLD_CLASSES
        old[f"cifar_x{suffix}"], old[f"cifar_y{suffix}"] = x[known], y[known]
        new[f"cifar_x{suffix}"], new[f"cifar_y{suffix}"] = x[~known][:NEW_IMAGES], y[~known][:NEW_IMAGES] - OLD_CLASSES
    return old, new
