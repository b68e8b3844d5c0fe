"""Whether gradients and state fit their parameters: what a step checks before it writes anything.

A caller who catches the error has lost nothing, and a second step behaves like the first. A step that repeats the last one
skips this, because its plan has compared all of these tensors with those that fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from learned_optim.average import AVERAGE
from learned_optim.group_options import Group, check_options, compute_dtype
from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import MEMORY_FLOATS, layout, names
from learned_optim.sharding import as_real, local


def check_group_options(groups: Iterable[Group]) -> None:
    """Refuse a step whose options were set out of range; to look at the value of a tensor would wait for its device.

    Args:
        groups: The optimizer's.

    Raises:
        ValueError: If an option of a group is out of range.
    """
    for group in groups:
        check_options({**group, "lr": 1.0} if isinstance(group["lr"], Tensor) else group)


def check_fit(groups: Iterable[Group], state: Mapping[Tensor, Any], rule_of: Callable[[Group], UpdateRule]) -> None:
    """Refuse a step whose gradients or state do not fit.

    Args:
        groups: The optimizer's.
        state: The optimizer's; a parameter that has none starts at rest.
        rule_of: The rule of a group.

    Raises:
        RuntimeError: If a gradient is sparse or unlike its parameter, or state has another shape, dtype or device.
    """
    first = 0
    for group in groups:
        rule = rule_of(group)
        for position, param in enumerate(group["params"]):
            if param.grad is not None:
                name = _name(group, position, first + position)
                memory = state.get(param)
                _check_gradient(name, param, param.grad)
                if memory:
                    _check_state(name, param, memory, rule)
                elif _capturing(param):
                    raise RuntimeError(
                        f"{name} has no state yet, and a CUDA graph cannot hold the first step of a parameter; take one "
                        "step before you capture"
                    )
        first += len(group["params"])


def _name(group: Group, position: int, index: int) -> str:
    return f"parameter {group['param_names'][position]!r}" if "param_names" in group else f"parameter {index}"


def _check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"LearnedOptimizer does not support sparse gradients, and {name} has one; build the embedding with sparse=False"
        )
    for what, own, other in (
        ("shape", tuple(param.shape), tuple(grad.shape)),
        ("device", param.device, grad.device),
        ("kind of number", _kind(param), _kind(grad)),
    ):
        if own != other:
            raise RuntimeError(
                f"{name} has {what} {own}, but its gradient has {what} {other}: the parameter was replaced after "
                "backward(); call zero_grad() and compute the gradient again"
            )


def _check_state(name: str, param: Tensor, memory: Mapping[str, Any], rule: UpdateRule) -> None:
    if not isinstance(memory, Mapping) or "hidden" not in memory:
        raise RuntimeError(f"the state of {name} is not this optimizer's; {_FRESH}")
    if memory["hidden"].dtype == torch.int8 and compute_dtype(param.dtype) == torch.float64:
        raise RuntimeError(
            f"{name} is {param.dtype}, but its memory is 8-bit, which serves single precision alone; load a checkpoint made "
            f"before the change, which converts the memory, or {_FRESH}"
        )
    shape, device = tuple(as_real(param).shape), param.device
    expected = layout(rule, memory["hidden"].dtype)
    for entry_name in names(rule, memory):
        value = memory.get(entry_name)
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            found = "is missing" if value is None else f"is {_describe(value)}"
            raise RuntimeError(f"{entry_name!r} of {name} {found}, not a dense tensor; {_FRESH}")
        entry = expected[entry_name]
        if tuple(value.shape) != shape + entry.trailing:
            raise RuntimeError(
                f"{name} has shape {tuple(param.shape)}, but its {entry_name!r} has shape {tuple(value.shape)} where "
                f"{shape + entry.trailing} belongs; change every tensor of the state as you changed the parameter, or "
                f"{_FRESH}"
            )
        integer = entry_name in ("hidden", "cell") and memory["hidden"].dtype == torch.int8
        if value.dtype not in ((torch.int8,) if integer else MEMORY_FLOATS):
            raise RuntimeError(f"{entry_name!r} of {name} is {value.dtype}, which holds no memory; {_FRESH}")
        if local(value).device != device:
            raise RuntimeError(
                f"{name} lies on {device}, but its {entry_name!r} on {local(value).device}; move the state with the "
                f"parameter, or {_FRESH}"
            )
    average = memory.get(AVERAGE, param)
    if not isinstance(average, Tensor) or average.shape != param.shape or _kind(average) != _kind(param):
        raise RuntimeError(
            f"{name} has shape {tuple(param.shape)}, but its average is {_describe(average)}; change it as you changed the "
            "parameter, or let it start at the weights: `del optimizer.state[param]['average']`"
        )
    step = memory.get("step")
    if (
        isinstance(step, bool)
        or not isinstance(step, (int, float, Tensor))
        or (isinstance(step, Tensor) and step.numel() != 1)
    ):
        raise RuntimeError(f"'step' of {name} is {_describe(step)}, not one number; {_FRESH}")


_FRESH = "start its memory afresh: `del optimizer.state[param]`"


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "real" if tensor.is_floating_point() else str(tensor.dtype)


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def _capturing(param: Tensor) -> bool:
    return param.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
