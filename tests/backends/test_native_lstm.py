import copy

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.backends.native.sequence import native_available, native_sequence, native_supports
from learned_optim.rules.lstm import lstm_step
from tests.cases import RULE_CASES, small_rule

pytestmark = pytest.mark.skipif(not native_available(), reason="the kernels were not built: no C compiler")

SIZES = [(1, 1, 1), (1, 8, 4), (2, 20, 2), (1, 16, 7), (3, 5, 9)]


def make_lstm(layers: int, hidden: int, inputs: int) -> tuple[nn.LSTM, nn.LSTM]:
    """An LSTM with wide weights, so that gates saturate too, and its float64 twin."""
    lstm = nn.LSTM(inputs, hidden, layers)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.mul_(3)
    return lstm, copy.deepcopy(lstm).double()


def reference(lstm: nn.LSTM, inputs: Tensor, carry: tuple[Tensor, Tensor], active: Tensor) -> tuple[Tensor, ...]:
    tops = []
    for x, moves in zip(inputs, active.unsqueeze(-1), strict=True):
        top, (hidden, cell) = lstm_step(lstm, x, carry)
        carry = (torch.where(moves, hidden, carry[0]), torch.where(moves, cell, carry[1]))
        tops.append(top)
    return torch.stack(tops), *carry


def draw(layers: int, hidden: int, inputs: int, steps: int, count: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    x = torch.randn(steps, count, inputs) * torch.logspace(-4, 1, count).view(1, count, 1)
    carry = (torch.randn(count, layers * hidden).tanh(), 2 * torch.randn(count, layers * hidden))
    return x, carry, torch.rand(steps, count) > 0.3


@pytest.mark.parametrize(("layers", "hidden", "inputs"), SIZES)
@pytest.mark.parametrize("count", [1, 31, 64, 203])
def test_a_hundred_steps_equal_the_reference(layers: int, hidden: int, inputs: int, count: int) -> None:
    lstm, exact = make_lstm(layers, hidden, inputs)
    x, carry, active = draw(layers, hidden, inputs, 100, count)
    with torch.no_grad():
        expected = reference(exact, x.double(), (carry[0].double(), carry[1].double()), active)
        tops = native_sequence(lstm, x, carry, active)
    torch.testing.assert_close(tops.double(), expected[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("layers", "hidden", "inputs"), SIZES)
@pytest.mark.parametrize("all_active", [True, False])
def test_weight_gradients_of_a_sequence_equal_autograd(layers: int, hidden: int, inputs: int, all_active: bool) -> None:
    lstm, exact = make_lstm(layers, hidden, inputs)
    x, carry, active = draw(layers, hidden, inputs, 12, 77)
    active |= all_active
    seed = torch.randn(12, 77, hidden) * active.unsqueeze(-1)
    hiddens = native_sequence(lstm, x, carry, active)
    (hiddens * seed).sum().backward()
    want, *_ = reference(exact, x.double(), (carry[0].double(), carry[1].double()), active)
    (want * seed.double()).sum().backward()
    torch.testing.assert_close(hiddens.double(), want, rtol=1e-5, atol=2e-5)
    for (name, got), want_parameter in zip(lstm.named_parameters(), exact.parameters(), strict=True):
        assert got.grad is not None
        assert want_parameter.grad is not None
        error = (got.grad - want_parameter.grad).norm() / want_parameter.grad.norm()
        assert error < 1e-5, (name, float(error))


def test_no_coordinates_and_no_gradient() -> None:
    lstm, _ = make_lstm(1, 4, 2)
    empty = torch.zeros(0, 4)
    native_sequence(lstm, torch.zeros(3, 0, 2), (empty, empty)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in lstm.parameters())


def test_a_second_derivative_and_a_changed_input_are_refused() -> None:
    lstm, _ = make_lstm(1, 4, 2)
    x, carry, _ = draw(1, 4, 2, 3, 5)
    hiddens = native_sequence(lstm, x, carry)
    (gradient,) = torch.autograd.grad(hiddens.square().sum(), [lstm.weight_hh_l0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hiddens.sum().backward()


def test_results_depend_on_neither_position_nor_threads() -> None:
    lstm, _ = make_lstm(2, 6, 3)
    x, carry, active = draw(2, 6, 3, 4, 150)
    order = torch.randperm(150)
    tops = native_sequence(lstm, x, carry, active)
    torch.set_num_threads(2)
    try:
        again = native_sequence(lstm, x[:, order], (carry[0][order], carry[1][order]), active[:, order])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(again, tops[:, order])


def test_only_float32_on_the_cpu_is_supported() -> None:
    assert native_supports(nn.LSTM(2, 3))
    assert not native_supports(nn.LSTM(2, 3).double())
    assert not native_supports(nn.LSTM(2, 3, device="meta"))


@pytest.mark.parametrize("case", RULE_CASES)
def test_a_hundred_optimizer_steps_equal_those_of_the_reference_backend(case: str) -> None:
    results = []
    for backend in ("reference", "native"):
        torch.manual_seed(3)
        params = [torch.randn(5, 7).requires_grad_(), torch.randn(()).requires_grad_(), torch.randn(90).requires_grad_()]
        optimizer = LearnedOptimizer(params, weights=small_rule(case), backend=backend)
        for step in range(100):
            for param in params:
                param.grad = torch.randn(param.shape) * 10.0 ** (step % 5 - 3)
            params[0].grad[0, :3] = torch.tensor([0.0, float("nan"), float("inf")])  # type: ignore[index]
            optimizer.step()
        results.append(([p.detach() for p in params], [optimizer.state[p] for p in params]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
