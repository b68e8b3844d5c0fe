"""The matrix stage by the compiled kernel: matrices with a short side are shaped and applied in one call.

``native/matrix.c`` says how the kernel works; :mod:`learned_optim.rules.orthogonal` defines what it computes. The result of
a matrix depends neither on others nor on the number of threads, so a sharded parameter moves like a whole one, bit by bit.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.backends.items import PLAIN_TENSORS, StepOptions
from learned_optim.backends.native.library import AVAILABLE, LIBRARY, call, pointer
from learned_optim.rules import MatrixStage
from learned_optim.rules.orthogonal import SCRATCH_BYTES

VALUE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of parameters, with the number that the kernel has for each."""

MOMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of momenta."""

LONGEST_SHORT_SIDE = 256
"""Above it BLAS is faster, which blocks for larger caches."""


class _Matrices(ctypes.Structure):
    """``struct matrices`` of matrix.c."""

    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, pointer) for name in ("rows", "columns", "updates")),
        ("momenta", pointer * 2),
        ("momentum_types", pointer * 2),
        *((name, pointer) for name in ("params", "param_types")),
        *((name, ctypes.c_float) for name in ("blend", "share", "gain", "sign", "lr", "shrink")),
        ("shaped", ctypes.c_int32),
    )


def takes_sides(rows: int, columns: int) -> bool:
    """Return whether the kernel shapes matrices of these sides."""
    if not AVAILABLE or not 0 < min(rows, columns) <= LONGEST_SHORT_SIDE or torch.compiler.is_compiling():
        return False
    return LIBRARY is not None and LIBRARY.learned_optim_matrix_scratch(rows, columns) <= SCRATCH_BYTES


def takes_params(params: Sequence[Tensor]) -> bool:
    """Return whether the kernel can apply updates to all of these parameters."""
    return not torch.compiler.is_compiling() and all(
        type(param) in PLAIN_TENSORS
        and param.device.type == "cpu"
        and param.dtype in VALUE_TYPES
        and param.is_contiguous()
        and not param.is_neg()
        for param in params
    )


class MatrixTable:
    """The addresses of all that one call of the kernel reads and writes, but for the updates.

    Args:
        sides: Rows and columns of each matrix.
        params: Contiguous; empty where updates are only shaped.
        momenta: Up to two sequences of contiguous tensors, whose sum times ``sign`` is the raw momentum.
        sign: 1, or -1 for the momenta as memory has them.
    """

    def __init__(
        self,
        sides: Sequence[tuple[int, int]],
        params: Sequence[Tensor] = (),
        momenta: Sequence[Sequence[Tensor]] = (),
        sign: float = -1.0,
    ) -> None:
        self.tensors = [*params, *(moment for each in momenta for moment in each)]
        self._sides = array("q", [rows for rows, _ in sides] + [columns for _, columns in sides])
        self._addresses = array("Q", map(Tensor.data_ptr, self.tensors))
        self._types = array("B", [VALUE_TYPES[param.dtype] for param in params])
        self._types.extend(MOMENT_TYPES[moment.dtype] for each in momenta for moment in each)
        count, sides_at = len(sides), self._sides.buffer_info()[0]
        addresses, types = self._addresses.buffer_info()[0], self._types.buffer_info()[0]
        first = 1 if params else 0
        self._columns = _Matrices(
            count=count, rows=sides_at, columns=sides_at + 8 * count,
            params=addresses if params else None, param_types=types if params else None,
            momenta=(pointer * 2)(*(addresses + 8 * count * (first + at) for at in range(len(momenta)))),
            momentum_types=(pointer * 2)(*(types + count * (first + at) for at in range(len(momenta)))),
            sign=sign,
        )  # fmt: skip

    def run(self, updates: array[int], stage: MatrixStage | None, options: StepOptions | None) -> None:
        """Shape updates, and apply them where there are parameters.

        Args:
            updates: The address of each matrix, of float32 numbers; shaped in place.
            stage: How they are shaped; None: they are already.
            options: How they are applied.
        """
        columns = self._columns
        columns.updates = updates.buffer_info()[0]
        columns.shaped = stage is None
        if stage is not None:
            columns.blend, columns.share, columns.gain = stage.blend, stage.momentum, stage.gain
        if options is not None:
            columns.lr, columns.shrink = float(options.lr), float(options.shrink)
        call("learned_optim_matrices", ctypes.byref(columns), SCRATCH_BYTES, torch.get_num_threads())


def shape(updates: Tensor, momentum: Tensor | None, stage: MatrixStage) -> Tensor:
    """Return shaped updates, like :meth:`~learned_optim.rules.MatrixStage.shape`.

    Args:
        updates: ``(B, m, n)``, float32, with sides that :func:`takes_sides` accepts.
        momentum: A tensor of the same shape, or None.
        stage: How to shape them.

    Returns:
        New updates.
    """
    count, rows, columns = updates.shape
    shaped = updates.clone(memory_format=torch.contiguous_format)
    momenta = [] if momentum is None else [list(momentum.contiguous().unbind())]
    MatrixTable([(rows, columns)] * count, (), momenta, 1.0).run(addresses_in(shaped), stage, None)
    return shaped


def apply(params: Sequence[Tensor], updates: Tensor, options: StepOptions) -> None:
    """Apply shaped updates: ``param = shrink * param + lr * update``.

    Args:
        params: B tensors that :func:`takes_params` accepts; written.
        updates: ``(B, m, n)``, float32.
        options: How updates are applied.
    """
    flat = updates.contiguous()
    MatrixTable([(1, flat[0].numel())] * len(params), params).run(addresses_in(flat), None, options)
    torch.autograd.graph.increment_version(list(params))


def addresses_in(batch: Tensor) -> array[int]:
    """Return the address of each matrix of a contiguous batch."""
    start, size = batch.data_ptr(), batch.stride(0) * batch.element_size()
    return array("Q", range(start, start + size * len(batch), size) if len(batch) else [])
