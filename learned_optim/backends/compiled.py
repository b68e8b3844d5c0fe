"""The ``compiled`` backend: the reference's chunks through TorchInductor, the compiler behind ``torch.compile``.

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
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from learned_optim.backends import reference
from learned_optim.backends.items import StepItem, StepOptions
from learned_optim.rules import Memory, UpdateRule
from learned_optim.rules.lstm import Carry, lstm_cell

NARROW = 8
"""Units of a layer that fill no more than half a vector of sixteen numbers."""

BLOCK = 1_040
"""Coordinates side by side of each unit of a narrow layer; what threads share out is blocks. Not a power of two: the numbers
of all units would lie a multiple of 4,096 bytes apart, where they are in one another's way in a processor's cache."""

SIZES = (64 * BLOCK, 8 * BLOCK, BLOCK)
"""Coordinates of a chunk: few sizes, for each is compiled for itself; whole blocks."""

OPTIONS = {"use_decompose_tanh": True, "enable_floating_point_contract_flag": "fast"}
"""Of the compiler on a CPU. tanh(x) is computed as 2 sigmoid(2x) - 1, to 1e-7, for its own takes as long as sixteen
exponentials; and a product with a sum is one instruction."""

COMPILERS = ("g++", "clang++", "c++", "cl")

_graphs: dict[Hashable, Callable[..., object]] = {}
"""Compiled chunks, by what tells apart those that cannot share one."""

_compiling = threading.Lock()

_failures: list[str] = []
"""Why compiling failed, if it ever did in this process."""


def available() -> bool:
    """Return whether there is a C++ compiler, which TorchInductor calls, and compiling has not failed before."""
    return not _failures and _has_compiler()


@functools.cache  # Looking along the path takes a tenth of a millisecond, and every step asks.
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)


def supports(rule: UpdateRule) -> bool:
    """Return whether a rule can be compiled here; a caller who compiles the whole step is left to do so."""
    return rule.readout.weight.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def apply_step(rule: UpdateRule, items: Sequence[StepItem], options: StepOptions) -> None:
    """Apply one inner step in place, like :func:`learned_optim.backends.reference.apply_step`.

    Args:
        rule: Frozen.
        items: Parameters that share the rule and its device.
        options: How updates are applied.
    """
    run = functools.partial(_step_filled, [weight.contiguous() for weight in rule.parameters()])
    reference.apply_step(rule, items, StepOptions(*options.as_tensors(), options.maximize), run=run, sizes=SIZES)


def _step_filled(
    weights: Sequence[Tensor],
    rule: UpdateRule,
    param: Tensor,
    grad: Tensor,
    stored: Memory,
    step: Tensor,
    scale: Tensor | None,
    options: StepOptions,
) -> None:
    size = min(size for size in SIZES if size >= len(param))
    written = (param, *stored.values())
    filled = [_filled(values, size) for values in written]
    of_tensors = [step] if scale is None else [step, scale]
    of_tensors = [values if values.dim() == 0 else _filled(values, size, 1.0) for values in of_tensors]
    tensors = (*weights, *filled, _filled(grad, size), *options.as_tensors(), *of_tensors)
    _graph(rule, tuple(stored), options.maximize, tensors)(*tensors)
    for values, new in zip(written, filled, strict=True):
        if new is not values:
            values.copy_(new[: len(values)])


def _graph(rule: UpdateRule, names: tuple[str, ...], maximize: bool, tensors: Sequence[Tensor]) -> Callable[..., object]:
    """Return what steps a chunk of such a form: compiled, or the reference if compiling fails."""
    forms = ((values.shape, values.dtype, values.device) for values in tensors)
    form = (rule.config, names, maximize, torch.get_num_threads(), *forms)
    if form in _graphs:
        return _graphs[form]
    chunk = _Chunk(rule, names, maximize)
    if _failures:
        return chunk.step
    with _compiling:
        try:
            if form not in _graphs:  # As another thread may have seen to it by now.
                _graphs[form] = compile_graph(*trace(chunk.step, tensors))
        except Exception as error:  # Compilers raise whatever they like; nothing has run yet.
            _failures.append(str(error))
            logging.getLogger("learned_optim").warning(
                "torch could not compile, steps go on in plain PyTorch; choose another backend or repair the compiler: %s",
                next(iter(str(error).strip().splitlines()), type(error).__name__),
            )
            return chunk.step
    return _graphs[form]


class _Chunk(nn.Module):
    """One inner step of a chunk, all of whose tensors can be given from outside, the meta-parameters too."""

    def __init__(self, rule: UpdateRule, names: tuple[str, ...], maximize: bool) -> None:
        super().__init__()
        self.rule = rule.for_tracing()
        self.names, self.maximize = names, maximize

    def forward(self, param: Tensor, *others: Tensor) -> None:
        """Take the step in place; memory, gradient, ``lr``, shrinkage, step and perhaps scale come in this order."""
        stored = dict(zip(self.names, others, strict=False))
        grad, lr, shrink, step, *scale = others[len(stored) :]
        narrow = self.rule.config.hidden_size <= NARROW
        advance = functools.partial(advance_in_blocks, self.rule) if narrow else None
        options = StepOptions(lr, shrink, self.maximize)
        reference.step_chunk(self.rule, param, grad, stored, step, scale[0] if scale else None, options, advance)

    def step(self, *tensors: Tensor) -> tuple[()]:
        """Call it with the meta-parameters before everything else, in their order."""
        names = [name for name, _ in self.named_parameters()]
        torch.func.functional_call(self, dict(zip(names, tensors, strict=False)), tensors[len(names) :])
        return ()


def trace(function: Callable[..., tuple[()]], tensors: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """Return the graph of a function of contiguous tensors, which it may write to, and stand-ins for them.

    ``torch.compile`` would check before every call that nothing has changed since; here the caller knows.

    Args:
        function: Returns nothing.
        tensors: Of the shapes, dtypes and devices of all that the graph will be called with; not touched.

    Returns:
        The graph, and tensors without memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):  # Without it what is compiled would not be kept for other processes.
        fakes = [torch.empty(values.shape, dtype=values.dtype, device=values.device) for values in tensors]
        return make_fx(function)(*fakes), fakes


def compile_graph(graph: fx.GraphModule, fakes: Sequence[Tensor]) -> Callable[..., object]:
    """Compile a graph.

    Args:
        graph: As :func:`trace` returns it.
        fakes: Likewise.

    Returns:
        The same function, compiled.
    """
    from torch._dynamo import utils
    from torch._inductor import compile as inductor
    from torch._inductor import config

    # malloc gives back to the system what is free beyond twice the largest piece it has seen freed, up to 32 MiB. To get the
    # scratch memory of each chunk anew, page by page, would take twice as long as the step itself.
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
    options = {f"cpp.{name}": value for name, value in OPTIONS.items() if hasattr(config.cpp, name)}
    if not hasattr(getattr(utils, "CompileEventLogger", None), "try_"):
        options["fx_graph_cache"] = False  # Older torch counts what it finds there, and fails outside torch.compile.
    compiled: Any = inductor(graph, list(fakes), options)
    return compiled


def advance_in_blocks(rule: UpdateRule, inputs: Tensor, carry: Carry, active: Tensor) -> tuple[Tensor, Carry]:
    """Run the LSTM for one inner step, like :meth:`learned_optim.rules.UpdateRule.advance`, coordinates side by side.

    Where units lie side by side, a processor's vector holds the units of one coordinate: eight units fill half a vector.

    Args:
        rule: Any.
        inputs: ``(N, F)``.
        carry: Hidden and cell, each ``(N, L * H)``.
        active: ``(N,)`` bool.

    Returns:
        The top hidden state ``(N, H)``, held as well, and the new carry.
    """
    lstm = rule.lstm
    cell_of = cell_by_fractions if inputs.dtype == torch.float32 and inputs.device.type == "cpu" else lstm_cell
    block = BLOCK if len(active) % BLOCK == 0 else len(active)
    moves = _computed_once(active.to(inputs.dtype)).view(-1, 1, block) != 0  # As a number: compilers are slow with bytes.
    hiddens, cells = (_coordinates_last(memory, block).split(lstm.hidden_size, 1) for memory in carry)
    below = _coordinates_last(inputs, block)
    all_weights: Sequence[Sequence[Tensor]] = lstm.all_weights
    kept = []
    for hidden, cell, (weight_ih, weight_hh, bias_ih, bias_hh) in zip(hiddens, cells, all_weights, strict=True):
        factor = _computed_once(torch.cat((below, hidden), 1))
        hidden = factor[:, below.shape[1] :]
        gates = torch.cat((weight_ih, weight_hh), 1) @ factor + (bias_ih + bias_hh).unsqueeze(-1)
        new_hidden, new_cell = cell_of(gates.chunk(4, 1), cell)
        below = torch.where(moves, new_hidden, hidden)
        kept.append((below, torch.where(moves, new_cell, cell)))
    kept_hidden, kept_cell = (_coordinates_first(torch.cat(layers, 1)) for layers in zip(*kept, strict=True))
    return _coordinates_first(below), (kept_hidden, kept_cell)


def cell_by_fractions(gates: Sequence[Tensor], cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new hidden state and cell of one layer, like :func:`learned_optim.rules.lstm.lstm_cell`, by two divisions.

    With ``tanh(x) = p / q`` a sigmoid is ``(q + p) / 2q`` of half its argument, and fractions are added and multiplied.

    Args:
        gates: As there, float32.
        cell: As there.

    Returns:
        Both.
    """
    i, f, g, o = gates
    (p_i, q_i), (p_f, q_f), (p_g, q_g), (p_o, q_o) = map(tanh_parts, (0.5 * i, 0.5 * f, g, 0.5 * o))
    q = q_i * q_g
    cell = 0.5 * ((q_f + p_f) * cell * q + (q_i + p_i) * p_g * q_f) / (q_f * q)
    p_c, q_c = tanh_parts(cell)
    return 0.5 * (q_o + p_o) * p_c / (q_o * q_c), cell


def tanh_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return tanh as numerator and denominator, with the numbers of ``native/vectors.h``; relative error 3e-7."""
    x = x.clamp(-8.5, 8.5)
    s = x * x
    p = ((s * 1.4269175589e-8 + 2.1251003527e-5) * s + 3.5340242556e-3) * s + 1.3413244694e-1
    q = ((s * 8.1451010918e-7 + 3.3488606337e-4) * s + 2.6022741322e-2) * s + 4.6746567426e-1
    return x * (p * s + 9.9999998817e-1), q * s + 1.0


def _computed_once(values: Tensor) -> Tensor:
    """Return the same tensor, which a compiler then writes to memory instead of working it out wherever it is read."""
    return values.as_strided(values.size(), values.stride())


def _coordinates_last(values: Tensor, block: int) -> Tensor:
    """Return ``(N, units)`` as ``(N / block, units, block)``."""
    return values.unflatten(0, (-1, block)).transpose(1, 2)


def _coordinates_first(values: Tensor) -> Tensor:
    """Undo :func:`_coordinates_last`."""
    return values.transpose(1, 2).flatten(0, 1)


def _filled(values: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Return exactly ``size`` rows, contiguous; the same tensor if it is that already."""
    missing = size - len(values)
    return F.pad(values, (*[0, 0] * (values.dim() - 1), 0, missing), value=value) if missing else values.contiguous()
