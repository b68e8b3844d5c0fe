"""The judging tasks: real data that no rule was meta-trained or selected on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from meta_train.judging.real_data import Tensors
from meta_train.tasks.case import Batch, Case, JudgingTask, classification_loss, regression_loss
from meta_train.tasks.modules import CharLSTM, CharTransformer, VisionTransformer, conv_net, mlp

LONG = (200, 1000, 5000, 20_000)
_HELD_OUT_BATCH = 500


def real_tasks(data: Tensors, fingerprint: str) -> tuple[JudgingTask, ...]:
    """Return the judging tasks.

    Args:
        data: From :func:`~meta_train.judging.real_data.prepared`.
        fingerprint: Fingerprint of the data.

    Returns:
        Thirteen tasks; three of them run to 20,000 steps.
    """

    def images(
        name: str, batch: int, make: Callable[[], nn.Module], *, flat: bool = False, reconstruct: bool = False
    ) -> Callable[[int], Case]:
        shape = (-1,) if flat else (1, 28, 28) if name == "mnist" else (3, 32, 32)

        def batch_of(x: Tensor, y: Tensor) -> Batch:
            x = (x.float() / 255 - 0.3) / 0.3
            x = x.reshape(len(x), *shape)
            return (x, x) if reconstruct else (x, y)

        loss = regression_loss if reconstruct else classification_loss
        return lambda seed: case_of_set(data, name, batch, make(), loss, batch_of)

    def table(name: str, batch: int, make: Callable[[], nn.Module], *, classify: bool = False) -> Callable[[int], Case]:
        loss = classification_loss if classify else regression_loss
        return lambda seed: case_of_set(data, name, batch, make(), loss, lambda x, y: (x, y))

    def text(batch: int, length: int, make: Callable[[], nn.Module]) -> Callable[[int], Case]:
        return lambda seed: case_of_text(data, batch, length, make())

    features = data["adult_x"].shape[1]
    definitions: list[tuple[str, str, Callable[[int], Case], bool]] = [
        (
            "mnist-sigmoid",
            "784-20-10 sigmoid MLP, batch 128",
            images("mnist", 128, lambda: mlp([784, 20, 10], nn.Sigmoid), flat=True),
            True,
        ),
        (
            "mnist-relu",
            "784-128-128-10 ReLU MLP, batch 128",
            images("mnist", 128, lambda: mlp([784, 128, 128, 10], nn.ReLU), flat=True),
            True,
        ),
        (
            "mnist-conv",
            "convolutions 8-16, batch 32",
            images("mnist", 32, lambda: conv_net([1, 8, 16], 28, 10, False)),
            False,
        ),
        (
            "mnist-conv-bn",
            "convolutions 8-16 with batch norm, batch 32",
            images("mnist", 32, lambda: conv_net([1, 8, 16], 28, 10, True)),
            False,
        ),
        (
            "cifar-conv",
            "convolutions 8-16-32, batch 32",
            images("cifar", 32, lambda: conv_net([3, 8, 16, 32], 32, 10, False)),
            False,
        ),
        (
            "cifar-conv-bn",
            "convolutions 8-16-32 with batch norm, batch 32",
            images("cifar", 32, lambda: conv_net([3, 8, 16, 32], 32, 10, True)),
            False,
        ),
        (
            "cifar-vit",
            "vision transformer, width 48, depth 2, patches of 8, batch 32",
            images("cifar", 32, lambda: VisionTransformer(32, 3, 8, 48, 2, 10)),
            False,
        ),
        (
            "mnist-autoencoder",
            "784-64-16-64-784 GELU, batch 64",
            images("mnist", 64, lambda: mlp([784, 64, 16, 64, 784], nn.GELU), flat=True, reconstruct=True),
            False,
        ),
        (
            "char-transformer",
            "causal transformer, width 48, depth 2, 32 symbols, batch 16",
            text(16, 32, lambda: CharTransformer(65, 32, 48, 2)),
            False,
        ),
        ("char-lstm", "LSTM of 64 units, 32 symbols, batch 16", text(16, 32, lambda: CharLSTM(65, 64)), False),
        ("kin40k", "8-64-64-1 ReLU regression, batch 64", table("kin", 64, lambda: mlp([8, 64, 64, 1], nn.ReLU)), True),
        ("california-linear", "linear regression, batch 64", table("california", 64, lambda: nn.Linear(8, 1)), False),
        (
            "adult",
            "one-hot-64-64-2 ReLU classification, batch 128",
            table("adult", 128, lambda: mlp([features, 64, 64, 2], nn.ReLU), classify=True),
            False,
        ),
    ]
    return tuple(
        JudgingTask(name, about, make, LONG if is_long else LONG[:3], fingerprint)
        for name, about, make, is_long in definitions
    )


def case_of_set(
    data: Tensors,
    name: str,
    batch: int,
    module: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batch_of: Callable[[Tensor, Tensor], Batch],
) -> Case:
    """Make a case whose examples are drawn with replacement.

    Args:
        data: Tensors by name.
        name: Name of the set: ``NAME_x`` and ``NAME_y``, and the same with ``_held_out``.
        batch: Examples in a minibatch.
        module: Freshly initialised.
        loss: Maps module and minibatch to a 0-dim loss.
        batch_of: Maps stored examples to a minibatch.

    Returns:
        The case.
    """
    x, y = data[f"{name}_x"], data[f"{name}_y"]
    held_out = [data[f"{name}_{part}_held_out"].split(_HELD_OUT_BATCH) for part in "xy"]

    def next_batch(generator: torch.Generator) -> Batch:
        rows = torch.randint(0, len(x), (batch,), generator=generator)
        return batch_of(x[rows], y[rows])

    return Case(module, loss, next_batch, [batch_of(*part) for part in zip(*held_out, strict=True)])


def case_of_text(data: Tensors, batch: int, length: int, module: nn.Module) -> Case:
    """Make a case that predicts the next symbol in windows of ``text``; 256 windows of ``text_held_out`` are held out.

    Args:
        data: Tensors by name.
        batch: Windows in a minibatch.
        length: Symbols in a window.
        module: Freshly initialised.

    Returns:
        The case.
    """
    text, held_out = data["text"], data["text_held_out"]
    window = torch.arange(length + 1)

    def cut(source: Tensor, starts: Tensor) -> Batch:
        symbols = source[starts.unsqueeze(1) + window].long()
        return symbols[:, :-1], symbols[:, 1:]

    def next_batch(generator: torch.Generator) -> Batch:
        return cut(text, torch.randint(0, len(text) - length, (batch,), generator=generator))

    starts = torch.arange(0, len(held_out) - length - 1, len(held_out) // 256)
    return Case(module, classification_loss, next_batch, [cut(held_out, starts)])
