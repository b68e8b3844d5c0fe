r"""How a rule's memory is stored: in float32, or in fewer bytes.

A rule computes in float32; the memory of a coordinate between steps may be narrower:

- LSTM memory as bfloat16, rounded to nearest;
- LSTM memory as int8: ``hidden``, which lies in (-1, 1), as ``q / 127``; ``cell`` as ``q * cell_scale``. Each coordinate and
  layer has a bfloat16 scale of its own, at least the layer's largest cell / 127, so no cell is cut off, and a large cell in
  one layer does not coarsen another layer;
- moments as bfloat16, except the mean square.

Numbers that *accumulate* (int8 cells, bfloat16 moments) are rounded stochastically: one step often adds less than half the
distance of two representable numbers, and rounding to nearest would lose that every time. The mean square stays float32:
it gains a thousandth in each step, and the noise of a thousand roundings would add up to several percent.

Randomness comes from a hash of the step and the bits of the coordinate's own gradient, which :func:`noise` defines. No
generator is used, and neither the order of coordinates nor their cut into chunks, threads or shards changes a result.

Coordinates that are not active keep their bytes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.rules.rule import Memory, UpdateRule

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Dtypes of LSTM memory, by name. A name, unlike a dtype, survives every checkpoint format."""

MOMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes of moments, by name."""

MEMORY_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Floating dtypes that memory may be stored in. LSTM memory may also have 8 bits, with its scales."""

CELL_SCALE = "cell_scale"
WIDE_MOMENTS = frozenset({"exp_avg_sq"})
"""Moments that are never narrowed."""

LARGEST = 127
"""The largest 8-bit integer in use. -128 is not used, so memory is symmetric."""

_GOLDEN = 0x9E3779B9 - 2**32
"""2^32 over the golden ratio: its multiples spread evenly over 32 bits."""


class Entry(NamedTuple):
    """One tensor of a parameter's state: the dimensions that follow the parameter's shape, and the dtype."""

    trailing: tuple[int, ...]
    dtype: torch.dtype


def layout(
    rule: UpdateRule,
    state_dtype: torch.dtype = torch.float32,
    moment_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> dict[str, Entry]:
    """Return what the state of a coordinate holds, by name, in the order of the state.

    Args:
        rule: The rule that uses the memory.
        state_dtype: Dtype of the LSTM memory: float32, bfloat16 or int8.
        moment_dtype: Dtype of the moments that may be narrow: float32 or bfloat16. None means bfloat16 beside int8, and
            otherwise float32.
        compute_dtype: Dtype that the rule computes in. float64 keeps everything in float64.

    Returns:
        Moments, ``hidden``, ``cell`` and, for int8, ``cell_scale``.
    """
    if compute_dtype == torch.float64:
        state_dtype = moment_dtype = compute_dtype
    if moment_dtype is None:
        moment_dtype = torch.bfloat16 if state_dtype == torch.int8 else compute_dtype
    entries = {name: Entry((), compute_dtype if name in WIDE_MOMENTS else moment_dtype) for name in rule.moment_names}
    entries["hidden"] = entries["cell"] = Entry((rule.memory_width,), state_dtype)
    if state_dtype == torch.int8:
        entries[CELL_SCALE] = Entry((rule.config.num_layers,), torch.bfloat16)
    return entries


def names(rule: UpdateRule, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the tensors in a parameter's memory. An int8 ``hidden`` has scales.

    Args:
        rule: The rule that uses the memory.
        state: The state of one parameter; it may hold more or less.

    Returns:
        ``hidden``, ``cell``, the moments and perhaps ``cell_scale``: the order in which kernels take them.
    """
    scaled = "hidden" in state and state["hidden"].dtype == torch.int8
    return ("hidden", "cell", *rule.moment_names, *((CELL_SCALE,) if scaled else ()))


def decode(rule: UpdateRule, stored: Memory, dtype: torch.dtype) -> Memory:
    """Return memory as a rule computes with it.

    Args:
        rule: The rule that uses the memory.
        stored: Tensors of shape ``(N, ...)``.
        dtype: Dtype to compute in.

    Returns:
        Moments ``(N,)``, ``hidden`` and ``cell`` ``(N, L * H)``. Tensors stored in ``dtype`` are not copied.
    """
    memory = {name: values.to(dtype) for name, values in stored.items() if name != CELL_SCALE}
    if CELL_SCALE in stored:
        memory["hidden"] = memory["hidden"] * (1 / LARGEST)
        memory["cell"] = (_layers(rule, memory["cell"]) * stored[CELL_SCALE].to(dtype).unsqueeze(-1)).flatten(1)
    return memory


def encode(rule: UpdateRule, memory: Memory, stored: Memory, active: Tensor, bits: Tensor) -> Memory:
    """Return memory as it is stored.

    Args:
        rule: The rule that uses the memory.
        memory: After a step, as :meth:`UpdateRule.forward` returns it.
        stored: The stored memory before that step: it gives the dtypes, and inactive coordinates keep its values.
        active: ``(N,)`` bool.
        bits: From :func:`noise`, ``(N,)``.

    Returns:
        A tensor for each in ``stored``, of the same shape. Floats that round to nearest are not cast to their dtype yet.
    """
    width = rule.memory_width
    new = dict(memory)
    for number, name in enumerate(rule.moment_names):
        if stored[name].dtype == torch.bfloat16:
            new[name] = round_to_bfloat16(memory[name], _draws(bits, width + number, 1).squeeze(-1))
    if CELL_SCALE in stored:
        draws = _draws(bits, 0, width).to(memory["cell"].dtype) * 2.0**-16
        new |= _quantized(rule, memory["hidden"], memory["cell"], draws)
        for name in ("hidden", "cell", CELL_SCALE):
            new[name] = torch.where(active.unsqueeze(-1), new[name].to(stored[name].dtype), stored[name])
    return new


def convert(rule: UpdateRule, stored: Memory, entries: Mapping[str, Entry]) -> Memory:
    """Store memory in another layout. Everything is rounded to nearest: a single rounding accumulates no error.

    Args:
        rule: The rule that uses the memory.
        stored: Tensors ``(N, ...)`` of any floating dtype; 8-bit values, as int8 or floats, come with their ``cell_scale``.
        entries: The layout to reach, from :func:`layout`.

    Returns:
        Memory in that layout.
    """
    if CELL_SCALE in entries and CELL_SCALE in stored:
        return {name: stored[name].to(entry.dtype) for name, entry in entries.items()}
    memory = decode(rule, stored, torch.float64 if entries["hidden"].dtype == torch.float64 else torch.float32)
    if CELL_SCALE in entries:
        memory |= _quantized(rule, memory["hidden"], memory["cell"], 0.5)
    return {name: memory[name].to(entry.dtype) for name, entry in entries.items()}


def noise(grad: Tensor, step: Tensor) -> Tensor:
    """Hash each coordinate's gradient and step count to 32 bits.

    Unit ``k`` of a coordinate draws the upper 16 bits of ``hash + k * 0x9e3779b9``: the draws of a unit are uniform over
    steps, and the draws of one step are spread evenly over the units. Moment ``i`` draws as unit ``L * H + i``.

    Args:
        grad: ``(N,)``, the gradient before ``maximize`` changes its sign.
        step: Inner steps including this one, 0-dim or ``(N,)``.

    Returns:
        int32 ``(N,)``.
    """
    x = grad.to(torch.float32).contiguous().view(torch.int32) ^ (step.to(torch.int32) * _GOLDEN)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 16)


def round_to_bfloat16(values: Tensor, draws: Tensor) -> Tensor:
    """Round float32 to one of the two nearest bfloat16, away from zero if 16 random bits exceed what would be cut off."""
    return ((values.view(torch.int32) + draws) & -0x10000).view(torch.float32)


def bfloat16_above(values: Tensor) -> Tensor:
    """Return the least bfloat16 that is not below a non-negative float32."""
    return ((values.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _quantized(rule: UpdateRule, hidden: Tensor, cell: Tensor, draws: Tensor | float) -> Memory:
    """Return LSTM memory in 8-bit units. A cell is rounded up where its fraction and ``draws``, in [0, 1), reach 1."""
    layers = _layers(rule, cell)
    scale = bfloat16_above(layers.abs().amax(-1) / LARGEST)
    cells = (layers / torch.where(scale > 0, scale, 1).unsqueeze(-1)).flatten(1)
    cells = (cells + draws).floor().clamp(-LARGEST, LARGEST)
    return {"hidden": (hidden * LARGEST).round(), "cell": cells, CELL_SCALE: scale}


def _draws(bits: Tensor, first: int, count: int) -> Tensor:
    """Return the 16-bit draws of some units, int32 ``(N, count)``."""
    units = torch.arange(first, first + count, dtype=torch.int32, device=bits.device)
    return _shifted(bits.unsqueeze(-1) + units * _GOLDEN, 16)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """Shift to the right as unsigned integers do."""
    return (x >> shift) & ((1 << (32 - shift)) - 1)


def _layers(rule: UpdateRule, memory: Tensor) -> Tensor:
    return memory.unflatten(-1, (rule.config.num_layers, rule.config.hidden_size))
