"""Accelerate: prepare the optimizer with everything else; `save_state` and `load_state` carry the LSTM's memory.

python -m examples.accelerate_loop
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
inputs = torch.randn(512, 8)
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
loader = DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, LearnedOptimizer(model.parameters()), loader)

losses = []
with tempfile.TemporaryDirectory() as folder:
    for epoch in range(30):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        if epoch == 10:
            accelerator.save_state(folder)
            accelerator.load_state(folder)
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
