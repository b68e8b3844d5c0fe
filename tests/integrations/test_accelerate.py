"""Accelerate's prepare, its accumulation, clipping and mixed precision, and its saved state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.cases import assert_identical
from tests.integrations.training import (
    Run,
    averages_of,
    end_of,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    plain_averages,
    plain_run,
)

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the settings of the first Accelerator of a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(dtype: torch.dtype = torch.float32, average: bool = False, **options: Any) -> tuple[Any, ...]:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = make_model(dtype)
    optimizer = make_optimizer(model, average=average)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loader = DataLoader(make_batches(4), batch_size=None)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def train(accelerator: Any, model: nn.Module, optimizer: Any, loader: Any, scheduler: Any, clip: float | None = None) -> Run:
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return end_of(model, optimizer.optimizer)


def test_a_prepared_optimizer_equals_a_plain_loop() -> None:
    def decay(_: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] = 0.5 ** (len(rates) - 1)

    rates: list[float] = []
    assert_identical(train(*prepared()), plain_run(make_batches(4), before_step=decay))


def test_accumulation_and_clipping_equal_a_plain_loop() -> None:
    ran = train(*prepared(gradient_accumulation_steps=2), clip=1e-3)
    model = make_model()
    optimizer = make_optimizer(model)
    batches = make_batches(4)
    for number, pair in enumerate((batches[:2], batches[2:])):
        optimizer.param_groups[0]["lr"] = 0.5**number
        for batch in pair:
            (loss_of(model, batch) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert_identical(ran, end_of(model, optimizer))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "no"), (torch.float32, "bf16"), (torch.bfloat16, "no")])
def test_saved_state_resumes_to_the_last_bit(dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    accelerator, *rest = prepared(dtype, mixed_precision=precision)
    train(accelerator, *rest)
    accelerator.save_state(tmp_path)
    expected = train(accelerator, *rest)
    assert expected.memory[0]["step"] == 8

    again, *others = prepared(dtype, mixed_precision=precision)
    nn.init.zeros_(others[0][0].weight)
    again.load_state(tmp_path)
    assert_identical(train(again, *others), expected)


def test_averaged_weights_are_those_of_a_plain_loop_and_survive_saved_state(tmp_path: Path) -> None:
    def run(accelerator: Any, model: nn.Module, optimizer: Any, loader: Any, _: Any) -> list[torch.Tensor]:
        for batch in loader:
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        return averages_of(accelerator.unwrap_model(model), optimizer.optimizer)

    first = prepared(average=True)
    assert_identical(run(*first), plain_averages(make_batches(4)))
    first[0].save_state(tmp_path)
    second = prepared(average=True)
    second[0].load_state(tmp_path)
    assert_identical(run(*second), plain_averages(make_batches(4) * 2))
