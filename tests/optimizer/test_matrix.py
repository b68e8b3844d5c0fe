"""The matrix stage in the optimizer: what it does, in every backend, and where it does nothing."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, UpdateRule, backends
from learned_optim.backends import matrices
from learned_optim.rules.orthogonal import matrix_shape
from tests.cases import needs_dynamo, small_rule

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not backends.native.available(), reason="no C compiler")),
    pytest.param("compiled", marks=pytest.mark.skipif(not backends.compiled.available(), reason="no C++ compiler")),
]
SHAPES = ((6, 4), (6, 4), (3, 2, 2, 2), (5,), (), (1, 7), (9, 2), (300, 5))


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(params: list[nn.Parameter], optimizer: LearnedOptimizer, steps: int = 4) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if param.dim() > 1:
                param.grad[0] = 0.0
        optimizer.step()


def by_hand(rule: UpdateRule, params: list[nn.Parameter], steps: int, lr: float, weight_decay: float) -> None:
    """The rule's stages, one tensor at a time."""
    stage = rule.matrix_stage
    assert stage is not None
    memories = [rule.initial_memory(param.numel(), param.detach()) for param in params]
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for at, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator)
            if param.dim() > 1:
                grad[0] = 0.0
            scale = rule.tensor_scale(param, memories[at], torch.tensor(float(step)))
            update, memories[at], _ = rule(grad.flatten(), memories[at], torch.tensor(step + 1.0), scale)
            if param.dim() > 1 and min(matrix_shape(param.shape)) >= 2:
                momentum = rule.raw_momentum(memories[at])
                assert momentum is not None
                sides = (1, *matrix_shape(param.shape))
                update = stage.shape(update.view(sides), momentum.view(sides))
            with torch.no_grad():
                param.mul_(1 - lr * 1e-3 * weight_decay).add_(update.view_as(param), alpha=lr)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of the compiler.
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_the_rule_and_then_the_stage(backend: str) -> None:
    rule, params, expected = small_rule("adam-modulation-matrix"), make(), make()
    train(params, LearnedOptimizer(params, lr=0.7, weights=rule, weight_decay=30.0, backend=backend))
    rule.freeze()
    by_hand(rule, expected, 4, 0.7, 30.0)
    for found, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{"state_dtype": "int8"}, {"state_dtype": "bfloat16"}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_backends_agree(dtype: torch.dtype, options: dict[str, Any]) -> None:
    found = []
    for backend in ("reference", "auto"):
        params = make(dtype)
        train(params, LearnedOptimizer(params, weights=small_rule("adam-modulation-matrix"), backend=backend, **options))
        found.append(params)
    tolerance = 1e-5 if dtype.itemsize > 2 else 1e-2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_repeated_step_is_a_step_in_full(one_thread: None) -> None:
    found = []
    for repeats in (True, False):
        params = make()
        optimizer = LearnedOptimizer(params, weights=small_rule("adam-modulation-matrix"), weight_decay=30.0)
        if not repeats:
            optimizer.register_step_pre_hook(lambda each, *_: setattr(each, "_plan", None))
        train(params, optimizer)
        assert repeats == (optimizer._plan is not None) or not backends.native.available() or not repeats
        found.append(params)
    assert all(map(torch.equal, *found))


def test_a_group_decides_and_rules_without_a_stage_take_one_when_told() -> None:
    results: dict[str, list[nn.Parameter]] = {}
    for case in ("adam-modulation", "paper-raw"):
        for matrix in ("auto", True, False):
            params = make()
            train(params, LearnedOptimizer([{"params": params, "matrix": matrix}], weights=small_rule(case)))
            results[f"{case} {matrix}"] = params
        assert all(map(torch.equal, results[f"{case} auto"], results[f"{case} False"]))
        same = [
            torch.equal(one, other) for one, other in zip(*(results[f"{case} {m}"] for m in ("auto", True)), strict=True)
        ]
        assert same == [len(shape) < 2 or min(matrix_shape(shape)) < 2 for shape in SHAPES]


def test_switching_the_stage_off_between_steps_is_seen_by_a_repeated_step() -> None:
    params, expected = make(), make()
    optimizer = LearnedOptimizer(params, weights=small_rule("adam-modulation-matrix"))
    plain = LearnedOptimizer(expected, weights=small_rule("adam-modulation-matrix"))
    train(params, optimizer)
    train(expected, plain)
    optimizer.param_groups[0]["matrix"] = plain.param_groups[0]["matrix"] = False
    plain._plan = None
    train(params, optimizer, 2)
    train(expected, plain, 2)
    assert all(map(torch.equal, params, expected))


@pytest.mark.parametrize("value", ["yes", 1, None, 0.5])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Invalid matrix"):
        LearnedOptimizer(make(), matrix=value)
    optimizer = LearnedOptimizer(make())
    optimizer.param_groups[0]["matrix"] = value
    with pytest.raises(ValueError, match="Invalid matrix"):
        train(optimizer.param_groups[0]["params"], optimizer, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of the compiler.
@pytest.mark.parametrize("backend", BACKENDS)
def test_rest_and_bad_gradients_stay_where_they_are(backend: str) -> None:
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = LearnedOptimizer([param], weights=small_rule("adam-modulation-matrix"), backend=backend)
    grad = torch.randn(4, 3)
    grad[1], grad[2, 0] = 0.0, math.nan
    param.grad = grad
    optimizer.step()
    assert torch.equal(param[1], torch.ones(3))
    assert param[2, 0] == 1
    assert param.isfinite().all()
    assert (param[0] != 1).all()


def test_scratch_memory_is_bounded_and_does_not_change_the_result(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found, loads = [], []
    original = matrices.loads

    def counted(*arguments: Any) -> list[Any]:
        loads.append(len(list(original(*arguments))))
        return list(original(*arguments))

    monkeypatch.setattr(matrices, "loads", counted)
    for scratch in (2**26, 2000):
        monkeypatch.setattr(matrices, "SCRATCH_BYTES", scratch)
        params = make()
        train(params, LearnedOptimizer(params, weights=small_rule("adam-modulation-matrix"), backend="reference"), 2)
        found.append(params)
    assert loads[0] == 1
    assert loads[-1] > 3
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "lay_out",
    [lambda x: x.t().contiguous().t(), lambda x: x[:, :2], lambda x: x.expand(3, *x.shape)[1]],
    ids=["t", "cut", "row"],
)
def test_strides_do_not_matter(lay_out: Callable[[Tensor], Tensor]) -> None:
    start, grad = torch.randn(6, 4), torch.randn(6, 4)
    ends = []
    for contiguous in (True, False):
        tensor, slope = lay_out(start.clone()), lay_out(grad.clone())
        param = nn.Parameter(tensor.clone(memory_format=torch.contiguous_format) if contiguous else tensor)
        param.grad = slope
        LearnedOptimizer([param], weights=small_rule("adam-modulation-matrix")).step()
        ends.append(param.detach().clone())
    torch.testing.assert_close(*ends)


def test_complex_parameters_have_no_matrix() -> None:
    ends = []
    for matrix in ("auto", False):
        param = nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))
        param.grad = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
        LearnedOptimizer([param], weights=small_rule("adam-modulation-matrix"), matrix=matrix).step()
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_the_guard_falls_back_to_a_rule_without_the_stage() -> None:
    from learned_optim.guard import nominal
    from learned_optim.weights import resolve_weights

    assert nominal(resolve_weights(small_rule("adam-modulation-matrix"))).rule.matrix_stage is None


@needs_dynamo
def test_a_whole_step_compiles() -> None:
    ends = []
    for compiled in (True, False):
        params = make()
        optimizer = LearnedOptimizer(params, weights=small_rule("adam-modulation-matrix"), weight_decay=10.0)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
        step()
        step()
        ends.append(params)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
