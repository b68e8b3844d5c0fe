"""The kernels read and write inside their tensors alone, at every size where a loop begins or ends.

Each step is taken twice: on tensors that end where their allocation ends, and on tensors at odd addresses between fences.
The results are equal to the last bit, and no fence has changed. ``make sanitize`` runs this module on kernels built with the
address sanitizer, which sees a read outside as well.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim.backends.items import StepItem, StepOptions
from learned_optim.backends.native import step as native
from learned_optim.backends.native.sequence import native_sequence
from tests.backends.test_native_lstm import make_lstm
from tests.backends.test_native_step import draw_gradients, draw_items, stepper, wide_rule
from tests.cases import assert_identical, copies, make_params, take_steps

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels were not built: no C compiler")

BLOCKS = (16, 32, 64)
"""Coordinates that the kernel takes at once, for each instruction set."""

COUNTS = (0, 1, 3, 4, 5, *(size + more for size in (*BLOCKS, 2 * 64) for more in (-1, 0, 1)))
WHOLE, PIECE = 1024, 32768
"""Up to WHOLE coordinates are left to one thread; squares are summed by PIECE."""

LSTMS = [(layers, hidden) for layers in (1, 2) for hidden in range(1, 21)]
MEMORY_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
FENCE = 77


def exact(tensor: Tensor) -> Tensor:
    """Return a copy that fills its allocation."""
    return tensor.clone()


class Fences:
    """Copies of tensors at odd addresses, each between two fences of 67 numbers."""

    def __init__(self) -> None:
        self._fenced: list[tuple[Tensor, int]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a copy that lies between fences."""
        size = tensor.numel()
        allocation = torch.full((size + 2 * 67,), FENCE, dtype=tensor.dtype)
        allocation[67 : 67 + size] = tensor.flatten()
        self._fenced.append((allocation, size))
        return allocation[67 : 67 + size].view(tensor.shape)

    def hold(self) -> bool:
        """Return whether no fence has changed."""
        return all(
            bool((allocation[:67] == FENCE).all()) and bool((allocation[67 + size :] == FENCE).all())
            for allocation, size in self._fenced
        )


def placed(items: list[StepItem], place: Callable[[Tensor], Tensor]) -> list[StepItem]:
    """Return the items with every tensor copied by ``place``."""
    return [
        StepItem(
            place(item.param),
            place(item.grad),
            {name: place(value) for name, value in item.memory.items()},
            place(item.step),
            None if item.scale is None else place(item.scale),
        )
        for item in items
    ]


def step_twice(rule: native.UpdateRule, items: list[StepItem]) -> None:
    """Compare a step between fences with one in allocations that fit."""
    draw_gradients(items, 5)
    fences = Fences()
    outcomes = []
    for place in (exact, fences):
        twins = placed(items, place)
        native.apply_step(rule, twins, StepOptions.of(0.5, 0.1, False))
        outcomes.append([(item.param, item.memory) for item in twins])
    assert_identical(*outcomes)
    assert fences.hold()


def test_fences_notice_a_write() -> None:
    fences = Fences()
    inside = fences(torch.zeros(3))
    assert fences.hold()
    torch.as_strided(inside, (1,), (1,), inside.storage_offset() + 3).zero_()
    assert not fences.hold()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES, ids=str)
@pytest.mark.parametrize("family", ["paper", "adam-modulation"])
def test_every_lstm_stays_within_its_tensors(family: str, memory_dtype: torch.dtype) -> None:
    for layers, hidden in LSTMS:
        rule = wide_rule(family, layers, hidden)
        step_twice(rule, draw_items(rule, COUNTS, memory_dtype=memory_dtype))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [("paper", 2, 20), ("adam-modulation", 1, 8), ("adam-modulation", 1, 16)], ids=str)
def test_parameters_of_every_dtype_and_low_precision_moments(size: tuple[str, int, int], dtype: torch.dtype) -> None:
    rule = wide_rule(*size)
    items = draw_items(rule, COUNTS, dtype)
    for item in items:
        item.memory.update({name: item.memory[name].bfloat16() for name in rule.moment_names})
    step_twice(rule, items)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("border", [WHOLE, PIECE])
def test_tensors_shared_among_threads(border: int) -> None:
    rule = wide_rule("adam-modulation", 1, 8)
    torch.set_num_threads(3)
    try:
        for more in (-1, 0, 1):
            step_twice(rule, draw_items(rule, (border + more, 5, border + more)))
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("steps", [1, 3])
def test_sequences_stay_within_their_tensors(steps: int) -> None:
    for layers, hidden in LSTMS:
        inputs = 1 + hidden % 9
        lstm, _ = make_lstm(layers, hidden, inputs)
        for count in (0, 1, *(size + more for size in BLOCKS[:2] for more in (-1, 1))):
            drawn = torch.randn(steps, count, inputs), *torch.randn(2, count, layers * hidden)
            active = torch.rand(steps, count) > 0.3
            outcomes, fences = [], Fences()
            for place in (exact, fences):
                x, before, cell = map(place, drawn)
                lstm.zero_grad()
                tops = native_sequence(lstm, x, (before, cell), place(active.to(torch.uint8)).view(torch.bool))
                tops.sum().backward()
                outcomes.append([tops.detach(), *copies(p.grad for p in lstm.parameters() if p.grad is not None)])
            assert_identical(*outcomes)
            assert fences.hold()


PLANNED = [{}, {"state_dtype": "int8"}, {"moment_dtype": "bfloat16"}, {"matrix": True}, {"average": True}]


@pytest.mark.parametrize("options", PLANNED, ids=str)
def test_planned_steps_follow_tensors_that_are_replaced_and_freed(options: dict[str, Any]) -> None:
    results = []
    for backend in ("native", "reference"):
        params = make_params(((5,), (33,), (0,), (1025,), (3, 5), (33, 17)))
        optimizer = stepper("adam-modulation-matrix", params, backend=backend, **options)
        for round_ in range(4):
            take_steps(optimizer, params, 2, first=2 * round_)
            for param in params:  # Whatever a plan remembers is freed: gradients, parameters, states.
                param.grad = None
                torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone()))
                for value in optimizer.state[param].values():
                    torch.utils.swap_tensors(value, value.clone())
            _ = [torch.full((size,), torch.nan) for size in range(1, 200)]  # Freed memory that is read would show.
        results.append(copies(params))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
