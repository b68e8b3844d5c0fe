"""The bundled default rule trains models of many kinds, with nothing passed in, and never diverges."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim import LearnedOptimizer


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.out = nn.Embedding(8, 12), nn.LSTM(12, 12, batch_first=True), nn.Linear(12, 8)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.lstm(self.table(words))[0]).flatten(0, 1)


MODELS = {
    "linear": (lambda: nn.Linear(16, 4), False),
    "dense": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), False),
    "deep": (lambda: nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(16, 16), nn.Tanh())], nn.Linear(16, 4)), False),
    "conv": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
        ),
        False,
    ),
    "attention": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (4, 4)),
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(16, 4),
        ),
        False,
    ),
    "recurrent": (Recurrent, True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss_scale", [1e-4, 1.0, 1e4])
def test_it_trains_whatever_the_scale_of_the_loss(name: str, loss_scale: float) -> None:
    make, reads_words = MODELS[name]
    torch.manual_seed(0)
    model = make()
    inputs = torch.randn(256, 16) if not reads_words else torch.arange(8).repeat(256, 2)[:, :9]
    labels = inputs[:, :4].argmax(1) if not reads_words else inputs[:, 1:]
    inputs = inputs if not reads_words else inputs[:, :-1]
    optimizer = LearnedOptimizer(model.parameters())
    losses = []
    for _ in range(150):
        rows = torch.randint(256, (32,))
        loss = F.cross_entropy(model(inputs[rows]), labels[rows].flatten())
        optimizer.zero_grad()
        (loss_scale * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:3]) / 3 * 10
    assert max(losses) < 3 * losses[0]
