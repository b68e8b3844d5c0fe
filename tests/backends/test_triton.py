"""The Triton kernel against the reference: on a GPU, or in Triton's interpreter in a process of its own."""

import copy
import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, UpdateRule, build_rule
from learned_optim.backends import StepItem, StepOptions, choose_backend
from learned_optim.backends.triton import step as triton_step
from learned_optim.weights import resolve_weights
from tests.cases import assert_identical, assert_stored_alike, copies, memories, small_rule

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RUNS = triton_step.available()
needs_kernel = pytest.mark.skipif(not RUNS, reason="no GPU here; test_in_the_interpreter runs these")
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide):RuntimeWarning")  # The interpreter is NumPy.

UNROLLED = dataclasses.replace(triton_step.UNROLLED, block=64, chunk=128)
TILED = dataclasses.replace(triton_step.TILED, block=64, chunk=128)
FORMS = {"unrolled": UNROLLED, "tiled": TILED}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "1x8": ("adam-modulation", {}),
    "2x3-time": (
        "adam-modulation",
        {
            "hidden_size": 3,
            "num_layers": 2,
            "time_scales": (5.0,),
            "fast_decay": 0.3,
            "anneal_power": 0.4,
            "anneal_start": 2.0,
            "outlier_bound": 1.5,
        },
    ),
    "1x4-matrix": ("adam-modulation", {"hidden_size": 4, "matrix_blend": 0.8, "matrix_momentum": 0.4}),
    "1x1": ("adam-modulation", {"hidden_size": 1}),
    "raw-1x5": ("paper", {"hidden_size": 5, "num_layers": 1, "input_scale": 3.0, "output_scale": 0.1}),
    "log-3x2": ("paper", {"hidden_size": 2, "num_layers": 3, "inputs": "log_and_sign", "output_scale": 0.1}),
}


@pytest.mark.skipif(RUNS or os.environ.get("TRITON_INTERPRET") == "1", reason="the tests below run in this process")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def make_rule(name: str, seed: int = 0) -> UpdateRule:
    family, config = RULES[name]
    torch.manual_seed(seed)
    rule = build_rule(family, **config)
    nn.init.normal_(rule.readout.weight, std=0.5)
    nn.init.normal_(rule.readout.bias, std=0.2)
    return rule


def steps(
    rule: UpdateRule,
    backend: str,
    *,
    shapes: tuple[tuple[int, ...], ...] = ((5, 7), (), (150,)),
    count: int = 3,
    dtype: torch.dtype = torch.float32,
    form: triton_step.Form | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Take steps on gradients of very different sizes, some of them zero, NaN, infinite or hardly representable."""
    torch.manual_seed(3)
    params = [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    optimizer = LearnedOptimizer(params, weights=rule, backend=backend, **options)
    if form is not None:
        (weights,) = optimizer._weights.values()
        ready = weights.rule_on(params[0].device, torch.float32)
        triton_step._programs[ready] = triton_step.Program(ready, form)
    for step in range(count):
        for param in params:
            param.grad = (torch.randn(param.shape) * 10.0 ** (step % 5 - 3)).to(DEVICE, dtype)
        special = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), 1e-19, 3e19, 0.0]).to(DEVICE, dtype)
        params[0].grad.view(-1)[:7] = special
        if step < count - 1:
            params[0].grad.view(-1)[7:10] = 0
        optimizer.step()
    return copies(params), [optimizer.state[param] for param in params]


@needs_kernel
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RULES)
def test_steps_equal_those_of_the_reference(name: str, form: str) -> None:
    rule = make_rule(name)
    want, got = steps(rule, "reference", weight_decay=10.0), steps(rule, "triton", form=FORMS[form], weight_decay=10.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    assert not torch.equal(want[0][0].view(-1)[11:], steps(rule, "reference", count=0)[0][0].view(-1)[11:])


LOW_PRECISION = [
    (torch.float32, "bfloat16", 1e-4, 2**-7),
    (torch.float16, "float32", 2**-9, 2e-4),
    (torch.bfloat16, "bfloat16", 2**-7, 2**-7),
]


@needs_kernel
@pytest.mark.parametrize(("dtype", "state_dtype", "tolerance", "memory_tolerance"), LOW_PRECISION)
def test_low_precision_differs_in_last_bits(
    dtype: torch.dtype, state_dtype: str, tolerance: float, memory_tolerance: float
) -> None:
    rule = make_rule("1x8")
    want = steps(rule, "reference", dtype=dtype, state_dtype=state_dtype)
    got = steps(rule, "triton", dtype=dtype, state_dtype=state_dtype)
    bits = 1 if CUDA else 3  # The interpreter cuts bfloat16 off instead of rounding it, in each of three steps.
    torch.testing.assert_close(got[0], want[0], rtol=bits * tolerance, atol=1e-4)
    torch.testing.assert_close(got[1], want[1], rtol=memory_tolerance, atol=bits * memory_tolerance)
    assert got[1][0]["hidden"].dtype == getattr(torch, state_dtype)


def assert_rounded_as_by_the_reference(rule: UpdateRule, form: triton_step.Form, **options: Any) -> None:
    """Take each step twice, from the same memory."""
    torch.manual_seed(4)
    params = [torch.randn(size, device=DEVICE).requires_grad_() for size in (150, 7)]
    optimizer = LearnedOptimizer(params, weights=rule, backend="triton", **options)
    (weights,) = optimizer._weights.values()
    ready = weights.rule_on(params[0].device, torch.float32)
    triton_step._programs[ready] = triton_step.Program(ready, form)
    for step in range(5):
        for param in params:
            param.grad = torch.randn_like(param) * 10.0 ** (step % 4 - 2) * (torch.rand_like(param) > 0.2)
        params[0].grad[:2] = torch.tensor([float("nan"), float("inf")])  # type: ignore[index]
        if step < 4:
            params[0].grad[100:] = 0  # type: ignore[index]
        others, other = copy.deepcopy((params, optimizer))
        other.backend = "reference"
        before = copy.deepcopy([optimizer.state[param] for param in params])
        optimizer.step()
        other.step()
        torch.testing.assert_close(copies(params), copies(others), rtol=1e-5, atol=2e-6)
        for param, twin, old in zip(params, others, before, strict=True):
            for name, values in optimizer.state[param].items():
                assert_stored_alike(values, other.state[twin][name])
                if old and name != "step":
                    held = ~param.grad.isfinite()  # type: ignore[union-attr]
                    assert_identical(values[held], old[name][held])
    assert any(values.dtype in (torch.int8, torch.bfloat16) for values in optimizer.state[params[0]].values())


@needs_kernel
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RULES)
def test_eight_bit_memory_is_rounded_as_the_reference_rounds(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = make_rule(name)
    taken, run = [], triton_step.Program.run

    def spy(self: triton_step.Program, types: tuple[torch.dtype, ...], *rest: Any) -> None:
        taken.append(types)
        run(self, types, *rest)

    monkeypatch.setattr(triton_step.Program, "run", spy)
    assert_rounded_as_by_the_reference(rule, FORMS[form], state_dtype=torch.int8)
    assert {types[2] for types in taken} == {torch.int8}


@needs_kernel
def test_narrow_moments_beside_wide_memory_and_ascent() -> None:
    rule = make_rule("2x3-time")
    assert_rounded_as_by_the_reference(rule, UNROLLED, moment_dtype=torch.bfloat16, maximize=True)


@needs_kernel
def test_options_strides_and_a_learning_rate_on_the_device() -> None:
    rule = make_rule("log-3x2")
    for options in ({"maximize": True}, {"lr": torch.tensor(0.3, device=DEVICE)}, {"capturable": True}):
        want, got = steps(rule, "reference", **options), steps(rule, "triton", **options)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        param = torch.randn(6, 4, device=DEVICE).t().requires_grad_()
        optimizer = LearnedOptimizer([param], weights=rule, backend=backend)
        for _ in range(2):
            param.grad = torch.randn(4, 6, 2, device=DEVICE)[:, :, 0]
            version = param._version
            optimizer.step()
            assert param._version > version
        assert param.stride() == (1, 4)
        results.append((param.detach(), optimizer.state[param]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-6)


@needs_kernel
def test_tables_follow_tensors_that_move() -> None:
    rule = make_rule("raw-1x5")
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        params = [torch.randn(size, device=DEVICE).requires_grad_() for size in (3, 200)]
        optimizer = LearnedOptimizer(params, weights=rule, backend=backend)
        for step in range(4):
            for param in params:
                param.grad = torch.randn_like(param)
            if step == 1:
                params[0].data = params[0].detach().clone()
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
            if step == 3:
                params[1].grad = None
            optimizer.step()
        results.append((copies(params), [optimizer.state[param] for param in params]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-6)


def make_optimizer(
    shapes: list[tuple[int, ...]], rule: UpdateRule, backend: str = "triton", **options: Any
) -> tuple[list[Tensor], LearnedOptimizer]:
    """Return parameters and an optimizer with a group for each."""
    torch.manual_seed(0)
    params = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    return params, LearnedOptimizer([{"params": [param]} for param in params], weights=rule, backend=backend, **options)


def step_on(optimizer: LearnedOptimizer, params: list[Tensor], value: float, having: tuple[int, ...] | None = None) -> None:
    """Take a step on gradients made anew, all of one value; only the parameters ``having`` one have a gradient."""
    for number, param in enumerate(params):
        param.grad = torch.full_like(param, value) if having is None or number in having else None
    optimizer.step()


def program_of(optimizer: LearnedOptimizer) -> triton_step.Program:
    (weights,) = optimizer._weights.values()
    return triton_step._programs[weights.rule_on(torch.empty(0, device=DEVICE).device, torch.float32)]


def tables_of(optimizer: LearnedOptimizer) -> list[triton_step._Table]:
    return [table for tables in program_of(optimizer).tables.values() for table in tables.values()]


@needs_kernel
def test_tables_are_made_once_however_many_groups_and_optimizers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], triton_step._Table.__init__

    def spy(self: triton_step._Table, *rest: Any) -> None:
        made.append(rest)
        make(self, *rest)

    monkeypatch.setattr(triton_step._Table, "__init__", spy)
    rule = make_rule("raw-1x5")
    optimizers = [make_optimizer([(3,)] * 9, rule) for _ in range(2)]
    for value in (0.1, -0.3):
        for params, optimizer in optimizers:
            step_on(optimizer, params, value)
        assert len(made) == 18 > triton_step.KEPT_TABLES


@needs_kernel
def test_tables_go_with_the_memory_they_point_to() -> None:
    rule = make_rule("raw-1x5")
    params, optimizer = make_optimizer([(3,), (4,)], rule)
    program = None
    for _ in range(3):
        others, other = make_optimizer([(3,), (4,)], rule)
        step_on(other, others, 0.1)
        program = program_of(other)
        assert len(program.tables) == 2
        step_on(optimizer, params, 0.1)
        optimizer.load_state_dict(optimizer.state_dict())
        del others, other
        gc.collect()
        assert len(program.tables) == 0
    step_on(optimizer, params, 0.1)
    assert program_of(optimizer) is program
    assert len(program.tables) == 2


@needs_kernel
def test_tables_stay_few_when_every_step_leaves_out_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "KEPT_TABLES", 2)
    rule = make_rule("raw-1x5")
    results = []
    for backend in ("reference", "triton"):
        params = [torch.ones(3, device=DEVICE, requires_grad=True) for _ in range(5)]
        optimizer = LearnedOptimizer(params, weights=rule, backend=backend)
        for having in ((0,), (0, 1), (0, 2, 3), (0, 1), (0, 4)):
            step_on(optimizer, params, 0.1, having)
        results.append((copies(params), memories(optimizer, params)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-6)
    assert [len(table.sizes) for table in tables_of(optimizer)] == [2, 2]  # Those used last: of (0, 1) and of (0, 4).


@needs_kernel
def test_tables_that_a_graph_reads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "KEPT_TABLES", 1)
    params = [torch.ones(3, device=DEVICE, requires_grad=True) for _ in range(4)]
    optimizer = LearnedOptimizer(params, weights=make_rule("raw-1x5"), backend="triton", capturable=True)
    step_on(optimizer, params, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(triton_step, "_capturing", lambda device: True)
        step_on(optimizer, params, 0.1)
    (table,) = tables_of(optimizer)
    for having in ((0, 1), (0, 2), (0, 3)):
        step_on(optimizer, params, 0.1, having)
    assert table in tables_of(optimizer)
    assert len(tables_of(optimizer)) == 2


@needs_kernel
def test_steps_between_replays_use_their_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, results = make_rule("raw-1x5"), []
    gradients = [torch.full((3,), value, device=DEVICE) for value in (0.1, -0.4)]
    for backend in ("reference", "triton"):
        param = torch.ones(3, device=DEVICE, requires_grad=True)
        optimizer = LearnedOptimizer([param], weights=rule, backend=backend, capturable=True)
        param.grad = gradients[0]
        optimizer.step()
        param.grad = gradients[1]
        with monkeypatch.context() as patch:
            patch.setattr(triton_step, "_capturing", lambda device: True)
            optimizer.step()
        written = [table.addresses.clone() for table in (tables_of(optimizer) if backend == "triton" else ())]
        param.grad = gradients[0]
        optimizer.step()
        for addresses, table in zip(written, tables_of(optimizer) if written else (), strict=True):
            table.addresses.copy_(addresses)  # What a replay does.
        optimizer.step()
        results.append((param.detach(), memories(optimizer, [param])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-6)


@needs_kernel
def test_a_step_of_parameters_that_are_not_contiguous_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, results = make_rule("raw-1x5"), []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        param = torch.randn(6, 4, device=DEVICE).t().requires_grad_()
        optimizer = LearnedOptimizer([param], weights=rule, backend=backend, capturable=True)
        step_on(optimizer, [param], 0.1)
        elsewhere = [torch.empty(4, 6, device=DEVICE) for _ in range(50)]  # Copies will not lie where they lay.
        with monkeypatch.context() as patch:
            patch.setattr(triton_step, "_capturing", lambda device: True)
            step_on(optimizer, [param], -0.2)
        del elsewhere
        results.append((param.detach(), memories(optimizer, [param])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-6)


@needs_kernel
def test_what_cannot_be_captured_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = make_rule("raw-1x5")
    params, optimizer = make_optimizer([(3,), (4,)], rule, capturable=True)
    step_on(optimizer, params, 0.1, having=(0,))
    monkeypatch.setattr(triton_step, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="before a step outside of it"):
        step_on(optimizer, params, 0.1, having=(1,))
    fresh, other = make_optimizer([(3,)], make_rule("raw-1x5", seed=1))
    with pytest.raises(RuntimeError, match="before a step outside of it"):
        step_on(other, fresh, 0.1)
    (weights,) = optimizer._weights.values()
    memory = {name: optimizer.state[params[0]][name] for name in ("hidden", "cell")}
    item = StepItem(params[0].detach(), torch.ones_like(params[0]), memory, torch.ones((), device="meta"), None)
    with pytest.raises(RuntimeError, match="construct the optimizer with capturable=True"):
        triton_step.apply_step(weights.rule_on(params[0].device, torch.float32), [item], StepOptions.of(1.0))


@needs_kernel
@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, None), (torch.float64, None), (torch.float32, "meta")])
@pytest.mark.parametrize(("name", "form"), [("2x3-time", "unrolled"), ("log-3x2", "tiled")])
def test_the_default_dtype_and_device_of_torch_change_nothing(
    name: str, form: str, dtype: torch.dtype, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, results = make_rule(name), []
    gradients = [torch.tensor([0.3, -0.7, 0.05], device=DEVICE), torch.tensor([0.1, 0.9, -2.0], device=DEVICE)]
    monkeypatch.setattr(triton_step, "choose_form", lambda rule: FORMS[form])
    for default, place in ((torch.float32, None), (dtype, device)):
        monkeypatch.setattr(triton_step, "_programs", weakref.WeakKeyDictionary())
        params = [torch.linspace(-1, 1, 3, device=DEVICE).requires_grad_() for _ in range(2)]
        torch.set_default_dtype(default)
        try:
            with nullcontext() if place is None else torch.device(place):
                optimizer = LearnedOptimizer(params, weights=rule, backend="triton", lr=0.3, weight_decay=0.9)
                for gradient in gradients:
                    params[0].grad, params[1].grad = gradient, -gradient
                    optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((copies(params), memories(optimizer, params)))
    assert_identical(results[1], results[0])


@needs_kernel
def test_what_the_kernel_cannot_take_goes_to_the_reference() -> None:
    rule = make_rule("raw-1x5")
    for dtype in (torch.float64, torch.complex64):
        torch.testing.assert_close(
            steps_of_one(rule, "triton", dtype), steps_of_one(rule, "reference", dtype), rtol=1e-5, atol=1e-6
        )
    assert not triton_step.supports(small_rule().double())


def steps_of_one(rule: UpdateRule, backend: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    param = torch.randn(20, dtype=dtype, device=DEVICE).requires_grad_()
    optimizer = LearnedOptimizer([param], weights=rule, backend=backend)
    param.grad = torch.randn_like(param)
    optimizer.step()
    return param.detach()


def test_it_is_for_nvidia_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "INSTALLED", True)
    monkeypatch.setattr(triton_step, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton_step.available()
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD's GPUs call themselves "cuda", too.
    assert not triton_step.available()


def test_it_is_refused_where_it_cannot_run() -> None:
    param = torch.zeros(3, requires_grad=True)
    if RUNS:
        assert LearnedOptimizer([param], backend="triton").backend == "triton"
    else:
        with pytest.raises(RuntimeError, match=r"backend='triton' is not available here; it needs an NVIDIA GPU"):
            LearnedOptimizer([param], backend="triton")


@needs_gpu
@pytest.mark.parametrize("weights", ["default", "quadratic"])
def test_a_hundred_steps_of_the_bundled_rules(weights: str) -> None:
    rule = resolve_weights(weights).rule
    shapes = ((64, 33), (), (5000,))
    want, got = (steps(rule, backend, shapes=shapes, count=100) for backend in ("reference", "triton"))
    for wanted, actual in zip(want[0], got[0], strict=True):
        assert (actual - wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@needs_gpu
def test_auto_takes_it_on_a_gpu() -> None:
    assert choose_backend("auto", small_rule().to("cuda")) is triton_step


@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    params = [torch.randn(50, 3, device="cuda").requires_grad_(), torch.randn(7, device="cuda").requires_grad_()]
    optimizer = LearnedOptimizer(params, weights=make_rule("1x8"), backend="triton")
    for mode, having in (("default", (0, 1)), ("error", (0, 1)), ("error", (0,))):
        for number, param in enumerate(params):
            param.grad = torch.randn_like(param) if number in having else None
        torch.cuda.set_sync_debug_mode(mode)
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_captured_step_equals_eager_steps() -> None:
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        params = [torch.randn(50, 3, device="cuda").t().requires_grad_()]
        params += [torch.randn(7, device="cuda").requires_grad_() for _ in range(triton_step.KEPT_TABLES + 4)]
        groups = [{"params": [param]} for param in params]
        optimizer = LearnedOptimizer(groups, weights=make_rule("1x8"), backend="triton", capturable=True)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay  # type: ignore[assignment]
        for number in range(5):
            for param in params:
                param.grad.copy_(torch.full_like(param, 0.1 * number - 0.2))  # type: ignore[union-attr]
            step()
            if number == 2:  # Between replays, on other gradients.
                captured_gradients = [param.grad for param in params]
                step_on(optimizer, params, 0.3)
                for param, gradient in zip(params, captured_gradients, strict=True):
                    param.grad = gradient
        results.append((copies(params), memories(optimizer, params)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@needs_gpu
def test_steps_counted_on_the_cpu_cannot_be_captured() -> None:
    params, optimizer = make_optimizer([(3,)], make_rule("1x8"))
    step_on(optimizer, params, 0.1)
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@needs_gpu
def test_a_first_step_cannot_be_captured() -> None:
    param = torch.zeros(3, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = LearnedOptimizer([param], weights=make_rule("1x8"), backend="triton", capturable=True)
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
