"""The ``triton`` backend for CUDA: a whole step of a whole model in one launch, its state read and written once.

This file packs weights, keeps the tables from which programs learn their work, and launches; ``triton_kernels`` is what
runs on the device. Triton is optional and imported on first use. Nothing here waits for the device, and all of it can be
captured in a CUDA graph once one step has been taken outside.
"""

from __future__ import annotations

import importlib.util
import math
import os
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakTensorKeyDictionary

from learned_optim.backends import reference
from learned_optim.backends.items import PLAIN_TENSORS, StepItem, StepOptions
from learned_optim.rules import AdamModulationConfig, AdamModulationRule, PaperRule, PaperRuleConfig, UpdateRule
from learned_optim.rules.storage import CELL_SCALE, names

UNROLLED_WEIGHTS = 1500
"""Up to this many weights the LSTM is unrolled, beyond it is tiled: each is an instruction, and 2,000 fill a cache."""

KEPT_TABLES = 16
"""Tables kept for one first parameter: this many sets of parameters with a gradient may take turns without a new table."""

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, which takes tensors on the CPU; for tests."""

FLOATS = {torch.float32, torch.bfloat16, torch.float16}


class PaperConstants(NamedTuple):
    """What the device code of :class:`PaperRule` has compiled in."""

    log_and_sign: bool
    preprocess_p: float
    threshold: float
    input_scale: float
    adam: bool = False


class AdamConstants(NamedTuple):
    """What the device code of :class:`AdamModulationRule` has compiled in; complements are rounded as torch rounds."""

    fast_decay: float
    slow_decay: float
    square_decay: float
    fast_complement: float
    slow_complement: float
    square_complement: float
    outlier_bound: float
    log_gain: float
    time_scales: int
    adam: bool = True


@dataclass(frozen=True)
class Form:
    """How the kernel is laid out.

    Args:
        tiled: Multiply matrices instead of unrolling.
        block: Coordinates at once.
        chunk: Coordinates a program.
        warps: Warps a program.
        precision: Of the matrix products, as ``tl.dot`` names it.
    """

    tiled: bool
    block: int
    chunk: int
    warps: int
    precision: str = "tf32x3"


UNROLLED = Form(tiled=False, block=128, chunk=1024, warps=4)
TILED = Form(tiled=True, block=128, chunk=512, warps=8)


def available() -> bool:
    """Return whether Triton is installed and there is an NVIDIA GPU, or its interpreter stands in."""
    return INSTALLED and (INTERPRETED or (torch.version.hip is None and torch.cuda.is_available()))


def supports(rule: UpdateRule) -> bool:
    """Return whether the kernel can run a rule: float32 on CUDA, of a family it knows; ``torch.compile`` traces others."""
    weight = rule.readout.weight
    return (
        type(rule) in (PaperRule, AdamModulationRule)
        and weight.dtype == torch.float32
        and weight.device.type == ("cpu" if INTERPRETED else "cuda")
        and not torch.compiler.is_compiling()
    )


def apply_step(rule: UpdateRule, items: Sequence[StepItem], options: StepOptions) -> None:
    """Apply one inner step in place, like :func:`learned_optim.backends.reference.apply_step`.

    Args:
        rule: A frozen rule that :func:`supports` accepts.
        items: Parameters that share the rule and its device.
        options: How updates are applied.
    """
    program = _program(rule)
    alike: dict[Any, list[StepItem]] = defaultdict(list)
    for item in items:
        alike[_types(rule, item)].append(item)
    for types, group in alike.items():
        if types is None:
            reference.apply_step(rule, group, options)
        else:
            kept = names(rule, group[0].memory)
            program.run(types, kept, group, _values(rule, group, options), options.maximize)


def _types(rule: UpdateRule, item: StepItem) -> tuple[torch.dtype, ...] | None:
    """Return the element types of parameter, gradient, LSTM memory and moments; None where the kernel has none for them."""
    memory, device = item.memory, rule.readout.weight.device
    if set(memory) != set(names(rule, memory)):
        return None
    hidden, cell, moments = memory["hidden"], memory["cell"], [memory[name] for name in rule.moment_names]
    types = (item.param.dtype, item.grad.dtype, hidden.dtype, moments[0].dtype if moments else torch.float32)
    fits = (
        all(dtype in FLOATS for dtype in (types[0], types[1], types[3]))
        and hidden.dtype in FLOATS | {torch.int8}
        and cell.dtype == hidden.dtype
        and all(moment.dtype == types[3] for moment in moments[:2])
        and all(moment.dtype == torch.float32 for moment in moments[2:])
        and (CELL_SCALE not in memory or memory[CELL_SCALE].dtype == torch.bfloat16)
        and all(tensor.is_contiguous() and tensor.device == device for tensor in memory.values())
        and item.param.device == item.grad.device == device
        and type(item.param) in PLAIN_TENSORS
        and type(item.grad) in PLAIN_TENSORS
    )
    return types if fits else None


def _values(rule: UpdateRule, items: Sequence[StepItem], options: StepOptions) -> Tensor:
    """Return what differs between tensors but not between their coordinates, float32, one column a tensor, on the device.

    Raises:
        RuntimeError: If a CUDA graph is captured that would read step counts from the CPU.
    """
    device, count = rule.readout.weight.device, len(items)

    def spread(value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.expand(count)
        return torch.full((count,), value, dtype=torch.float32, device=device)

    if _capturing(device) and any(item.step.device != device for item in items):
        raise RuntimeError(
            "LearnedOptimizer.step() was captured in a CUDA graph, which cannot count steps on the CPU when it is replayed; "
            "construct the optimizer with capturable=True"
        )
    steps = torch.stack([item.step for item in items]).to(device, non_blocking=True)
    rows = [spread(options.lr), spread(options.shrink)]
    if isinstance(rule, AdamModulationRule):
        config = rule.config
        scales = torch.stack([item.scale for item in items if item.scale is not None])
        rows += [-config.step_size * scales * rule.anneal(steps), steps]
        # As the reference does it, operation by operation: 1 - 0.999 in float32 leaves few digits to disagree about.
        decays = (config.fast_decay, config.slow_decay, config.second_moment_decay)
        rows += [1 / (1 - decay**steps) for decay in decays]
        rows += [torch.tanh(steps / tau - 1) for tau in config.time_scales]
    else:
        assert isinstance(rule, PaperRule)
        rows += [spread(rule.config.output_scale), steps]
    return torch.stack(rows)


# ---- launches -------------------------------------------------------------------------------------------------------


_programs: weakref.WeakKeyDictionary[UpdateRule, Program] = weakref.WeakKeyDictionary()


def _program(rule: UpdateRule) -> Program:
    if rule not in _programs:
        _refuse_capture(rule.readout.weight.device)
        _programs[rule] = Program(rule, choose_form(rule))
    return _programs[rule]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_capture(device: torch.device) -> None:
    """Refuse to make in a CUDA graph what only a step outside of it can make.

    Raises:
        RuntimeError: If one is captured.
    """
    if _capturing(device):
        raise RuntimeError(
            "LearnedOptimizer.step() was captured in a CUDA graph before a step outside of it with gradients for the same "
            "parameters; take one such step right before the capture, it allocates what the graph is to use"
        )


class Program:
    """A rule made ready to run: its weights packed, and the tables of the models it is stepping.

    A table belongs to the LSTM memory of its first parameter, which is referred to weakly, and goes with it. So there may be
    any number of groups and optimizers, and nothing is left of those that are gone. A table that a CUDA graph reads stays as
    long as that memory, which the graph needs, too. Which parameters have a gradient may change from step to step: of the
    other tables with the same first parameter, the :data:`KEPT_TABLES` used last stay.

    Args:
        rule: Frozen; read once, which waits for its device.
        form: How the kernel is laid out.
    """

    def __init__(self, rule: UpdateRule, form: Form) -> None:
        config = rule.config
        width = config.hidden_size if form.tiled else rule.memory_width
        self.rule_sizes = (rule.lstm.input_size, config.hidden_size, config.num_layers)
        self.memory_width = rule.memory_width
        self.padded = max(16 if form.tiled else 1, 1 << (width - 1).bit_length())
        self.form = form
        self.constants = _constants(rule)
        self.weights = pack_tiled(rule, self.padded) if form.tiled else tuple(pack_unrolled(rule).tolist())
        self.tables = WeakTensorKeyDictionary()

    def run(
        self,
        types: tuple[torch.dtype, ...],
        kept: Sequence[str],
        items: Sequence[StepItem],
        values: Tensor,
        maximize: bool,
    ) -> None:
        """Launch the kernel for tensors of the same element types, whose memory consists of what is ``kept``."""
        import triton.language as tl

        from learned_optim.backends.triton.kernels import step_kernel

        # The kernel reads and writes flat tensors; a copy stands in for one that is not.
        params = [item.param.resolve_neg().contiguous() for item in items]
        grads = [item.grad.resolve_neg().contiguous() for item in items]
        table = self._table([item.param.numel() for item in items], [item.memory[name] for name in kept for item in items])
        table.point_to([*params, *grads])
        with torch.cuda.device_of(values):
            step_kernel[len(table.tensor_of),](
                table.tensor_of,
                table.chunk_of,
                table.sizes,
                table.addresses,
                values,
                len(items),
                self.weights if self.form.tiled else None,
                *self.rule_sizes,
                WEIGHTS=None if self.form.tiled else self.weights,
                RULE=self.constants,
                PARAM_TYPE=getattr(tl, str(types[0]).removeprefix("torch.")),
                GRAD_TYPE=getattr(tl, str(types[1]).removeprefix("torch.")),
                MEMORY_TYPE=getattr(tl, str(types[2]).removeprefix("torch.")),
                MOMENT_TYPE=getattr(tl, str(types[3]).removeprefix("torch.")),
                ALIGNED=table.aligned and self.memory_width * types[2].itemsize % 16 == 0,
                MAXIMIZE=maximize,
                TILED=self.form.tiled,
                PRECISION=self.form.precision,
                PADDED=self.padded,
                LOG_PADDED=self.padded.bit_length() - 1,
                BLOCK=self.form.block,
                CHUNK=self.form.chunk,
                num_warps=self.form.warps,
                enable_fp_fusion=True,
            )
        increment_version([item.param for item in items])
        for item, flat in zip(items, params, strict=True):
            if flat is not item.param:
                item.param.copy_(flat)

    def _table(self, sizes: Sequence[int], memory: Sequence[Tensor]) -> _Table:
        """Return the table of this memory, whose first tensor is the ``hidden`` of the first parameter."""
        tables: dict[Any, _Table] = self.tables.setdefault(memory[0], {})
        key = (tuple(sizes), tuple(map(Tensor.data_ptr, memory)))
        if key not in tables:
            _refuse_capture(memory[0].device)
            tables[key] = _Table(*key, self.form.chunk, memory[0].device)
            free = [old for old, table in tables.items() if not table.captured]
            for old in free[:-KEPT_TABLES]:
                del tables[old]
        tables[key] = tables.pop(key)  # The last used come last.
        return tables[key]


class _Table:
    """From programs to tensors, and from tensors to addresses, on the device.

    Args:
        sizes: Coordinates of each tensor.
        memory: Addresses of every ``hidden``, then of every ``cell``, moment and perhaps ``cell_scale``.
        chunk: Coordinates a program.
        device: Where to put it.
    """

    def __init__(self, sizes: tuple[int, ...], memory: tuple[int, ...], chunk: int, device: torch.device) -> None:
        with torch.device("cpu"):  # Whatever the default device is.
            counts = torch.tensor(sizes).add(chunk - 1) // chunk
            ends = counts.cumsum(0)
            tensor_of = torch.repeat_interleave(counts)
            chunk_of = torch.arange(int(ends[-1])) - (ends - counts)[tensor_of]
            rows = torch.tensor(memory).view(-1, len(sizes))
            addresses = torch.cat((torch.zeros_like(rows[:2]), rows))
            numels = torch.tensor(sizes)
        self.aligned = not (rows[:2] % 16).any()
        self.tensor_of = tensor_of.int().to(device, non_blocking=True)
        self.chunk_of = chunk_of.int().to(device, non_blocking=True)
        self.sizes = numels.to(device, non_blocking=True)
        self.addresses = addresses.to(device, non_blocking=True)
        self.captured = False
        self._written: list[int] = []

    def point_to(self, tensors: Sequence[Tensor]) -> None:
        """Write the addresses of all parameters, then of all gradients, unless they are there.

        Either may change from step to step: gradients are made anew, and copies stand in for what is not contiguous.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        rows = self.addresses[:2].view(-1)
        if _capturing(rows.device):
            # A graph keeps the arguments of kernels but not the host memory of a copy.
            rows.zero_()
            torch._foreach_add_(list(rows.unbind()), addresses)
            self.captured = True
        elif self.captured or addresses != self._written:  # A replay of the graph writes, too, and is not seen here.
            rows.copy_(torch.tensor(addresses, device="cpu"), non_blocking=True)
            self._written = addresses


# ---- rules ----------------------------------------------------------------------------------------------------------


def choose_form(rule: UpdateRule) -> Form:
    """Return the layout for a rule of this size."""
    return UNROLLED if sum(weight.numel() for weight in rule.parameters()) <= UNROLLED_WEIGHTS else TILED


def _constants(rule: UpdateRule) -> PaperConstants | AdamConstants:
    config = rule.config
    if isinstance(config, AdamModulationConfig):
        decays = (config.fast_decay, config.slow_decay, config.second_moment_decay)
        fast, slow, square = (1 - torch.tensor(decays, dtype=torch.float32, device="cpu")).tolist()
        return AdamConstants(*decays, fast, slow, square, config.outlier_bound, config.log_gain, len(config.time_scales))
    assert isinstance(config, PaperRuleConfig)
    p = config.preprocess_p
    return PaperConstants(config.inputs == "log_and_sign", p, math.exp(-p), config.input_scale)


def _scaled_layers(rule: UpdateRule) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each layer's input weights ``(4, H, K)``, hidden weights ``(4, H, H)`` and biases ``(4, H)``.

    Rows of the sigmoids are scaled by ``-log2 e`` and rows of the tanh by ``-2 log2 e``, so each gate needs one ``exp2``.
    """
    factors = rule.readout.weight.new_tensor([-1.0, -1.0, -2.0, -1.0]).view(4, 1, 1) / math.log(2.0)
    for weight_ih, weight_hh, bias_ih, bias_hh in rule.lstm_weights.all_weights:
        hidden = weight_hh.shape[1]
        stacked = [w.detach().reshape(4, hidden, -1) * factors for w in (weight_ih, weight_hh, bias_ih + bias_hh)]
        yield stacked[0], stacked[1], stacked[2].squeeze(-1)


def pack_unrolled(rule: UpdateRule) -> Tensor:
    """Return a rule's weights as the unrolled form reads them.

    Args:
        rule: Float32.

    Returns:
        Flat: for each layer ``[unit][gate][inputs, hiddens, bias]``, at the end ``[output][hiddens, bias]``.
    """
    parts = [
        torch.cat((inputs, hiddens, biases.unsqueeze(-1)), -1).transpose(0, 1).flatten()
        for inputs, hiddens, biases in _scaled_layers(rule)
    ]
    readout = torch.cat((rule.readout.weight, rule.readout.bias.unsqueeze(1)), 1).detach()
    return torch.cat((*parts, readout.flatten()))


def pack_tiled(rule: UpdateRule, padded: int) -> Tensor:
    """Return a rule's weights as the tiled form reads them.

    Args:
        rule: Float32.
        padded: What the hidden size is padded to; the added units have no weights and stay at zero.

    Returns:
        Flat: for each layer ``[gate][inputs, hiddens, bias][unit]``, at the end ``[output][hiddens, bias]``. Inputs of the
        first layer are not padded.
    """
    pad = torch.nn.functional.pad
    more = padded - rule.config.hidden_size
    parts = []
    for layer, (inputs, hiddens, biases) in enumerate(_scaled_layers(rule)):
        inputs = inputs if layer == 0 else pad(inputs, (0, more))
        rows = torch.cat((inputs, pad(hiddens, (0, more)), biases.unsqueeze(-1)), -1)
        parts.append(pad(rows.transpose(1, 2), (0, more)).flatten())
    readout = torch.cat((pad(rule.readout.weight, (0, more)), rule.readout.bias.unsqueeze(1)), 1).detach()
    return torch.cat((*parts, readout.flatten()))
