"""Mixed precision, accumulated and clipped gradients: unscale before you clip, as with any optimizer.

    python -m examples.mixed_precision

`GradScaler` matters in float16; with the bfloat16 of this CPU run it changes nothing, nor does it harm. A step that it skips
leaves the LSTM's memory alone.
"""

import torch
from torch import nn

from learned_optim import LearnedOptimizer

ACCUMULATE = 4
torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = LearnedOptimizer(model.parameters())
scaler = torch.amp.GradScaler("cpu")

losses = []
for _ in range(100):
    total = 0.0
    for x, y in zip(inputs.chunk(ACCUMULATE), targets.chunk(ACCUMULATE), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x).float() - y).square().mean() / ACCUMULATE
        scaler.scale(loss).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    losses.append(total)
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
