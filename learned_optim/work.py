"""From parameters, groups and state to what a backend is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim.backends import StepItem, StepOptions
from learned_optim.group_options import is_matrix, matrix_stage
from learned_optim.rules import MatrixStage, UpdateRule
from learned_optim.rules.storage import names
from learned_optim.sharding import as_real, gradient_of, local, whole


def step_items(
    rule: UpdateRule, params: Sequence[Tensor], state: Mapping[Tensor, Any], stage: MatrixStage | None
) -> list[StepItem]:
    """Return what a backend steps of each parameter.

    Args:
        rule: Steps them all.
        params: With gradients and state, on one device.
        state: The optimizer's.
        stage: Shapes the updates of those that are matrices.

    Returns:
        One item for each parameter.
    """
    memories = [{name: state[param][name] for name in rule.agreement_names} for param in params]
    done = [state[param]["step"] for param in params]
    scales = rule.tensor_scales([as_real(param) for param in params], memories, done)
    return [
        StepItem(
            param=local(as_real(param)),
            grad=local(gradient_of(param)),
            memory={name: local(state[param][name]) for name in names(rule, state[param])},
            step=state[param]["step"],
            scale=None if scale is None else whole(scale),
            matrix=param if stage is not None and is_matrix(param, stage) else None,
        )
        for param, scale in zip(params, scales, strict=True)
    ]


def options_of(group: dict[str, Any], rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> StepOptions:
    """Return how a group's updates are applied; a rate that is a tensor goes where the rule computes.

    Args:
        group: Its options.
        rule: Steps it.
        device: Where the rule computes.
        dtype: What it computes in.

    Returns:
        The options of a step.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.detach().to(device, dtype, non_blocking=True).reshape(())
    return StepOptions.of(lr, group["weight_decay"], group["maximize"], matrix_stage(group, rule))
