"""The matrix stage: moves the update of a whole matrix towards an orthogonal one.

A rule that moves every coordinate by itself cannot see that a weight is a matrix. This stage can. It has no state and no
meta-parameters of its own: :class:`MatrixStage` says how far it goes, in which direction and how long the result is.
Everything here is a pure function of batched matrices ``(B, m, n)``, so that a step, a roll-out and the test of a kernel
share one definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of the quintic ``x -> a x + b x^3 + c x^5``, which every singular value takes in each iteration."""

ITERATIONS = 5

ALIGNMENT = 4
"""Zeros pad both sides to multiples of this number, so every matrix of a batch begins at a multiple of 64 bytes. BLAS
rounds by the address: without the padding, the result of a matrix would depend on its place in the batch."""

SCRATCH_BYTES = 64 * 2**20
"""Memory that one bucket of :func:`buckets` may need beside updates and results."""


@dataclass(frozen=True)
class MatrixStage:
    """How a rule shapes the updates of matrices, after it has made them coordinate by coordinate.

    Args:
        blend: How far an update goes towards the orthogonal one, from above 0 to 1.
        momentum: Share of the raw momentum in the direction that is orthogonalised, from 0 to 1.
        gain: Length of the orthogonal update, relative to the update that the rule made.
        smallest_side: Fewest rows and columns of a matrix that takes part.
    """

    blend: float = 1.0
    momentum: float = 0.0
    gain: float = 1.0
    smallest_side: int = 2

    def applies_to(self, shape: Sequence[int]) -> bool:
        """Return whether the stage shapes tensors of this shape."""
        return has_matrix(shape, self.smallest_side)

    def shape(self, updates: Tensor, momentum: Tensor | None) -> Tensor:
        """Apply :func:`shape_updates` with the numbers of this stage.

        Args:
            updates: ``(B, m, n)``.
            momentum: ``(B, m, n)``, or None where the rule keeps none.

        Returns:
            Updates of the same shape.
        """
        return shape_updates(updates, self.blend, self.gain, momentum if self.momentum else None, self.momentum)

    def pull_back(self, updates: Tensor, cotangents: Tensor, momentum: Tensor | None) -> Tensor:
        """Return the vector-Jacobian product of :meth:`shape` by the updates.

        Args:
            updates: As given to :meth:`shape`.
            cotangents: Derivatives by the result of :meth:`shape`.
            momentum: As given to :meth:`shape`.

        Returns:
            Derivatives by the updates, ``(B, m, n)``.
        """
        used = momentum if self.momentum else None
        return pull_back(updates, cotangents, self.blend, self.gain, used, self.momentum)


def has_matrix(shape: Sequence[int], smallest_side: int = 2) -> bool:
    """Return whether the stage applies to a tensor.

    Args:
        shape: Sides of the tensor; a convolution counts as ``(out, rest)``.
        smallest_side: Fewest rows and columns.

    Returns:
        Whether the tensor has at least two dimensions and both sides are long enough.
    """
    if len(shape) < 2:
        return False
    rows, columns = matrix_shape(shape)
    return min(rows, columns) >= max(smallest_side, 1)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the sides ``(out, rest)`` of a tensor with at least two dimensions, seen as a matrix.

    Leading sides of 1 are left out while two others remain: ``(1, 16, 24)`` is ``(16, 24)``.
    """
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    rest = 1
    for side in shape[1:]:
        rest *= side
    return shape[0], rest


def buckets(
    shapes: Sequence[tuple[int, int]], element_size: int, scratch_bytes: int = SCRATCH_BYTES
) -> Iterator[tuple[int, ...]]:
    """Group matrices of equal shape into batches of bounded memory.

    Args:
        shapes: Sides of each matrix.
        element_size: Bytes of one entry.
        scratch_bytes: Bound on :func:`scratch_entries` of one batch, in bytes. A matrix that exceeds the
            bound by itself comes alone: its Gram matrix needs that memory.

    Yields:
        Positions in ``shapes``, in ascending order within a batch; every position comes once.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for position, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(position)
    for shape, positions in groups.items():
        count = max(scratch_bytes // max(scratch_entries(*shape) * element_size, 1), 1)
        for start in range(0, len(positions), count):
            yield tuple(positions[start : start + count])


def scratch_entries(rows: int, columns: int) -> int:
    """Return the entries that :func:`shape_updates` holds at once for one matrix, its input and its result included."""
    short, long = sorted(side + -side % ALIGNMENT for side in (rows, columns))
    return 9 * short * long + 6 * short * short


def orthogonalize(matrices: Tensor) -> Tensor:
    r"""Return nearly orthogonal matrices with the singular vectors of the given ones.

    Five Newton-Schulz iterations take every singular value of ``X / |X|`` to about 0.7 to 1.2 unless it is below a
    thousandth::

        A = X X^T,    X <- a X + (b A + c A^2) X

    The iteration runs on the smaller side. Where the other side is more than twice as long, only the Gram matrix iterates,
    which is the same polynomial at half the cost::

        A_0 = X X^T,    P_k = a + b A_k + c A_k^2,    A_{k+1} = P_k A_k P_k,    result = P_4 P_3 P_2 P_1 P_0 X

    Args:
        matrices: ``(B, m, n)``, float32 or float64, of any scale. A matrix that is zero or holds NaN or Inf gives zeros.

    Returns:
        Matrices of the same shape.

    References:
        Jordan et al. 2024, "Muon" (https://kellerjordan.github.io/posts/muon/), which gives the coefficients. Departures:
        the largest entry is divided out before the norm, so no scale over- or underflows; bfloat16 on GPUs only;
        the Gram form.
    """
    return _newton_schulz(_normalize(matrices)[0])


def shape_updates(
    updates: Tensor,
    blend: Tensor | float = 1.0,
    gain: Tensor | float = 1.0,
    momentum: Tensor | None = None,
    share: Tensor | float = 0.0,
) -> Tensor:
    """Move updates towards orthogonal ones.

    With ``D = (1 - share) U / |U| + share M / |M|`` and ``Q = orthogonalize(D)``, set to zero where ``U`` is zero, the
    result is ``(1 - blend) U + blend gain |U| Q / |Q|``. A coordinate that the rule leaves at rest therefore stays at rest.

    On one thread of a CPU, the result of a matrix depends on no other matrix of its batch, to the last bit. On several
    threads, BLAS splits a batch of one matrix differently from a larger batch, so the last bits may differ there.

    Args:
        updates: ``(B, m, n)``, float32 or float64. Zero matrices and matrices with NaN or Inf come back as they are.
        blend: From 0, the update itself to the last bit, to 1; a number or ``(B,)``.
        gain: Length of an orthogonal update, relative to ``|U|``; a number or ``(B,)``.
        momentum: ``(B, m, n)``, of any scale. A momentum that is zero or not finite is left out.
        share: Weight of the momentum in the direction, from 0 to 1; a number or ``(B,)``.

    Returns:
        Updates of the same shape. Differentiable once by every argument but the momentum.
    """
    unit, length, usable = _normalize(updates)
    if momentum is not None:
        mixed = torch.lerp(unit, _normalize(momentum)[0].detach(), _spread(share, updates))
        unit = mixed * _inverse(torch.linalg.vector_norm(mixed, dim=(-2, -1), keepdim=True))
    orthogonal = _newton_schulz(unit) * (updates != 0)
    norm = torch.linalg.vector_norm(orthogonal, dim=(-2, -1), keepdim=True)
    shaped = orthogonal * (length * _spread(gain, updates) * _inverse(norm))
    if isinstance(blend, Tensor) or blend != 1.0:
        shaped = torch.lerp(_chosen(usable, updates, 0.0), shaped, _spread(blend, updates))
    return _chosen(usable, shaped, updates)


def _chosen(usable: Tensor, matrices: Tensor, otherwise: Tensor | float) -> Tensor:
    """Return usable matrices, and ``otherwise`` in place of the others; skip the copy where all are usable."""
    plain = type(usable) is Tensor and usable.device.type == "cpu" and not torch.compiler.is_compiling()
    if plain and bool(usable.all()):
        return matrices
    return torch.where(usable, matrices, otherwise)


def _inverse(norm: Tensor) -> Tensor:
    """Return ``1 / norm``, and 1 where there is nothing to divide."""
    return 1.0 / torch.where(norm > 0, norm, 1.0)


def _spread(value: Tensor | float, updates: Tensor) -> Tensor | float:
    """Return a number unchanged, and one number for each matrix as ``(B, 1, 1)``."""
    return value.reshape(-1, 1, 1).to(updates.dtype) if isinstance(value, Tensor) else value


def pull_back(
    updates: Tensor,
    cotangents: Tensor,
    blend: Tensor | float = 1.0,
    gain: Tensor | float = 1.0,
    momentum: Tensor | None = None,
    share: Tensor | float = 0.0,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """Return the vector-Jacobian product of :func:`shape_updates` by its updates, in batches of bounded memory.

    Args:
        updates: ``(B, m, n)``, for instance of all steps of a truncation.
        cotangents: Derivatives of a scalar by the shaped updates, ``(B, m, n)``.
        blend: As given to :func:`shape_updates`.
        gain: As given to :func:`shape_updates`.
        momentum: As given to :func:`shape_updates`.
        share: As given to :func:`shape_updates`.
        scratch_bytes: Bound on the memory of one batch; the pull-back keeps about eight times as much as the forward pass.

    Returns:
        Derivatives by the updates, ``(B, m, n)``.
    """
    count, rows, columns = updates.shape
    size = max(scratch_bytes // max(8 * scratch_entries(rows, columns) * updates.element_size(), 1), 1)
    results: list[Tensor] = []
    for start in range(0, count, size):
        part = slice(start, start + size)
        blended, gained, shared = (
            value.detach().expand(count)[part] if isinstance(value, Tensor) else value for value in (blend, gain, share)
        )
        with torch.enable_grad():
            leaf = updates[part].detach().requires_grad_()
            shaped = shape_updates(leaf, blended, gained, None if momentum is None else momentum[part], shared)
        results += torch.autograd.grad(shaped, leaf, cotangents[part])
    return torch.cat(results) if results else torch.zeros_like(updates)


def _normalize(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return matrices of norm 1, their old norms ``(B, 1, 1)``, and whether each is finite and not zero."""
    # The result does not depend on the peak, which only keeps squares in range, so it needs no derivative.
    peak = matrices.detach().abs().amax((-2, -1), keepdim=True)
    usable = peak.isfinite() & (peak > 0)
    peak = torch.where(usable, peak, 1.0)
    scaled = _chosen(usable, matrices, 0.0) / peak
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    return scaled * _inverse(norm), norm * peak, usable


def _newton_schulz(unit: Tensor) -> Tensor:
    """Iterate on matrices of norm at most 1; use the cheaper derivative where autograd asks for one."""
    rows, columns = unit.shape[-2:]
    wide = unit if rows <= columns else unit.mT
    if rows % ALIGNMENT or columns % ALIGNMENT:
        wide = F.pad(wide, (0, -max(rows, columns) % ALIGNMENT, 0, -min(rows, columns) % ALIGNMENT))
    if wide.is_cuda and wide.dtype == torch.float32:
        wide = wide.to(torch.bfloat16)  # Tensor cores; the iteration damps rounding, as Muon relies on.
    # A compiler derives the plain iteration by itself, and warns about a function with its own derivative.
    if torch.is_grad_enabled() and wide.requires_grad and not torch.compiler.is_compiling():
        result = _NewtonSchulz.apply(wide)
    else:
        result = _iterate_gram(wide)[0] if _by_gram(wide) else _iterate(wide)[0]
    result = result[:, : min(rows, columns), : max(rows, columns)].to(unit.dtype)
    return result if rows <= columns else result.mT


def _by_gram(wide: Tensor) -> bool:
    rows, columns = wide.shape[-2:]
    return columns > 2 * rows and wide.dtype != torch.bfloat16  # A product of factors loses too many of its eight bits.


def _iterate(wide: Tensor, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Return the result and, if kept, ``X, A, b A + c A^2`` of each iteration."""
    a, b, c = COEFFICIENTS
    kept: list[Tensor] = []
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if keep:
            kept += [wide, gram, factor]
        wide = torch.baddbmm(wide, factor, wide, beta=a)
    return wide, kept


def _pull_back(kept: Sequence[Tensor], cotangent: Tensor) -> Tensor:
    """Pull back through :func:`_iterate`. Gram matrices are symmetric, so half of the products are transposes."""
    a, b, c = COEFFICIENTS
    for start in range(3 * ITERATIONS - 3, -1, -3):
        wide, gram, factor = kept[start : start + 3]
        by_factor = _symmetric(cotangent @ wide.mT)
        by_gram = b * by_factor + 2 * c * _symmetric(by_factor @ gram)
        cotangent = torch.baddbmm(torch.baddbmm(cotangent, factor, cotangent, beta=a), by_gram, wide, alpha=2)
    return cotangent


def _iterate_gram(wide: Tensor, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Return the result and, if kept, X, then ``A, P, P A`` and the product ``P_k ... P_0`` of each iteration."""
    a, b, c = COEFFICIENTS
    kept = [wide] if keep else []
    gram = wide @ wide.mT
    product = gram
    for k in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if k == 0 else factor @ product
        last = k == ITERATIONS - 1
        half = gram if last else factor @ gram
        if keep:
            kept += [gram, factor, half, product]
        if not last:
            gram = half @ factor
    return product @ wide, kept


def _pull_back_gram(kept: Sequence[Tensor], cotangent: Tensor) -> Tensor:
    """Pull back through :func:`_iterate_gram`. A and P are symmetric, so half of the products are transposes."""
    _, b, c = COEFFICIENTS
    wide = kept[0]
    by_product = cotangent @ wide.mT
    by_gram: Tensor | None = None
    for k in range(ITERATIONS - 1, -1, -1):
        gram, factor, half = kept[1 + 4 * k : 4 + 4 * k]
        by_factor = by_product if k == 0 else by_product @ kept[4 * k].mT
        if by_gram is not None:
            by_factor = torch.baddbmm(by_factor, by_gram, half, alpha=2)
            by_gram = factor @ by_gram @ factor
        if k > 0:
            by_product = factor @ by_product
        by_factor = _symmetric(by_factor)
        through = b * by_factor + 2 * c * _symmetric(by_factor @ gram)
        by_gram = through if by_gram is None else by_gram + through
    assert by_gram is not None
    return torch.baddbmm(kept[-1].mT @ cotangent, by_gram, wide, alpha=2)


def _symmetric(square: Tensor) -> Tensor:
    return (square + square.mT) / 2


class _NewtonSchulz(torch.autograd.Function):
    """The iteration with a derivative of fewer products than autograd takes."""

    @staticmethod
    def forward(ctx, wide: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        result, kept = _iterate_gram(wide, keep=True) if _by_gram(wide) else _iterate(wide, keep=True)
        ctx.save_for_backward(*kept)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        kept = ctx.saved_tensors
        return _pull_back_gram(kept, cotangent) if _by_gram(kept[0]) else _pull_back(kept, cotangent)
