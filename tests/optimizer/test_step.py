"""``step``: closures, gradients of every kind, lr, weight decay, dtypes, layouts."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from learned_optim import LearnedOptimizer, UpdateRule
from tests.cases import SHAPES, assert_identical, copies, draw_gradients, make_params, memories, small_rule, take_steps

pytestmark = pytest.mark.usefixtures("each_backend")


def quadratic(params: list[nn.Parameter]) -> Tensor:
    return torch.stack([param.square().sum() for param in params]).sum()


# Closures


def test_a_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(rule: UpdateRule) -> None:
    params, calls = make_params(), []
    optimizer = LearnedOptimizer(params, weights=rule)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = quadratic(params)
        loss.backward()
        return loss

    expected = quadratic(params).item()
    with torch.no_grad():
        assert optimizer.step(closure=closure).item() == expected
    assert calls == [True]
    assert optimizer.step(closure) is not None
    assert optimizer.step() is None
    assert optimizer.step(closure=None) is None


def test_a_closure_steps_like_a_backward_before_step(rule: UpdateRule) -> None:
    with_closure, without = make_params(), make_params()
    optimizer = LearnedOptimizer(with_closure, weights=rule)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = quadratic(with_closure)
        loss.backward()
        return loss

    other = LearnedOptimizer(without, weights=rule)
    for _ in range(3):
        optimizer.step(closure)
        other.zero_grad()
        quadratic(without).backward()
        other.step()
    assert_identical(with_closure, without)


# Gradients


def test_parameters_without_gradients_are_left_alone_and_their_memory_waits(rule: UpdateRule) -> None:
    params = make_params([(3,), (3,)])
    optimizer = LearnedOptimizer(params, weights=rule, weight_decay=10.0)
    optimizer.step()
    assert not optimizer.state
    take_steps(optimizer, params, 2)
    before, memory = copies(params), memories(optimizer, params)
    optimizer.zero_grad()
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert_identical(params[1].detach(), before[1])
    assert_identical(memories(optimizer, params)[1], memory[1])
    assert not torch.equal(params[0], before[0])
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 2]


def test_zero_gradients_move_nothing_and_leave_memory_at_rest(rule: UpdateRule) -> None:
    params = make_params()
    before = copies(params)
    optimizer = LearnedOptimizer(params, weights=rule)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_identical(copies(params), before)
    for memory in memories(optimizer, params):
        assert not any(value.any() for name, value in memory.items() if name != "step")


@pytest.mark.parametrize("shapes", [SHAPES, [(5,)]])  # A parameter alone is not packed, so nothing is copied.
def test_the_gradient_is_read_only(rule: UpdateRule, shapes: list[tuple[int, ...]]) -> None:
    params = make_params(shapes)
    optimizer = LearnedOptimizer(params, weights=rule, maximize=True, weight_decay=1.0)
    take_steps(optimizer, params, 1)
    assert_identical([param.grad for param in params], draw_gradients(params, 0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_bad_gradient_is_contained(rule: UpdateRule, bad: float, dtype: torch.dtype) -> None:
    params, clean = make_params([(2, 3), (4,)], dtype), make_params([(2, 3), (4,)], dtype)
    # With a matrix stage, a coordinate that is skipped turns the direction of its whole matrix: see test_matrix.py.
    optimizer, other = (LearnedOptimizer(each, weights=rule, matrix=False) for each in (params, clean))
    take_steps(optimizer, params, 1)
    take_steps(other, clean, 1)
    before, memory = params[0][1, 2].item(), memories(optimizer, params)[0]
    gradients = [torch.randn_like(param) for param in params]
    for param, twin, gradient in zip(params, clean, gradients, strict=True):
        param.grad, twin.grad = gradient.clone(), gradient
    params[0].grad[1, 2] = bad
    optimizer.step()
    other.step()

    assert params[0][1, 2].item() == before
    for name, value in memories(optimizer, params)[0].items():
        if name != "step":
            assert_identical(value[1, 2], memory[name][1, 2])
    with torch.no_grad():
        clean[0][1, 2] = before
    assert_identical(params, clean)
    params[0].grad[1, 2] = 1.0
    optimizer.step()
    assert params[0].isfinite().all()
    assert dtype in (torch.bfloat16, torch.float16) or params[0][1, 2].item() != before


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    params = make_params([(3,), (4, 2)])
    before = copies(params)
    optimizer = LearnedOptimizer([{"params": params[:1]}, {"params": params[1:]}], weights=small_rule())
    params[0].grad = torch.ones(3)
    params[1].grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"LearnedOptimizer does not support sparse gradients.*sparse=False"):
        optimizer.step()
    assert_identical(copies(params), before)
    assert not optimizer.state


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_step_as_pairs_of_reals(rule: UpdateRule, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (param,) = make_params([shape], dtype)
    real = nn.Parameter(torch.view_as_real(param.detach()).clone())
    optimizer, twin = (LearnedOptimizer([each], weights=rule, matrix=False) for each in (param, real))
    for _ in range(3):
        param.grad = torch.randn_like(param)
        real.grad = torch.view_as_real(param.grad).clone()
        optimizer.step()
        twin.step()
    assert_identical(torch.view_as_real(param.detach()), real.detach())
    assert_identical(memories(optimizer, [param]), memories(twin, [real]))


def test_a_parameter_that_is_nan_stops_no_other(rule: UpdateRule) -> None:
    params = make_params([(5,), (40_000,)])
    for param in params:
        param.data[2] = torch.nan
    before = copies(params)
    take_steps(LearnedOptimizer(params, weights=rule), params, 2)
    for param, old in zip(params, before, strict=True):
        assert param.isnan().nonzero().tolist() == [[2]]
        assert (param[:2] != old[:2]).all()


def test_a_conjugate_gradient_is_a_gradient(rule: UpdateRule) -> None:
    params, expected = make_params([(3,)], torch.complex64), make_params([(3,)], torch.complex64)
    gradient = torch.randn(3, dtype=torch.complex64)
    for (param,), grad in ((params, gradient.conj()), (expected, gradient.conj().resolve_conj())):
        param.grad = grad
        LearnedOptimizer([param], weights=rule).step()
    assert params[0].grad is not None
    assert params[0].grad.is_conj()
    assert_identical(params, expected)


@pytest.mark.parametrize("backend", ["auto", "reference", "compiled"])
@pytest.mark.parametrize("shape", [(4, 3), (12,), (5, 4), (2, 4)])
def test_a_parameter_of_another_shape_than_its_state_is_refused(backend: str, shape: tuple[int, ...]) -> None:
    params = make_params([(2,), (3, 4)])
    optimizer = LearnedOptimizer(params, weights=small_rule(), backend="auto")
    take_steps(optimizer, params, 2)
    optimizer.backend = backend
    params[1].data, before = torch.ones(shape), memories(optimizer, params)
    params[1].grad = torch.ones(shape)
    with pytest.raises(RuntimeError, match=rf"shape {re.escape(str(shape))}, but its .hidden. has shape \(3, 4, 8\)"):
        optimizer.step()
    assert_identical(memories(optimizer, params), before)
    del optimizer.state[params[1]]
    optimizer.backend = "auto"
    optimizer.step()
    assert optimizer.state[params[1]]["hidden"].shape[:-1] == shape


def test_memory_dtypes_may_be_written_into_a_group_by_hand() -> None:
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, weights=small_rule())
    optimizer.param_groups[0].update(state_dtype=torch.bfloat16, moment_dtype="bfloat16")
    take_steps(optimizer, params, 1)
    state = optimizer.state[params[0]]
    assert (state["hidden"].dtype, state["exp_avg"].dtype) == (torch.bfloat16, torch.bfloat16)


def test_a_graph_behind_the_gradient_is_not_kept(rule: UpdateRule) -> None:
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, weights=rule, lr=torch.tensor(1.0, requires_grad=True))
    params[0].grad = torch.ones(3, requires_grad=True) * 2
    optimizer.step()
    assert params[0].is_leaf
    assert params[0].requires_grad
    for value in (params[0].data, *optimizer.state[params[0]].values()):
        assert not value.requires_grad
        assert value.grad_fn is None


def test_parameters_saved_for_backward_are_known_to_have_changed() -> None:
    # Autograd must see the write: a step between forward and backward is an error, not a wrong gradient.
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, weights=small_rule())
    loss = (params[0] * params[0].exp()).sum()
    params[0].grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# lr and weight decay


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_lr_of_any_rank_equals_a_float_and_is_never_rebound(
    rule: UpdateRule, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    params, expected = make_params(), make_params()
    lr = torch.full(shape, 0.25, dtype=dtype)
    optimizer = LearnedOptimizer(params, lr=lr, weights=rule)
    other = LearnedOptimizer(expected, lr=0.25, weights=rule)
    take_steps(optimizer, params, 2)
    take_steps(other, expected, 2)
    lr.fill_(0.5)
    other.param_groups[0]["lr"] = 0.5
    take_steps(optimizer, params, 2, first=2)
    take_steps(other, expected, 2, first=2)
    assert_identical(params, expected)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.shape == shape


def test_lr_multiplies_the_update(rule: UpdateRule) -> None:
    start, whole, half = (make_params(dtype=torch.float64) for _ in range(3))
    take_steps(LearnedOptimizer(whole, weights=rule), whole, 1)
    take_steps(LearnedOptimizer(half, lr=0.5, weights=rule), half, 1)
    for before, full, part in zip(start, whole, half, strict=True):
        torch.testing.assert_close(part - before, 0.5 * (full - before), rtol=1e-9, atol=1e-15)
        assert before.numel() == 0 or not torch.equal(full, before)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0), torch.tensor([[0.0]])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lr_zero_moves_nothing_at_all(rule: UpdateRule, lr: float | Tensor, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    before = copies(params)
    optimizer = LearnedOptimizer(params, lr=lr, weights=rule, weight_decay=100.0)
    take_steps(optimizer, params, 3)
    assert_identical(copies(params), before)
    assert optimizer.state[params[2]]["hidden"].any()  # The memory has advanced all the same.


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_weight_decay_is_decoupled_and_means_what_it_means_to_adamw(rule: UpdateRule, lr: float | Tensor) -> None:
    params, plain = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    start = copies(params)
    take_steps(LearnedOptimizer(params, lr=lr, weights=rule, weight_decay=20.0), params, 1)
    take_steps(LearnedOptimizer(plain, lr=lr, weights=rule), plain, 1)
    for decayed, other, before in zip(params, plain, start, strict=True):
        expected = before * (1 - 0.5 * 1e-3 * 20.0) + (other - before)
        torch.testing.assert_close(decayed.detach(), expected.detach(), rtol=1e-13, atol=1e-13)


def test_weight_decay_matches_adamw_where_the_gradient_is_zero(rule: UpdateRule) -> None:
    params, expected = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    for param, twin in zip(params, expected, strict=True):
        param.grad, twin.grad = torch.zeros_like(param), torch.zeros_like(twin)
    LearnedOptimizer(params, weights=rule, weight_decay=0.1).step()
    torch.optim.AdamW(expected, lr=1e-3, weight_decay=0.1).step()
    torch.testing.assert_close(params, expected, rtol=1e-14, atol=0)


def test_maximize_is_descent_on_the_negated_gradient(rule: UpdateRule) -> None:
    up, down = make_params(), make_params()
    ascent = LearnedOptimizer(up, weights=rule, maximize=True)
    descent = LearnedOptimizer(down, weights=rule)
    for step in range(3):
        for param, twin, gradient in zip(up, down, draw_gradients(up, step), strict=True):
            param.grad, twin.grad = gradient, -gradient
        ascent.step()
        descent.step()
    assert_identical(up, down)
    assert_identical(memories(ascent, up), memories(descent, down))


# Shapes, layouts, dtypes


def test_state_is_tensors_in_the_documented_layout(rule: UpdateRule) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=rule)
    take_steps(optimizer, params, 2)
    for param, shape in zip(params, SHAPES, strict=True):
        state = optimizer.state[param]
        assert set(state) == {"step", *rule.moment_names, "hidden", "cell"}
        assert state["step"].shape == ()
        assert state["step"].dtype == torch.float32
        assert state["step"].item() == 2
        for name in rule.moment_names:
            assert state[name].shape == shape
        for name in ("hidden", "cell"):
            assert state[name].shape == (*shape, rule.memory_width)
    assert set(optimizer.state) == set(params)


def strided(values: Tensor, kind: str) -> Tensor:
    """Copy ``values`` into the given memory layout."""
    if kind == "channels_last":
        return values.to(memory_format=torch.channels_last)
    if kind == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.zeros(*values.shape, 2)
    spread[..., 0] = values
    return spread[..., 0]


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "slice"])
@pytest.mark.parametrize("strided_gradient", [False, True])
@pytest.mark.parametrize("chunk", [7, 65_536])
def test_memory_layout_changes_nothing(
    rule: UpdateRule, kind: str, strided_gradient: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learned_optim.backends.reference.CHUNK", chunk)
    (plain,) = make_params([(2, 3, 2, 4)])
    other = nn.Parameter(strided(plain.detach(), kind))
    assert not other.is_contiguous()
    optimizer, twin = LearnedOptimizer([plain], weights=rule), LearnedOptimizer([other], weights=rule)

    def step_both(first: int) -> None:
        for step in range(first, first + 2):
            (gradient,) = draw_gradients([plain], step)
            plain.grad, other.grad = gradient, strided(gradient, kind) if strided_gradient else gradient
            optimizer.step()
            twin.step()

    step_both(0)
    assert_identical(other.detach().contiguous(), plain.detach())
    assert_identical(memories(twin, [other]), memories(optimizer, [plain]))
    # The state of one may go on in the other.
    state, twin_state = optimizer.state_dict(), twin.state_dict()
    optimizer.load_state_dict(twin_state)
    twin.load_state_dict(state)
    step_both(2)
    assert_identical(other.detach().contiguous(), plain.detach())


def test_dtypes_mix_in_one_optimizer(rule: UpdateRule) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    params = [make_params([(4, 3)], dtype)[0] for dtype in dtypes]
    optimizer = LearnedOptimizer(params, weights=rule)
    take_steps(optimizer, params, 3)
    for param, dtype in zip(params, dtypes, strict=True):
        assert param.dtype == dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = {value.dtype for name, value in optimizer.state[param].items() if name != "step"}
        assert kinds == {wide}
    for param in params:
        (alone,) = make_params([(4, 3)], param.dtype)
        single = LearnedOptimizer([alone], weights=rule)
        all_gradients = [draw_gradients(params, step) for step in range(3)]
        for gradients in all_gradients:
            alone.grad = gradients[[p is param for p in params].index(True)]
            single.step()
        torch.testing.assert_close(param, alone, rtol=1e-6, atol=1e-6 if param.dtype.itemsize > 2 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_compute_in_float32(rule: UpdateRule, dtype: torch.dtype) -> None:
    (low,) = make_params([(50,)], dtype)
    high = nn.Parameter(low.detach().float())
    optimizer, other = LearnedOptimizer([low], weights=rule), LearnedOptimizer([high], weights=rule)
    low.grad = torch.randn(50).to(dtype)
    high.grad = low.grad.float()
    optimizer.step()
    other.step()
    assert_identical(low.detach(), high.detach().to(dtype))
    assert_identical(memories(optimizer, [low]), memories(other, [high]))


def test_float64_parameters_compute_in_float64(rule: UpdateRule) -> None:
    double = make_params([(5,)], torch.float64)
    optimizer = LearnedOptimizer(double, weights=rule)
    start = double[0].detach().clone()
    exact = rule.double()
    memory = exact.initial_memory(5, start)
    for step in range(3):
        (gradient,) = draw_gradients(double, step)
        double[0].grad = gradient
        optimizer.step()
        time = torch.tensor(step + 1, dtype=torch.float64)
        update, memory, _ = exact(gradient, memory, time, exact.tensor_scale(start, memory, time - 1))
        start = start + update
    torch.testing.assert_close(double[0].detach(), start, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", [torch.bfloat16, "bfloat16"])
def test_state_dtype_narrows_the_lstm_memory_only(rule: UpdateRule, name: torch.dtype | str) -> None:
    params, wide, double = make_params(), make_params(), make_params(dtype=torch.float64)
    optimizer = LearnedOptimizer([{"params": params}, {"params": double}], weights=rule, state_dtype=name)
    take_steps(optimizer, [*params, *double], 3)
    take_steps(LearnedOptimizer(wide, weights=rule), wide, 3)
    assert optimizer.state[params[2]]["hidden"].dtype == torch.bfloat16
    assert optimizer.state[params[2]]["cell"].dtype == torch.bfloat16
    for moment in rule.moment_names:
        assert optimizer.state[params[2]][moment].dtype == torch.float32
    assert optimizer.state[double[2]]["hidden"].dtype == torch.float64
    assert optimizer.param_groups[0]["state_dtype"] == "bfloat16"
    torch.testing.assert_close(params, wide, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_nothing(rule: UpdateRule, default: torch.dtype, state_dtype: str) -> None:
    shapes = ((), (5,), (300, 4))  # Thousands of draws: a default of sixteen bits rounds few of them upwards.
    params, expected = make_params(shapes), make_params(shapes)
    options: dict[str, Any] = {"weights": rule, "weight_decay": 3.0, "state_dtype": state_dtype}
    optimizer = LearnedOptimizer(expected, **options)
    take_steps(optimizer, expected, 3)
    torch.set_default_dtype(default)
    try:
        other = LearnedOptimizer(params, **options)
        take_steps(other, params, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_identical(params, expected)
    assert_identical(memories(other, params), memories(optimizer, expected))


def test_bundled_weights_do_not_depend_on_the_default_dtype_or_device() -> None:
    before = LearnedOptimizer(make_params([(3,)])).param_groups[0]["fingerprint"]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            after = LearnedOptimizer([nn.Parameter(torch.ones(3, device="cpu"))]).param_groups[0]["fingerprint"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert after == before


@pytest.mark.parametrize("capturable", [False, True])
def test_capturable_changes_no_number_on_cpu(rule: UpdateRule, capturable: bool) -> None:
    params, expected = make_params(), make_params()
    optimizer = LearnedOptimizer(params, weights=rule, capturable=capturable)
    take_steps(optimizer, params, 2)
    take_steps(LearnedOptimizer(expected, weights=rule), expected, 2)
    assert_identical(params, expected)
    assert optimizer.state[params[0]]["step"].device == params[0].device
    assert optimizer.param_groups[0]["capturable"] is capturable


def test_state_tensors_keep_their_storage_from_step_to_step(rule: UpdateRule) -> None:
    # CUDA graphs replay fixed addresses.
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=rule, capturable=True)
    take_steps(optimizer, params, 1)
    before = [[value.data_ptr() for value in optimizer.state[param].values()] for param in params]
    addresses = [param.data_ptr() for param in params]
    take_steps(optimizer, params, 2, first=1)
    assert [[value.data_ptr() for value in optimizer.state[param].values()] for param in params] == before
    assert [param.data_ptr() for param in params] == addresses


# Hooks


def test_step_hooks_run_in_order_around_the_step(rule: UpdateRule) -> None:
    params, seen = make_params([(3,)]), []
    optimizer = LearnedOptimizer(params, weights=rule)

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((name, params[0].detach().clone()))

    handles: list[Any] = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        take_steps(optimizer, params, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert [name for name, _ in seen] == ["global pre", "pre", "post", "global post"]
    assert not torch.equal(seen[1][1], seen[2][1])
    take_steps(optimizer, params, 1)
    assert len(seen) == 4


def test_the_profiler_sees_the_step() -> None:
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, weights=small_rule())
    with torch.autograd.profiler.profile() as profile:
        take_steps(optimizer, params, 1)
    assert "Optimizer.step#LearnedOptimizer.step" in {event.name for event in profile.function_events}


def test_zero_grad_clears_or_zeroes() -> None:
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, weights=small_rule())
    params[0].grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert_identical(params[0].grad, torch.zeros(3))
    optimizer.zero_grad()
    assert params[0].grad is None


def test_one_bad_gradient_neither_throws_default_off_nor_stops_it() -> None:
    param = nn.Parameter(torch.randn(500))
    optimizer = LearnedOptimizer([param])
    sizes = []
    for step in range(60):
        before = param.detach().clone()
        param.grad = torch.randn(500) * (1e4 if step == 40 else 1.0)
        optimizer.step()
        sizes.append((param.detach() - before).abs().median().item())
    usual = sum(sizes[30:40]) / 10
    assert max(sizes[40:]) < 2 * usual
    assert sum(sizes[50:]) / 10 == pytest.approx(usual, rel=0.3)
