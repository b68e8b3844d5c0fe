"""`torch.compile` of the whole optimizer step: one graph, compiled once to create the state and once to use it.

    python -m examples.compiled_step

A rate that changes must be a tensor, or each new value is compiled anew. `fullgraph=True` works where no scheduler is
attached: torch's schedulers wrap `step` in a function that the compiler leaves alone.
"""

import argparse

import torch
from torch import nn

from learned_optim import LearnedOptimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", default="inductor", help="aot_eager needs no compiler")
backend = parser.parse_args().backend

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = LearnedOptimizer(model.parameters(), lr=torch.tensor(1.0))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
step = torch.compile(optimizer.step, backend=backend)

losses = []
for _ in range(100):
    loss = (model(inputs) - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    step()
    scheduler.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
