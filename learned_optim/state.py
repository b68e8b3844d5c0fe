"""The state of one parameter: its initial values and its size in bytes."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from learned_optim.average import average_dtype
from learned_optim.group_options import Group, layout_dtypes
from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import layout
from learned_optim.sharding import as_real, zeros_like
from learned_optim.weights.facts import bytes_per_parameter


@torch.inference_mode(False)  # Later steps could not write to inference tensors.
def initial_state(param: Tensor, group: Group, rule: UpdateRule) -> dict[str, Tensor]:
    """Return memory at rest.

    Args:
        param: A parameter on any device, sharded or not.
        group: Its group.
        rule: The rule that will step it.

    Returns:
        ``step``, and every tensor of the layout. A tensor's shape is the parameter's shape, then the trailing dimensions.
    """
    like = as_real(param)
    step = torch.zeros((), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")
    entries = layout(rule, *layout_dtypes(param, group)).items()
    return {"step": step, **{name: zeros_like(like, entry.trailing, entry.dtype) for name, entry in entries}}


def step_tensor(param: Tensor, group: Group, state: MutableMapping[str, Any]) -> Tensor:
    """Return a parameter's count of steps as a tensor.

    Args:
        param: The parameter.
        group: Its group.
        state: Its state. A count that was set to a Python number is replaced by a tensor.

    Returns:
        0-dim float32, which the next step increments.

    Raises:
        RuntimeError: If the count is neither a tensor nor a number of steps.
    """
    step = state["step"]
    if isinstance(step, Tensor):
        return step
    if not isinstance(step, (int, float)) or not 0 <= step <= torch.finfo(torch.float32).max:
        raise RuntimeError(
            f"state[...]['step'] was set to {type(step).__name__} {step!s:.20}; a count of steps is 0 or more"
        )
    with torch.inference_mode(False):
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=param.device if group["capturable"] else "cpu")
    return state["step"]


def state_bytes(param: Tensor, group: Group, rule: UpdateRule, state: Mapping[str, Any] | None) -> int:
    """Return the bytes of a parameter's state over all ranks.

    Args:
        param: Any parameter.
        group: Its group.
        rule: The rule that steps it.
        state: Its state; empty or None before its first step.

    Returns:
        The bytes of the state, or without one the bytes that the first step will allocate.

    Raises:
        ValueError: If the parameter has no shape yet.
    """
    if state:
        return sum(value.nbytes if isinstance(value, Tensor) else 4 for value in state.values())
    if is_lazy(param):
        raise ValueError("a parameter has no shape yet: its module is lazy; run one forward pass first")
    numel = param.numel() * (2 if param.is_complex() else 1)
    average = param.numel() * average_dtype(param).itemsize if group["average"] else 0
    return numel * bytes_per_parameter(rule, *layout_dtypes(param, group)) + average + 4


@torch.inference_mode(False)  # Later steps could not write to inference tensors.
def make_contiguous(memory: dict[str, Any]) -> None:
    """Replace tensors with other strides, which a caller may have put there, by contiguous copies.

    Args:
        memory: The state of one parameter.
    """
    for name, value in memory.items():
        if isinstance(value, Tensor) and not value.is_contiguous():
            memory[name] = value.contiguous()
