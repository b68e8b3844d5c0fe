"""Conditions that make optimizers diverge: losses and inputs in odd units, a big model, a long run; on synthetic data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from meta_train.tasks.case import Batch, Case, JudgingTask, classification_loss
from meta_train.tasks.data import cluster_stream
from meta_train.tasks.held_out import HELD_OUT_KINDS
from meta_train.tasks.modules import mlp
from meta_train.tasks.task import seeded

LOSS_SCALES = (1e-4, 1e4)
INPUT_SCALES = (0.1, 10.0)
_BASES = ("wide-mlp", "conv-bn", "vit")


def stress_tasks() -> tuple[JudgingTask, ...]:
    """Return held-out kinds with losses or inputs in other units, a model of ten million parameters, and a long run.

    Returns:
        Fourteen tasks.
    """
    kinds = {task.name: task for task in HELD_OUT_KINDS}
    return (
        *(_scaled_loss(kinds[name], scale) for name in _BASES for scale in LOSS_SCALES),
        *(_scaled_inputs(kinds[name], scale) for name in _BASES for scale in INPUT_SCALES),
        JudgingTask("ten-million", "512-2048-2048-2048-256 ReLU on clusters, batch 16", _ten_million, (200,)),
        replace(kinds["layer-norm-mlp"], name="layer-norm-mlp, long", horizons=(20_000,)),
    )


def _scaled_loss(task: JudgingTask, scale: float) -> JudgingTask:
    def make(seed: int) -> Case:
        case = task.make(seed)
        return replace(case, loss=lambda module, batch: scale * case.loss(module, batch))

    return _changed(task, f"loss x {scale:g}", make)


def _scaled_inputs(task: JudgingTask, scale: float) -> JudgingTask:
    def make(seed: int) -> Case:
        case = task.make(seed)

        def next_batch(generator: torch.Generator) -> Batch:
            inputs, targets = case.next_batch(generator)
            return scale * inputs, targets

        return replace(case, next_batch=next_batch)

    return _changed(task, f"inputs x {scale:g}", make)


def _changed(task: JudgingTask, change: str, make: Callable[[int], Case]) -> JudgingTask:
    return replace(task, name=f"{task.name}, {change}", about=f"{task.about}; {change}", make=make, horizons=(500,))


def _ten_million(seed: int) -> Case:
    stream = cluster_stream(seeded(seed), 1, 16, inputs=512, classes=256, modes=2, spread=0.5)

    def next_batch(generator: torch.Generator) -> Batch:
        inputs, labels = stream(generator)
        return inputs[0], labels[0]

    return Case(mlp([512, 2048, 2048, 2048, 256], nn.ReLU), classification_loss, next_batch)
