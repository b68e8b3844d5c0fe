"""Weights that a task of fine-tuning starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from meta_train.tasks.case import Batch, Loss

RATE = 3e-3


def pretrained(
    make_module: Callable[[], nn.Module],
    loss: Loss,
    next_batch: Callable[[torch.Generator], Batch],
    seed: int,
    steps: int,
) -> dict[str, Tensor]:
    """Train a model with AdamW, whose rate of 3e-3 decays along a cosine.

    Args:
        make_module: Builds and initialises it, from torch's global generator, whose state is restored afterwards.
        loss: Maps module and minibatch to a 0-dim loss.
        next_batch: Draws a minibatch.
        seed: Decides initialisation and minibatches.
        steps: Training steps.

    Returns:
        The model's state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make_module()
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = AdamW(module.parameters(), lr=RATE)
    scheduler = CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module, next_batch(generator)).backward()
        optimizer.step()
        scheduler.step()
    return module.state_dict()


def fine_tuned(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load pretrained weights; a tensor whose shape differs, such as a readout of other classes, stays freshly initialised.

    Args:
        module: Freshly initialised.
        state: From :func:`pretrained`.

    Returns:
        The module.
    """
    own = module.state_dict()
    module.load_state_dict({name: state[name] if state[name].shape == value.shape else value for name, value in own.items()})
    return module
