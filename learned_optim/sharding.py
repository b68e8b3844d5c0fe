"""Complex and sharded tensors as the real, local ones that rules and backends see; and what the ranks must agree on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FSDP1 = (
    "LearnedOptimizer does not support FullyShardedDataParallel (FSDP1): it flattens parameters together, so no rule can "
    "see a whole tensor, and no checkpoint can hold its memory; use torch.distributed.fsdp.fully_shard"
)
"""What is said where FSDP1 flattened the parameters."""

REPLICATED, SUMMED, AVERAGED, OTHER = 64, 65, 66, 67
"""Codes of placements for :func:`share_gradients`. The code of a shard is the number of its dimension."""
ABSENT = -1


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as real ones with a last dimension of two, any other tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the full value of a DTensor, any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradient_of(param: Tensor) -> Tensor:
    """Return a parameter's gradient, real, and sharded as the parameter is. Tensor parallelism may leave it unreduced."""
    grad = param.grad
    assert grad is not None
    grad = as_real(grad.resolve_conj() if grad.is_complex() else grad)
    if getattr(grad, "placements", None) == getattr(param, "placements", None):
        return grad
    return grad.redistribute(placements=param.placements)  # type: ignore


def share_gradients(groups: Iterable[dict[str, Any]]) -> bool:
    """Let every rank of a mesh step the same sharded parameters, and so take part in the same collectives.

    A rank may lack the gradient of a parameter that others have, as where an expert saw no token there. That rank gets
    zeros, which is what one process would have added up. The price is one all-reduce of a few bytes a parameter and mesh.

    Args:
        groups: The optimizer's; ``grad`` is set where it is missing on this rank only.

    Returns:
        Whether any parameter is sharded.

    Raises:
        RuntimeError: On every rank, if some lack the gradient of a replicated parameter, or the gradients are not sharded
            alike.
    """
    if torch.compiler.is_compiling() or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    params_of: dict[Any, list[tuple[int, Tensor]]] = defaultdict(list)
    params = [param for group in groups for param in group["params"]]
    for position, param in enumerate(params):
        mesh = getattr(param, "device_mesh", None)
        if mesh is not None and mesh.get_coordinate() is not None:
            params_of[mesh].append((position, param))
    for mesh, sharded in params_of.items():
        _share_on(mesh, sharded)
    return bool(params_of)


def _share_on(mesh: Any, params: list[tuple[int, Tensor]]) -> None:
    """Compare over a mesh how gradients are placed: the largest code, the largest negated one, and whether any is absent."""
    own = torch.tensor([_placements(param.grad, mesh.ndim) for _, param in params], dtype=torch.int32)
    absent = own == ABSENT
    codes = torch.stack([own, torch.where(absent, -OTHER - 1, -own), absent.to(torch.int32)]).to(mesh.device_type)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(codes, torch.distributed.ReduceOp.MAX, mesh.get_group(dim))
    for (position, param), largest, negated, lacking in zip(params, *codes.tolist(), strict=True):
        if ABSENT in largest:
            continue  # No rank has it.
        unlike = largest != [-code for code in negated]
        whole = any(code == REPLICATED and mesh.size(dim) > 1 for dim, code in enumerate(largest))
        if unlike or (any(lacking) and (whole or OTHER in largest)):
            raise RuntimeError(
                f"parameter {position} has placements {param.placements}, but its gradient is placed in other ways on some "
                "ranks, or replicated and missing on some; give every rank the same kind of gradient, or none"
            )
    for (_, param), largest in zip(params, codes[0].tolist(), strict=True):
        if param.grad is None and ABSENT not in largest:
            param.grad = _zero_gradient(param, largest)


def _placements(grad: Tensor | None, ndim: int) -> list[int]:
    if grad is None:
        return [ABSENT] * ndim
    return [_code(placement) for placement in getattr(grad, "placements", [None] * ndim)]


def _code(placement: Any) -> int:
    if placement is None or type(placement).__name__ not in ("Shard", "Replicate", "Partial"):
        return OTHER
    if placement.is_shard():
        return placement.dim
    if placement.is_replicate():
        return REPLICATED
    return {"sum": SUMMED, "avg": AVERAGED}.get(placement.reduce_op, OTHER)


def _zero_gradient(param: Tensor, codes: list[int]) -> Tensor:
    """Return zeros in the given placements; there is nothing to communicate."""
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, zeros

    mesh: Any = param.device_mesh  # type: ignore
    partial = {SUMMED: Partial("sum"), AVERAGED: Partial("avg")}
    spread: list[Placement] = [Replicate() if code >= REPLICATED else Shard(code) for code in codes]
    like = zeros(param.shape, dtype=param.dtype, device_mesh=mesh, placements=spread)
    placements = [partial.get(code, placement) for code, placement in zip(codes, spread, strict=True)]
    return DTensor.from_local(like.to_local(), mesh, placements, run_check=False, shape=param.shape, stride=like.stride())


def zeros_like(like: Tensor, trailing: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return contiguous zeros of shape ``(*like.shape, *trailing)``, sharded as ``like`` is."""
    shard = local(like)
    zeros = torch.zeros((*shard.shape, *trailing), dtype=dtype, device=shard.device)
    if shard is like:
        return zeros
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*like.shape, *trailing))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros,
        like.device_mesh,  # type: ignore
        like.placements,  # type: ignore
        run_check=False,
        shape=shape,
        stride=stride,
    )
