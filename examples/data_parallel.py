"""Data parallel: two processes, each with half of every batch, one model.

    python -m examples.data_parallel

Every rank takes the same step on the averaged gradients, so the ranks stay equal. With `torchrun` call `train` yourself.
"""

import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from learned_optim import LearnedOptimizer

WORLD = 2


def train(rank: int, folder: str) -> None:
    """Train on this rank's share of the data."""
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=dist.FileStore(f"{folder}/store", WORLD))
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
    mine = slice(rank, None, WORLD)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)))
    optimizer = LearnedOptimizer(model.parameters())

    losses = []
    for _ in range(100):
        loss = (model(inputs[mine]) - targets[mine]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if rank == 0:
        print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    time.sleep(0.1)  # Gloo's threads may still hold old sums; a process that ends before they let go is aborted.
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (folder,), nprocs=WORLD)
