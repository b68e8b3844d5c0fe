"""Lightning's loops give the numbers of a plain one, and its checkpoints resume to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.cases import assert_identical
from tests.integrations.training import (
    Batch,
    averages_of,
    end_of,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    plain_averages,
    plain_run,
)

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.filterwarnings("ignore")  # Advice on data loaders, and deprecations that are Lightning's own.

EPOCH = 4


class Regression(lightning.LightningModule):
    def __init__(self, automatic: bool = True, schedule: bool = False, average: bool = False) -> None:
        super().__init__()
        self.model = make_model()
        self.automatic_optimization = automatic
        self.schedule, self.average = schedule, average

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = loss_of(self.model, batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self, average=self.average)
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: Regression, epochs: int = 1, checkpoint: Path | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    resume = {} if checkpoint is None else {"ckpt_path": checkpoint, "weights_only": True}
    trainer.fit(module, DataLoader(make_batches(EPOCH), batch_size=None), **resume)
    return trainer


def run_of(module: Regression, trainer: Any) -> Any:
    return end_of(module.model, trainer.optimizers[0])


@pytest.mark.parametrize("automatic", [True, False])
def test_automatic_and_manual_optimisation_equal_a_plain_loop(automatic: bool) -> None:
    module = Regression(automatic)
    assert_identical(run_of(module, fit(module)), plain_run(make_batches(EPOCH)))


def test_clipping_accumulation_and_a_schedule_equal_a_plain_loop() -> None:
    module = Regression(schedule=True)
    trainer = fit(module, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    model = make_model()
    optimizer = make_optimizer(model)
    batches = make_batches(EPOCH)
    for number, pair in enumerate((batches[:2], batches[2:])):
        optimizer.param_groups[0]["lr"] = 0.5**number
        optimizer.zero_grad()
        for batch in pair:
            (loss_of(model, batch) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    assert_identical(run_of(module, trainer), end_of(model, optimizer))


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_checkpoint_resumes_to_the_last_bit(automatic: bool, precision: Any, tmp_path: Path) -> None:
    whole = Regression(automatic, schedule=True)
    expected = run_of(whole, fit(whole, epochs=2, precision=precision))
    first = Regression(automatic, schedule=True)
    fit(first, precision=precision).save_checkpoint(tmp_path / "half.ckpt")
    second = Regression(automatic, schedule=True)
    nn.init.zeros_(second.model[0].weight)
    trainer = fit(second, epochs=2, precision=precision, checkpoint=tmp_path / "half.ckpt")
    assert expected.params[0].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert expected.memory[0]["step"] == 2 * EPOCH
    assert_identical(run_of(second, trainer), expected)


@pytest.mark.parametrize("automatic", [True, False])
def test_averaged_weights_are_those_of_a_plain_loop_and_survive_a_checkpoint(automatic: bool, tmp_path: Path) -> None:
    first = Regression(automatic, average=True)
    trainer = fit(first)
    (optimizer,) = trainer.optimizers
    assert_identical(averages_of(first.model, optimizer), plain_averages(make_batches(EPOCH)))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Regression(automatic, average=True)
    trainer = fit(second, epochs=2, checkpoint=tmp_path / "half.ckpt")
    assert_identical(averages_of(second.model, trainer.optimizers[0]), plain_averages(make_batches(EPOCH) * 2))
