"""Options of a parameter group: which values are allowed, and which dtypes they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from learned_optim.guard import check_guard
from learned_optim.rules import MatrixStage, UpdateRule
from learned_optim.rules.storage import MOMENT_DTYPES, STATE_DTYPES

Group = dict[str, Any]


NUMBERS: Any = (Real, Tensor)

NOT_NEEDED = (
    "alpha",
    "amsgrad",
    "beta1",
    "beta2",
    "betas",
    "dampening",
    "eps",
    "initial_accumulator_value",
    "lr_decay",
    "momentum",
    "nesterov",
    "rho",
)
"""Options of other optimizers. The learned rule takes their place."""


def refuse_unknown(options: Iterable[str]) -> None:
    """Refuse keyword arguments that the constructor does not have.

    Args:
        options: Their names.

    Raises:
        TypeError: If there is one. An option of another optimizer gets the advice to remove it.
    """
    for name in options:
        if name in NOT_NEEDED:
            raise TypeError(f"{name}= is not needed here: remove it; the learned rule decides what {name} would")
        raise TypeError(f"LearnedOptimizer.__init__() got an unexpected keyword argument {name!r}")


def check_options(options: Group) -> None:
    """Refuse options that no step could use.

    Args:
        options: All options of one group, with the defaults filled in.

    Raises:
        ValueError: If a value is out of range, or an option is one that this optimizer does not have.
    """
    for name in ("fused", "differentiable"):
        if options.get(name):
            raise ValueError(f"Invalid {name}: {options[name]!r}; a group of LearnedOptimizer cannot have it")
    lr: Any = options["lr"]
    weight_decay: Any = options["weight_decay"]
    if lr is None:
        raise ValueError("Invalid learning rate: None; lr= is not needed here: remove it, the factor is then 1.0")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not isinstance(lr, NUMBERS) or not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}; it multiplies the learned update, 1.0 is the default")
    if not isinstance(weight_decay, NUMBERS) or not weight_decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; it is a number that is not negative")
    if not (isinstance(options["matrix"], bool) or options["matrix"] == "auto"):
        raise ValueError(f"Invalid matrix: {options['matrix']!r}; it is 'auto', True or False")
    share: Any = options["average"]
    if not isinstance(share, bool) and not (isinstance(share, (int, float)) and 0 <= share <= 1):
        raise ValueError(f"Invalid average: {share!r}; it is True, False, or a share of the steps taken, from 0 to 1")
    check_guard(options)


def matrix_stage(group: Group, rule: UpdateRule) -> MatrixStage | None:
    """Return what shapes the updates of a group's matrices.

    Args:
        group: Its ``matrix`` is ``"auto"``, the rule's own stage if it has one; True, a stage even if it has none; or False.
        rule: Steps the group.

    Returns:
        None where updates stay as the LSTM made them.
    """
    if group["matrix"] == "auto":
        return rule.matrix_stage
    return (rule.matrix_stage or MatrixStage()) if group["matrix"] else None


def is_matrix(param: Tensor, stage: MatrixStage) -> bool:
    """Return whether a parameter's update is shaped: it is real, has two or more dimensions and long enough sides."""
    return stage.applies_to(param.shape) and not param.is_complex()


def dtype_names(options: Group) -> dict[str, str | None]:
    """Return the memory dtypes among the options as names; a name, unlike a dtype, survives every checkpoint format.

    Args:
        options: Of one group, or the defaults. Dtypes or their names.

    Returns:
        A name for each of ``state_dtype`` and ``moment_dtype`` that is among the options. None lets the layout decide.

    Raises:
        ValueError: If memory cannot be stored in such a dtype.
    """
    named: dict[str, str | None] = {}
    for option, known, default in (("state_dtype", STATE_DTYPES, "float32"), ("moment_dtype", MOMENT_DTYPES, None)):
        if option in options:
            dtype = options[option]
            named[option] = default if dtype is None else str(dtype).removeprefix("torch.")
            if dtype is not None and named[option] not in known:
                raise ValueError(f"Invalid {option}: {dtype!r}; choose one of {', '.join(known)}")
    return named


def layout_dtypes(param: Tensor, group: Group) -> tuple[torch.dtype, torch.dtype | None, torch.dtype]:
    """Return the last three arguments of :func:`~learned_optim.rules.storage.layout` for a parameter.

    Args:
        param: Any.
        group: Its group. The names are checked again, because a group may have been edited by hand.

    Returns:
        The dtypes of LSTM memory, of moments (None: the layout decides) and of the computation.
    """
    named = dtype_names(group)
    state_dtype, moment_dtype = named["state_dtype"], named["moment_dtype"]
    moments = None if moment_dtype is None else MOMENT_DTYPES[moment_dtype]
    return STATE_DTYPES[str(state_dtype)], moments, compute_dtype(param.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a rule computes in for parameters of ``dtype``: float64 for double precision, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def params_with_groups(groups: Iterable[Group]) -> list[tuple[Any, Group]]:
    """Return every parameter, or in a checkpoint every index, together with its group."""
    return [(param, group) for group in groups for param in group["params"]]
