"""Choose the optimizer by name: register it in a factory, here that of pytorch_optimizer.

    python -m examples.optimizer_factory

Mind the rate: the factory's own default is 1e-3, and `lr` is a factor on the learned update.
"""

import torch
from pytorch_optimizer import create_optimizer
from pytorch_optimizer.optimizer import OPTIMIZERS
from torch import nn

from learned_optim import LearnedOptimizer

OPTIMIZERS["learned"] = LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = create_optimizer(model, "learned", lr=1.0, weight_decay=0.1)

losses = []
for _ in range(100):
    loss = (model(inputs) - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
