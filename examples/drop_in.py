"""Everything around an optimizer stays as it was: groups, a schedule, clipping, a checkpoint.

python -m examples.drop_in
"""

import io

import torch
from torch import nn

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
decayed = [p for p in model.parameters() if p.dim() > 1]
plain = [p for p in model.parameters() if p.dim() <= 1]
optimizer = LearnedOptimizer([{"params": decayed, "weight_decay": 0.1}, {"params": plain}])
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]


def train(steps: int) -> float:
    """Take some steps and return the last loss."""
    for _ in range(steps):
        rows = torch.randint(512, (64,))
        loss = (model(inputs[rows]) - targets[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return loss.item()


first = train(1)
middle = train(99)
checkpoint = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
checkpoint.seek(0)
saved = torch.load(checkpoint, weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
print(f"loss {first:.3f} at the start, {middle:.3f} at step 100, resumed, {train(100):.3f} at step 200")
