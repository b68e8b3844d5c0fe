"""Weights of its own for each layer: a parameter group may name the learned rule that trains it.

    python -m examples.layer_weights

The readout of a regression net sees a quadratic, for which the `quadratic` weights were made; the layers below it do not.
"""

import torch
from torch import nn

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
body, readout = model[0], model[2]
optimizer = LearnedOptimizer(
    [
        {"params": body.parameters(), "weight_decay": 0.1},
        {"params": readout.parameters(), "weights": "quadratic", "lr": 0.3},
    ]
)
for group in optimizer.param_groups:
    print(group["weights"], [tuple(param.shape) for param in group["params"]])

losses = []
for _ in range(100):
    loss = (model(inputs) - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
