"""Complex and sharded tensors as the real, local ones that rules and backends see."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Return a parameter's gradient, real and sharded as the parameter is: tensor parallelism may leave it unreduced."""
    grad = param.grad
    assert grad is not None
    grad = as_real(grad.resolve_conj() if grad.is_complex() else grad)
    if getattr(grad, "placements", None) == getattr(param, "placements", None):
        return grad
    return grad.redistribute(placements=param.placements)  # type: ignore


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
