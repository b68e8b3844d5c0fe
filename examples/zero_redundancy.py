"""Optimizer memory split over data-parallel processes: ZeroRedundancyOptimizer takes the class and its options.

    python -m examples.zero_redundancy

An LSTM's memory is several times a model's size, so sharing it out pays even where Adam's would not.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from learned_optim import LearnedOptimizer

WORLD = 2


def train(rank: int, folder: str) -> None:
    """Train on this rank's share of the data, with this rank's share of the memory."""
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=dist.FileStore(f"{folder}/store", WORLD))
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]
    mine = slice(rank, None, WORLD)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    )
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=LearnedOptimizer, lr=1.0)

    losses = []
    for _ in range(100):
        loss = (model(inputs[mine]) - targets[mine]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"rank {rank} keeps the memory of {len(optimizer.optim.state)} of {len(list(model.parameters()))} tensors")
    dist.barrier()
    if rank == 0:
        print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (folder,), nprocs=WORLD)
