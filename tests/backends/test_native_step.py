"""The fused CPU step against the reference, coordinate for coordinate."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from learned_optim import UpdateRule, build_rule
from learned_optim.backends import chunks, native, native_library
from learned_optim.backends.chunks import StepItem

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels were not built: no C compiler")

SIZES = [("paper", layers, hidden) for layers, hidden in ((1, 1), (2, 3), (3, 9), (2, 20))]
SIZES += [("adam-modulation", layers, hidden) for layers, hidden in ((1, 1), (1, 8), (2, 5), (3, 13))]
COUNTS = (1, 3, 31, 32, 33, 203)


def wide_rule(family: str, layers: int, hidden: int, seed: int = 0) -> UpdateRule:
    """A rule whose gates saturate too."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {"num_layers": layers, "hidden_size": hidden}
    if family == "paper":
        config |= {"inputs": "log_and_sign" if hidden % 2 else "raw", "output_scale": 0.1}
    else:
        config |= {"time_scales": tuple(10.0**k for k in range(layers - 1))}
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
        memory = rule.initial_memory(count, torch.empty(0))
        for name in ("hidden", "cell"):
            memory[name] = memory[name].to(memory_dtype)
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
    options = {"lr": 0.5, "weight_decay": 0.0, "maximize": False, **options}
    for step in range(steps):
        draw_gradients(items, step)
        for item, other in zip(items, others, strict=True):
            other.grad.copy_(item.grad)
            other.step.copy_(item.step)
        native.apply_step(rule, items, **options)
        chunks.apply_step(rule, others, **options)
    assert_agree(items, others, rtol, atol)


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that the kernel, not the reference, takes the step."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the native backend handed a step to the reference")

    fake = type("chunks", (), {"apply_step": staticmethod(refuse)})
    monkeypatch.setattr(native, "chunks", fake)


@pytest.fixture(params=["plain", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every variant that this processor has."""
    library, wanted = native_library.LIBRARY, ("plain", "avx2", "avx512").index(request.param)
    library.learned_optim_limit_isa(wanted)  # type: ignore[union-attr]
    try:
        if library.learned_optim_isa() != wanted:  # type: ignore[union-attr]
            pytest.skip(f"this processor has no {request.param}")
        yield
    finally:
        library.learned_optim_limit_isa(2)  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_reference", "instruction_set")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_hundred_steps_equal_the_reference(size: tuple[str, int, int]) -> None:
    rule = wide_rule(*size)
    assert native.supports(rule)
    compare(rule, draw_items(rule), 100, rtol=1e-5, atol=1e-5)
