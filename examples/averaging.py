"""An average of the weights along the way, to evaluate, save and ship: no decay to choose, no schedule and no horizon.

python -m examples.averaging
"""

import torch
from torch import nn

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = LearnedOptimizer(model.parameters(), average=True)


@torch.no_grad()
def evaluate() -> float:
    """Return the loss on all data."""
    return (model(inputs) - targets).square().mean().item()


first = evaluate()
for _ in range(300):
    rows = torch.randint(512, (8,))
    loss = (model(inputs[rows]) - targets[rows]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"without averaging {evaluate():.3f}")
with optimizer.averaged():  # The weights come back at the end of the block.
    print(f"loss {first:.3f} at the start, {evaluate():.3f} at the end")

shipped = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
shipped.load_state_dict(optimizer.averaged_state_dict(model))
