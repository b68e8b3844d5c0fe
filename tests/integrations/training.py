"""The model, the data and the plain loop that every framework must reproduce, and a run to compare."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim import LearnedOptimizer
from tests.cases import copies, memories, small_rule

Batch = tuple[Tensor, Tensor]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Draw the same model each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def make_batches(count: int) -> list[Batch]:
    """Draw the same batches each time, the first ones equal whatever the count."""
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(8, 3, generator=generator) for _ in range(count)]
    return [(x, x.sum(-1, keepdim=True).sin()) for x in inputs]


def make_optimizer(model: nn.Module, lr: float = 1.0, average: bool = False) -> LearnedOptimizer:
    """Build the optimizer under test."""
    return LearnedOptimizer(model.parameters(), lr=lr, weights=small_rule(), average=average)


def averages_of(model: nn.Module, optimizer: LearnedOptimizer) -> list[Tensor]:
    """Copy the averaged weights, and see that the model keeps its own."""
    before = copies(model.parameters())
    averaged = optimizer.averaged_state_dict(model)
    with optimizer.averaged():
        inside = copies(model.parameters())
    for raw, now, average, name in zip(before, model.parameters(), inside, dict(model.named_parameters()), strict=True):
        assert torch.equal(raw, now)
        assert not torch.equal(raw, average)
        assert torch.equal(average, averaged[name])
    return inside


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the squared error, in float32."""
    inputs, targets = batch
    return (model(inputs.to(next(model.parameters()).dtype)).float() - targets).square().mean()


class Run(NamedTuple):
    """Where a run ended; two runs are the same if these are, to the last bit."""

    params: list[Tensor]
    memory: list[dict[str, Tensor]]


def end_of(model: nn.Module, optimizer: Optimizer) -> Run:
    """Copy parameters and memory."""
    params = list(model.parameters())
    return Run(copies(params), memories(optimizer, params))


def plain_run(
    batches: Iterable[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    before_step: Callable[[nn.Module, LearnedOptimizer], None] | None = None,
) -> Run:
    """Train with a loop of one's own."""
    model = make_model(dtype)
    optimizer = make_optimizer(model)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if before_step is not None:
            before_step(model, optimizer)
        optimizer.step()
    return end_of(model, optimizer)


def plain_averages(batches: Iterable[Batch], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Train with a loop of one's own; return the averaged weights."""
    model = make_model(dtype)
    optimizer = make_optimizer(model, average=True)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return averages_of(model, optimizer)
