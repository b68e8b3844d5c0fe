"""Functions that check a checkpoint given to ``load_state_dict`` and restore its memory.

``torch.optim.Optimizer.load_state_dict`` would cast the memory to the parameter's dtype, all of it at once, and alias the
caller's tensors. So the base class sees everything except the memory (:func:`without_memory`), and :func:`restore` copies
the memory afterwards.

A checkpoint may hold the memory in any floating dtype: trainers cast whole checkpoints, and a float32 model may become
a float64 model. The memory is converted to the layout that the group's ``state_dtype`` and ``moment_dtype`` name. Memory
that cannot be converted is refused, and everything is checked before anything is written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from learned_optim.average import AVERAGE, average_dtype
from learned_optim.group_options import Group, check_options, dtype_names, layout_dtypes, params_with_groups
from learned_optim.modes import is_fake
from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import CELL_SCALE, MEMORY_FLOATS, WIDE_MOMENTS, Entry, convert, layout
from learned_optim.sharding import as_real, local, zeros_like

PIECE = 2**16
"""Coordinates that are checked or converted at once: conversion needs little memory beside the state."""

RuleOf = Callable[[Group], UpdateRule]
"""From a group, live or saved, to the rule that steps it."""


@contextlib.contextmanager
def loading(optimizer: Optimizer, rule_of: RuleOf) -> Iterator[None]:
    """Check a checkpoint before the base class loads it, hide the memory from that class, and copy it afterwards.

    Both happen between the hooks of the caller: after the pre-hooks, which may replace the checkpoint, and before the
    post-hooks, which may change what was loaded.

    Args:
        optimizer: The optimizer that is about to load.
        rule_of: The rule of a group.

    Yields:
        Nothing; load inside.
    """
    checked: list[dict[str, Any]] = []

    def check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        check_checkpoint(state_dict, optimizer.param_groups, optimizer.defaults, rule_of)
        checked.append(state_dict)
        return without_memory(state_dict, optimizer.param_groups, rule_of)

    @torch.inference_mode(False)  # Later steps could not write to inference tensors.
    def copy_memory(_: Optimizer) -> None:
        restore(optimizer.state, checked[0], optimizer.param_groups, optimizer.defaults, rule_of)

    hooks = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(copy_memory, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_checkpoint(state_dict: dict[str, Any], groups: Sequence[Group], defaults: Group, rule_of: RuleOf) -> None:
    """Refuse a checkpoint that another optimizer or other weights made, or that does not fit the parameters.

    Args:
        state_dict: The checkpoint to load.
        groups: The optimizer's groups.
        defaults: The optimizer's defaults, for options that the checkpoint lacks.
        rule_of: The rule of a group.

    Raises:
        ValueError: If the checkpoint does not fit; the message says what to do.
    """
    _check_containers(state_dict)
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        return  # The base class explains this one.
    for number, (saved, live) in enumerate(zip(saved_groups, groups, strict=True)):
        _check_weights(saved, live)
        try:
            dtype_names(saved)
            check_options({**defaults, **saved})
        except ValueError as error:
            raise ValueError(f"group {number} of the checkpoint cannot be used: {error}") from error
    for index, saved, param, group in _saved_states(state_dict, groups):
        if is_lazy(param):
            raise ValueError(f"parameter {index} has no shape yet: its module is lazy; run one forward pass, then load")
        if is_fake(param):
            raise ValueError(f"parameter {index} is fake and holds no numbers; load into a real model")
        rule = rule_of(group)
        step_count(index, saved)
        _check_tensors(index, saved, param, rule)
        _check_values(index, saved, param, {**defaults, **group}, rule)


def without_memory(state_dict: dict[str, Any], groups: Sequence[Group], rule_of: RuleOf) -> dict[str, Any]:
    """Return a checkpoint without the memory that :func:`restore` copies.

    Args:
        state_dict: The checkpoint to load; not modified.
        groups: The optimizer's groups.
        rule_of: The rule of a group.

    Returns:
        A checkpoint that shares the other values.
    """
    state = dict(state_dict["state"])
    saved = params_with_groups(state_dict["param_groups"])
    for (index, _), (_, group) in zip(saved, params_with_groups(groups), strict=False):
        if index in state:
            own = {"step", AVERAGE, CELL_SCALE, *_names(rule_of(group), state[index])}
            state[index] = {name: value for name, value in state[index].items() if name not in own}
    return {**state_dict, "state": state, "param_groups": [{**g, **dtype_names(g)} for g in state_dict["param_groups"]]}


def restore(
    state: MutableMapping[Any, Any], state_dict: dict[str, Any], groups: Sequence[Group], defaults: Group, rule_of: RuleOf
) -> None:
    """Copy the memory of a checkpoint into an optimizer's state, in the layout of its groups.

    Args:
        state: The optimizer's state, which is written.
        state_dict: A checkpoint that passed :func:`check_checkpoint`; neither modified nor aliased.
        groups: The optimizer's groups.
        defaults: The optimizer's defaults, for options that the checkpoint lacks.
        rule_of: The rule of a group.

    Raises:
        RuntimeError: If memory runs out on the way. The state is empty then.
    """
    try:
        for index, saved, param, saved_group in _saved_states(state_dict, groups):
            group = {**defaults, **saved_group}
            device = param.device if group["capturable"] else "cpu"
            state[param]["step"] = torch.tensor(step_count(index, saved), dtype=torch.float32, device=device)
            rule = rule_of(group)
            entries = layout(rule, *layout_dtypes(param, group))
            new = {name: zeros_like(as_real(param), entry.trailing, entry.dtype) for name, entry in entries.items()}
            old = {name: saved[name].detach() for name in _names(rule, saved)}
            if {name: tensor.dtype for name, tensor in old.items()} == {name: tensor.dtype for name, tensor in new.items()}:
                for name, tensor in new.items():
                    local(tensor).copy_(local(old[name]))
            else:
                _convert(rule, old, new, entries)
            state[param].update(new)
            if group["average"] and AVERAGE in saved:
                average = torch.empty_like(param, dtype=average_dtype(param), memory_format=torch.contiguous_format)
                state[param][AVERAGE] = average
                local(average).copy_(local(saved[AVERAGE].detach()))
    except (RuntimeError, MemoryError) as error:
        state.clear()  # The next step would take half a memory for a whole one.
        raise RuntimeError(
            f"the checkpoint could not be copied ({error}); the optimizer has no state now: make room and load it again"
        ) from error


def step_count(index: int, saved: Mapping[str, Any]) -> float:
    """Return the inner steps that a parameter has taken.

    Args:
        index: The parameter's position, for the message.
        saved: Its state in the checkpoint.

    Returns:
        A number that float32 holds.

    Raises:
        ValueError: If the count is missing, or is not a number of steps.
    """
    if "step" not in saved:
        raise ValueError(f"the checkpoint lacks step of parameter {index}; was it edited?")
    value, number = saved["step"], math.nan
    if isinstance(value, Tensor):
        if _is_dense(value) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool:
            number = float(value)
    elif isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not 0 <= number <= torch.finfo(torch.float32).max:
        shown = type(value).__name__ if math.isnan(number) else f"{number:g}"
        raise ValueError(
            f"the step of parameter {index} in the checkpoint is {shown}, not a number of steps: finite and not below 0; "
            "was it edited, or stored in 16 bits?"
        )
    return number


def _check_containers(state_dict: dict[str, Any]) -> None:
    """Refuse anything except a state dict, before the base class takes it apart."""
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
        raise ValueError(
            "the checkpoint is no state of an optimizer: it needs a dict 'state' and a list 'param_groups', got "
            f"{type(state).__name__} and {type(groups).__name__}"
        )
    for number, group in enumerate(groups):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(params, (list, tuple)) or not all(isinstance(index, (int, str)) for index in params):
            raise ValueError(f"group {number} of the checkpoint is no dict with a list 'params' of indices; was it edited?")
    indices = [index for index, _ in params_with_groups(groups)]
    if len(set(indices)) != len(indices):
        raise ValueError("the checkpoint names a parameter twice in its groups; was it edited?")
    for index in indices:
        if not isinstance(state.get(index, {}), Mapping):
            kind = type(state[index]).__name__
            raise ValueError(f"the state of parameter {index} in the checkpoint is a {kind}, not a dict; was it edited?")


def _saved_states(state_dict: dict[str, Any], groups: Sequence[Group]) -> Iterator[tuple[int, Any, Tensor, Group]]:
    """Yield index, saved state, parameter and saved group of every parameter whose state the checkpoint holds."""
    saved, live = params_with_groups(state_dict["param_groups"]), params_with_groups(groups)
    for index, ((saved_index, group), (param, _)) in enumerate(zip(saved, live, strict=True)):
        if state_dict["state"].get(saved_index):
            yield index, state_dict["state"][saved_index], param, group


def _check_weights(saved: Group, live: Group) -> None:
    if "fingerprint" not in saved:
        raise ValueError(
            "the checkpoint was not made by LearnedOptimizer: its parameter groups name no weights; "
            "start the optimizer fresh or load the checkpoint into the optimizer that made it"
        )
    if saved["fingerprint"] != live["fingerprint"]:
        name = saved.get("weights")
        raise ValueError(
            f"the checkpoint was made with weights {name!r} ({str(saved['fingerprint'])[:12]}), this "
            f"optimizer uses {live['weights']!r} ({live['fingerprint'][:12]}); an LSTM's memory means nothing "
            f"to another LSTM, so construct it with weights={name!r}"
        )


def _names(rule: UpdateRule, saved: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a checkpoint's memory tensors. Eight-bit memory has scales, even after a cast."""
    scaled = CELL_SCALE in saved or _dtype(saved.get("hidden")) == torch.int8
    return ("hidden", "cell", *rule.moment_names, *((CELL_SCALE,) if scaled else ()))


def _check_tensors(index: int, saved: Mapping[str, Any], param: Tensor, rule: UpdateRule) -> None:
    """Refuse tensors that cannot be this rule's memory of this parameter, by kind, dtype and shape."""
    names = _names(rule, saved)
    if any(name in saved and not _is_dense(saved[name]) for name in names):
        raise ValueError(f"the memory of parameter {index} in the checkpoint is not all of dense tensors; was it edited?")
    if missing := [name for name in names if name not in saved]:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)} of parameter {index}; was it edited?")
    if AVERAGE in saved and not _fits(saved[AVERAGE], param):
        raise ValueError(
            f"the average of parameter {index} in the checkpoint does not fit its shape {tuple(param.shape)} and kind of "
            "number, or is not sharded alike; leave it out, and a new one starts at the weights"
        )
    entries = layout(rule, torch.int8 if CELL_SCALE in saved else torch.float32)
    for name in names:
        dtype, shape = saved[name].dtype, tuple(saved[name].shape)
        if dtype not in MEMORY_FLOATS and not (dtype == torch.int8 and entries[name].dtype == torch.int8):
            raise ValueError(
                f"the {name} of parameter {index} in the checkpoint is {dtype}, which no memory is stored in; save the "
                "checkpoint again without a cast, or cast it to float32"
            )
        if shape != tuple(as_real(param).shape) + entries[name].trailing:
            raise ValueError(
                f"parameter {index} has shape {tuple(param.shape)}, but its {name} in the checkpoint has shape "
                f"{shape}; give the optimizer the same parameters in the same order"
            )
        if getattr(saved[name], "placements", None) != getattr(param, "placements", None):
            raise ValueError(
                f"the {name} of parameter {index} in the checkpoint is not sharded as the parameter is; load it with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )


def _check_values(index: int, saved: Mapping[str, Any], param: Tensor, group: Group, rule: UpdateRule) -> None:
    """Refuse memory that lost its meaning on the way: 8-bit units without scales, float16 that under- or overflowed."""
    names = _names(rule, saved)
    dtype = str(saved["hidden"].dtype).removeprefix("torch.")
    narrow = [name for name in names if saved[name].dtype == torch.float16]
    for piece in _pieces({name: saved[name].detach() for name in names}, as_real(param).dim()):
        hidden = piece["hidden"]
        whole = not hidden.is_floating_point() or bool((hidden == hidden.round()).all())
        beyond = hidden.is_floating_point() and bool((hidden.abs() > 1).any())
        if CELL_SCALE in saved and not whole:
            raise ValueError(
                f"the memory of parameter {index} in the checkpoint has a cell_scale, but is {dtype} and not in 8-bit "
                "units; was it edited?"
            )
        if CELL_SCALE not in saved and (beyond or (whole and group["state_dtype"] == "int8" and bool(hidden.any()))):
            raise ValueError(
                f"the memory of parameter {index} is {dtype} in the checkpoint, whose options say "
                f"state_dtype={group['state_dtype']!r}; its numbers are those of 8-bit memory, which means nothing without "
                "its scales: load it into an optimizer with the state_dtype that saved it"
            )
        if not all(bool(piece[name].isfinite().all()) for name in narrow):
            raise ValueError(
                f"the memory of parameter {index} overflowed in float16; save the checkpoint without a cast, or in bfloat16"
            )
        for name in WIDE_MOMENTS.intersection(narrow):
            others = [piece[other] != 0 for other in names if other not in (name, CELL_SCALE)]
            lost = [(piece[name] == 0) & other.flatten(1).any(1) for other in (o.unsqueeze(-1) for o in others)]
            if any(bool(coordinates.any()) for coordinates in lost):
                raise ValueError(
                    f"the {name} of parameter {index} in the checkpoint is float16, and underflowed to zero where other "
                    "memory is not zero; save the checkpoint without a cast, or in bfloat16"
                )


def _convert(rule: UpdateRule, old: Mapping[str, Tensor], new: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> None:
    dims = new["hidden"].dim() - 1
    for source, target in zip(_pieces(old, dims), _pieces(new, dims), strict=True):
        source = {name: values.to(target["hidden"].device) for name, values in source.items()}
        for name, values in convert(rule, source, entries).items():
            target[name].copy_(values)


def _pieces(memory: Mapping[str, Tensor], dims: int) -> Iterator[dict[str, Tensor]]:
    """Cut this rank's part of a memory into pieces of some coordinates, each tensor ``(N, ...)``."""
    flat = {name: local(values).reshape(-1, *values.shape[dims:]) for name, values in memory.items()}
    for start in range(0, len(flat["hidden"]), PIECE):
        yield {name: values[start : start + PIECE] for name, values in flat.items()}


def _fits(average: Any, param: Tensor) -> bool:
    return (
        _is_dense(average)
        and average.shape == param.shape
        and average.is_complex() == param.is_complex()
        and (average.is_complex() or average.is_floating_point())
        and getattr(average, "placements", None) == getattr(param, "placements", None)
    )


def _is_dense(value: Any) -> bool:
    real = isinstance(value, Tensor) and value.device.type != "meta" and not is_fake(value)
    return real and value.layout == torch.strided


def _dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) else None
