"""A task is something that samples optimizees. Any ``nn.Module`` with any loss can be an optimizee."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import msgspec
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

Count = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
"""Numbers of a recipe, with these bounds; every number must be finite too."""

Params = dict[str, Tensor]
"""Optimizee parameters by name, each ``(P, *shape)``: P independent problems side by side."""

LossFunction = Callable[[Params], Tensor]
"""Maps parameters to one loss for each problem, ``(P,)``; draws its own next minibatch."""


class Optimizee:
    """P problems of one architecture, to be optimized side by side.

    Args:
        params: Initial parameters, each ``(P, *shape)``.
        losses: Returns the P losses at given parameters on the next minibatch, drawn from ``generator``.
        generator: The only source of randomness after construction, so that its state pins down all later minibatches.
    """

    def __init__(self, params: Mapping[str, Tensor], losses: LossFunction, generator: torch.Generator) -> None:
        self.params: Params = {name: value.detach().clone() for name, value in params.items()}
        self.losses = losses
        self.generator = generator

    @property
    def num_problems(self) -> int:
        """Problems side by side, P."""
        return next(iter(self.params.values())).shape[0]

    @functools.cached_property
    def tensor_index(self) -> Tensor:
        """The number of the tensor that each of the D coordinates of a problem belongs to, ``(D,)``."""
        sizes = torch.tensor([value[0].numel() for value in self.params.values()])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @functools.cached_property
    def tensor_means(self) -> Tensor:
        """A matrix ``(D, tensors)`` that takes the mean over each tensor of a problem."""
        members = torch.nn.functional.one_hot(self.tensor_index, len(self.params)).double()
        return members / members.sum(0)

    def flat_params(self) -> Tensor:
        """Return the initial parameters as one matrix ``(P, D)``."""
        return torch.cat([value.flatten(1) for value in self.params.values()], 1)

    def unflatten(self, flat: Tensor) -> Params:
        """View a matrix ``(P, D)`` as named parameters."""
        shapes = {name: value.shape for name, value in self.params.items()}
        pieces = flat.split([shape[1:].numel() for shape in shapes.values()], 1)
        return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


class Task(Protocol):
    """A distribution of optimizees."""

    def sample(self, seed: int) -> Optimizee:
        """Return the optimizee of a seed: same seed, same initial parameters, data and minibatches."""
        ...


@runtime_checkable
class OnData(Protocol):
    """A task of real data; its recipe does not say where the data are."""

    def on(self, data: Path) -> Task:
        """Return the task with the data of a directory."""
        ...


def with_data(task: Task, data: Path | None) -> Task:
    """Give a task the real data it needs.

    Args:
        task: Any task.
        data: Directory of the data; ignored by a task that needs none.

    Returns:
        A task that can be sampled; without a directory, the given task.
    """
    return task.on(data) if data and isinstance(task, OnData) else task


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator at ``seed``."""
    return torch.Generator().manual_seed(seed)


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """Derive an independent seed, so that training, validation and evaluation never share an optimizee."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def module_optimizee(
    make_module: Callable[[], nn.Module],
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    next_batch: Callable[[torch.Generator], tuple[Tensor, ...]],
    seed: int,
    num_problems: int = 1,
) -> Optimizee:
    """Make optimizees out of an ordinary ``nn.Module`` and an ordinary loss.

    One problem (P = 1) works with any module. Several run side by side under ``torch.func.vmap``, each copy with an
    initialisation of its own, as long as vmap can batch the module (no batch-norm running statistics, no ``nn.LSTM``).

    Args:
        make_module: Builds and initialises one module, from torch's global generator.
        loss: ``loss(module, batch)`` returns a 0-dim tensor.
        next_batch: Draws a minibatch from a generator; every tensor has a leading dimension P.
        seed: Decides initialisations and minibatches, which are drawn from the streams of ``seed`` and ``seed + 1``. Draw
            the rest of a problem, such as its data, from another stream, or it is correlated with its initial weights.
        num_problems: Problems side by side, P.

    Returns:
        An optimizee whose parameters are the stacked parameters of the modules that require gradients. Frozen ones stay as
        they are. Dropout, and everything else that draws from torch's global generator, follows from ``seed`` too.

    Raises:
        ValueError: If no parameter requires gradients.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = [make_module() for _ in range(num_problems)]
    params, buffers = stack_module_state(modules)
    skeleton = modules[0]
    frozen = [name for name, parameter in skeleton.named_parameters() if not parameter.requires_grad]
    fixed = {**buffers, **{name: params.pop(name).detach() for name in frozen}}
    if not params:
        raise ValueError(f"no parameter of {type(skeleton).__name__} requires gradients, so there is nothing to optimize")
    generator = seeded(seed + 1)

    wrapped = _WithLoss(skeleton, loss)

    def one(values: Params, fixed: Params, batch: tuple[Tensor, ...]) -> Tensor:
        named = {f"module.{name}": value for name, value in (*values.items(), *fixed.items())}
        return functional_call(wrapped, named, (batch,))

    def losses(values: Params) -> Tensor:
        before = generator.get_state()
        batch = next_batch(generator)
        if torch.equal(generator.get_state(), before):  # The next call must draw other noise.
            torch.rand((), generator=generator)
        with _global_generator_after(generator):
            if num_problems > 1:
                return vmap(one, randomness="different")(values, fixed, batch)
            first, rest = ({name: value[0] for name, value in tensors.items()} for tensors in (values, fixed))
            return one(first, rest, tuple(value[0] for value in batch)).unsqueeze(0)

    return Optimizee(params, losses, generator)


class _WithLoss(nn.Module):
    """A module whose output is the loss, for ``functional_call``."""

    def __init__(self, module: nn.Module, loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.loss(self.module, batch)


@contextmanager
def _global_generator_after(generator: torch.Generator) -> Iterator[None]:
    """Let torch's global generator follow from the state of another, which does not advance, and restore it afterwards."""
    digest = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        yield
