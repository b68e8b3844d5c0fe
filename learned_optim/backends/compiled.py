"""The ``compiled`` backend: the reference's chunks through ``torch.compile``.

Chunks have one of few sizes, the last one filled up with coordinates at rest, and whatever changes between steps is a
tensor: a graph for each size serves every step of every model. Others are compiled only for another form of rule, way to
store memory, ``maximize``, or where a chunk holds several tensors instead of part of one. Where compiling fails the
reference takes over.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from learned_optim.backends import chunks
from learned_optim.backends.chunks import StepItem
from learned_optim.rules import Memory, UpdateRule
from learned_optim.rules.lstm import Carry, lstm_cell

SIZES = (32_768, 8_192, 2_048)
"""Coordinates of a chunk: few sizes, for each is compiled for itself."""

NARROW = 8
"""Units of a layer that fill no more than half a vector of sixteen numbers."""

BLOCK = 1_024
"""Coordinates side by side of each unit of a narrow layer; what threads share out is blocks."""

COMPILERS = ("g++", "clang++", "c++", "cl")

_failures: list[str] = []
"""Why compiling failed, if it ever did in this process."""


def available() -> bool:
    """Return whether there is a C++ compiler, which ``torch.compile`` calls, and compiling has not failed before."""
    return not _failures and _has_compiler()


@functools.cache  # Looking along the path takes a tenth of a millisecond, and every step asks.
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)


def supports(rule: UpdateRule) -> bool:
    """Return whether a rule can be compiled here; a caller who compiles the whole step is left to do so."""
    return rule.readout.weight.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def apply_step(
    rule: UpdateRule, items: Sequence[StepItem], *, lr: Tensor | float, weight_decay: float, maximize: bool
) -> None:
    """Apply one inner step in place, like :func:`learned_optim.backends.chunks.apply_step`.

    Args:
        rule: Frozen.
        items: Parameters that share the rule and its device.
        lr: Factor on the update.
        weight_decay: Decoupled; parameters shrink by ``1e-3 * lr * weight_decay``.
        maximize: Ascend instead of descend.
    """
    lr = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")
    options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
    chunks.apply_step(rule, items, run=_step_filled, sizes=SIZES, **options)  # type: ignore[arg-type]


def _step_filled(
    rule: UpdateRule, param: Tensor, grad: Tensor, stored: Memory, step: Tensor, scale: Tensor | None, *options: object
) -> None:
    size = min(size for size in SIZES if size >= len(param))
    written = [param, *stored.values()]
    new = [_filled(values, size) for values in written]
    memory = dict(zip(stored, new[1:], strict=True))
    step = step if step.dim() == 0 else _filled(step, size, 1.0)
    scale = scale if scale is None or scale.dim() == 0 else _filled(scale, size)
    form = (size, rule.config, *(values.dtype for values in written))
    arguments: tuple[Any, ...] = (rule, new[0], _filled(grad, size), memory, step, scale, *options)
    try:
        (chunks.step_chunk if _failures else compiled(form))(*arguments)
    except RuntimeError as error:  # What compilers raise is one, whatever the stage; nothing has run then.
        _failures.append(str(error))
        logging.getLogger("learned_optim").warning(
            "torch.compile failed, steps go on in plain PyTorch; choose another backend or repair the C++ compiler: %s",
            str(error).strip().splitlines()[0],
        )
        chunks.step_chunk(*arguments)
    if len(param) < size:
        for values, filled in zip(written, new, strict=True):
            values.copy_(filled[: len(values)])


@functools.cache
def compiled(form: Hashable) -> Callable[..., None]:
    """Return :func:`step_chunk`, to be compiled: for each form of chunk and rule a function with code of its own.

    Torch counts the graphs of a code and refuses to compile more than eight. Where it can, tanh(x) is computed as
    2 sigmoid(2x) - 1, to 1e-7: on a CPU a vector of its tanh takes as long as sixteen of its exponentials.

    Args:
        form: What tells apart those that do not share a graph.

    Returns:
        The same function for the same form.
    """
    from torch._inductor import config

    options: dict[str, Any] = {"cpp.use_decompose_tanh": True} if hasattr(config.cpp, "use_decompose_tanh") else {}
    function = FunctionType(step_chunk.__code__.replace(), globals())
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def step_chunk(rule: UpdateRule, *arguments: Any) -> None:
    """Take one inner step of a chunk, like :func:`learned_optim.backends.chunks.step_chunk`, narrow layers in blocks.

    Args:
        rule: Frozen.
        *arguments: The others of that function, but for the last.
    """
    advance = functools.partial(advance_in_blocks, rule) if rule.config.hidden_size <= NARROW else None
    chunks.step_chunk(rule, *arguments, advance=advance)  # type: ignore[misc]


def advance_in_blocks(rule: UpdateRule, inputs: Tensor, carry: Carry, active: Tensor) -> tuple[Tensor, Carry]:
    """Run the LSTM for one inner step, like :meth:`learned_optim.rules.UpdateRule.advance`, coordinates side by side.

    Where units lie side by side, a vector of the processor holds those of one coordinate: half a vector if they are eight.

    Args:
        rule: Frozen.
        inputs: ``(N, F)``.
        carry: Hidden and cell, each ``(N, L * H)``.
        active: ``(N,)`` bool.

    Returns:
        The top hidden state ``(N, H)``, not held, and the new carry, held.
    """
    lstm = rule.lstm if rule._frozen_lstm is None else rule._frozen_lstm
    block = BLOCK if len(active) % BLOCK == 0 else len(active)
    # Computed once and written as a number: a compiler would work the mask out for every unit, and is slow with bytes.
    mask = active.to(inputs.dtype)
    moves = mask.as_strided(mask.size(), mask.stride()).view(-1, 1, block) != 0
    hiddens, cells = (_coordinates_last(memory, block).split(lstm.hidden_size, 1) for memory in carry)
    below = _coordinates_last(inputs, block)
    all_weights: Sequence[Sequence[Tensor]] = lstm.all_weights
    kept = []
    for hidden, cell, (weight_ih, weight_hh, bias_ih, bias_hh) in zip(hiddens, cells, all_weights, strict=True):
        products = torch.cat((weight_ih, weight_hh), 1) @ torch.cat((below, hidden), 1)
        gates = products + (bias_ih + bias_hh).unsqueeze(-1)
        below, new_cell = lstm_cell(gates.chunk(4, 1), cell)
        kept.append((torch.where(moves, below, hidden), torch.where(moves, new_cell, cell)))
    new_hidden, new_cell = (_coordinates_first(torch.cat(layers, 1)) for layers in zip(*kept, strict=True))
    return _coordinates_first(below), (new_hidden, new_cell)


def _coordinates_last(values: Tensor, block: int) -> Tensor:
    """Return ``(N, units)`` as ``(N / block, units, block)``."""
    return values.unflatten(0, (-1, block)).transpose(1, 2)


def _coordinates_first(values: Tensor) -> Tensor:
    """Undo :func:`_coordinates_last`."""
    return values.transpose(1, 2).flatten(0, 1)


def _filled(values: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Return exactly ``size`` rows."""
    missing = size - len(values)
    return F.pad(values, (*[0, 0] * (values.dim() - 1), 0, missing), value=value) if missing else values
