"""The matrix stage, against singular value decompositions, autograd and finite differences."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from learned_optim.rules import orthogonal
from learned_optim.rules.orthogonal import (
    COEFFICIENTS,
    ITERATIONS,
    buckets,
    has_matrix,
    matrix_shape,
    orthogonalize,
    pull_back,
    scratch_entries,
    shape_updates,
)
from tests.cases import needs_dynamo

SIDES = ((1, 1), (1, 7), (2, 2), (3, 4), (4, 3), (3, 8), (9, 4), (16, 16), (5, 40), (2, 1000), (33, 65))
BOTH_FORMS = ((3, 4), (9, 3))
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_svd(matrices: Tensor) -> Tensor:
    """What five quintics make of the singular values, one by one."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag_embed(values) @ right


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_singular_values_take_the_polynomial(sides: tuple[int, int], dtype: torch.dtype) -> None:
    matrices = random(3, *sides, dtype=dtype)
    torch.testing.assert_close(orthogonalize(matrices).double(), by_svd(matrices), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("sides", "products"), [((8, 16), 10 * 16 + 5 * 8), ((8, 80), 2 * 80 + 17 * 8), ((80, 8), 2 * 80 + 17 * 8)]
)
def test_long_sides_meet_two_products_only(sides: tuple[int, int], products: int) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(random(1, *sides))
    assert counter.get_total_flops() == 2 * 8 * 8 * products


@pytest.mark.parametrize("sides", [(8, 8), (8, 40), (40, 8)], ids=str)
def test_deficient_rank_adds_no_direction(sides: tuple[int, int]) -> None:
    rows, columns = sides
    matrices = (random(2, rows, 2) @ random(2, 2, columns, seed=1)).float()
    expected = by_svd(matrices)
    assert torch.linalg.svdvals(orthogonalize(matrices))[:, 2:].max() < 1e-3
    torch.testing.assert_close(orthogonalize(matrices).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 120])
@pytest.mark.parametrize("sides", BOTH_FORMS, ids=str)
def test_scale_comes_back_to_the_last_bit(sides: tuple[int, int], exponent: int) -> None:
    updates = random(2, *sides, dtype=torch.float32)
    assert torch.equal(shape_updates(updates * 2.0**exponent), shape_updates(updates) * 2.0**exponent)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sides", BOTH_FORMS, ids=str)
def test_matrices_without_a_direction_come_back_as_they_are(sides: tuple[int, int], value: float, one_thread: None) -> None:
    updates = random(3, *sides)
    updates[1] = value if value == 0 else updates[1]
    updates[1, 0, 1] = value
    gain = torch.ones(3, dtype=torch.float64)
    for shaped in (shape_updates(updates), shape_updates(updates, 0.5, gain, random(3, *sides, seed=1), 0.5)):
        assert torch.equal(shaped[1].nan_to_num(7.0), updates[1].nan_to_num(7.0))
    assert torch.equal(shape_updates(updates)[[0, 2]], shape_updates(updates[[0, 2]]))
    leaf = updates.clone().requires_grad_()
    shape_updates(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert torch.equal(leaf.grad[1], torch.ones_like(updates[1]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_length_is_kept_times_the_gain(dtype: torch.dtype) -> None:
    updates, gain = random(3, 4, 6, dtype=dtype), torch.tensor([0.1, 2.0, 30.0])
    lengths = updates.norm(dim=(1, 2))
    torch.testing.assert_close(shape_updates(updates).norm(dim=(1, 2)), lengths)
    torch.testing.assert_close(shape_updates(updates, gain=gain).norm(dim=(1, 2)), lengths * gain.to(dtype))
    assert shape_updates(updates, gain=gain).dtype == dtype


@pytest.mark.parametrize("sides", BOTH_FORMS, ids=str)
def test_the_direction_may_follow_a_momentum(sides: tuple[int, int]) -> None:
    updates, momentum = random(3, *sides), 1e6 * random(3, *sides, seed=1)
    toward = shape_updates(updates, momentum=momentum, share=1.0)
    torch.testing.assert_close(toward, shape_updates(momentum, gain=updates.norm(dim=(1, 2)) / momentum.norm(dim=(1, 2))))
    unit, other = (x / x.norm(dim=(1, 2), keepdim=True) for x in (updates, momentum))
    between = shape_updates(0.7 * unit + 0.3 * other)
    found = shape_updates(updates, momentum=momentum, share=0.3)
    torch.testing.assert_close(
        found / found.norm(dim=(1, 2), keepdim=True), between / between.norm(dim=(1, 2), keepdim=True)
    )
    torch.testing.assert_close(shape_updates(updates, momentum=momentum, share=0.0), shape_updates(updates))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_momentum_without_a_direction_has_no_say(value: float) -> None:
    updates, momentum = random(2, 4, 6), random(2, 4, 6, seed=1)
    momentum[1] = value
    torch.testing.assert_close(shape_updates(updates, momentum=momentum, share=0.5)[1], shape_updates(updates)[1])


def test_blend_goes_from_the_update_to_the_orthogonal_one() -> None:
    updates = random(3, 4, 6)
    whole, share = shape_updates(updates), torch.tensor([0.0, 0.25, 1.0])
    mixed = shape_updates(updates, share)
    assert torch.equal(mixed[0], updates[0])
    assert torch.equal(mixed[2], whole[2])
    torch.testing.assert_close(mixed[1], 0.75 * updates[1] + 0.25 * whole[1])
    assert torch.equal(shape_updates(updates, 0.0), updates)
    torch.testing.assert_close(shape_updates(updates, 0.25)[1], mixed[1])


def test_coordinates_at_rest_stay_at_rest() -> None:
    updates = random(1, 4, 6)
    updates[0, 1, 2] = 0
    assert orthogonalize(updates)[0, 1, 2] != 0
    shaped = shape_updates(updates)
    assert shaped[0, 1, 2] == 0
    torch.testing.assert_close(shaped.norm(), updates.norm())


def test_one_row_keeps_its_direction() -> None:
    updates = random(2, 1, 50, dtype=torch.float32)
    torch.testing.assert_close(shape_updates(updates), updates)


# Derivatives


@pytest.mark.parametrize("sides", [(2, 2), (3, 4), (4, 3), (2, 7), (7, 2)], ids=str)
def test_derivatives_by_finite_differences(sides: tuple[int, int]) -> None:
    updates = random(2, *sides).requires_grad_()
    blend, gain = (torch.tensor(pair, dtype=torch.float64, requires_grad=True) for pair in ([0.3, 0.9], [0.5, 2.0]))
    share = torch.tensor([0.2, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: shape_updates(one), (updates,))
    assert torch.autograd.gradcheck(shape_updates, (updates, blend, gain, random(2, *sides, seed=1), share))


def through_the_graph(updates: Tensor, cotangents: Tensor) -> Tensor:
    """The same derivative by autograd alone."""

    def plain(wide: Tensor) -> Tensor:
        a, b, c = COEFFICIENTS
        for _ in range(ITERATIONS):
            gram = wide @ wide.mT
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
        return wide

    leaf = updates.clone().requires_grad_()
    with mock.patch.object(orthogonal._NewtonSchulz, "apply", plain):
        return torch.autograd.grad(shape_updates(leaf, 0.8), leaf, cotangents)[0]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("sides", [(6, 6), (5, 9), (24, 8), (8, 40)], ids=str)
def test_pull_back_is_autograd_s(sides: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    updates, cotangents = random(7, *sides, dtype=dtype), random(7, *sides, dtype=dtype, seed=1)
    expected = through_the_graph(updates, cotangents)
    for scratch in (1, 2**26):
        found = pull_back(updates, cotangents, 0.8, scratch_bytes=scratch)
        assert (found - expected).norm() <= bound * expected.norm()


def test_pull_back_cuts_every_argument_with_the_batch() -> None:
    updates, cotangents, momentum = (random(3, 3, 4, seed=seed) for seed in range(3))
    blend, gain, share = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.2, 0.4, 0.6])
    one_by_one = [
        pull_back(updates[i : i + 1], cotangents[i : i + 1], blend[i], gain[i], momentum[i : i + 1], share[i])
        for i in range(3)
    ]
    found = pull_back(updates, cotangents, blend, gain, momentum, share, scratch_bytes=1)
    torch.testing.assert_close(found, torch.cat(one_by_one))
    with torch.no_grad():
        assert pull_back(updates[:0], cotangents[:0], blend[:0], gain[:0], momentum[:0], share[:0]).shape == (0, 3, 4)


# Batches


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sides", [(2, 3), (7, 13), (10, 48), (33, 65), (20, 200), (64, 64)], ids=str)
def test_a_result_does_not_depend_on_its_batch(sides: tuple[int, int], dtype: torch.dtype, one_thread: None) -> None:
    updates, cotangents = random(5, *sides, dtype=dtype), random(5, *sides, dtype=dtype, seed=1)
    whole, pulled = shape_updates(updates), pull_back(updates, cotangents)
    for place in range(5):
        for part in (slice(place, place + 1), slice(0, place + 1), slice(place, 5)):
            assert torch.equal(shape_updates(updates[part].clone()), whole[part])
            assert torch.equal(pull_back(updates[part].clone(), cotangents[part].clone()), pulled[part])


def test_buckets_hold_equal_shapes_within_bounds() -> None:
    shapes = [(4, 8), (8, 4), (4, 8), (100, 100), (4, 8), (100, 100)]
    bound = 2 * scratch_entries(4, 8) * 4  # Enough for two.
    found = list(buckets(shapes, 4, bound))
    assert sorted(position for bucket in found for position in bucket) == list(range(6))
    assert found == [(0, 2), (4,), (1,), (3,), (5,)]
    assert list(buckets(shapes, 4)) == [(0, 2, 4), (1,), (3, 5)]
    assert list(buckets([], 4)) == []


class Live(TorchDispatchMode):
    """Counts the bytes of living tensors that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in filter(lambda each: isinstance(each, Tensor), tree_leaves(result)):
            storage = leaf.untyped_storage()
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


@pytest.mark.parametrize("sides", [(5, 5), (16, 16), (16, 32), (40, 16), (8, 160), (160, 8)], ids=str)
def test_scratch_is_what_is_promised(sides: tuple[int, int]) -> None:
    updates = random(4, *sides, dtype=torch.float32)
    with torch.no_grad(), Live() as live:
        shape_updates(updates, momentum=updates.clone(), share=0.5)
    promised = 4 * scratch_entries(*sides) * 4
    assert live.peak + 4 * updates.numel() <= promised + 1024
    assert live.peak + 4 * updates.numel() > promised / 3
    with Live() as live:
        pull_back(updates, updates)
    assert live.peak <= 8 * promised


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((), 1, False),
        ((5,), 1, False),
        ((5, 1), 2, False),
        ((5, 2), 2, True),
        ((8, 3, 1, 1), 4, False),
        ((8, 3, 3, 3), 8, True),
        ((0, 3), 0, False),
        ((3, 0, 2), 0, False),
    ],
)
def test_which_tensors_are_matrices(shape: tuple[int, ...], side: int, expected: bool) -> None:
    assert has_matrix(shape, side) is expected


def test_convolutions_are_out_by_rest() -> None:
    assert matrix_shape((8, 3, 5, 5)) == (8, 75)
    assert matrix_shape((8, 3)) == (8, 3)
    assert matrix_shape((1, 1, 8, 3)) == (8, 3)
    assert matrix_shape((1, 8)) == (1, 8)


@needs_dynamo
@pytest.mark.parametrize("sides", BOTH_FORMS, ids=str)
def test_compiles_whole_with_its_derivative(sides: tuple[int, int]) -> None:
    updates, blend, gain = random(2, *sides), torch.tensor([0.3, 1.0]), torch.ones(2)
    compiled = torch.compile(shape_updates, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(updates, blend, gain), shape_updates(updates, blend, gain))
    leaf = updates.clone().requires_grad_()
    found = torch.autograd.grad(compiled(leaf, blend, gain).square().sum(), leaf)[0]
    shaped = shape_updates(updates, blend, gain)
    torch.testing.assert_close(found, pull_back(updates, 2 * shaped, blend, gain))
