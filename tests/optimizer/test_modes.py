"""No mode in which an optimizer is made or stepped changes what a later one does; each works, or is refused clearly."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from learned_optim import LearnedOptimizer, UpdateRule, Weights, WeightsError, build_rule, state_bytes
from tests.cases import RULE_CASES, assert_identical, copies, draw_gradients, make_params, memories, small_rule, take_steps

seeds = itertools.count(1000)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "FakeTensorMode": FakeTensorMode,
    "default device": lambda: torch.device("meta"),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype f64": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def fresh_rule(case: str = "adam-modulation") -> UpdateRule:
    """A rule that no cache of the process has seen."""
    return small_rule(case, seed=next(seeds))


def outcome(rule: UpdateRule | str, backend: str = "auto", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    params = make_params(dtype=dtype)
    take_steps(LearnedOptimizer(params, weights=rule, backend=backend), params, 3)
    return copies(params)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["paper-raw", "adam-modulation"])
def test_weights_that_were_first_met_in_a_mode_are_those_met_outside(
    case: str, mode: str, backend: str, tmp_path: Path
) -> None:
    rule = fresh_rule(case)
    path = tmp_path / "rule.safetensors"
    Weights(rule).save(path)
    params, doubles, other = make_params(), make_params(dtype=torch.float64), fresh_rule(case)
    with MODES[mode]():
        first = LearnedOptimizer([*params, *doubles], weights=path, backend=backend)
        LearnedOptimizer(params, weights=other, guard=True)
    expected = outcome(fresh := path.as_posix(), backend)
    assert not any(value.is_inference() for value in first._weights_of(first.param_groups[0]).rule.state_dict().values())
    take_steps(first, params, 3)
    assert_identical(copies(params), expected)
    assert_identical(outcome(fresh, backend, torch.float64)[2], outcome(rule, backend, torch.float64)[2])
    assert_identical(outcome(rule, backend), expected)


@pytest.mark.parametrize("mode", [name for name in MODES if name not in ("FakeTensorMode", "default device")])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_steps_taken_in_a_mode_are_steps(rule: UpdateRule, mode: str, backend: str) -> None:
    params, expected = make_params(), make_params()
    optimizer, other = (LearnedOptimizer(held, weights=rule, backend=backend) for held in (params, expected))
    for step in range(3):
        gradients = draw_gradients(params, step)
        for held in (params, expected):
            for param, gradient in zip(held, gradients, strict=True):
                param.grad = gradient.clone()
        with MODES[mode]() if step < 2 else contextlib.nullcontext():
            optimizer.step()
        other.step()
    assert_identical(copies(params), copies(expected))
    assert_identical(memories(optimizer, params), memories(other, expected))


def test_a_load_in_inference_mode_leaves_memory_that_can_be_stepped(rule: UpdateRule) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=rule)
    take_steps(optimizer, params, 2)
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
    assert not any(value.is_inference() for memory in optimizer.state.values() for value in memory.values())
    take_steps(optimizer, params, 1, first=2)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_torch_func_transforms_are_refused_and_leave_nothing_behind(rule: UpdateRule, transform: str) -> None:
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, weights=rule)
    params[0].grad = torch.ones(3)

    def inside(x: Tensor) -> Tensor:
        optimizer.step()
        return x.sum()

    run = torch.func.grad(inside) if transform == "grad" else torch.func.vmap(inside)
    with pytest.raises(RuntimeError, match=r"a torch.func transform \(grad, vmap ...\).*call step outside the transform"):
        run(torch.ones(2, 2) if transform == "vmap" else torch.ones(2))
    assert not optimizer.state
    assert_identical(params, make_params([(3,)]))
    optimizer.step()


def test_weights_first_met_inside_a_transform_are_plain() -> None:
    rule = fresh_rule()

    def inside(x: Tensor) -> Tensor:
        LearnedOptimizer(params, weights=rule)
        return x.sum()

    params = make_params()
    torch.func.grad(inside)(torch.ones(2))
    outcome(rule)


@pytest.mark.parametrize("mode", ["FakeTensorMode", "default device"])
def test_a_rule_without_numbers_is_refused(mode: str) -> None:
    with MODES[mode](), pytest.raises(WeightsError, match="meta-parameters hold no numbers: build it outside"):
        LearnedOptimizer(make_params(), weights=build_rule("paper"))


# Fake tensors


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", RULE_CASES)
def test_fake_steps_allocate_what_state_bytes_says(case: str, backend: str, state_dtype: str) -> None:
    rule = fresh_rule(case)
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 2, dtype=torch.float64))
        optimizer = LearnedOptimizer(model.parameters(), weights=rule, state_dtype=state_dtype, backend=backend)
        for _ in range(2):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        allocated = sum(value.nbytes for memory in optimizer.state.values() for value in memory.values())
        assert state_bytes(model, rule, state_dtype=state_dtype) == allocated
        assert f"{allocated:,}" in optimizer.summary()
    real = LearnedOptimizer(params := make_params(), weights=rule, state_dtype=state_dtype, backend=backend)
    take_steps(real, params, 2)
    assert {type(value) for memory in real.state.values() for value in memory.values()} == {Tensor}


def test_real_parameters_inside_fake_tensor_mode_are_refused_before_anything_changes(rule: UpdateRule) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=rule)
    for param, gradient in zip(params, draw_gradients(params, 0), strict=True):
        param.grad = gradient
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"only fake parameters are stepped.*state_bytes"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()


def test_neither_fake_memory_nor_fake_parameters_are_loaded(rule: UpdateRule) -> None:
    model = nn.Linear(3, 2)
    optimizer = LearnedOptimizer(model.parameters(), weights=rule)
    take_steps(optimizer, list(model.parameters()), 1)
    before = memories(optimizer, model.parameters())
    with FakeTensorMode() as mode:
        fake = nn.Linear(3, 2)
        other = LearnedOptimizer(fake.parameters(), weights=rule)
        with pytest.raises(ValueError, match="parameter 0 is fake and holds no numbers"):
            other.load_state_dict(optimizer.state_dict())
        state = optimizer.state_dict()
        state["state"] = {i: {n: mode.from_tensor(v) for n, v in memory.items()} for i, memory in state["state"].items()}
    with pytest.raises(ValueError, match="parameter 0"):
        optimizer.load_state_dict(state)
    assert_identical(memories(optimizer, model.parameters()), before)


def test_a_guard_on_fake_parameters_is_refused(rule: UpdateRule) -> None:
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        optimizer = LearnedOptimizer(model.parameters(), weights=rule, guard=True)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="guard=True reads the parameters, and fake ones hold no numbers"):
            optimizer.step()
