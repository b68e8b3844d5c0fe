"""Schedules: any of torch's drives the optimizer through `lr`, a factor on the learned update, 1 by default.

    python -m examples.schedules

None is needed; here the update is warmed up for 10 steps and then faded out along a cosine.
"""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = LearnedOptimizer(model.parameters())
warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=10)
scheduler = SequentialLR(optimizer, [warm_up, CosineAnnealingLR(optimizer, T_max=90)], milestones=[10])

losses = []
for step in range(100):
    if step % 20 == 0:
        print(f"step {step}: lr {optimizer.param_groups[0]['lr']:.2f}")
    loss = (model(inputs) - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
