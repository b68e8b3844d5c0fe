"""The ``compiled`` backend: the reference's numbers, from few graphs, or the reference itself."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

from learned_optim import LearnedOptimizer, build_rule
from learned_optim.backends import backend_in_use, compiled
from learned_optim.rules.lstm import lstm_cell
from tests.cases import (
    assert_identical,
    copies,
    draw_gradients,
    make_params,
    memories,
    needs_dynamo,
    small_rule,
    take_steps,
)

SHAPES = ((), (5,), (3, 4), (0, 3), (130,), (7, 9))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that small models have several; nothing compiled before."""
    monkeypatch.setattr(compiled, "SIZES", (64, 16))
    monkeypatch.setattr(compiled, "BLOCK", 8)
    monkeypatch.setattr(compiled, "_failures", [])
    monkeypatch.setattr(compiled, "_graphs", {})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Keep the graphs, and run them without compiling."""
    kept: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, fakes: Sequence[Tensor]) -> fx.GraphModule:
        kept.append(graph)
        return graph

    monkeypatch.setattr(compiled, "compile_graph", keep)
    monkeypatch.setattr(compiled, "available", lambda: True)
    return kept


@contextmanager
def threads_set_to(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def results(backend: str, case: str, steps: int = 4, **options: Any) -> tuple[Any, Any]:
    params = [*make_params(SHAPES), *make_params([(3, 50)], torch.bfloat16)]
    params[2].data = params[2].detach().t().contiguous().t()
    optimizer = LearnedOptimizer(params, weights=small_rule(case), backend=backend, **options)
    take_steps(optimizer, params, steps)
    return copies(params), memories(optimizer, params)


@pytest.mark.skipif(not compiled.available(), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of the compiler's own parts.
@pytest.mark.parametrize(
    ("case", "dtype", "narrow", "steps"),
    [("paper-log-and-sign", "float32", 0, 100), ("adam-modulation", "float32", 8, 100), ("adam-modulation", "int8", 8, 4)],
)
def test_compiled_steps_equal_the_reference(
    case: str, dtype: str, narrow: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "NARROW", narrow)
    got, want = (results(backend, case, steps, state_dtype=dtype) for backend in ("compiled", "reference"))
    assert not compiled._failures
    for index, (param, expected) in enumerate(zip(got[0], want[0], strict=True)):
        tolerance = 2**-7 if param.dtype == torch.bfloat16 else 1e-3 if dtype == "int8" else 1e-5
        torch.testing.assert_close(param, expected, rtol=tolerance, atol=tolerance)
        for name, values in got[1][index].items():
            others = want[1][index][name]
            if values.dtype == torch.int8:
                assert values.numel() == 0 or (values.int() - others.int()).abs().max() <= 1
            else:
                torch.testing.assert_close(values, others, rtol=2**-7 if values.element_size() == 2 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [24, 21])
def test_a_step_in_blocks_equals_the_rule(count: int) -> None:
    rule = build_rule("paper", hidden_size=3, num_layers=2).double()
    inputs = torch.randn(count, 1, dtype=torch.float64)
    carry = (torch.randn(count, 6, dtype=torch.float64), torch.randn(count, 6, dtype=torch.float64))
    active = torch.arange(count) % 3 > 0
    got, want = compiled.advance_in_blocks(rule, inputs, carry, active), rule.advance(inputs, carry, active)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[0][active], want[0][active], rtol=1e-12, atol=1e-12)


def test_a_cell_by_fractions_equals_the_cell() -> None:
    gates = torch.randn(4, 5_000) * torch.logspace(-6, 3, 5_000)
    gates[:, :4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    cell = torch.randn(5_000) * torch.logspace(3, -3, 5_000)
    got, want = compiled.cell_by_fractions(gates.unbind(), cell), lstm_cell(gates.double().unbind(), cell.double())
    for values, expected in zip(got, want, strict=True):
        assert (values.isnan() == expected.isnan()).all()
        assert ((values - expected).nan_to_num().abs() <= 5e-7 * (1 + cell.abs())).all()


def test_strided_tensors_and_other_numbers_of_threads(graphs: list[fx.GraphModule]) -> None:
    got, want = [], []
    for results, backend in ((got, "compiled"), (want, "reference")):
        params = [nn.Parameter(param.detach()[::2]) for param in make_params([(150,), (40, 3)])]
        rule = small_rule()
        rule.readout.weight = nn.Parameter(rule.readout.weight.t().contiguous().t())
        optimizer = LearnedOptimizer(params, weights=rule, backend=backend)
        for step, threads in enumerate((1, 2, 1)):
            for param, gradient in zip(params, draw_gradients(params, step), strict=True):
                param.grad = gradient.repeat_interleave(2, 0)[::2]
            with threads_set_to(threads):
                optimizer.step()
        results += copies(params)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2 * 3  # Compiled code shares out its loops among as many threads as it was compiled for.


@pytest.mark.parametrize(("case", "state_dtype"), [("paper-raw", "float32"), ("adam-modulation-time", "int8")])
def test_chunks_filled_up_equal_the_reference(graphs: list[fx.GraphModule], case: str, state_dtype: str) -> None:
    options = {"lr": torch.tensor(0.5), "weight_decay": 1.0, "maximize": True, "state_dtype": state_dtype}
    got, want = (results(backend, case, **options) for backend in ("compiled", "reference"))
    tolerance = 1e-5 if state_dtype == "float32" else 1e-3
    torch.testing.assert_close(got[0][:6], want[0][:6], rtol=tolerance, atol=tolerance)


def test_fifty_tensors_and_a_hundred_steps_compile_three_graphs(graphs: list[fx.GraphModule]) -> None:
    params = make_params([(size, 1 + size % 3) for size in range(1, 51)])
    optimizer = LearnedOptimizer(params, weights=small_rule(), backend="compiled")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    take_steps(optimizer, params, 1)
    assert len(graphs) == 3  # Of several tensors in either size, and of part of one.
    for step in range(1, 100):
        for param, gradient in zip(params, draw_gradients(params, step), strict=True):
            param.grad = None if step % 7 == 3 and param.numel() % 5 == 0 else gradient
        optimizer.step()
        scheduler.step()
    assert len(graphs) == 3
    # Another model and other weights of the same form need no other graph.
    others, expected = make_params([(900,), (77,)], seed=1), make_params([(900,), (77,)], seed=1)
    take_steps(LearnedOptimizer(others, weights=small_rule(seed=1), backend="compiled"), others, 2)
    take_steps(LearnedOptimizer(expected, weights=small_rule(seed=1), backend="reference"), expected, 2)
    torch.testing.assert_close(others, expected, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 3
    assert not compiled._failures


def test_many_forms_of_rule_compile_in_one_process(graphs: list[fx.GraphModule]) -> None:
    for number in range(1, 11):
        (param,) = make_params([(70,)])
        rule = build_rule("paper", hidden_size=2, num_layers=1, output_scale=number)
        take_steps(LearnedOptimizer([param], weights=rule, backend="compiled"), [param], 1)
    assert len(graphs) == 20


def test_where_compiling_fails_the_reference_goes_on_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("g++: no such header")

    monkeypatch.setattr(compiled, "compile_graph", broken)
    monkeypatch.setattr(compiled, "available", lambda: True)
    with caplog.at_level(logging.WARNING, "learned_optim"):
        got = results("compiled", "adam-modulation")
    (message,) = [record.getMessage() for record in caplog.records if record.name == "learned_optim"]
    assert "g++: no such header" in message
    torch.testing.assert_close(got, results("reference", "adam-modulation"), rtol=1e-5, atol=1e-6)


def test_without_a_compiler_it_is_refused_and_auto_never_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = small_rule()
    rule.freeze()
    monkeypatch.setattr(compiled, "_has_compiler", compiled._has_compiler.__wrapped__)
    for found in ("/usr/bin/g++", None):
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        assert compiled.available() == bool(found)
        assert backend_in_use("auto", rule) in ("native", "reference")
        assert backend_in_use("compiled", rule) == ("compiled" if found else "reference")
    with pytest.raises(RuntimeError, match=r"'compiled' is not available here; it needs a C.. compiler"):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], backend="compiled")


@needs_dynamo
def test_inside_a_compiled_step_the_reference_is_traced(graphs: list[fx.GraphModule]) -> None:
    outer = CompileCounterWithBackend("eager")
    params, expected = make_params(((5,), (3, 4))), make_params(((5,), (3, 4)))
    optimizer = LearnedOptimizer(params, weights=small_rule(), backend="compiled", lr=torch.tensor(1.0))
    optimizer.step = torch.compile(optimizer.step, backend=outer, fullgraph=True)  # type: ignore[method-assign]
    take_steps(optimizer, params, 3)
    take_steps(LearnedOptimizer(expected, weights=small_rule(), backend="reference"), expected, 3)
    assert (outer.frame_count, len(graphs)) == (2, 0)
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_two_compiled_runs_are_identical(graphs: list[fx.GraphModule]) -> None:
    assert_identical(*(results("compiled", "adam-modulation", state_dtype="int8") for _ in range(2)))
