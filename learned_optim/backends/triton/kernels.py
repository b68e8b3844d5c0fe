"""The device code of the ``triton`` backend: encode, LSTM layers, decode and parameter update in one pass over the state.

A program takes one chunk of one tensor; which, it reads from a table, so that one launch serves a model of any number of
tensors. Importing this file needs Triton.

There are two forms of the LSTM. *Unrolled* keeps one coordinate a thread with every unit in a register, and has its weights
compiled in, as operands of the multiply-adds: nothing is loaded but the state, and nothing is shared. *Tiled* multiplies
matrices, for LSTMs whose code would not fit in the instruction cache.

Letters: F input features, L layers, H hidden size, WIDTH the memory of one coordinate ``L * H``, PADDED the next power of
two of whatever a tile is wide.
"""

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Rows of the table of addresses.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
HIDDEN = tl.constexpr(2)
CELL = tl.constexpr(3)
MOMENTS = tl.constexpr(4)

# Rows of the table of values, one column a tensor.
LR = tl.constexpr(0)
KEEP = tl.constexpr(1)
AMPLITUDE = tl.constexpr(2)
STEP = tl.constexpr(3)
CORRECTIONS = tl.constexpr(4)

# Of 8-bit memory and of stochastic rounding, as rules/storage.py has them.
LARGEST = tl.constexpr(127.0)
GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def _pointer(addresses, tensors, tensor, offset, row: tl.constexpr, dtype: tl.constexpr):
    """Return the pointer in one row of the address table, moved by a number of elements."""
    return tl.load(addresses + row * tensors + tensor).to(tl.pointer_type(dtype)) + offset


@triton.jit
def _reciprocal(x):
    """Return ``1 / x`` to one unit in the last place: for divisors of at least 1 that is one instruction, not eight."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _tanh(x):
    return 2.0 * _reciprocal(1.0 + tl.exp2(x * (-2.0 * LOG2_E))) - 1.0


@triton.jit
def _rsqrt(x):
    """Return ``x**-0.5``, also of subnormal numbers, which the hardware's instruction takes for zero."""
    tiny = x < 1e-30
    return tl.rsqrt(tl.where(tiny, x * 18446744073709551616.0, x)) * tl.where(tiny, 4294967296.0, 1.0)


@triton.jit
def _lerp(value, memory, DECAY: tl.constexpr, COMPLEMENT: tl.constexpr):
    """Return ``torch.lerp(value, memory, decay)``, rounded as torch rounds it."""
    if DECAY < 0.5:
        return value + (memory - value) * DECAY
    else:
        return memory - (memory - value) * COMPLEMENT


@triton.jit
def _columns(tile, PADDED: tl.constexpr, LOG_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Split a tile ``(BLOCK, PADDED)`` into its columns, without leaving the registers."""
    parts = (tile,)
    for level in tl.static_range(LOG_PADDED):
        halves = ()
        for i in tl.static_range(2**level):
            pair = tl.permute(tl.reshape(parts[i], (BLOCK, 2, PADDED >> (level + 1))), (0, 2, 1))
            left, right = tl.split(pair)
            halves = halves + (left, right)
        parts = halves
    columns = ()
    for i in tl.static_range(PADDED):
        columns = columns + (tl.reshape(parts[i], (BLOCK,)),)
    return columns


@triton.jit
def _tile(columns, WIDTH: tl.constexpr, PADDED: tl.constexpr, LOG_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Join columns into a tile ``(BLOCK, PADDED)``; the inverse of :func:`_columns`."""
    parts = ()
    for i in tl.static_range(PADDED):
        parts = parts + (tl.reshape(columns[i if i < WIDTH else 0], (BLOCK, 1)),)
    for level in tl.static_range(LOG_PADDED):
        joined = ()
        for i in tl.static_range(PADDED >> (level + 1)):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
            joined = joined + (tl.reshape(pair, (BLOCK, 2 << level)),)
        parts = joined
    return parts[0]


@triton.jit
def _gate(below, hidden, WEIGHTS: tl.constexpr, K: tl.constexpr, H: tl.constexpr, FIRST: tl.constexpr, AT: tl.constexpr):
    """Return one gate's pre-activation: its WEIGHTS, from ``AT``, are K inputs, H hiddens and the bias."""
    total = below[0] * WEIGHTS[AT] + WEIGHTS[AT + K + H]
    for k in tl.static_range(1, K):
        total += below[k] * WEIGHTS[AT + k]
    for j in tl.static_range(H):
        total += hidden[FIRST + j] * WEIGHTS[AT + K + j]
    return total


@triton.jit
def _cell_step(write, forget, candidate, read, cell):
    """Advance a cell. The gates come multiplied by ``-log2 e``, the candidate by twice that."""
    wanted = 2.0 * _reciprocal(1.0 + tl.exp2(candidate)) - 1.0
    new_cell = cell * _reciprocal(1.0 + tl.exp2(forget)) + wanted * _reciprocal(1.0 + tl.exp2(write))
    return _tanh(new_cell) * _reciprocal(1.0 + tl.exp2(read)), new_cell


@triton.jit
def _layer_unrolled(
    below, hidden, cell, WEIGHTS: tl.constexpr, K: tl.constexpr, H: tl.constexpr, FIRST: tl.constexpr, AT: tl.constexpr
):
    hiddens, cells = (), ()
    for u in tl.static_range(H):
        write = _gate(below, hidden, WEIGHTS, K, H, FIRST, AT + (4 * u + 0) * (K + H + 1))
        forget = _gate(below, hidden, WEIGHTS, K, H, FIRST, AT + (4 * u + 1) * (K + H + 1))
        candidate = _gate(below, hidden, WEIGHTS, K, H, FIRST, AT + (4 * u + 2) * (K + H + 1))
        read = _gate(below, hidden, WEIGHTS, K, H, FIRST, AT + (4 * u + 3) * (K + H + 1))
        new_hidden, new_cell = _cell_step(write, forget, candidate, read, cell[FIRST + u])
        hiddens = hiddens + (new_hidden,)
        cells = cells + (new_cell,)
    return hiddens, cells


@triton.jit
def _lstm_unrolled(inputs, hidden, cell, WEIGHTS: tl.constexpr, F: tl.constexpr, H: tl.constexpr, L: tl.constexpr):
    """Advance every layer; hidden and cell are tuples of columns."""
    below, cells = _layer_unrolled(inputs, hidden, cell, WEIGHTS, F, H, 0, 0)
    hiddens = below
    for layer in tl.static_range(1, L):
        below, top = _layer_unrolled(
            below, hidden, cell, WEIGHTS, H, H, layer * H, 4 * H * (F + H + 1) + (layer - 1) * 4 * H * (2 * H + 1)
        )
        hiddens = hiddens + below
        cells = cells + top
    return below, hiddens, cells


@triton.jit
def _read_out(hidden, WEIGHTS: tl.constexpr, H: tl.constexpr, AT: tl.constexpr):
    """Return one output; its WEIGHTS, from ``AT``, are H hiddens and the bias."""
    total = hidden[0] * WEIGHTS[AT] + WEIGHTS[AT + H]
    for j in tl.static_range(1, H):
        total += hidden[j] * WEIGHTS[AT + j]
    return total


@triton.jit
def _layer_tiled(
    below, hidden, cell, weights, K: tl.constexpr, FLAT: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr
):
    """Advance a layer, its weights stored ``[gate][K inputs, PADDED hiddens, bias][PADDED]``; FLAT inputs are a tuple."""
    rows, columns = tl.arange(0, PADDED)[:, None] * PADDED, tl.arange(0, PADDED)[None, :]
    gates = ()
    for q in tl.static_range(4):
        gate = weights + q * (K + PADDED + 1) * PADDED
        total = tl.dot(hidden, tl.load(gate + K * PADDED + rows + columns), input_precision=PRECISION)
        total += tl.load(gate + (K + PADDED) * PADDED + columns)
        if FLAT:
            for k in tl.static_range(K):
                total += below[k][:, None] * tl.load(gate + k * PADDED + columns)
        else:
            total = tl.dot(below, tl.load(gate + rows + columns), total, input_precision=PRECISION)
        gates = gates + (total,)
    return _cell_step(gates[0], gates[1], gates[2], gates[3], cell)


@triton.jit
def _encode_paper(grad, finite, settled, RULE: tl.constexpr):
    """Return inputs and the mask of active coordinates; ``settled`` is true where the memory has left zero."""
    active = finite & ((grad != 0) | settled)
    if RULE.log_and_sign:
        log = tl.log2(tl.maximum(tl.abs(grad), RULE.threshold)) * (LN_2 / RULE.preprocess_p)
        return (log, tl.minimum(tl.maximum(grad / RULE.threshold, -1.0), 1.0)), active
    else:
        return (grad * RULE.input_scale,), active


@triton.jit
def _encode_adam(grad, finite, moments, values, RULE: tl.constexpr):
    """Return inputs, the mask of active coordinates and new moments; ``values`` are this tensor's, from CORRECTIONS."""
    if RULE.outlier_bound:
        bound = RULE.outlier_bound * tl.sqrt(moments[2] * values[2])
        grad = tl.where(moments[2] > 0, tl.minimum(tl.maximum(grad, -bound), bound), grad)
    fast = _lerp(grad, moments[0], RULE.fast_decay, RULE.fast_complement)
    slow = _lerp(grad, moments[1], RULE.slow_decay, RULE.slow_complement)
    mean = _lerp(grad * grad, moments[2], RULE.square_decay, RULE.square_complement)
    active = finite & (mean > 0)
    inverse_root = _rsqrt(tl.where(active, mean * values[2], 1.0))
    normalised = grad * inverse_root
    log_ratio = tl.log2(normalised * normalised + 1e-8) * (0.1 * LN_2)
    clamped = tl.minimum(tl.maximum(normalised, -5.0), 5.0)
    inputs = (clamped, fast * values[0] * inverse_root, slow * values[1] * inverse_root, log_ratio)
    TIMES: tl.constexpr = RULE.time_scales
    for i in tl.static_range(TIMES):
        inputs = inputs + (values[3 + i] + tl.zeros_like(grad),)
    return inputs, active, (fast, slow, mean)


# ---- memory in fewer bytes: rules/storage.py says what is stored and why --------------------------------------------------


@triton.jit
def _noise(grad, step):
    """Return the 32 random bits of each coordinate, from its gradient as the caller has it, and the step."""
    x = grad.to(tl.uint32, bitcast=True) ^ (step.to(tl.int32).to(tl.uint32) * GOLDEN)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _draw(bits, unit):
    """Return the 16 random bits that a unit draws."""
    return (bits + unit.to(tl.uint32) * GOLDEN) >> 16


@triton.jit
def _round_to_bfloat16(x, draw):
    return ((x.to(tl.uint32, bitcast=True) + draw) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _scale_above(peak):
    """Return the least bfloat16 that is no less than a hundred-and-twenty-seventh of the largest cell."""
    return (((peak / LARGEST).to(tl.uint32, bitcast=True) + 0xFFFF) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _to_eight_bits(cell, scale, draw):
    """Return cells as multiples of a scale, rounded stochastically."""
    rounded = tl.floor(cell / tl.where(scale > 0, scale, 1.0) + draw.to(tl.float32) * (1.0 / 65536.0))
    return tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST)


@triton.jit
def _to_nearest(hidden):
    """Return hidden states in multiples of 1/127: adding 1.5 * 2**23 rounds to an integer."""
    return hidden * LARGEST + 12582912.0 - 12582912.0


@triton.jit
def _quantized_unrolled(hidden, cell, bits, L: tl.constexpr, H: tl.constexpr):
    """Return columns of hidden states and cells as integers, and each layer's scale."""
    hiddens, cells, scales = (), (), ()
    for layer in tl.static_range(L):
        peak = tl.abs(cell[layer * H])
        for u in tl.static_range(1, H):
            peak = tl.maximum(peak, tl.abs(cell[layer * H + u]))
        scale = _scale_above(peak)
        scales = scales + (scale,)
        for u in tl.static_range(H):
            hiddens = hiddens + (_to_nearest(hidden[layer * H + u]),)
            cells = cells + (_to_eight_bits(cell[layer * H + u], scale, _draw(bits, tl.full((), layer * H + u, tl.int32))),)
    return hiddens, cells, scales


@triton.jit
def _quantized_tiled(hidden, cell, bits, L: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr):
    """Return tiles of hidden states and cells as integers, and each layer's scale; units beyond H are zero."""
    hiddens, cells, scales = (), (), ()
    for layer in tl.static_range(L):
        scale = _scale_above(tl.max(tl.abs(cell[layer]), 1))
        scales = scales + (scale,)
        hiddens = hiddens + (_to_nearest(hidden[layer]),)
        draw = _draw(bits[:, None], (layer * H + tl.arange(0, PADDED))[None, :])
        cells = cells + (_to_eight_bits(cell[layer], scale[:, None], draw),)
    return hiddens, cells, scales


# ---- the kernel -----------------------------------------------------------------------------------------------------


@triton.jit
def _places(rows, inside, FIRST: tl.constexpr, USED: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Return offsets and mask of USED columns from FIRST of a memory ``(N, WIDTH)``, as a tile ``(BLOCK, PADDED)``."""
    columns = tl.arange(0, PADDED)
    if USED == PADDED:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (columns < USED)[None, :]
    return rows[:, None] * WIDTH + (FIRST + columns)[None, :], mask


@triton.jit
def _at(base, where, ALIGNED: tl.constexpr):
    """Return pointers to a tile of memory, promising that rows start on 16-byte boundaries where they do."""
    if ALIGNED:
        return tl.multiple_of(base + where, (16, 16))
    else:
        return base + where


@triton.jit(do_not_specialize=["tensors"])
def step_kernel(
    tensor_of,
    chunk_of,
    sizes,
    addresses,
    values,
    tensors,
    weights,
    F: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RULE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MEMORY_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    TILED: tl.constexpr,
    PRECISION: tl.constexpr,
    PADDED: tl.constexpr,
    LOG_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Take one step of one chunk of one tensor.

    Args:
        tensor_of: int32, each program's tensor.
        chunk_of: int32, each program's chunk of that tensor.
        sizes: int64, each tensor's coordinates.
        addresses: int64 ``(rows, tensors)``.
        values: float32 ``(rows, tensors)``.
        tensors: Number of tensors.
        weights: The tiled form's, a float32 pointer, packed by ``triton_step``.
        F: Input features.
        H: Hidden size.
        L: Layers.
        WEIGHTS: The unrolled form's, a tuple of numbers.
        RULE: The family's constants.
        PARAM_TYPE: Of the parameters.
        GRAD_TYPE: Of the gradients.
        MEMORY_TYPE: Of hidden and cell.
        MOMENT_TYPE: Of the moments, all but the mean square, which is float32.
        ALIGNED: Whether each coordinate's memory starts on a 16-byte boundary.
        MAXIMIZE: Ascend.
        TILED: Which form of the LSTM.
        PRECISION: Of the tiled form's matrix products.
        PADDED: Width of a tile of memory: the power of two that holds ``L * H`` unrolled, ``H`` tiled.
        LOG_PADDED: Its logarithm.
        BLOCK: Coordinates at once.
        CHUNK: Coordinates a program, a multiple of BLOCK.
    """
    WIDTH: tl.constexpr = L * H
    USED: tl.constexpr = H if TILED else WIDTH
    EIGHT_BIT: tl.constexpr = tl.int8 == MEMORY_TYPE
    ROUNDED: tl.constexpr = RULE.adam and tl.bfloat16 == MOMENT_TYPE
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    start = tl.load(chunk_of + program).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(sizes + tensor) - start, CHUNK).to(tl.int32)
    params = _pointer(addresses, tensors, tensor, start, PARAM, PARAM_TYPE)
    grads = _pointer(addresses, tensors, tensor, start, GRAD, GRAD_TYPE)
    hiddens = _pointer(addresses, tensors, tensor, start * WIDTH, HIDDEN, MEMORY_TYPE)
    cells = _pointer(addresses, tensors, tensor, start * WIDTH, CELL, MEMORY_TYPE)
    lr = tl.load(values + LR * tensors + tensor)
    keep = tl.load(values + KEEP * tensors + tensor)
    amplitude = tl.load(values + AMPLITUDE * tensors + tensor)
    step = tl.load(values + STEP * tensors + tensor)
    if EIGHT_BIT:
        SCALES: tl.constexpr = 7 if RULE.adam else 4
        scales = _pointer(addresses, tensors, tensor, start * L, SCALES, tl.bfloat16)
    moments = ()
    corrections = ()
    if RULE.adam:
        for i in tl.static_range(3):
            moments = moments + (
                _pointer(addresses, tensors, tensor, start, MOMENTS + i, MOMENT_TYPE if i < 2 else tl.float32),
            )
        VALUES: tl.constexpr = 3 + RULE.time_scales
        for i in tl.static_range(VALUES):
            corrections = corrections + (tl.load(values + (CORRECTIONS + i) * tensors + tensor),)

    # Not `range(0, count, BLOCK)`: a loop whose number of turns is known lets the compiler see that rows are contiguous.
    for block in range(CHUNK // BLOCK):
        if block * BLOCK < count:
            rows = block * BLOCK + tl.arange(0, BLOCK)
            inside = rows < count
            grad = tl.load(grads + rows, mask=inside, other=0.0).to(tl.float32)
            param = tl.load(params + rows, mask=inside, other=0.0).to(tl.float32)
            old_moments = ()
            if RULE.adam:
                for i in tl.static_range(3):
                    old_moments = old_moments + (tl.load(moments[i] + rows, mask=inside, other=0.0).to(tl.float32),)
            old_hidden, old_cell = (), ()
            for tile in tl.static_range(L if TILED else 1):
                where, mask = _places(rows, inside, tile * H, USED, PADDED, WIDTH)
                old_hidden = old_hidden + (tl.load(_at(hiddens, where, ALIGNED), mask=mask, other=0.0).to(tl.float32),)
                old_cell = old_cell + (tl.load(_at(cells, where, ALIGNED), mask=mask, other=0.0).to(tl.float32),)
            if not TILED:
                old_hidden = _columns(old_hidden[0], PADDED, LOG_PADDED, BLOCK)
                old_cell = _columns(old_cell[0], PADDED, LOG_PADDED, BLOCK)

            if EIGHT_BIT:
                scale = ()
                for layer in tl.static_range(L):
                    scale = scale + (tl.load(scales + rows * L + layer, mask=inside, other=0.0).to(tl.float32),)
                hidden, cell = (), ()
                for i in tl.static_range(L if TILED else WIDTH):
                    hidden = hidden + (old_hidden[i] * (1.0 / LARGEST),)
                    cell = cell + (old_cell[i] * (scale[i][:, None] if TILED else scale[i // H]),)
                old_hidden, old_cell = hidden, cell
            if EIGHT_BIT or ROUNDED:
                bits = _noise(grad, step)
            if MAXIMIZE:
                grad = -grad
            if RULE.adam:
                finite = grad * grad < float("inf")
                grad = tl.where(finite, grad, 0.0)
                inputs, active, new_moments = _encode_adam(grad, finite, old_moments, corrections, RULE)
                for i in tl.static_range(2):
                    moment = new_moments[i]
                    if ROUNDED:
                        moment = _round_to_bfloat16(moment, _draw(bits, tl.full((), WIDTH + i, tl.int32)))
                    tl.store(moments[i] + rows, moment.to(MOMENT_TYPE), mask=inside & finite)
                tl.store(moments[2] + rows, new_moments[2], mask=inside & finite)
            else:
                finite = tl.abs(grad) < float("inf")
                if TILED:
                    bottom = tl.max(tl.abs(old_cell[0]), 1)
                else:
                    bottom = tl.abs(old_cell[0])
                    for u in tl.static_range(1, H):
                        bottom = tl.maximum(bottom, tl.abs(old_cell[u]))
                inputs, active = _encode_paper(tl.where(finite, grad, 0.0), finite, bottom != 0, RULE)

            if TILED:
                below, new_cell = _layer_tiled(inputs, old_hidden[0], old_cell[0], weights, F, True, PADDED, PRECISION)
                new_hidden, new_cell = (below,), (new_cell,)
                at = weights + 4 * (F + PADDED + 1) * PADDED
                for layer in tl.static_range(1, L):
                    below, cell = _layer_tiled(
                        below, old_hidden[layer], old_cell[layer], at, PADDED, False, PADDED, PRECISION
                    )
                    new_hidden = new_hidden + (below,)
                    new_cell = new_cell + (cell,)
                    at += 4 * (2 * PADDED + 1) * PADDED
                columns = tl.arange(0, PADDED)
                output = tl.sum(below * tl.load(at + columns)[None, :], 1) + tl.load(at + PADDED)
                if RULE.adam:
                    at += PADDED + 1
                    direction = tl.sum(below * tl.load(at + columns)[None, :], 1) + tl.load(at + PADDED)
            else:
                READOUT: tl.constexpr = 4 * H * (F + H + 1) + (L - 1) * 4 * H * (2 * H + 1)
                below, new_hidden, new_cell = _lstm_unrolled(inputs, old_hidden, old_cell, WEIGHTS, F, H, L)
                output = _read_out(below, WEIGHTS, H, READOUT)
                if RULE.adam:
                    direction = _read_out(below, WEIGHTS, H, READOUT + H + 1)
            if EIGHT_BIT:
                if TILED:
                    new_hidden, new_cell, scale = _quantized_tiled(new_hidden, new_cell, bits, L, H, PADDED)
                else:
                    new_hidden, new_cell, scale = _quantized_unrolled(new_hidden, new_cell, bits, L, H)
                for layer in tl.static_range(L):
                    tl.store(scales + rows * L + layer, scale[layer].to(tl.bfloat16), mask=inside & active)
            if not TILED:
                new_hidden = (_tile(new_hidden, WIDTH, PADDED, LOG_PADDED, BLOCK),)
                new_cell = (_tile(new_cell, WIDTH, PADDED, LOG_PADDED, BLOCK),)

            for tile in tl.static_range(L if TILED else 1):
                where, mask = _places(rows, inside, tile * H, USED, PADDED, WIDTH)
                mask = mask & active[:, None]
                tl.store(_at(hiddens, where, ALIGNED), new_hidden[tile].to(MEMORY_TYPE), mask=mask)
                tl.store(_at(cells, where, ALIGNED), new_cell[tile].to(MEMORY_TYPE), mask=mask)
            if RULE.adam:
                gain = tl.exp2(_tanh(output * (1.0 / RULE.log_gain)) * (RULE.log_gain * LOG2_E))
                update = gain * (inputs[1] + _tanh(direction))
            else:
                update = output
            update = tl.where(active, amplitude * update, 0.0)
            tl.store(params + rows, (param * keep + lr * update).to(PARAM_TYPE), mask=inside)
