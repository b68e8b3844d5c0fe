"""The sequence kernel at its edges: every tile remainder, held coordinates, one step, none, and threads."""

import copy

import pytest
import torch
from torch import Tensor, nn

from learned_optim.backends.native.sequence import native_available, native_sequence
from learned_optim.rules.lstm import Carry, lstm_sequence
from tests.backends.test_native_lstm import SIZES, draw, make_lstm, reference

pytestmark = pytest.mark.skipif(not native_available(), reason="the kernels were not built: no C compiler")

ALL_SIZES = sorted({(layers, hidden) for layers, hidden, _ in SIZES})


def replay(lstm: nn.LSTM, x: Tensor, carry: Carry, active: Tensor | None, seed: Tensor) -> list[Tensor]:
    """Top hidden states, then the gradient of every weight."""
    lstm.zero_grad()
    hiddens = native_sequence(lstm, x, carry, active)
    (hiddens * seed).sum().backward()
    return [hiddens.detach(), *(parameter.grad.clone() for parameter in lstm.parameters() if parameter.grad is not None)]


def expected(lstm: nn.LSTM, x: Tensor, carry: Carry, active: Tensor, seed: Tensor) -> list[Tensor]:
    """The same by autograd in float64."""
    exact = copy.deepcopy(lstm).double()
    hiddens, *_ = reference(exact, x.double(), (carry[0].double(), carry[1].double()), active)
    return [hiddens.detach(), *torch.autograd.grad((hiddens * seed.double()).sum(), list(exact.parameters()))]


def assert_equal_to_rounding(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=2e-5)
    for gradient, exact in zip(got[1:], want[1:], strict=True):
        assert (gradient - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("layers", "hidden"), ALL_SIZES)
@pytest.mark.parametrize("inputs", range(1, 10))
@pytest.mark.parametrize("all_active", [True, False])
def test_every_size_equals_autograd_in_float64(layers: int, hidden: int, inputs: int, all_active: bool) -> None:
    lstm, _ = make_lstm(layers, hidden, inputs)
    x, carry, active = draw(layers, hidden, inputs, 7, 45)
    active |= all_active
    seed = torch.randn(7, 45, hidden) * active.unsqueeze(-1)
    assert_equal_to_rounding(replay(lstm, x, carry, active, seed), expected(lstm, x, carry, active, seed))


@pytest.mark.parametrize(("layers", "hidden"), ALL_SIZES)
@pytest.mark.parametrize(("steps", "count"), [(1, 1), (1, 33), (5, 1), (3, 15), (3, 17)])
def test_one_step_one_coordinate_and_part_blocks(layers: int, hidden: int, steps: int, count: int) -> None:
    lstm, _ = make_lstm(layers, hidden, 3)
    x, carry, active = draw(layers, hidden, 3, steps, count)
    active[0, 0] = True
    seed = torch.randn(steps, count, hidden) * active.unsqueeze(-1)
    assert_equal_to_rounding(replay(lstm, x, carry, active, seed), expected(lstm, x, carry, active, seed))


def test_all_active_equals_torch() -> None:
    lstm, _ = make_lstm(2, 20, 2)
    x, carry, _ = draw(2, 20, 2, 20, 65)
    seed = torch.randn(20, 65, 20)
    got = replay(lstm, x, carry, None, seed)
    exact = copy.deepcopy(lstm).double()
    hiddens, _ = lstm_sequence(exact, x.double(), (carry[0].double(), carry[1].double()))
    gradients = torch.autograd.grad((hiddens * seed.double()).sum(), list(exact.parameters()))
    assert_equal_to_rounding(got, [hiddens.detach(), *gradients])


def test_nothing_active_has_no_gradient_and_ignores_the_one_from_above() -> None:
    lstm, _ = make_lstm(2, 5, 3)
    x, carry, _ = draw(2, 5, 3, 4, 21)
    hiddens, *gradients = replay(lstm, x, carry, torch.zeros(4, 21, dtype=torch.bool), torch.ones(4, 21, 5))
    assert hiddens.isfinite().all()
    assert len(gradients) == 8
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_repeat_is_bit_identical_and_threads_change_only_rounding(threads: int) -> None:
    lstm, _ = make_lstm(2, 6, 3)
    x, carry, active = draw(2, 6, 3, 9, 151)
    seed = torch.randn(9, 151, 6) * active.unsqueeze(-1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (replay(lstm, x, carry, active, seed) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    assert_equal_to_rounding(first, expected(lstm, x, carry, active, seed))


def test_inputs_that_are_not_contiguous() -> None:
    lstm, _ = make_lstm(1, 8, 4)
    x, carry, active = draw(1, 8, 4, 6, 37)
    seed = torch.randn(6, 37, 8) * active.unsqueeze(-1)
    want = replay(lstm, x, carry, active, seed)
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1), tuple(c.t().contiguous().t() for c in carry))
    got = replay(lstm, strided[0], (strided[1][0], strided[1][1]), active.t().contiguous().t(), seed)
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)
