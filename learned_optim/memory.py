"""The memory that a learned optimizer will need, known before anything is allocated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from learned_optim.optimizer import LearnedOptimizer, WeightsLike


def state_bytes(
    model_or_params: nn.Module | ParamsT,
    weights: WeightsLike = "default",
    *,
    state_dtype: torch.dtype | str | None = None,
    moment_dtype: torch.dtype | str | None = None,
    average: bool | float = False,
) -> int:
    """Return the bytes of optimizer state once every parameter has had a gradient; nothing is allocated to count them.

    Args:
        model_or_params: A model, of which the parameters that require gradients count, or parameters as
            :class:`LearnedOptimizer` takes them, groups included. On any device, ``"meta"`` too. Sharded parameters count
            whole, that is, over all ranks.
        weights: As for :class:`LearnedOptimizer`.
        state_dtype: As there.
        moment_dtype: As there.
        average: As there.

    Returns:
        Bytes. A step needs scratch memory beside them, a few MiB whatever the model.

    Raises:
        ValueError: If a dtype or ``weights`` is unknown.

    Examples:
        >>> state_bytes(torch.nn.Linear(1000, 1000, bias=False, device="meta"), state_dtype=torch.int8)
        26000004
    """
    params: Any = model_or_params
    if isinstance(params, nn.Module):
        params = [param for param in params.parameters() if param.requires_grad]
    optimizer = LearnedOptimizer(
        list(params) or [{"params": []}],
        weights=weights,
        state_dtype=state_dtype,
        moment_dtype=moment_dtype,
        average=average,
    )
    return sum(optimizer._state_bytes(param, group) for group in optimizer.param_groups for param in group["params"])
