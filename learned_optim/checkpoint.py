"""Checking and restoring what ``load_state_dict`` is given: functions of state dicts.

``torch.optim.Optimizer.load_state_dict`` would cast the memory to the parameter's dtype, all of it at once, and alias the
caller's tensors. So the base class is shown everything but the memory (:func:`without_memory`), and the memory is copied
afterwards (:func:`restore`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim.group_options import Group, compute_dtype, params_with_groups
from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import CELL_SCALE, layout, names
from learned_optim.sharding import as_real

RuleOf = Callable[[Group], UpdateRule]
"""From a group, live or saved, to the rule that steps it."""


def check_checkpoint(state_dict: dict[str, Any], groups: Sequence[Group], rule_of: RuleOf) -> None:
    """Refuse a checkpoint that another optimizer or other weights made, or that does not fit the parameters.

    Args:
        state_dict: What is to be loaded.
        groups: The optimizer's own.
        rule_of: The rule of a group.

    Raises:
        ValueError: If it does not fit; the message says what to do.
    """
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        return  # The base class explains this one.
    for saved, live in zip(saved_groups, groups, strict=True):
        _check_weights(saved, live)
    for index, saved, param, group in _saved_states(state_dict, groups):
        _check_memory(index, saved, param, group, rule_of(group))


def without_memory(state_dict: dict[str, Any], groups: Sequence[Group], rule_of: RuleOf) -> dict[str, Any]:
    """Return a checkpoint without what :func:`restore` restores.

    Args:
        state_dict: What is to be loaded; not modified.
        groups: The optimizer's own.
        rule_of: The rule of a group.

    Returns:
        A checkpoint that shares the other values.
    """
    state = dict(state_dict["state"])
    saved = params_with_groups(state_dict["param_groups"])
    for (index, _), (_, group) in zip(saved, params_with_groups(groups), strict=False):
        if index in state:
            own = {"step", *names(rule_of(group), state[index])}
            state[index] = {name: value for name, value in state[index].items() if name not in own}
    return {**state_dict, "state": state}


def restore(
    state: MutableMapping[Any, Any], state_dict: dict[str, Any], groups: Sequence[Group], rule_of: RuleOf, capturable: bool
) -> None:
    """Copy the memory of a checkpoint into an optimizer's state.

    Args:
        state: The optimizer's; written.
        state_dict: A checkpoint that passed :func:`check_checkpoint`; neither modified nor aliased.
        groups: The optimizer's own.
        rule_of: The rule of a group.
        capturable: Whether step counts lie on the parameter's device, where a saved group does not say.

    Raises:
        RuntimeError: If memory runs out on the way. The state is empty then.
    """
    try:
        for _, saved, param, group in _saved_states(state_dict, groups):
            step = torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu")
            on_device = group.get("capturable", capturable)
            state[param]["step"] = step.to(param.device if on_device else "cpu", copy=True)
            for name in names(rule_of(group), saved):
                state[param][name] = saved[name].detach().to(param.device, copy=True).contiguous()
    except (RuntimeError, MemoryError) as error:
        state.clear()  # Half a memory would be taken for a whole one.
        raise RuntimeError(
            f"the checkpoint could not be copied ({error}); the optimizer has no state now: make room and load it again"
        ) from error


def _saved_states(
    state_dict: dict[str, Any], groups: Sequence[Group]
) -> Iterator[tuple[int, dict[str, Any], Tensor, Group]]:
    """Yield index, saved state, parameter and saved group of every parameter of which the checkpoint holds state."""
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


def _check_memory(index: int, saved: dict[str, Any], param: Tensor, group: Group, rule: UpdateRule) -> None:
    """Refuse one parameter's saved state if it is not this rule's memory of this parameter."""
    shape = tuple(as_real(param).shape)
    own = ("hidden", "cell", CELL_SCALE, *rule.moment_names)
    if any(name in saved and not _is_plain_memory(saved[name]) for name in own):
        raise ValueError(f"the memory of parameter {index} in the checkpoint is not all of dense tensors; was it edited?")
    if missing := [name for name in ("step", *names(rule, saved)) if name not in saved]:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)} of parameter {index}; was it edited?")
    dtype = str(saved["hidden"].dtype).removeprefix("torch.")
    expected = group.get("state_dtype", dtype)
    if (dtype == "int8") != (expected == "int8") and compute_dtype(param.dtype) == torch.float32:
        raise ValueError(
            f"the memory of parameter {index} is {dtype} in the checkpoint, whose options say state_dtype={expected!r}; "
            "8-bit memory means nothing without its scales: load it into an optimizer with the state_dtype that saved it"
        )
    if not isinstance(saved["step"], (int, float)) and not (_is_plain_memory(saved["step"]) and saved["step"].numel() == 1):
        raise ValueError(
            f"the step of parameter {index} in the checkpoint is {saved['step']!r}, not a number; was it edited?"
        )
    entries = layout(rule, saved["hidden"].dtype)
    for name in names(rule, saved):
        if tuple(saved[name].shape) != shape + entries[name].trailing:
            raise ValueError(
                f"parameter {index} has shape {tuple(param.shape)}, but its {name} in the checkpoint has shape "
                f"{tuple(saved[name].shape)}; give the optimizer the same parameters in the same order"
            )


def _is_plain_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"
