"""How a step is executed. Every backend computes the same rule; all but the reference are tested against it.

A backend is a module with three functions: ``available()`` says whether it can work here at all; ``supports(rule)`` says
whether it can run a rule where that rule lies; ``apply_step(rule, items, options)`` takes the step and hands to the
reference what it cannot take. Two more are optional: ``make_plan(groups, state)`` returns what repeats a whole step, and
``matrix`` is a module that shapes the updates of matrices, a :class:`~learned_optim.backends.matrices.Kernel`.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from learned_optim.backends import compiled, native, reference, triton
from learned_optim.backends.items import PlannedGroup, StepItem, StepOptions, overlap
from learned_optim.backends.matrices import split, step_matrices
from learned_optim.modes import is_fake
from learned_optim.rules import UpdateRule

_MODULES: dict[str, ModuleType] = {"triton": triton, "native": native, "compiled": compiled}
"""Every backend but the reference, fastest first."""

_AUTO = ("triton", "native")
"""What ``auto`` takes without being asked: not ``compiled``, which spends up to a minute compiling at the first step."""

_INSTALL = {
    "triton": "it needs an NVIDIA GPU that torch can use, and `pip install triton`",
    "native": "install a C compiler and reinstall learned-optim",
    "compiled": "it needs a C++ compiler that works, such as g++",
}
"""What to do where a backend is not available."""

BACKENDS = ("auto", "reference", *_MODULES)
"""``reference`` is eager PyTorch, ``triton`` fused on CUDA, ``native`` compiled C on the CPU, ``compiled`` goes through
TorchInductor; ``auto`` takes ``triton``, ``native`` or ``reference``, the first that works."""


def check_backend(name: str) -> None:
    """Refuse a backend that does not exist or cannot work here.

    Args:
        name: What the user asked for.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If it is not available.
    """
    if name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}; choose one of {', '.join(BACKENDS)}")
    if name in _MODULES and not _MODULES[name].available():
        raise RuntimeError(f"backend={name!r} is not available here; {_INSTALL[name]}, or use backend='auto'")


def apply_step(
    backend: str,
    rule: UpdateRule,
    items: Sequence[StepItem],
    options: StepOptions,
) -> None:
    """Apply one inner step in place.

    Args:
        backend: One of :data:`BACKENDS`.
        rule: In the dtype to compute with, on the items' device.
        items: Parameters that share the rule, device and compute dtype.
        options: How updates are applied.
    """
    module = choose_backend(backend, rule)
    device = rule.readout.weight.device.type
    on_cpu = device == "cpu" and not torch.compiler.is_compiling()
    # Two that lie in the same memory, stepped at once, would each undo part of what the other does.
    one_by_one = on_cpu and overlap([item.param for item in items])
    narrowed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if narrowed else contextlib.nullcontext():
        for part in ([item] for item in items) if one_by_one else (items,):
            plain, matrices = split(part, options)
            if plain:
                module.apply_step(rule, plain, options)
            if matrices:
                step_matrices(module.apply_step, rule, matrices, options, getattr(module, "matrix", None))


class Plan(Protocol):
    """Repeats a step for which nothing but gradients and options has changed."""

    def repeat(self, groups: Sequence[PlannedGroup], state: dict[Tensor, Any]) -> bool:
        """Take and count the step if everything is as it was, and return whether it did."""
        ...


def make_plan(backend: str, groups: Sequence[PlannedGroup], state: dict[Tensor, Any]) -> Plan | None:
    """Plan the next step, where one backend runs all groups and can repeat steps.

    Args:
        backend: One of :data:`BACKENDS`.
        groups: The parameter groups.
        state: The optimizer's state.

    Returns:
        None where it cannot.
    """
    chosen = {choose_backend(backend, group.rule) for group in groups}
    make: Callable[..., Plan | None] | None = getattr(next(iter(chosen)), "make_plan", None) if len(chosen) == 1 else None
    return make(groups, state) if make else None


def choose_backend(name: str, rule: UpdateRule) -> ModuleType:
    """Return what runs a rule: the named backend, or for ``auto`` the first that supports it; else the reference."""
    if is_fake(rule.readout.weight):
        return reference
    lacking = name == "auto" and not native.available() and rule.readout.weight.device.type == "cpu"
    if lacking and not torch.compiler.is_compiling():  # Which would trace through the cache and warn.
        _say_once()
    names = _AUTO if name == "auto" else (name,)
    for module in (_MODULES[name] for name in names if name in _MODULES):
        if module.available() and module.supports(rule):
            return module
    return reference


@functools.cache
def _say_once() -> None:
    logging.getLogger("learned_optim").warning(
        "the compiled CPU kernels were not built, or from other sources, and steps are several times slower; %s",
        _INSTALL["native"],
    )


def backend_in_use(backend: str, rule: UpdateRule) -> str:
    """Return the name of what runs a frozen rule when ``backend`` is asked for; never ``auto``."""
    chosen = choose_backend(backend, rule)
    return next((name for name, module in _MODULES.items() if module is chosen), "reference")


__all__ = [
    "BACKENDS",
    "Plan",
    "PlannedGroup",
    "StepItem",
    "StepOptions",
    "apply_step",
    "backend_in_use",
    "check_backend",
    "choose_backend",
    "make_plan",
]
