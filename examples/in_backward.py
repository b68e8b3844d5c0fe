"""The optimizer inside the backward pass: each gradient is used and freed as soon as it is there.

    python -m examples.in_backward

One optimizer for each parameter. They share one copy of the learned weights.
"""

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizers = {param: LearnedOptimizer([param]) for param in model.parameters()}


def step(param: Tensor) -> None:
    """Use a parameter's gradient and free it."""
    optimizers[param].step()
    optimizers[param].zero_grad()


for param in model.parameters():
    param.register_post_accumulate_grad_hook(step)

losses = []
for _ in range(100):
    loss = (model(inputs) - targets).square().mean()
    loss.backward()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
