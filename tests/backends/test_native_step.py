"""The fused CPU step against the reference, coordinate for coordinate."""

import copy
import math
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, UpdateRule, build_rule
from learned_optim.backends import reference
from learned_optim.backends.items import StepItem, StepOptions
from learned_optim.backends.native import library as native_library
from learned_optim.backends.native import plan as native_plan
from learned_optim.backends.native import step as native
from learned_optim.rules.storage import layout, names
from tests.cases import (
    RULE_CASES,
    SHAPES,
    assert_identical,
    assert_stored_alike,
    copies,
    make_params,
    memories,
    needs_dynamo,
    small_rule,
    take_steps,
)

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels were not built: no C compiler")

SIZES = [("paper", layers, hidden) for layers, hidden in ((1, 1), (2, 3), (3, 9), (2, 20))]
SIZES += [("adam-modulation", layers, hidden) for layers, hidden in ((1, 1), (2, 5), (3, 13))]
SIZES += [("adam-modulation", 1, lanes) for lanes in (4, 8, 16)]  # Of one layer whose units fill a vector.
COUNTS = (1, 3, 31, 32, 33, 203)


def wide_rule(family: str, layers: int, hidden: int, seed: int = 0) -> UpdateRule:
    """A rule whose gates saturate too."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {"num_layers": layers, "hidden_size": hidden}
    if family == "paper":
        config |= {"inputs": "log_and_sign" if hidden % 2 else "raw", "output_scale": 0.1}
    else:
        config |= {"time_scales": tuple(10.0**k for k in range(layers - 1)), "anneal_power": 0.3 * (hidden % 2)}
        config |= {"anneal_start": 3.0 * (layers % 2), "outlier_bound": 1.5 * (hidden % 2)}
    rule = build_rule(family, **config)
    with torch.no_grad():
        for parameter in rule.lstm.parameters():
            parameter.mul_(2)
    nn.init.normal_(rule.readout.weight, std=0.5)
    nn.init.normal_(rule.readout.bias, std=0.2)
    rule.freeze()
    return rule


def draw_items(
    rule: UpdateRule,
    counts: tuple[int, ...] = COUNTS,
    dtype: torch.dtype = torch.float32,
    memory_dtype: torch.dtype = torch.float32,
) -> list[StepItem]:
    """Parameters at rest."""
    items = []
    for number, count in enumerate(counts):
        entries = layout(rule, memory_dtype).items()
        memory = {name: torch.zeros(count, *entry.trailing, dtype=entry.dtype) for name, entry in entries}
        scale = torch.rand(()) + 0.1 if rule.uses_scale else None
        param = torch.randn(count).to(dtype)
        items.append(StepItem(param, torch.zeros_like(param), memory, torch.tensor(float(number)), scale))
    return items


def draw_gradients(items: list[StepItem], step: int) -> None:
    """Gradients of very different sizes, and every special value."""
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-40, 1e-30, 3e38, -2e19, 1e10])
    for item in items:
        grad = torch.randn(item.grad.shape) * 10 ** torch.randn(item.grad.shape)
        grad[torch.rand(grad.shape) < 0.1] = 0
        where = torch.rand(grad.shape) < 0.05
        grad[where] = special[torch.randint(len(special), (int(where.sum()),))]
        if step < 3:
            grad[: len(grad) // 2] = 0  # These wake later.
        item.grad.copy_(grad)
        item.step.add_(1)


def assert_agree(native_items: list[StepItem], reference_items: list[StepItem], rtol: float, atol: float) -> None:
    for got, want in zip(native_items, reference_items, strict=True):
        torch.testing.assert_close(got.param, want.param, rtol=rtol, atol=atol, equal_nan=True)
        torch.testing.assert_close(got.memory, want.memory, rtol=rtol, atol=atol)


def compare(rule: UpdateRule, items: list[StepItem], steps: int, rtol: float, atol: float, **options: Any) -> None:
    """Step the kernel and the reference side by side."""
    others = copy.deepcopy(items)
    step_options = StepOptions.of(**{"lr": 0.5, **options})
    for step in range(steps):
        draw_gradients(items, step)
        for item, other in zip(items, others, strict=True):
            other.grad.copy_(item.grad)
            other.step.copy_(item.step)
        native.apply_step(rule, items, step_options)
        reference.apply_step(rule, others, step_options)
    assert_agree(items, others, rtol, atol)


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that the kernel, not the reference, takes the step."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the native backend handed a step to the reference")

    fake = type("chunks", (), {"apply_step": staticmethod(refuse)})
    monkeypatch.setattr(native, "reference", fake)


@pytest.mark.usefixtures("no_reference", "instruction_set")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_hundred_steps_equal_the_reference(size: tuple[str, int, int]) -> None:
    rule = wide_rule(*size)
    assert native.supports(rule)
    compare(rule, draw_items(rule), 100, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [("paper", 2, 3), ("paper", 2, 20), ("adam-modulation", 1, 8)], ids=str)
def test_low_precision_is_rounded_as_the_reference_rounds(
    size: tuple[str, int, int], dtype: torch.dtype, memory_dtype: torch.dtype
) -> None:
    # One step, so that only the rounding of the stores differs: by a unit in the last place, where two results straddle it.
    rule = wide_rule(*size)
    items = draw_items(rule, (1000,), dtype, memory_dtype)
    for item in items:
        for values in item.memory.values():
            values.uniform_(0, 1)
    unit = max(torch.finfo(dtype).eps, torch.finfo(memory_dtype).eps)
    compare(rule, items, 1, rtol=max(unit, 1e-5), atol=1e-5)


@pytest.mark.usefixtures("no_reference", "instruction_set")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_eight_bit_memory_is_rounded_as_the_reference_rounds(size: tuple[str, int, int]) -> None:
    rule = wide_rule(*size)
    items = draw_items(rule, (2003,), memory_dtype=torch.int8)
    for step in range(30):
        others = copy.deepcopy(items)
        draw_gradients(items, step)
        others[0].grad.copy_(items[0].grad)
        others[0].step.copy_(items[0].step)
        before = {name: values.clone() for name, values in items[0].memory.items()}
        native.apply_step(rule, items, StepOptions.of(0.5, 0.0, step % 2 == 1))
        reference.apply_step(rule, others, StepOptions.of(0.5, 0.0, step % 2 == 1))
        torch.testing.assert_close(items[0].param, others[0].param, rtol=1e-5, atol=1e-5)
        for name, values in items[0].memory.items():
            assert_stored_alike(values, others[0].memory[name])
            held = ~items[0].grad.isfinite()
            assert_identical(values[held], before[name][held])
    assert items[0].memory["cell"].abs().max() >= 126


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_hundred_steps_with_eight_bit_memory_stay_within_a_thousandth(size: tuple[str, int, int]) -> None:
    rule = wide_rule(*size)
    items = draw_items(rule, (1003,), memory_dtype=torch.int8)
    others, start = copy.deepcopy(items), items[0].param.clone()
    for step in range(100):
        draw_gradients(items, step)
        others[0].grad.copy_(items[0].grad)
        others[0].step.copy_(items[0].step)
        for module, each in ((native, items), (reference, others)):
            module.apply_step(rule, each, StepOptions.of(0.5, 0.0, False))
    assert (items[0].param - others[0].param).norm() <= 1e-3 * (others[0].param - start).norm()


@pytest.mark.usefixtures("no_reference")
def test_items_of_every_storage_step_together() -> None:
    rule, results = wide_rule("adam-modulation", 2, 5), []
    for together in (True, False):
        torch.manual_seed(3)
        items = [
            item
            for dtype in (torch.int8, torch.float32, torch.bfloat16)
            for item in draw_items(rule, (37, 70), dtype=torch.float32, memory_dtype=dtype)
        ]
        for step in range(3):
            draw_gradients(items, step)
            for group in [items] if together else [[item] for item in items]:
                native.apply_step(rule, group, StepOptions.of(0.5, 0.0, False))
        results.append([(item.param, item.memory) for item in items])
    assert_identical(*results)


@pytest.mark.usefixtures("no_reference")
def test_rounding_is_to_nearest_even_and_special_values_survive() -> None:
    rule = wide_rule("paper", 1, 3)
    for dtype in (torch.bfloat16, torch.float16):
        # Every 16-bit pattern, stepped by nothing, must come back as it was: lr = 0.
        values = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
        param = values.clone()
        memory = rule.initial_memory(param.numel(), torch.empty(0))
        item = StepItem(param, torch.ones_like(param), memory, torch.tensor(1.0), None)
        native.apply_step(rule, [item], StepOptions.of(0.0, 0.0, False))
        torch.testing.assert_close(param, values, rtol=0, atol=0, equal_nan=True)
        # A shrink by 1/2, 3/4 ... lands between representable values, and on ties.
        for shrink in (0.5, 0.75, 0.99609375, 1.00390625, 2.0**-9):
            memory = rule.initial_memory(values.numel(), torch.empty(0))
            scaled = StepItem(
                values.clone(), item.grad * 0, rule.initial_memory(param.numel(), torch.empty(0)), item.step, None
            )
            native.apply_step(rule, [scaled], StepOptions.of(1.0, (1 - shrink) * 1e3, False))
            want = (values.float() * shrink).to(dtype)
            torch.testing.assert_close(scaled.param, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize(
    "options", [{"maximize": True}, {"weight_decay": 3.0}, {"lr": torch.tensor(0.3)}, {"lr": 0.0}], ids=str
)
@pytest.mark.parametrize("size", [("paper", 2, 3), ("adam-modulation", 1, 8)], ids=str)
def test_options_act_as_in_the_reference(size: tuple[str, int, int], options: dict[str, Any]) -> None:
    rule = wide_rule(*size)
    compare(rule, draw_items(rule), 20, rtol=1e-5, atol=1e-5, **options)


@pytest.mark.usefixtures("no_reference")
def test_lr_zero_moves_nothing() -> None:
    rule = wide_rule("adam-modulation", 1, 8)
    items = draw_items(rule)
    before = [item.param.clone() for item in items]
    draw_gradients(items, 5)
    native.apply_step(rule, items, StepOptions.of(0.0, 1.0, False))
    assert_identical([item.param for item in items], before)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("size", SIZES[3:5], ids=str)
def test_neither_threads_nor_neighbours_change_a_result(size: tuple[str, int, int], memory_dtype: torch.dtype) -> None:
    rule = wide_rule(*size)
    counts = (5000, 1, 0, 33, 64, 4100)
    results = []
    for threads, split in ((1, False), (2, False), (3, False), (2, True)):
        torch.manual_seed(1)
        items = draw_items(rule, counts, memory_dtype=memory_dtype)
        for step in range(5):
            draw_gradients(items, step)
            torch.set_num_threads(threads)
            try:
                for group in [[item] for item in items] if split else [items]:
                    native.apply_step(rule, group, StepOptions.of(1.0, 0.1, False))
            finally:
                torch.set_num_threads(1)
        results.append([(item.param, item.memory) for item in items])
    for result in results[1:]:
        assert_identical(result, results[0])


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("case", RULE_CASES)
def test_strides_do_not_matter(case: str) -> None:
    rule = small_rule(case)
    rule.freeze()

    def item(param: Tensor, grad: Tensor) -> StepItem:
        memory = rule.initial_memory(12, torch.empty(0))
        memory = {name: value.view(3, 4, *value.shape[1:]) for name, value in memory.items()}
        return StepItem(param, grad, memory, torch.tensor(1.0), torch.tensor(0.5) if rule.uses_scale else None)

    param, grad = torch.randn(3, 4), torch.randn(3, 4)
    strided = [
        item(param.t().contiguous().t(), grad.clone()),
        item(param.clone(), grad.t().contiguous().t()),
        item(torch.cat((param, param), 1)[:, :4], grad[:1].expand(3, 4)),
        item(param.clone(), torch._neg_view(-grad)),
    ]
    plain = [item(param.clone(), given.grad.clone(memory_format=torch.contiguous_format).resolve_neg()) for given in strided]
    for items in (strided, plain):
        native.apply_step(rule, items, StepOptions.of(1.0, 0.0, False))
    assert_identical([x.param.contiguous() for x in strided], [x.param for x in plain])
    assert_identical([x.memory for x in strided], [x.memory for x in plain])


def test_the_reference_takes_what_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = wide_rule("adam-modulation", 1, 8)
    items = draw_items(rule, (7, 5, 6))
    items[1].memory["exp_avg"] = items[1].memory["exp_avg"].double()
    items[2].memory["hidden"] = items[2].memory["hidden"].t().contiguous().t()
    others = copy.deepcopy(items)
    draw_gradients(items, 5)
    for item, other in zip(items, others, strict=True):
        other.grad.copy_(item.grad)
        other.step.copy_(item.step)
    handed: list[int] = []
    original = reference.apply_step

    def note(rule: UpdateRule, items: list[StepItem], options: StepOptions) -> None:
        handed.extend(item.param.numel() for item in items)
        original(rule, items, options)

    monkeypatch.setattr(native.reference, "apply_step", note)
    native.apply_step(rule, items, StepOptions.of(1.0, 0.0, False))
    assert handed == [5, 6]
    original(rule, others, StepOptions.of(1.0, 0.0, False))
    assert_agree(items, others, 1e-5, 1e-6)


def test_what_is_supported() -> None:
    assert native.supports(small_rule("paper-raw"))
    assert not native.supports(small_rule("paper-raw").double())
    assert not native.supports(small_rule("paper-raw").to("meta"))
    assert not native.supports(build_rule("adam-modulation", time_scales=[1.0] * 17))


@pytest.mark.usefixtures("instruction_set")
def test_functions_to_a_millionth() -> None:
    arguments = torch.cat((torch.linspace(-100, 100, 20_001), torch.logspace(-30, 1, 1000), -torch.logspace(-30, 1, 1000)))
    functions = (torch.tanh, torch.sigmoid, torch.exp, lambda x: x.abs().clamp(min=1e-45).log())
    for number, exact in enumerate(functions):
        x = arguments.abs().clamp(min=1e-45) if number == 3 else arguments
        x = x[x > (-15 if number == 1 else -87)] if number in (1, 2) else x
        got = torch.empty_like(x)
        native_library.LIBRARY.learned_optim_evaluate(number, x.numel(), x.data_ptr(), got.data_ptr())  # type: ignore[union-attr]
        torch.testing.assert_close(got, exact(x.double()).float(), rtol=1e-6, atol=1e-17)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("number", range(3))
def test_functions_pass_nan_on(number: int) -> None:
    x, got = torch.full((20,), math.nan), torch.zeros(20)
    native_library.LIBRARY.learned_optim_evaluate(number, x.numel(), x.data_ptr(), got.data_ptr())  # type: ignore[union-attr]
    assert got.isnan().all()


# The optimizer's step, planned


def stepper(case: str, params: Any, **options: Any) -> LearnedOptimizer:
    return LearnedOptimizer(params, weights=small_rule(case), **options)


needs_plans = pytest.mark.skipif(not native_plan.POSSIBLE, reason="this torch lacks what plans look at tensors with")


@needs_plans
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"moment_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("case", RULE_CASES)
def test_planned_steps_equal_steps_that_are_not(case: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for planned in (True, False):
        params = make_params(SHAPES)
        optimizer = stepper(case, params, **options)
        if not planned:
            monkeypatch.setattr(LearnedOptimizer, "_plan_step", lambda self: None)
        take_steps(optimizer, params, 20)
        assert (optimizer._plan is not None) == planned
        results.append((copies(params), memories(optimizer, params)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for planned_memory, memory in zip(results[0][1], results[1][1], strict=True):
        for name, values in memory.items():
            assert values.numel() == 0 or assert_stored_alike(planned_memory[name], values) is None
    assert_identical([m["step"] for m in results[0][1]], [m["step"] for m in results[1][1]])


@needs_plans
def test_a_plan_measures_tensors_within_the_bounds_of_the_rule() -> None:
    results = []
    for backend in ("native", "reference"):
        params = [nn.Parameter(start * torch.ones(size)) for size in (1, 50, 1000, 1500) for start in (0.0, 0.1, 3.0)]
        optimizer = stepper("adam-modulation-time", params, backend=backend)
        take_steps(optimizer, params, 3)
        assert (optimizer._plan is not None) == (backend == "native")
        results.append(copies(params))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def rename(memory: dict[str, Tensor], one: str, other: str) -> None:
    """Exchange two names, and leave the tensors in their order."""
    entries = list(memory.items())
    memory.clear()
    memory.update({{one: other, other: one}.get(name, name): value for name, value in entries})


CHANGES = {
    "replaced data": lambda params, optimizer: setattr(params[2], "data", params[2].detach().clone()),
    "another dtype": lambda params, optimizer: setattr(params[2], "data", params[2].detach().to(torch.bfloat16)),
    "another layout": lambda params, optimizer: setattr(params[3], "data", params[3].detach().t().contiguous().t()),
    "replaced memory": lambda params, optimizer: optimizer.state[params[2]].update(
        hidden=optimizer.state[params[2]]["hidden"].clone()
    ),
    "replaced step": lambda params, optimizer: optimizer.state[params[1]].update(step=torch.tensor(2.0)),
    "replaced state": lambda params, optimizer: optimizer.state.update(
        {params[2]: copy.deepcopy(optimizer.state[params[2]])}
    ),
    "memory moved in place": lambda params, optimizer: setattr(
        optimizer.state[params[2]]["cell"], "data", optimizer.state[params[2]]["cell"].clone()
    ),
    "a checkpoint": lambda params, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "a new group": lambda params, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
    "options": lambda params, optimizer: optimizer.param_groups[0].update(lr=0.1, weight_decay=1.0, maximize=True),
    "a parameter less": lambda params, optimizer: optimizer.param_groups[0]["params"].pop(),
    "another order": lambda params, optimizer: optimizer.param_groups[0]["params"].reverse(),
    "swapped memory": lambda params, optimizer: torch.utils.swap_tensors(
        optimizer.state[params[2]]["hidden"], torch.full_like(optimizer.state[params[2]]["hidden"], 0.5)
    ),
    "renamed memory": lambda params, optimizer: rename(optimizer.state[params[2]], "exp_avg", "exp_avg_slow"),
    "swapped": lambda params, optimizer: torch.utils.swap_tensors(params[2], nn.Parameter(params[2].detach() + 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_notices_what_has_changed(change: str) -> None:
    results = []
    for backend in ("native", "reference"):
        params = make_params(SHAPES)
        optimizer = stepper("adam-modulation", params, backend=backend)
        take_steps(optimizer, params, 2)
        CHANGES[change](params, optimizer)
        # Fill the freed memory, so that stale addresses would show.
        _ = [torch.full((size,), torch.nan) for size in range(1, 200)]
        take_steps(optimizer, params, 3, first=2)
        results.append((copies(params), memories(optimizer, params)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_plan_follows_gradients_that_come_go_and_change_their_kind() -> None:
    results = []
    for backend in ("native", "reference"):
        params = make_params(((5,), (3, 3), (7,)))
        optimizer = stepper("adam-modulation", params, backend=backend)
        torch.manual_seed(5)
        for step in range(12):
            for number, param in enumerate(params):
                param.grad = None if step % 4 == 2 and number == 1 else torch.randn(param.shape)
            if step % 4 == 3:
                params[1].grad = torch._neg_view(torch.randn(3, 3))
            if step % 4 == 1:
                params[1].grad = torch.randn(3, 3).t()
            optimizer.step()
        results.append((copies(params), memories(optimizer, params)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@needs_plans
def test_a_plan_keeps_no_gradient_and_refuses_sparse_ones() -> None:
    params = make_params(((5,), (4, 3)))
    optimizer = stepper("adam-modulation", params)
    take_steps(optimizer, params, 3)
    assert optimizer._plan is not None
    gone = weakref.ref(params[0].grad.untyped_storage())  # type: ignore[union-attr]
    optimizer.zero_grad()
    assert gone() is None
    params[0].grad = torch.ones(5)
    params[1].grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (4, 3), check_invariants=True)
    before = copies(params)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_identical(copies(params), before)


class Marked(Tensor):
    """A tensor like any other, but its own class's business."""


@needs_plans
def test_a_plan_refuses_gradients_of_a_subclass_held_or_not() -> None:
    params = make_params(((5,), (4, 3)))
    optimizer = stepper("adam-modulation", params)
    take_steps(optimizer, params, 2)
    for plain, grad in ((False, torch.ones(4, 3).as_subclass(Marked)), (True, torch.ones(4, 3))):
        params[1].grad = grad
        assert optimizer._repeat_step() == plain
        del grad
        assert optimizer._repeat_step() == plain
    params[1].grad = None
    assert not optimizer._repeat_step()


@needs_plans
def test_threads_that_look_for_tensors_find_what_has_changed() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        params = make_params(((2,),) * 1500)
        optimizer = stepper("paper-raw", params)
        take_steps(optimizer, params, 2)
        for index in (0, 700, 1499):
            versions = [param._version for param in params]
            assert optimizer._repeat_step()
            assert [param._version for param in params] == [version + 1 for version in versions]
            memory = optimizer.state[params[index]]
            for other in (dict(reversed(memory.items())), memory | {"more": memory["step"]}, {"step": memory["step"]}, None):
                optimizer.state[params[index]] = other
                assert not optimizer._repeat_step()
            optimizer.state[params[index]] = memory
            moved = optimizer.state[params[index]]["cell"]
            kept, moved.data = moved.detach(), moved.clone()
            assert not optimizer._repeat_step()
            moved.data = kept
            kept_grad, params[index].grad = params[index].grad, None
            assert not optimizer._repeat_step()
            params[index].grad = kept_grad
    finally:
        torch.set_num_threads(threads)


@needs_plans
def test_a_plan_spans_groups_with_options_of_their_own_and_groups_at_rest() -> None:
    results = []
    for backend in ("native", "reference"):
        params = make_params(((5,), (4, 3), (7,), (2,)))
        groups: list[dict[str, Any]] = [
            {"params": params[:2], "lr": 0.5},
            {"params": params[2:3], "weights": small_rule("paper-raw"), "weight_decay": 2.0, "maximize": True},
            {"params": params[3:]},
        ]
        optimizer = stepper("adam-modulation", groups, backend=backend)
        for step in range(4):
            for param in params[:3]:
                param.grad = torch.full_like(param, step - 1.5)
            optimizer.step()
        assert (optimizer._plan is not None) == (backend == "native")
        results.append((copies(params), [dict(optimizer.state[param]) for param in params[:3]]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_loading_a_checkpoint_frees_the_old_state() -> None:
    params = make_params(((5,),))
    optimizer = stepper("adam-modulation", params)
    take_steps(optimizer, params, 3)
    old = weakref.ref(optimizer.state[params[0]]["hidden"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert old() is None


def test_a_planned_step_tells_autograd() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = stepper("paper-raw", [param])
    for _ in range(3):
        param.grad = torch.ones(3)
        loss = param.square().sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# torch.compile


@needs_dynamo
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("case", ["paper-log-and-sign", "adam-modulation-time"])
def test_a_compiled_native_step_equals_the_eager_one(case: str, state_dtype: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    results, counter = [], CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for compiled in (True, False):
        params = make_params(((), (5,), (3, 4)))
        params[2].data = params[2].detach().t().contiguous().t()
        optimizer = stepper(case, params, backend="native", weight_decay=0.1, lr=torch.tensor(0.5), state_dtype=state_dtype)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend=counter, fullgraph=True)  # type: ignore[method-assign]
        take_steps(optimizer, params, 4)
        results.append((copies(params), memories(optimizer, params)))
    torch._dynamo.reset()
    assert counter.frame_count == 2  # Once to create the state, once to use it.
    assert any("native_step" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@needs_dynamo
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_schedule_of_floats_compiles_no_graph_for_each_rate(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    param = nn.Parameter(torch.randn(8, 4))
    optimizer = stepper("adam-modulation", [param], backend=backend)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    step = torch.compile(optimizer.step, backend=counter)
    for _ in range(8):
        param.grad = torch.randn(8, 4)
        step()
        schedule.step()
    assert counter.frame_count == 2  # One that creates the state, one that uses it.


@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.int8])
def test_the_operator_is_registered_properly(memory_dtype: torch.dtype) -> None:
    rule = wide_rule("adam-modulation", 2, 3)
    (item,) = draw_items(rule, (37,), memory_dtype=memory_dtype)
    draw_gradients([item], 5)
    memory = [item.memory[name] for name in names(rule, item.memory)]
    assert item.scale is not None
    numbers = native.describe(rule)
    described = list(numbers), list(numbers.values()), list(native.time_scales(rule))
    arguments = (native.pack(rule), *described, [item.param], [item.grad], memory, [item.step], [item.scale])
    torch.library.opcheck(
        torch.ops.learned_optim.native_step.default,
        (*arguments, torch.tensor(1.0), torch.tensor(1.0), False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


# Without the library


def test_without_the_library_everything_works_and_auto_says_so_once() -> None:
    program = """
import logging, sys
import learned_optim.backends.native.library as library
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("learned_optim").addHandler(handler)
import torch
from learned_optim import LearnedOptimizer
assert not library.AVAILABLE
for _ in range(2):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param])
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
assert (param < 1).all()
assert len(messages) == 1 and "C compiler" in messages[0], messages
try:
    LearnedOptimizer([param], backend="native")
except RuntimeError as error:
    assert "not available" in str(error)
else:
    raise AssertionError("backend='native' was accepted")
"""
    hidden = "import ctypes\ndef refuse(*a, **k): raise OSError('hidden')\nreal = ctypes.CDLL\n"
    hidden += "ctypes.CDLL = lambda name, *a, **k: refuse() if '_native' in str(name) else real(name, *a, **k)\n"
    subprocess.run([sys.executable, "-c", hidden + program], check=True, timeout=120)
