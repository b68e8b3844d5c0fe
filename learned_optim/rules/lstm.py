"""The coordinatewise LSTM: one inner step written with matmuls, and a whole sequence through ``nn.LSTM``.

Both read the same ``nn.LSTM`` module, so its parameter names (``weight_ih_l0`` ...) and gate order (i, f, g, o) are
torch's. Memory is kept coordinate-major, ``(N, L * H)`` with layer 0 first, because that is the layout of optimizer
state.

Letters used throughout: N coordinates, F input features, L layers, H hidden size, K inner steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Carry = tuple[Tensor, Tensor]
"""Hidden and cell memory, each ``(N, L * H)``."""


class LSTMTensors(NamedTuple):
    """The tensors of an ``nn.LSTM`` by its own names, without the module: ``torch.compile`` refuses to look at one."""

    hidden_size: int
    all_weights: list[list[Tensor]]


def lstm_step(lstm: nn.LSTM | LSTMTensors, inputs: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
    """Advance every coordinate's LSTM by one inner step, with plain matmuls.

    ``nn.LSTM`` would break ``torch.compile(fullgraph=True)``; a matmul a layer and some pointwise operations do not. It is
    one because of two that are added a compiler makes an ``addmm``, for which it copies all gates; as it would of a matmul
    and biases of the same shape.

    Args:
        lstm: Holds the weights; its ``forward`` is not called.
        inputs: ``(N, F)``.
        carry: Hidden and cell, each ``(N, L * H)``.

    Returns:
        The top layer's hidden state ``(N, H)`` and the new carry.
    """
    hiddens, cells = [], []
    below = inputs
    for layer, (hidden, cell) in enumerate(
        zip(carry[0].split(lstm.hidden_size, -1), carry[1].split(lstm.hidden_size, -1), strict=True)
    ):
        weight_ih, weight_hh, bias_ih, bias_hh = lstm.all_weights[layer]
        products = torch.cat((below, hidden), -1) @ torch.cat((weight_ih, weight_hh), 1).t()
        gates = products.unflatten(-1, (4, -1)) + (bias_ih + bias_hh).view(4, -1)
        below, cell = lstm_cell(gates.unbind(-2), cell)
        hiddens.append(below)
        cells.append(cell)
    if len(hiddens) == 1:
        return below, (hiddens[0], cells[0])
    return below, (torch.cat(hiddens, -1), torch.cat(cells, -1))


def lstm_cell(gates: Sequence[Tensor], cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new hidden state and cell of one layer.

    Args:
        gates: Before their nonlinearities, in torch's order: input, forget, candidate and output, each of ``cell``'s shape.
        cell: Any shape.

    Returns:
        Both.
    """
    write, forget, candidate, read = gates
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(write) * torch.tanh(candidate)
    return torch.sigmoid(read) * torch.tanh(cell), cell


def lstm_sequence(lstm: nn.LSTM, inputs: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
    """Run K inner steps in one fused ``nn.LSTM`` call; equal to K calls of :func:`lstm_step`.

    Args:
        lstm: The module to call.
        inputs: ``(K, N, F)``.
        carry: Hidden and cell before the first step, each ``(N, L * H)``.

    Returns:
        The top layer's hidden states ``(K, N, H)`` and the carry after the last step.
    """
    hidden, cell = (_layers_first(tensor, lstm.num_layers) for tensor in carry)
    hiddens, (hidden, cell) = lstm(inputs, (hidden, cell))
    return hiddens, (_coordinates_first(hidden), _coordinates_first(cell))


def _layers_first(memory: Tensor, num_layers: int) -> Tensor:
    return memory.reshape(memory.shape[0], num_layers, -1).transpose(0, 1).contiguous()


def _coordinates_first(memory: Tensor) -> Tensor:
    return memory.transpose(0, 1).reshape(memory.shape[1], -1)
