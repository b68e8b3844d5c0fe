"""How a step is executed. Every backend computes the same rule; all but the reference are tested against it."""

import weakref

import torch

from learned_optim.backends.chunks import StepItem, apply_step
from learned_optim.backends.native_lstm import native_advance, native_available, native_supports
from learned_optim.rules import UpdateRule
from learned_optim.rules.rule import Advance

BACKENDS = ("auto", "reference", "native")
"""``reference`` is eager PyTorch, ``native`` runs the LSTM in compiled C on the CPU, ``auto`` takes the fastest."""

_kernels: weakref.WeakKeyDictionary[UpdateRule, Advance] = weakref.WeakKeyDictionary()


def check_backend(name: str) -> None:
    """Refuse a backend that does not exist or cannot work here.

    Args:
        name: What the user asked for.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If the native kernels were not built.
    """
    if name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "native" and not native_available():
        raise RuntimeError(
            "backend='native' needs kernels that were not built here; install a C compiler and reinstall learned-optim, "
            "or use backend='auto'"
        )


def advance_with(backend: str, rule: UpdateRule) -> Advance | None:
    """Return what runs a frozen rule's LSTM for one step, or None for the rule's own matmuls.

    Args:
        backend: One of :data:`BACKENDS`.
        rule: In the dtype and on the device to compute with.

    Returns:
        The kernel, its weights packed once for each rule.
    """
    if torch.compiler.is_compiling() or backend == "reference" or not native_supports(rule.lstm):
        return None
    if rule not in _kernels:
        _kernels[rule] = native_advance(rule.lstm)
    return _kernels[rule]


def backend_in_use(backend: str, rule: UpdateRule) -> str:
    """Return the name of what runs a frozen rule when ``backend`` is asked for; never ``auto``."""
    return "reference" if advance_with(backend, rule) is None else "native"


__all__ = ["BACKENDS", "StepItem", "advance_with", "apply_step", "backend_in_use", "check_backend"]
