"""Averaged weights: the formula, what holds them when, and that nothing else changes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, state_bytes
from tests.cases import needs_dynamo


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[list[Tensor]]:
    """Train, and return the weights after each step."""
    seen = []
    for step in steps:
        inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :2]).square().mean().backward()
        optimizer.step()
        seen.append([param.detach().clone() for param in model.parameters()])
    return seen


def held(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize(("option", "share"), [(True, 0.05), (0.3, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_average_is_the_formula(option: bool | float, share: float, backend: str) -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), average=option, backend=backend)
    seen = train(model, optimizer, range(40))
    expected = seen[0]
    for step, weights in enumerate(seen[1:], start=2):
        expected = [a + (w - a) * (1 - 2 ** (-1 / (share * step))) for a, w in zip(expected, weights, strict=True)]
    with optimizer.averaged():
        for found, wanted in zip(held(model), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_weights_are_those_of_a_run_without_an_average() -> None:
    ends = []
    for average in (True, False):
        model = make_model()
        train(model, LearnedOptimizer(model.parameters(), average=average), range(5))
        ends.append(held(model))
    assert all(map(torch.equal, *ends))


def test_the_weights_come_back_after_an_exception_too() -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), average=True)
    last, addresses = train(model, optimizer, range(5))[-1], [param.data_ptr() for param in model.parameters()]

    def fail() -> None:
        with optimizer.averaged():
            assert not torch.equal(model[0].weight, last[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(map(torch.equal, held(model), last))
    assert addresses == [param.data_ptr() for param in model.parameters()]
    with optimizer.averaged():
        assert torch.is_grad_enabled()


def test_no_step_and_no_second_block_inside() -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), average=True)
    last = train(model, optimizer, range(3))[-1]
    with optimizer.averaged():
        with pytest.raises(RuntimeError, match="before the next step"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="nested"), optimizer.averaged():
            pass
    assert all(map(torch.equal, held(model), last))
    train(model, optimizer, range(3, 4))


def test_without_an_average_there_is_none_to_hold() -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters())
    with pytest.raises(RuntimeError, match="average=True"), optimizer.averaged():
        pass
    with pytest.raises(RuntimeError, match="average=True"):
        optimizer.averaged_state_dict(model)


def test_a_state_dict_of_averages_holds_buffers_as_they_are() -> None:
    model, other = make_model(), make_model()
    optimizer = LearnedOptimizer(model.parameters(), average=True)
    train(model, optimizer, range(4))
    saved = optimizer.averaged_state_dict(model)
    other.load_state_dict(saved)
    with optimizer.averaged():
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert not torch.equal(saved["0.weight"], model[0].weight)
    assert torch.equal(saved["1.running_mean"], model[1].running_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_resume_is_exact(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = LearnedOptimizer(model.parameters(), average=True)
    train(model, optimizer, range(4))
    twin = copy.deepcopy(model)
    resumed = LearnedOptimizer(twin.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(4, 8))
    train(twin, resumed, range(4, 8))
    with optimizer.averaged(), resumed.averaged():
        assert all(map(torch.equal, held(model), held(twin)))
    averages = [optimizer.state[param]["average"] for param in model.parameters()]
    assert {average.dtype for average in averages} == {torch.float32 if dtype == torch.bfloat16 else dtype}


def test_a_loaded_average_is_no_alias_and_must_fit() -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), average=True)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    other = LearnedOptimizer(make_model().parameters(), average=True)
    other.load_state_dict(saved)
    weight = other.param_groups[0]["params"][0]
    assert other.state[weight]["average"].data_ptr() != saved["state"][0]["average"].data_ptr()
    before = other.state[weight]["average"].clone()
    for wrong in (torch.zeros(3), torch.zeros(8, 3, dtype=torch.int32), "average"):
        damaged = copy.deepcopy(saved)
        damaged["state"][0]["average"] = wrong
        with pytest.raises(ValueError, match="average of parameter 0"):
            other.load_state_dict(damaged)
        assert torch.equal(other.state[weight]["average"], before)


def test_an_average_may_begin_in_the_middle_of_a_run() -> None:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters())
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["average"] = True
    last = train(model, optimizer, range(3, 4))[-1]
    with optimizer.averaged():
        assert all(map(torch.equal, held(model), last))


def test_groups_decide_and_state_surgery_is_refused() -> None:
    model = make_model()
    groups = [{"params": model[0].parameters(), "average": True}, {"params": model[3].parameters()}]
    optimizer = LearnedOptimizer(groups)
    last = train(model, optimizer, range(4))[-1]
    with optimizer.averaged():
        same = [torch.equal(one, other) for one, other in zip(held(model), last, strict=True)]
    assert same == [False, False, True, True, True, True]  # Batch norm is in no group.
    optimizer.state[model[0].weight]["average"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="its average is a tensor of shape"):
        train(model, optimizer, range(4, 5))


@pytest.mark.parametrize("value", [-0.1, 1.5, "yes", None])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Invalid average"):
        LearnedOptimizer(make_model().parameters(), average=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_bytes_are_known_before(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(10, 3, dtype=dtype))
    expected = state_bytes([param], average=True)
    optimizer = LearnedOptimizer([param], average=True)
    assert expected == state_bytes([param]) + 30 * max(param.element_size(), 4)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert sum(value.nbytes for value in optimizer.state[param].values()) == expected
    assert f"{expected:,}" in optimizer.summary()


@needs_dynamo
def test_a_compiled_step_averages() -> None:
    ends = []
    for compiled in (True, False):
        model = make_model()
        model[0].register_parameter("bias", None)  # Under batch norm its gradient is nothing but rounding.
        optimizer = LearnedOptimizer(model.parameters(), average=True)
        train(model, optimizer, range(1))
        if compiled:
            optimizer.step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
        train(model, optimizer, range(1, 5))
        with optimizer.averaged():
            ends.append(held(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
