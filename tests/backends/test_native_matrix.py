"""The matrix kernel agrees with the stage's definition, and writes inside its tensors alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from learned_optim.backends import native
from learned_optim.backends.items import StepOptions
from learned_optim.backends.native import matrix
from learned_optim.backends.native.library import LIBRARY
from learned_optim.rules import MatrixStage
from tests.backends.test_native_bounds import Fences, exact

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels were not built: no C compiler")

SIDES = (
    *((2, 2), (2, 3), (5, 7), (8, 8), (20, 33), (15, 16), (17, 17), (31, 64), (33, 65), (48, 97), (129, 130), (16, 27)),
    *((1, 9), (2, 5000), (10, 784), (100, 300), (2, 4), (2, 5), (3, 8), (64, 129)),
)
STAGES = (MatrixStage(), MatrixStage(0.7, 0.3, 1.2), MatrixStage(1.0, 1.0, 0.5), MatrixStage(0.2, 0.8))


@pytest.fixture(params=[0, 1, 2], ids=["plain", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    assert LIBRARY is not None
    LIBRARY.learned_optim_limit_isa(request.param)
    if LIBRARY.learned_optim_isa() != request.param:
        pytest.skip("this processor has no such instructions")
    yield
    LIBRARY.learned_optim_limit_isa(2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_agrees(updates: Tensor, momentum: Tensor | None, stage: MatrixStage, tolerance: float = 1e-5) -> None:
    """Compare with the definition in float64; the error is relative to the update's norm."""
    expected = stage.shape(updates.double(), None if momentum is None else momentum.double())
    error = (matrix.shape(updates, momentum, stage) - expected).norm(dim=(1, 2)) / updates.double().norm(dim=(1, 2))
    assert error.max() < tolerance


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_the_kernel_agrees_with_the_definition(sides: tuple[int, int], instruction_set: None) -> None:
    for stage in STAGES:
        for rows, columns in {sides, sides[::-1]}:
            updates = draw(3, rows, columns)
            updates[0, 0, 0] = 0.0
            assert_agrees(updates, draw(3, rows, columns, seed=1), stage)
            assert_agrees(updates, None, stage)


@pytest.mark.parametrize("scale", [1e-42, 1e-36, 1e-20, 1e20, 1e34])
def test_no_scale_over_or_underflows(scale: float, instruction_set: None) -> None:
    updates, momentum = draw(2, 7, 20), draw(2, 7, 20, seed=1)
    for stage in STAGES:
        expected = stage.shape(updates * scale, momentum)  # Rounded at the limit of float32 as the kernel's input is.
        found = matrix.shape(updates * scale, momentum / scale if 1e-30 < scale < 1e30 else momentum, stage)
        torch.testing.assert_close(found / scale, expected / scale, rtol=1e-4, atol=1e-2 if scale < 1e-38 else 1e-4)


def test_updates_of_low_rank_agree(instruction_set: None) -> None:
    for rows, columns in ((12, 12), (12, 40), (40, 12)):
        updates = draw(2, rows, 2) @ draw(2, 2, columns, seed=1)
        assert_agrees(updates, None, MatrixStage(), 2e-4)  # Rounding of the input decides where singular values vanish.
        assert_agrees(updates, draw(2, rows, columns, seed=2), STAGES[1])


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])
def test_zero_and_bad_matrices_come_back_as_they_are(bad: float, instruction_set: None) -> None:
    updates, momentum = draw(3, 6, 5), draw(3, 6, 5, seed=1)
    if bad == 0.0:
        updates[1] = 0.0
    else:
        updates[1, 5, 4] = bad
    for stage in STAGES:
        shaped = matrix.shape(updates, momentum, stage)
        torch.testing.assert_close(shaped[1], updates[1], rtol=0, atol=0, equal_nan=True)
        assert shaped[::2].isfinite().all()
        without = momentum.clone()
        without[0], without[2, 3, 3] = 0.0, bad or float("nan")
        torch.testing.assert_close(matrix.shape(updates, without, stage), stage.shape(updates, without), equal_nan=True)


def test_a_matrix_depends_on_no_other_and_on_no_thread() -> None:
    updates, momentum = draw(70, 33, 40), draw(70, 33, 40, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = matrix.shape(updates, momentum, STAGES[1])
    finally:
        torch.set_num_threads(threads)
    for at in (0, 1, 69):
        alone = matrix.shape(updates[at : at + 1].clone(), momentum[at : at + 1].clone(), STAGES[1])
        assert torch.equal(alone[0], together[at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sides", [(1, 3), (2, 2), (3, 5), (8, 8), (17, 15), (16, 33), (33, 16), (65, 20)], ids=str)
def test_nothing_outside_is_read_or_written(
    sides: tuple[int, int], dtype: torch.dtype, moment_dtype: torch.dtype, instruction_set: None
) -> None:
    drawn: list[Any] = [draw(*sides).to(dtype), draw(*sides, seed=1)]
    drawn += [draw(*sides, seed=seed).to(moment_dtype) for seed in (2, 3)]
    ends, fences = [], Fences()
    for lay in (exact, fences):
        param, update, fast, slow = map(lay, drawn)
        table = matrix.MatrixTable([sides], [param], [[fast], [slow]])
        table.run(matrix.addresses_in(update[None]), STAGES[1], StepOptions(0.5, 0.9))
        ends.append((param.clone(), update.clone()))
    assert fences.hold()
    assert all(map(torch.equal, *ends))
    momentum = -(drawn[2].float() + drawn[3].float())
    shaped = STAGES[1].shape(drawn[1][None], momentum[None])[0]
    expected = (drawn[0].float() * 0.9 + shaped * 0.5).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ends[0][0], expected, rtol=tolerance, atol=tolerance)
