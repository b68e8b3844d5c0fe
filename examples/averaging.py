"""An average of the weights along the way (EMA), to evaluate with: it follows the optimizer and does not disturb it.

python -m examples.averaging
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
optimizer = LearnedOptimizer(model.parameters())


@torch.no_grad()
def evaluate(net: nn.Module) -> float:
    """Return the loss on all data."""
    return (net(inputs) - targets).square().mean().item()


first = evaluate(model)
for _ in range(300):
    rows = torch.randint(512, (8,))
    loss = (model(inputs[rows]) - targets[rows]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(model)
print(f"without averaging {evaluate(model):.3f}")
print(f"loss {first:.3f} at the start, {evaluate(average):.3f} at the end")
