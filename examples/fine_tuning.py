"""Fine-tuning: a net that knows one problem learns a related one, with small first steps.

    python -m examples.fine_tuning

The learned rule moves each tensor by a share of its size, whatever the tensor holds. Pretrained weights are worth more than
random ones, so take a tenth of the learned steps, `lr=0.1`, and a warm-up of some tens of steps.
"""

import copy

import torch
from torch import nn

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
directions = torch.randn(4, 32)
other = directions + 0.15 * torch.randn(4, 32)


def loss_of(model: nn.Module, classes: torch.Tensor) -> torch.Tensor:
    """Return the loss on a fresh minibatch: the class is the direction that the input points to most."""
    x = torch.randn(64, 32)
    return nn.functional.cross_entropy(model(x), (x @ classes.T).argmax(1))


pretrained = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
adam = torch.optim.Adam(pretrained.parameters(), lr=1e-3)
for _ in range(1500):
    adam.zero_grad()
    loss_of(pretrained, directions).backward()
    adam.step()


def tuned(lr: float, warm_up: int, steps: int = 200) -> list[float]:
    """Fine-tune a copy of the pretrained net; return its losses."""
    model = copy.deepcopy(pretrained)
    optimizer = LearnedOptimizer(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, other)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def mean(losses: list[float]) -> float:
    """Return the mean."""
    return sum(losses) / len(losses)


if __name__ == "__main__":
    with torch.no_grad():
        start = mean([loss_of(pretrained, other).item() for _ in range(20)])
    whole, small = tuned(1.0, 1), tuned(0.1, 50)
    print(f"loss of steps 5 to 15: {mean(whole[4:15]):.3f} with lr=1, {mean(small[4:15]):.3f} with lr=0.1 and a warm-up")
    print(f"loss {start:.3f} at the start, {mean(small[-20:]):.3f} at the end")
