"""The compiled CPU backend: encode, LSTM, decode and parameter update in one pass over parameters and memory.

``native/step.c`` says how the kernel works. What it cannot take (float64, tensor subclasses, other ways to store
memory) goes to the reference, item by item.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from learned_optim.backends import reference
from learned_optim.backends.items import PLAIN_TENSORS, StepItem, StepOptions
from learned_optim.backends.native.library import AVAILABLE, call, pointer
from learned_optim.rules import AdamModulationRule, PaperRule, UpdateRule
from learned_optim.rules.adam_modulation import AdamModulationConfig
from learned_optim.rules.paper import PaperRuleConfig
from learned_optim.rules.storage import CELL_SCALE, names

VALUE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of parameters and gradients, with the number that the kernel has for each."""

MEMORY_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}
"""Dtypes of hidden and cell."""

MOMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of moments."""

_LOG2_E = 1.44269504


MAX_TIME_SCALES = 16
"""Room for features of time in the kernel's struct."""

_WHOLE_NUMBERS = ("family", "layers", "hidden", "log_and_sign", "num_times")


class _Rule(ctypes.Structure):
    """``struct rule`` of step.c. Fields that a family does not have stay 0."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in _WHOLE_NUMBERS),
        *((name, ctypes.c_float) for name in ("fast_decay", "slow_decay", "second_moment_decay", "outlier_bound")),
        *((name, ctypes.c_float) for name in ("step_size", "log_gain")),
        *((name, ctypes.c_float) for name in ("anneal_power", "anneal_steps", "anneal_start")),
        *((name, ctypes.c_float) for name in ("min_scale", "small_min_scale", "max_scale")),
        *((name, ctypes.c_double) for name in ("agreement_gain", "agreement_floor", "agreement_limit")),
        *((name, ctypes.c_double) for name in ("agreement_noise", "agreement_decay")),
        *((name, ctypes.c_float) for name in ("input_scale", "output_scale", "preprocess_p", "threshold")),
        ("time_scales", ctypes.c_float * MAX_TIME_SCALES),
    )


class _Columns(ctypes.Structure):
    """``struct columns`` of step.c."""

    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, pointer) for name in ("sizes", "updates", "params", "grads", "hidden", "cell")),
        ("moments", pointer * 3),
        *((name, pointer) for name in ("cell_scales", "steps", "scales", "param_types", "grad_types", "memory_types")),
        ("moment_types", pointer * 3),
        *((name, ctypes.c_float) for name in ("lr", "shrink")),
        *((name, ctypes.c_int32) for name in ("maximize", "count_step", "measure")),
    )


def available() -> bool:
    """Return whether the kernels were built and load."""
    return AVAILABLE


def supports(rule: UpdateRule) -> bool:
    """Return whether the kernels can run a rule at all: built, a family they know, float32 on the CPU."""
    weight = rule.readout.weight
    return (
        available()
        and type(rule) in (PaperRule, AdamModulationRule)
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and len(time_scales(rule)) <= MAX_TIME_SCALES
    )


def apply_step(rule: UpdateRule, items: Sequence[StepItem], options: StepOptions) -> None:
    """Apply one inner step in place, like :func:`learned_optim.backends.reference.apply_step`.

    Args:
        rule: One that :func:`supports` accepts, frozen.
        items: Parameters that share the rule.
        options: How updates are applied.
    """
    taken = [takes(rule, item) for item in items]
    others = [item for item, taking in zip(items, taken, strict=True) if not taking]
    if others:
        reference.apply_step(rule, others, options)
    items = [item for item, taking in zip(items, taken, strict=True) if taking]
    for eight_bit in (False, True):
        if alike := [item for item in items if (item.memory["hidden"].dtype == torch.int8) == eight_bit]:
            _apply_alike(rule, alike, options)


def _apply_alike(rule: UpdateRule, items: Sequence[StepItem], options: StepOptions) -> None:
    """Step items whose memory has the same names."""
    # The kernel reads and writes flat tensors; a copy stands in for one that is not.
    params = [item.param.resolve_neg().contiguous() for item in items]
    grads = [item.grad.resolve_neg().contiguous() for item in items]
    memory = [item.memory[name] for name in names(rule, items[0].memory) for item in items]
    numbers = [item.step for item in items], [item.scale for item in items if item.scale is not None]
    if torch.compiler.is_compiling():
        description, factors = describe(rule), options.as_tensors()
        described = list(description), list(description.values()), list(time_scales(rule))
        operator = torch.ops.learned_optim.native_step
        operator(pack(rule), *described, params, grads, memory, *numbers, *factors, options.maximize)
    else:
        Table(params, memory, *numbers).run(struct_of(rule), packed(rule), grads, options)
        increment_version(params)
    for item, flat in zip(items, params, strict=True):
        if flat is not item.param:
            item.param.copy_(flat)


def takes(rule: UpdateRule, item: StepItem) -> bool:
    """Return whether the kernel can take an item, perhaps by way of a contiguous copy of parameter and gradient."""
    size, layers, memory = item.param.numel(), rule.config.num_layers, item.memory
    if set(memory) != set(names(rule, memory)):
        return False
    moments = [memory[name] for name in rule.moment_names]
    numbers = [item.step] if item.scale is None else [item.step, item.scale]
    states = (memory["hidden"], memory["cell"])
    cell_scales = [memory[CELL_SCALE]] if CELL_SCALE in memory else []
    return (
        all(type(x) in PLAIN_TENSORS and x.device.type == "cpu" for x in (item.param, item.grad, *memory.values(), *numbers))
        and item.param.dtype in VALUE_TYPES
        and item.grad.dtype in VALUE_TYPES
        and item.grad.shape == item.param.shape
        and (torch.compiler.is_compiling() or not item.grad._is_zerotensor())  # Which has no memory.
        and states[0].dtype == states[1].dtype
        and states[0].dtype in MEMORY_TYPES
        and all(x.is_contiguous() and x.numel() == size * rule.memory_width for x in states)
        and all(x.is_contiguous() and x.numel() == size and x.dtype in MOMENT_TYPES for x in moments)
        and all(x.is_contiguous() and x.numel() == size * layers and x.dtype == torch.bfloat16 for x in cell_scales)
        and all(x.numel() == 1 and x.dtype == torch.float32 for x in numbers)
    )


# ---- rules ----------------------------------------------------------------------------------------------------------


def describe(rule: UpdateRule) -> dict[str, float]:
    """Return what the kernel must know of a rule beside its weights, by the names of ``struct rule``."""
    config = rule.config
    sizes = {"layers": float(config.num_layers), "hidden": float(config.hidden_size)}
    if isinstance(config, AdamModulationConfig):
        same = (
            *("fast_decay", "slow_decay", "second_moment_decay", "outlier_bound", "step_size", "log_gain"),
            *("anneal_power", "anneal_steps", "anneal_start", "min_scale", "small_min_scale", "max_scale"),
            *("agreement_gain", "agreement_floor", "agreement_limit"),
        )
        fields = {name: float(getattr(config, name)) for name in same}
        # Once more, in float64: in float32 little is left of the digits of 1 - 0.98.
        fields |= {"agreement_noise": config.noise_share, "agreement_decay": config.second_moment_decay}
        return {"family": 1.0, **sizes, "num_times": float(len(config.time_scales)), **fields}
    assert isinstance(config, PaperRuleConfig)
    fields = {name: float(getattr(config, name)) for name in ("input_scale", "output_scale", "preprocess_p")}
    return {
        "family": 0.0,
        **sizes,
        "log_and_sign": float(config.inputs == "log_and_sign"),
        "threshold": math.exp(-config.preprocess_p),
        **fields,
    }


def time_scales(rule: UpdateRule) -> tuple[float, ...]:
    """Return the time scales of a rule; empty for a family that has none."""
    return rule.config.time_scales if isinstance(rule.config, AdamModulationConfig) else ()


def struct_of(rule: UpdateRule) -> ctypes.Structure:
    """Return ``struct rule`` of a rule."""
    return _struct(tuple(describe(rule).items()), time_scales(rule))


@functools.lru_cache(maxsize=64)
def _struct(description: tuple[tuple[str, float], ...], times: tuple[float, ...]) -> _Rule:
    struct = _Rule()
    for name, number in description:
        setattr(struct, name, int(number) if name in _WHOLE_NUMBERS else number)
    struct.time_scales[: len(times)] = times
    return struct


def pack(rule: UpdateRule) -> Tensor:
    """Return a rule's weights in the order in which the kernel reads them.

    For each layer the bias ``[unit][gate]``, in the first layer the columns of the features of time, which a tensor's
    coordinates share, then ``[unit][inputs, hiddens][gate]``; at the end the readout ``[output][hiddens, bias]``. Gates in
    the order input, forget, output, candidate; all that belongs to the first three, which are sigmoids, times -1/ln 2.

    Args:
        rule: Float32.

    Returns:
        Flat, contiguous.
    """
    hidden = rule.config.hidden_size
    times = len(time_scales(rule))
    factors = rule.readout.weight.new_tensor([-_LOG2_E, -_LOG2_E, -_LOG2_E, 1.0])
    layers: Sequence[Sequence[Tensor]] = rule.lstm_weights.all_weights
    parts = []
    for layer, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(layers):
        inputs = weight_ih.shape[1] - (0 if layer else times)
        rows = torch.cat(((bias_ih + bias_hh).unsqueeze(1), weight_ih[:, inputs:], weight_ih[:, :inputs], weight_hh), 1)
        gates = rows.view(4, hidden, -1)[[0, 1, 3, 2]] * factors.view(4, 1, 1)
        shared = 1 + weight_ih.shape[1] - inputs
        parts += [gates[:, :, :shared].permute(2, 1, 0).flatten(), gates[:, :, shared:].permute(1, 2, 0).flatten()]
    readout = torch.cat((rule.readout.weight, rule.readout.bias.unsqueeze(1)), 1).flatten()
    return torch.cat((*parts, readout)).detach().contiguous()


_packed: weakref.WeakKeyDictionary[UpdateRule, tuple[list[Tensor], list[int], Tensor]] = weakref.WeakKeyDictionary()


def packed(rule: UpdateRule) -> Tensor:
    """Return :func:`pack` of a rule, packed once, and again if its weights were written since."""
    if rule not in _packed or _packed[rule][1] != _versions(_packed[rule][0]):
        weights: list[Tensor] = list(rule.parameters())  # Kept: walking through modules takes longer.
        _packed[rule] = weights, _versions(weights), pack(rule)
    return _packed[rule][2]


def _versions(weights: Sequence[Tensor]) -> list[int]:
    return [x for weight in weights for x in (weight._version, weight.data_ptr())]


# ---- one call of the kernel -------------------------------------------------------------------------------------------


class Table:
    """The addresses of all that one call of the kernel reads and writes, but for the gradients.

    Args:
        params: Contiguous.
        memory: ``hidden`` of every parameter, then ``cell`` of every parameter, then each moment, then, if hidden is 8-bit,
            ``cell_scale``; contiguous.
        steps: One number each.
        scales: One number each; empty where the rule takes none.
    """

    def __init__(
        self, params: Sequence[Tensor], memory: Sequence[Tensor], steps: Sequence[Tensor], scales: Sequence[Tensor]
    ) -> None:
        count, self.scaled = len(params), bool(scales)
        self.tensors = [*params, *memory, *steps, *scales]
        self.addresses = array("Q", map(Tensor.data_ptr, self.tensors))
        self.sizes = array("q", map(Tensor.numel, params))
        scaled = any(x.dtype == torch.int8 for x in memory[:1])
        moments = max(len(memory) // max(count, 1) - 2 - scaled, 0)
        self.types = array("B", [VALUE_TYPES[x.dtype] for x in params] + [MEMORY_TYPES[x.dtype] for x in memory[:count]])
        self.types.extend(MOMENT_TYPES[x.dtype] for x in memory[2 * count : (2 + moments) * count])
        types = self.types.buffer_info()[0]
        params_at, hidden, cell, *rest = (self.addresses.buffer_info()[0] + 8 * count * column for column in range(9))
        cell_scales = rest[moments] if scaled else None
        steps_at, scales_at = rest[moments + scaled : moments + scaled + 2]
        self.columns = _Columns(
            count=count, sizes=self.sizes.buffer_info()[0], params=params_at, hidden=hidden, cell=cell,
            moments=(pointer * 3)(*rest[:moments]), cell_scales=cell_scales, steps=steps_at, scales=scales_at,
            param_types=types, memory_types=types + count,
            moment_types=(pointer * 3)(*(types + count * (2 + moment) for moment in range(moments))),
        )  # fmt: skip

    def run(self, rule: ctypes.Structure, weights: Tensor, grads: Sequence[Tensor], options: StepOptions) -> None:
        """Take a step that is already counted.

        Args:
            rule: From :func:`struct_of`.
            weights: From :func:`pack`.
            grads: Contiguous, in the order of the parameters.
            options: How updates are applied.
        """
        types = array("B", [VALUE_TYPES[grad.dtype] for grad in grads])
        self.columns.grad_types = types.buffer_info()[0]
        self.call(rule, weights, grads, options)

    def run_and_count(
        self,
        rule: ctypes.Structure,
        weights: Tensor,
        grads: Sequence[Tensor],
        options: StepOptions,
        updates: Sequence[int] = (),
    ) -> None:
        """Count a step, measure the scales and take it.

        Args:
            rule: From :func:`struct_of`.
            weights: From :func:`pack`.
            grads: Contiguous, in the order and of the dtypes of the parameters.
            options: How updates are applied.
            updates: For each parameter the address of float32 numbers that its update is written to, and the parameter
                is left alone; or 0. Empty: all updates are applied.
        """
        self.columns.grad_types = self.columns.param_types
        self.columns.count_step, self.columns.measure = True, self.scaled
        addresses = array("Q", updates)
        self.columns.updates = addresses.buffer_info()[0] if updates else None
        self.call(rule, weights, grads, options)

    def call(self, rule: ctypes.Structure, weights: Tensor, grads: Sequence[Tensor], options: StepOptions) -> None:
        """Call the kernel as the columns say."""
        addresses = array("Q", map(Tensor.data_ptr, grads))
        self.columns.grads = addresses.buffer_info()[0]
        self.columns.lr, self.columns.shrink = float(options.lr), float(options.shrink)
        self.columns.maximize = options.maximize
        columns = ctypes.byref(self.columns)
        call("learned_optim_step", ctypes.byref(rule), weights.data_ptr(), columns, torch.get_num_threads())


torch.library.define(
    "learned_optim::native_step",
    "(Tensor weights, str[] names, float[] numbers, float[] time_scales, Tensor(a!)[] params, Tensor[] grads, "
    "Tensor(b!)[] memory, Tensor[] steps, Tensor[] scales, Tensor lr, Tensor shrink, bool maximize) -> ()",
)


@torch.library.impl("learned_optim::native_step", "CPU")
def _native_step(
    weights: Tensor,
    names: list[str],
    numbers: list[float],
    time_scales: list[float],
    params: list[Tensor],
    grads: list[Tensor],
    memory: list[Tensor],
    steps: list[Tensor],
    scales: list[Tensor],
    lr: Tensor,
    shrink: Tensor,
    maximize: bool,
) -> None:
    rule = _struct(tuple(zip(names, numbers, strict=True)), tuple(time_scales))
    Table(params, memory, steps, scales).run(rule, weights, grads, StepOptions(lr, shrink, maximize))


@torch.library.register_fake("learned_optim::native_step")
def _native_step_fake(*arguments: Any) -> None:
    """Do nothing: the operator returns nothing and only writes."""
