"""Small rules and small parameters that the tests share."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim import UpdateRule, build_rule

needs_dynamo = pytest.mark.skipif(torch.__version__ < (2, 7), reason="Dynamo of torch 2.6 cannot follow a step")

RULE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "paper-raw": ("paper", {"output_scale": 0.1}),
    "paper-log-and-sign": (
        "paper",
        {"hidden_size": 3, "num_layers": 1, "inputs": "log_and_sign", "output_scale": 0.1},
    ),
    "adam-modulation": ("adam-modulation", {}),
    "adam-modulation-time": (
        "adam-modulation",
        {
            "hidden_size": 4,
            "num_layers": 2,
            "time_scales": (5.0, 50.0),
            "outlier_bound": 2.0,
            "step_size": 0.02,
            "min_scale": 0.02,
            "small_min_scale": 0.2,
            "max_scale": 0.9,
            "anneal_power": 0.4,
            "anneal_steps": 3.0,
            "anneal_start": 2.0,
        },
    ),
    "adam-modulation-matrix": (
        "adam-modulation",
        {
            "hidden_size": 4,
            "matrix_blend": 0.8,
            "matrix_momentum": 0.4,
            "matrix_gain": 1.5,
            "agreement_gain": 2.0,
            "agreement_floor": 0.05,
        },
    ),
}

COORDINATE_CASES = [case for case, (_, config) in RULE_CASES.items() if "matrix_blend" not in config]
"""Those whose update of a coordinate depends on no other coordinate but through the tensor's scale."""

SHAPES = ((), (1,), (5,), (3, 4), (2, 3, 2, 2), (0, 3))


def small_rule(case: str = "adam-modulation", seed: int = 0) -> UpdateRule:
    """Build an untrained rule whose every meta-parameter matters (a fresh adam-modulation readout is zero)."""
    family, config = RULE_CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule = build_rule(family, **config)
        nn.init.normal_(rule.readout.weight, std=0.5)
        nn.init.normal_(rule.readout.bias, std=0.2)
    return rule


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """Draw parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def draw_gradients(params: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Draw gradients of very different sizes; equal seeds give equal gradients whatever the dtype and layout."""
    generator = torch.Generator().manual_seed(1000 + seed)
    gradients = []
    for param in params:
        size, exponent = (torch.randn(param.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        gradients.append((size * 10**exponent).to(param.dtype))
    return gradients


def take_steps(optimizer: Optimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    """Take inner steps on drawn gradients, numbered from ``first``."""
    for step in range(first, first + steps):
        for param, gradient in zip(params, draw_gradients(params, step), strict=True):
            param.grad = gradient
        optimizer.step()


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Clone tensors, to compare with later."""
    return [tensor.detach().clone() for tensor in tensors]


def memories(optimizer: Optimizer, params: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """Clone each parameter's state."""
    return [{name: value.detach().clone() for name, value in optimizer.state[param].items()} for param in params]


def assert_stored_alike(got: Tensor, want: Tensor) -> None:
    """Equal but for numbers that lay on a threshold, which may fall on its other side: few, and by one unit.

    Moments that all but cancel may differ by the round-off of what cancelled.
    """
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    elif got.dtype == torch.int8:
        assert (got.int() - want.int()).abs().max() <= 1
    else:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-7 * float(want.abs().max()))
    if got.dtype != torch.float32:
        assert (got != want).double().mean() <= 0.005


def assert_identical(actual: Any, expected: Any) -> None:
    """Compare values, dtypes and shapes with no tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
