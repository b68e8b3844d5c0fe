"""What a planned step must refuse or hold on to, beside what ``test_native_step.py`` has it follow."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from learned_optim import LearnedOptimizer
from learned_optim.backends.native import library as native_library
from learned_optim.backends.native import plan as native_plan
from learned_optim.backends.native import step as native_step
from tests.cases import assert_identical, copies, make_params, small_rule, take_steps

pytestmark = pytest.mark.skipif(not native_plan.POSSIBLE, reason="no kernels, or a torch without what plans need")


def planned(params: list[nn.Parameter], **options: object) -> LearnedOptimizer:
    """An optimizer that has taken two steps."""
    optimizer = LearnedOptimizer(params, weights=small_rule(), **options)  # type: ignore[arg-type]
    take_steps(optimizer, params, 2)
    return optimizer


def test_kernels_built_from_other_sources_are_not_loaded() -> None:
    assert native_library.load(native_library.source_digest()) is not None
    assert native_library.load("of other sources") is None


def test_where_no_sources_lie_any_library_is_taken(tmp_path: Path) -> None:
    assert native_library.source_digest(tmp_path) is None
    assert native_library.load(None) is not None


def test_another_backend_takes_over_at_once() -> None:
    optimizer = planned(make_params(((5,),)))
    assert optimizer._repeat_step()
    optimizer.backend = "reference"
    assert not optimizer._repeat_step()


def test_gradients_are_held_until_the_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params(((5_000,), (3,)))
    optimizer = planned(params)
    gradients = [weakref.ref(param.grad.untyped_storage()) for param in params if param.grad is not None]
    alive: list[bool] = []

    def called(*arguments: object) -> None:
        optimizer.zero_grad()  # As another thread may, while the kernel runs.
        alive.extend(gradient() is not None for gradient in gradients)
        original(*arguments)  # type: ignore[arg-type]

    original = native_step.call
    monkeypatch.setattr(native_step, "call", called)
    assert optimizer._repeat_step()
    assert alive == [True, True]
    assert [gradient() for gradient in gradients] == [None, None]


def test_a_gradient_without_memory_counts_as_zeros() -> None:
    params, expected = make_params(((4,),)), make_params(((4,),))
    for tensors, zeros in ((params, torch._efficientzerotensor(4)), (expected, torch.zeros(4))):
        optimizer = planned(tensors)
        for _ in range(2):
            tensors[0].grad = zeros
            optimizer.step()
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_parameters_in_the_same_memory_take_turns(backend: str, threads: int) -> None:
    tied = make_params(((9_000,), (9_000,)))
    tied[1].data = tied[0].data
    rule = small_rule("paper-raw")  # It takes no scale of the tensor, which both are given before either moves.
    optimizer = LearnedOptimizer(tied, weights=rule, backend=backend)
    apart = make_params(((9_000,), (9_000,)))
    apart[1].data.copy_(apart[0].data)
    others = [LearnedOptimizer([param], weights=rule, backend=backend) for param in apart]
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            for param, other in zip(tied, apart, strict=True):
                param.grad = other.grad = torch.randn(9_000)
            optimizer.step()
            for number, other in enumerate(others):
                apart[number].data.copy_(apart[number - 1].data)
                other.step()
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(tied[0], apart[1], rtol=1e-5, atol=1e-5)


def test_a_double_rate_steps_the_same_before_and_after_a_checkpoint() -> None:
    params, other = make_params(((5,),)), make_params(((5,),))
    options = {"lr": torch.tensor(0.7, dtype=torch.float64), "weight_decay": 13.7}
    optimizer = planned(params, **options)
    take_steps(optimizer, params, 1, first=2)
    resumed = LearnedOptimizer(other, weights=small_rule(), **options)  # type: ignore[arg-type]
    for step in range(3):
        resumed._plan = None  # As after loading.
        take_steps(resumed, other, 1, first=step)
    assert_identical(copies(other), copies(params))
