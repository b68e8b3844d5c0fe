"""The compiled CPU kernel of a sequence of the LSTM and of its meta-gradient.

The library is optional. It is built by ``pip install`` where there is a C compiler and found beside this file; without it
:func:`native_available` is false and callers stay with torch. Kernels are float32 and take any layers and hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from learned_optim.backends.native.library import AVAILABLE, call
from learned_optim.rules.lstm import Carry

MAX_LAYERS = 16


def native_available() -> bool:
    """Return whether the compiled kernels were built and load."""
    return AVAILABLE


def native_supports(lstm: nn.LSTM) -> bool:
    """Return whether the kernels can run this LSTM: built, on the CPU, float32, not too deep."""
    weight = lstm.weight_ih_l0
    return (
        native_available()
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and lstm.num_layers <= MAX_LAYERS
    )


def pack_weights(lstm: nn.LSTM) -> Tensor:
    """Pack an LSTM as the kernels read it: ``[layer][unit][inputs, hiddens, bias][gate]``, flat.

    Args:
        lstm: The weights; differentiable, so that gradients of the packed form flow back.

    Returns:
        float32 vector.
    """
    layers = []
    for weight_ih, weight_hh, bias_ih, bias_hh in lstm.all_weights:
        rows = torch.cat((weight_ih, weight_hh, (bias_ih + bias_hh).unsqueeze(1)), 1)
        layers.append(rows.view(4, lstm.hidden_size, -1).permute(1, 2, 0).flatten())
    return torch.cat(layers).contiguous()


def native_sequence(lstm: nn.LSTM, inputs: Tensor, carry: Carry, active: Tensor | None = None) -> Tensor:
    """Run K inner steps; differentiable with respect to the weights, not to inputs or carry.

    Nothing but the inputs is kept for the backward pass, which recomputes each block of coordinates in cache.

    Args:
        lstm: The weights.
        inputs: ``(K, N, F)``.
        carry: Hidden and cell before the first step, each ``(N, L * H)``.
        active: ``(K, N)`` bool; coordinates keep their memory where it is false. None means all are active.

    Returns:
        Top hidden states ``(K, N, H)``. Where a coordinate is inactive its entry is what it would have been, and any
        gradient that reaches it is ignored.
    """
    mask = None if active is None or bool(active.all()) else active.contiguous()
    sizes = (lstm.input_size, lstm.hidden_size, lstm.num_layers)
    return _Sequence.apply(pack_weights(lstm), inputs.contiguous(), *(c.contiguous() for c in carry), mask, sizes)


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        inputs: Tensor,
        hidden: Tensor,
        cell: Tensor,
        mask: Tensor | None,
        sizes: tuple[int, int, int],
    ) -> Tensor:
        top = inputs.new_empty(*inputs.shape[:2], sizes[1])
        ctx.save_for_backward(packed, inputs, hidden, cell, mask)
        ctx.sizes = sizes
        _run_sequence(packed, inputs, hidden, cell, mask, sizes, top=top)
        return top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed, inputs, hidden, cell, mask = ctx.saved_tensors
        gradient = torch.zeros_like(packed)
        _run_sequence(packed, inputs, hidden, cell, mask, ctx.sizes, d_top=grads[0].contiguous(), d_packed=gradient)
        return gradient, None, None, None, None, None


def _run_sequence(
    packed: Tensor,
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor,
    mask: Tensor | None,
    sizes: tuple[int, int, int],
    *,
    top: Tensor | None = None,
    d_top: Tensor | None = None,
    d_packed: Tensor | None = None,
) -> None:
    addresses = _addresses(inputs, hidden, cell, mask, packed, top, d_top, d_packed)
    call("learned_optim_lstm_sequence", *inputs.shape[:2], *sizes, *addresses, torch.get_num_threads())


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
