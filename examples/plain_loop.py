"""The plain loop: replace the line that builds the optimizer, and nothing else.

python -m examples.plain_loop
"""

import torch
from torch import nn

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = LearnedOptimizer(model.parameters())

losses = []
for _ in range(100):
    loss = (model(inputs) - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
