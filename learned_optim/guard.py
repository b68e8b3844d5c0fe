"""The guard of ``LearnedOptimizer(..., guard=True)``: it gives up on a learned rule that misbehaves.

After each step the guard looks at every guarded group. A group falls back for good when

- an update is not finite: the step is undone first;
- updates are long: their root mean square has exceeded :data:`MAX_RATIO` times the root mean square of the parameters
  (taken as at least :data:`MIN_SCALE`) in :data:`PATIENCE` steps in a row;
- the loss has risen, which the guard sees where ``step`` gets a closure. In :data:`PATIENCE` steps in a row, the loss was
  not finite, or its running mean was above three times its lowest value and above half-way from there to the first loss.

The group then forgets its memory and goes on with the nominal step of its rule: an Adam step relative to the tensor for the
default family, and plain Adam at 1e-3 for the paper's rules. Parameters stay where they are: the guard keeps a run
from getting worse and does not rewind it. One warning says why the guard acted, and ``summary`` repeats it from then on.

The guard keeps its numbers and its reason (a string) in the parameter groups, so checkpoints and copies carry them.
"""

import copy
import dataclasses
import math
import warnings
import weakref
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim.modes import is_fake, outside_modes
from learned_optim.rate_watch import small_rate
from learned_optim.rules import AdamModulationRule, plain_adam
from learned_optim.weights import Weights

MAX_RATIO = 0.25
"""An update is long if its root mean square exceeds this fraction of the parameters' root mean square."""

MIN_SCALE = 1e-2
"""Floor of the parameters' root mean square: many parameters start at zero."""

PATIENCE = 20
"""Steps that must misbehave in a row before the guard acts."""

SMOOTHING = 0.9
"""Decay of the running mean of the loss."""

START: dict[str, Any] = {
    "guard_tripped": "",
    "guard_long_updates": 0,
    "guard_high_losses": 0,
    "guard_first_loss": math.inf,
    "guard_mean_loss": math.inf,
    "guard_lowest_loss": math.inf,
}
"""What a group knows before it has been watched."""

_nominal: weakref.WeakKeyDictionary[Weights, Weights] = weakref.WeakKeyDictionary()


def check_guard(options: dict[str, Any]) -> None:
    """Refuse options that the guard cannot work with.

    Args:
        options: All options of one parameter group.

    Raises:
        ValueError: If ``guard`` is not a bool, ``capturable`` is set too, or a value that the guard wrote was replaced.
    """
    for name, start in START.items():
        if not isinstance(options.get(name, start), str if name == "guard_tripped" else (int, float)):
            raise ValueError(f"Invalid {name}: {options[name]!r}; the guard writes it, so leave it as it was")
    if not isinstance(options["guard"], bool):
        raise ValueError(f"Invalid guard: {options['guard']!r}; it is True or False")
    if options["guard"] and options["capturable"]:
        raise ValueError("guard=True reads every step on the host, which a CUDA graph cannot; leave out capturable=True")


def nominal(weights: Weights) -> Weights:
    """Return the weights a group falls back to: its rule with zero meta-parameters, or Adam at 1e-3 for the paper's rules.

    Args:
        weights: The group's weights.

    Returns:
        The weights to fall back to. Equal arguments give the same object.
    """
    if weights not in _nominal:
        _nominal[weights] = outside_modes(lambda: _make_nominal(weights))
    return _nominal[weights]


def _make_nominal(weights: Weights) -> Weights:
    if not isinstance(weights.rule, AdamModulationRule):
        return Weights(plain_adam(1e-3), "Adam(1e-3)")
    rule = copy.deepcopy(weights.rule)
    rule.config = dataclasses.replace(rule.config, matrix_blend=0.0)
    for parameter in rule.parameters():
        nn.init.zeros_(parameter)
    return Weights(rule, f"nominal Adam of {weights.name}")


def snapshot(groups: Iterable[dict[str, Any]]) -> list[dict[Tensor, Tensor]]:
    """Copy the parameters that a step is about to move, in the groups that the guard watches.

    Args:
        groups: The optimizer's groups.

    Returns:
        One dict for each group, from parameter to copy; the dict is empty if the guard does not watch the group.

    Raises:
        RuntimeError: If a watched group is trained by several processes.
    """
    return [_copies(group) if group["guard"] else {} for group in groups]


def _copies(group: dict[str, Any]) -> dict[Tensor, Tensor]:
    group.update({**START, **group})
    if group["guard_tripped"]:
        return {}
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "guard=True watches one process, and several would fall back at different steps; leave it out, and record "
            "what happens with learned_optim.Recorder instead"
        )
    if any(map(is_fake, group["params"])):
        raise RuntimeError("guard=True reads the parameters, and fake ones hold no numbers; leave the guard out here")
    return {p: p.detach().clone() for p in group["params"] if p.grad is not None and p.numel()}


def judge(
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, Any],
    before: Sequence[dict[Tensor, Tensor]],
    loss: Tensor | float | None,
) -> None:
    """Look at the step just taken, and fall back and warn where a rule has misbehaved for too long.

    Args:
        groups: The optimizer's groups; the guard writes what it knows into them.
        state: The optimizer's state; emptied for the parameters of a group that falls back.
        before: What :func:`snapshot` returned before the step.
        loss: The closure's loss; None without a closure.
    """
    tripped = {}
    for number, (group, old) in enumerate(zip(groups, before, strict=True)):
        reason = old and (_update_fault(group, old) or _loss_fault(group, loss))
        if reason:
            if rate := small_rate(group):
                reason += f"; lr={rate:g} is small, 1 is the usual factor"
            group["guard_tripped"] = tripped[number] = reason
            for param in group["params"]:
                state.pop(param, None)
    if tripped:
        reasons = "; ".join(f"group {number}: {reason}" for number, reason in tripped.items())
        warnings.warn(
            f"LearnedOptimizer fell back to its nominal Adam step, from now on and starting afresh ({reasons})", stacklevel=5
        )


def _update_fault(group: dict[str, Any], before: dict[Tensor, Tensor]) -> str:
    update = _root_mean_square(param.detach() - old for param, old in before.items())
    if not math.isfinite(update) and any((old.isfinite() & ~param.isfinite()).any() for param, old in before.items()):
        for param, old in before.items():
            param.copy_(old)
        return "an update was not finite; that step was undone"
    ratio = update / max(_root_mean_square(before.values()), MIN_SCALE)
    if _in_a_row(group, "guard_long_updates", ratio > MAX_RATIO):
        return f"{PATIENCE} updates in a row were longer than {MAX_RATIO} of the parameters, the last {ratio:.3g}"
    return ""


def _loss_fault(group: dict[str, Any], loss: Tensor | float | None) -> str:
    if loss is None:
        return ""
    value = float(loss.detach() if isinstance(loss, Tensor) else loss)
    if math.isfinite(value):
        if group["guard_first_loss"] == math.inf:
            group["guard_first_loss"] = group["guard_mean_loss"] = value
        mean = group["guard_mean_loss"] = SMOOTHING * group["guard_mean_loss"] + (1 - SMOOTHING) * value
        lowest = group["guard_lowest_loss"] = min(mean, group["guard_lowest_loss"])
        risen = mean > lowest + max(2 * abs(lowest), (group["guard_first_loss"] - lowest) / 2)
        found = f"the loss had risen to {mean:.3g} from {lowest:.3g}"
    else:
        risen, found = True, f"the loss was {value}"
    return f"for {PATIENCE} steps {found}" if _in_a_row(group, "guard_high_losses", risen) else ""


def _in_a_row(group: dict[str, Any], name: str, bad: bool) -> bool:
    group[name] = group[name] + 1 if bad else 0
    return group[name] >= PATIENCE


def _root_mean_square(tensors: Iterable[Tensor]) -> float:
    """Return the root mean square of all entries of all tensors; a complex number counts once."""
    norms, count = [], 0
    for tensor in tensors:
        norms.append(torch.linalg.vector_norm(tensor, dtype=torch.float32 if tensor.dtype.itemsize == 2 else None))
        count += tensor.numel()
    total = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]).square().sum()
    return math.sqrt(float(total) / count)
