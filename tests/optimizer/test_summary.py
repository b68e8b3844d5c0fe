"""``summary``: what it says is what there is."""

import pytest
import torch
from torch import nn

from learned_optim import LearnedOptimizer, UpdateRule, Weights, state_bytes
from learned_optim.backends import backend_in_use
from learned_optim.backends.native.sequence import native_available
from tests.cases import make_params, small_rule, take_steps


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_line_for_each_group_and_a_total() -> None:
    rules = small_rule("paper-raw"), small_rule("adam-modulation-time")
    weights = [Weights(rule, name) for rule, name in zip(rules, ("first", "second"), strict=True)]
    groups = [
        {"params": make_params([(3, 4), (1200,)])},
        {"params": make_params([(7,)]), "weights": weights[1], "lr": 0.5, "state_dtype": torch.bfloat16},
    ]
    optimizer = LearnedOptimizer(groups, weights=weights[0], backend="reference")
    header, *lines, total = optimizer.summary().splitlines()
    assert columns(header) == [
        *("group", "weights", "fingerprint", "rule", "lr"),
        *("parameters", "state bytes", "bytes/parameter", "backend"),
    ]
    first, second = (w.fingerprint[:12] for w in weights)
    size = [1212 * 320 + 2 * 4, 7 * (3 * 4 + 2 * 2 * 8) + 4]
    assert columns(lines[0]) == ["0", "first", first, "paper 2x20", "1", "1,212", f"{size[0]:,}", "320", "reference"]
    assert columns(lines[1]) == [
        "1",
        "second",
        second,
        "adam-modulation 2x4",
        "0.5",
        "7",
        f"{size[1]}",
        "44.57",
        "reference",
    ]
    assert columns(total) == ["total", "1,219", f"{sum(size):,}", f"{sum(size) / 1219:.4g}"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_the_bytes_of_state_are_those_allocated(rule: UpdateRule, dtype: torch.dtype) -> None:
    params = [*make_params(), *make_params([(3, 2)], torch.float64), *make_params([(5,)], torch.complex64)]
    optimizer = LearnedOptimizer(params, weights=rule, state_dtype=dtype)
    before = optimizer.summary()
    assert not optimizer.state
    take_steps(optimizer, params, 1)
    assert optimizer.summary() == before
    allocated = sum(value.nbytes for memory in optimizer.state.values() for value in memory.values())
    assert f" {allocated:,} " in before.splitlines()[-1] + " "


def test_state_in_another_layout_than_the_options_name_is_counted_as_it_is() -> None:
    params = make_params([(7,)])
    optimizer = LearnedOptimizer(params, weights=small_rule())
    take_steps(optimizer, params, 1)
    before = optimizer.summary()
    optimizer.param_groups[0]["state_dtype"] = "int8"
    assert optimizer.summary() == before


def test_lazy_parameters_are_named_and_not_counted() -> None:
    lazy = nn.LazyLinear(2)
    optimizer = LearnedOptimizer(lazy.parameters(), weights=small_rule())
    assert optimizer.summary().splitlines()[-1].startswith("group 0 has 2 parameters of lazy modules")
    with pytest.raises(ValueError, match=r"no shape yet.*forward pass"):
        state_bytes(nn.LazyLinear(2))
    lazy(torch.ones(1, 3))
    assert columns(optimizer.summary().splitlines()[-1])[1] == "8"


def test_a_rate_that_is_small_for_a_factor_is_named() -> None:
    optimizer = LearnedOptimizer([{"params": make_params()}, {"params": make_params()}], weights=small_rule())
    optimizer.param_groups[1]["lr"] = 6e-4
    assert (
        optimizer.summary().splitlines()[-1] == "group 1 multiplies the learned update by lr=0.0006; 1 is the usual factor"
    )


def test_the_backend_named_is_the_one_that_runs() -> None:
    single, double = small_rule(), small_rule().double()
    compiled = "native" if native_available() else "reference"
    assert backend_in_use("auto", single) == compiled
    assert backend_in_use("reference", single) == "reference"
    assert backend_in_use("auto", double) == "reference"
    mixed = LearnedOptimizer([*make_params(), *make_params(dtype=torch.float64)], weights=single)
    assert mixed.summary().splitlines()[1].endswith(", ".join(sorted({compiled, "reference"})))


def test_a_group_without_parameters_has_a_line_too() -> None:
    optimizer = LearnedOptimizer([{"params": make_params()}, {"params": []}], weights=small_rule())
    assert columns(optimizer.summary().splitlines()[2])[-3:] == ["0", "0", "0"]


def test_the_bytes_of_the_readme() -> None:
    model = nn.Linear(1000, 100, bias=False)
    sizes = (("default", None, "76"), ("default", "bfloat16", "44"), ("default", "int8", "26"), ("quadratic", None, "320"))
    for weights, dtype, expected in sizes:
        optimizer = LearnedOptimizer(model.parameters(), weights=weights, state_dtype=dtype)
        assert columns(optimizer.summary().splitlines()[1])[-2] == expected
