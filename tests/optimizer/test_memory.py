"""What state costs, and the optimizer with memory in fewer bytes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learned_optim import LearnedOptimizer, UpdateRule, state_bytes
from learned_optim.backends.native import step as native
from tests.cases import SHAPES, assert_identical, copies, draw_gradients, make_params, memories, small_rule, take_steps

DTYPES: list[dict[str, Any]] = [
    {},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": "int8"},
    {"state_dtype": "int8", "moment_dtype": torch.float32},
    {"state_dtype": "bfloat16", "moment_dtype": "bfloat16"},
]


def allocated(optimizer: LearnedOptimizer) -> int:
    return sum(value.untyped_storage().nbytes() for memory in optimizer.state.values() for value in memory.values())


# state_bytes


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_state_bytes_are_those_that_steps_allocate(rule: UpdateRule, dtypes: dict[str, Any]) -> None:
    params = [*make_params(), *make_params([(3, 2)], torch.float64), *make_params([(5,)], torch.complex64)]
    expected = state_bytes(params, rule, **dtypes)
    optimizer = LearnedOptimizer(params, weights=rule, **dtypes)
    take_steps(optimizer, params, 2)
    assert expected == allocated(optimizer)
    assert expected == state_bytes([param.detach().to("meta") for param in params], rule, **dtypes)


def test_of_a_model_only_what_is_trained_counts_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 10))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    optimizer = LearnedOptimizer(model.parameters())
    model(torch.randn(4, 10)).square().sum().backward()
    optimizer.step()
    assert state_bytes(model) == allocated(optimizer) == (100 + 3 * 10) * 76 + 4 * 4
    assert state_bytes(model.requires_grad_(False)) == 0


def test_groups_have_dtypes_and_weights_of_their_own() -> None:
    groups = [
        {"params": make_params([(100,)]), "state_dtype": "int8"},
        {"params": make_params([(7,)]), "weights": "quadratic"},
    ]
    assert state_bytes(groups) == 100 * 26 + 7 * 320 + 2 * 4
    assert state_bytes(nn.Linear(100, 1, bias=False).named_parameters(), state_dtype="int8") == 100 * 26 + 4


def test_a_model_that_fits_nowhere_is_counted_too() -> None:
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6, bias=False)
    assert state_bytes(model, state_dtype=torch.bfloat16) == 44 * 10**12 + 4


@pytest.mark.parametrize(("dtypes", "limit"), [(DTYPES[1], 44), (DTYPES[2], 28)], ids=str)
def test_the_default_rule_keeps_to_its_bytes(dtypes: dict[str, Any], limit: int) -> None:
    assert state_bytes(nn.Linear(10**4, 10**4, bias=False, device="meta"), **dtypes) <= limit * 10**8 + 4


# Memory in eight bits


@pytest.mark.parametrize("dtypes", DTYPES[2:], ids=str)
def test_narrow_memory_hardly_changes_a_step(rule: UpdateRule, dtypes: dict[str, Any]) -> None:
    params, wide, start = make_params(), make_params(), make_params()
    take_steps(LearnedOptimizer(params, weights=rule, **dtypes), params, 10)
    take_steps(LearnedOptimizer(wide, weights=rule), wide, 10)
    for narrow, exact, before in zip(params, wide, start, strict=True):
        assert (narrow - exact).norm() <= 0.03 * (exact - before).norm()
    assert not torch.equal(params[4], wide[4])


@pytest.mark.parametrize("chunk", [1, 7])
def test_neither_chunks_nor_neighbours_nor_order_change_a_bit(
    rule: UpdateRule, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (param,), (alone,), (shuffled,) = (make_params([(4, 6)]) for _ in range(3))
    order = torch.randperm(24)
    shuffled.data = shuffled.data.view(-1)[order]
    others = make_params(SHAPES)
    results = []
    for params in ([param, *others], [alone], [shuffled]):
        optimizer = LearnedOptimizer(params, weights=rule, state_dtype="int8", backend="reference")
        for step in range(4):
            (gradient,) = draw_gradients([param], step)
            for other in others:
                other.grad = torch.ones_like(other)
            params[0].grad = gradient if params[0] is not shuffled else gradient.view(-1)[order]
            optimizer.step()
        results.append(optimizer.state[params[0]])
        monkeypatch.setattr("learned_optim.backends.reference.CHUNK", chunk)
    together, single, permuted = ({n: v.view(24, -1) for n, v in s.items() if n != "step"} for s in results)
    for name, values in together.items():
        assert_close_in_storage(single[name], values)
        assert_close_in_storage(permuted[name], values[order])
    torch.testing.assert_close(alone, param, rtol=1e-3, atol=1e-3)


def assert_close_in_storage(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for numbers that lay on a threshold: off by one unit, and few."""
    if got.dtype == torch.int8:
        off = (got.int() - want.int()).abs()
        assert off.max() <= 1
        assert off.float().mean() <= 0.002
    else:
        torch.testing.assert_close(got, want, rtol=2**-7 if got.dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_the_global_generator_is_not_drawn_from() -> None:
    before = torch.get_rng_state()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        params = make_params()
        optimizer = LearnedOptimizer(params, weights=small_rule(), state_dtype="int8")
        torch.set_rng_state(before)
        take_steps(optimizer, params, 3)
        assert_identical(torch.get_rng_state(), before)
        results.append((copies(params), memories(optimizer, params)))
    assert_identical(results[0], results[1])


def test_parameters_that_began_under_another_dtype_go_on_as_they_began() -> None:
    params, alone = make_params([(5,), (6,)]), make_params([(5,), (6,)])
    optimizer = LearnedOptimizer(params, weights=small_rule(), state_dtype="int8")
    params[0].grad = torch.ones(5)
    optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = "bfloat16"
    take_steps(optimizer, params, 3)
    assert [optimizer.state[param]["hidden"].dtype for param in params] == [torch.int8, torch.bfloat16]
    single = LearnedOptimizer(alone[1:], weights=small_rule(), state_dtype="bfloat16")
    for step in range(3):
        alone[1].grad = draw_gradients(params, step)[1]
        single.step()
    torch.testing.assert_close(alone[1], params[1], rtol=1e-5, atol=1e-6)


# What a step and a load need beside the state

PEAK = """
import copy, sys
import torch
from torch import nn
from learned_optim import LearnedOptimizer, state_bytes

torch.set_num_threads(1)
backend, count, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def read(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def optimizer_of(sizes):
    params = [nn.Parameter(torch.ones(size)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    return LearnedOptimizer(params, backend=backend, state_dtype=dtype)


warm = optimizer_of((10, 3))
for _ in range(2):
    warm.step()
warm.load_state_dict(warm.state_dict())
before = read("VmRSS")
sizes = [count - 3, 3]
optimizer = optimizer_of(sizes)
state = state_bytes([param for group in optimizer.param_groups for param in group["params"]], state_dtype=dtype)
assert read("VmRSS") - before < 8 * count + 2**24, "state was allocated before a step"
for _ in range(2):
    optimizer.step()
print((read("VmHWM") - before - 8 * count - state) / 2**20)
saved = copy.deepcopy(optimizer.state_dict())
optimizer.load_state_dict(saved)
print((read("VmHWM") - before - 8 * count - 2 * state) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize(("backend", "count"), [("auto", 10_000_000), ("reference", 300_000)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_step_and_a_load_need_at_most_64_mebibytes_beside_the_state(backend: str, count: int, dtype: str) -> None:
    if backend == "auto" and (not native.available() or dtype == "float32"):
        pytest.skip("ten million parameters take the kernel, and in float32 760 MB")
    command = [sys.executable, "-c", PEAK, backend, str(count), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    stepping, loading = map(float, done.stdout.split())
    assert stepping <= 64
    assert loading <= 64
