"""Lightning: return the optimizer from `configure_optimizers`; checkpoints hold the LSTM's memory and resume exactly.

    python -m examples.lightning_trainer

Manual optimisation works too: `self.optimizers()` gives an optimizer like any other.
"""

import tempfile

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer


class Regression(lightning.LightningModule):
    """A small net and the losses it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss on a batch."""
        inputs, targets = batch
        loss = (self.net(inputs) - targets).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> LearnedOptimizer:
        """Return the optimizer."""
        return LearnedOptimizer(self.parameters())


def make_trainer(epochs: int) -> lightning.Trainer:
    """Build a quiet trainer."""
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
loader = DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True)

with tempfile.TemporaryDirectory() as folder:
    first, trainer = Regression(), make_trainer(epochs=5)
    trainer.fit(first, loader)
    trainer.save_checkpoint(f"{folder}/five-epochs.ckpt")
    second = Regression()
    make_trainer(epochs=15).fit(second, loader, ckpt_path=f"{folder}/five-epochs.ckpt")
print(f"loss {first.losses[0]:.3f} at the start, {first.losses[-1]:.3f} saved, {second.losses[-1]:.3f} at the end")
