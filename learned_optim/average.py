r"""Averaged weights: an exponential average beside the weights, which needs no horizon.

After step t of a parameter, with :math:`f` the group's share (0.05 for ``average=True``)::

    average_1 = theta_1
    average_t = average_{t-1} + (1 - 2 ** (-1 / (f t))) (theta_t - average_{t-1})

So the half-life is always the share f of the steps taken so far, and the average forgets the start of a run of any length.
The weights of the model change only inside :func:`averaged`.

References:
    Polyak and Juditsky 1992. A half-life that grows with t instead of a decay: Hägele et al. 2024, arXiv:2405.18392, and
    arXiv:2602.03702, where constant rates with averages match separately tuned cosines at every horizon.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim.sharding import as_real, local

AVERAGE = "average"
"""Name of the average in a parameter's state. It has the parameter's shape and dtype, or float32 for a 16-bit dtype."""

SHARE = 0.05
"""Half-life that ``average=True`` means, as a share of the steps taken."""

Group = dict[str, Any]


def share_of(group: Group) -> float:
    """Return the half-life of a group's average as a share of the steps taken; 0 without an average."""
    return SHARE if group["average"] is True else float(group["average"])


def average_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's average: 16 bits would lose the small moves of a slow average."""
    return torch.float32 if param.dtype.itemsize == 2 else param.dtype


@torch.no_grad()
def update_averages(groups: Sequence[Group], state: MutableMapping[Tensor, Any]) -> None:
    """Move the averages of all parameters that have just been stepped.

    Args:
        groups: The optimizer's groups.
        state: The optimizer's state; a missing average starts at the weights.
    """
    for group in groups:
        if not group["average"]:
            continue
        share, alike = share_of(group), defaultdict(list)
        for param in group["params"]:
            memory = state.get(param)
            if param.grad is None or not memory:
                continue
            if AVERAGE not in memory:
                memory[AVERAGE] = _start(param)
            elif _reads_as_number(memory["step"]):
                alike[float(memory["step"]), param.dtype].append((memory[AVERAGE], param))
            else:
                part = (1 - torch.exp2(-1 / (share * memory["step"]))).to(param.device)
                average, own = _pair(memory[AVERAGE], param)
                average.lerp_(own, part.to(average.dtype))
        for (step, _), pairs in alike.items():
            averages, params = zip(*(_pair(*pair) for pair in pairs), strict=True)
            torch._foreach_lerp_(averages, params, 1 - 2 ** (-1 / (share * max(step, 1.0))))


@torch.inference_mode(False)  # Later steps could not write to inference tensors.
def _start(param: Tensor) -> Tensor:
    return param.detach().to(average_dtype(param), copy=True, memory_format=torch.contiguous_format)


def _reads_as_number(step: Tensor) -> bool:
    """Return whether the host can read a count without waiting for a device or breaking a graph."""
    return step.device.type == "cpu" and not torch.compiler.is_compiling()


def _pair(average: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's part of an average and of its parameter, in real numbers of one dtype."""
    average, param = local(as_real(average)), local(as_real(param.detach()))
    return average, param.to(average.dtype)


@contextlib.contextmanager
def averaged(groups: Sequence[Group], state: Mapping[Tensor, Any]) -> Iterator[None]:
    """Put the averages into the parameters, and put the weights back afterwards, to the last bit.

    Args:
        groups: The optimizer's groups.
        state: The optimizer's state. A parameter without an average, for example before its first step, keeps its weights.

    Yields:
        Nothing; evaluate inside.

    Raises:
        RuntimeError: If no group keeps an average.
    """
    if not any(group["average"] for group in groups):
        raise RuntimeError("no group keeps an average; construct the optimizer with average=True, or set it in a group")
    kept = []
    for group in groups:
        for param in group["params"]:
            if group["average"] and AVERAGE in state.get(param, {}):
                own = local(param.detach())
                kept.append((own, own.clone(), local(state[param][AVERAGE])))
    try:
        for own, _, average in kept:
            own.copy_(average)
        yield
    finally:
        for own, weights, _ in kept:
            own.copy_(weights)


class Averaging:
    """The methods of an optimizer that keeps averages."""

    param_groups: list[dict[str, Any]]
    state: Any
    _holds_averages = False

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Let the model hold its averaged weights inside a ``with`` block.

        The weights come back at its end, to the last bit, after an exception too. Buffers stay as they are: for a model with
        batch norm, call ``torch.optim.swa_utils.update_bn(loader, model)`` inside, on a copy if the running statistics
        matter to you afterwards.

        Yields:
            Nothing; evaluate inside.

        Raises:
            RuntimeError: If no group keeps an average, or inside another such block.

        Examples:
            >>> model = torch.nn.Linear(3, 1)
            >>> opt = LearnedOptimizer(model.parameters(), average=True)
            >>> model(torch.ones(2, 3)).square().mean().backward()
            >>> opt.step()
            >>> with opt.averaged():
            ...     loss = model(torch.ones(2, 3)).square().mean()
        """
        if self._holds_averages:
            raise RuntimeError("the parameters hold their averages already; averaged() cannot be nested")
        with averaged(self.param_groups, self.state):
            self._holds_averages = True
            try:
                yield
            finally:
                self._holds_averages = False

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return a model's state dict with averaged weights, to save or to load into another model.

        Args:
            model: The model that this optimizer trains. It keeps its weights.

        Returns:
            Copies of all tensors.

        Raises:
            RuntimeError: If no group keeps an average.
        """
        with self.averaged():
            entries = model.state_dict().items()
            return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in entries}
