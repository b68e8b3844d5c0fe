"""Sharded parameters (FSDP2): the memory is sharded as they are, and a checkpoint loads on any number of processes.

    python -m examples.sharded

Two processes train a third of the way and save a distributed checkpoint; one process loads it, unsharded, and goes on.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from learned_optim import LearnedOptimizer

WORLD = 2
inputs = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
targets = torch.sin(inputs[:, :1] + inputs[:, 1:2]) * inputs[:, 2:3]


def make_model() -> nn.Module:
    """Build the net; its 33 rows do not divide by 2, and need not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 1))


def train(model: nn.Module, optimizer: LearnedOptimizer, steps: int) -> list[float]:
    """Take some steps and return the losses."""
    losses = []
    for _ in range(steps):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_sharded(rank: int, folder: str) -> None:
    """Train on this rank and save."""
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=dist.FileStore(f"{folder}/store", WORLD))
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = LearnedOptimizer(model.parameters())
    losses = train(model, optimizer, 30)
    for name, value in optimizer.state[model[0].weight].items():
        if rank == 0 and hasattr(value, "to_local"):
            print(f"{name}: {tuple(value.to_local().shape)} of {tuple(value.shape)} on rank 0")
    weights, memory = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": memory}, checkpoint_id=f"{folder}/checkpoint")
    if rank == 0:
        print(f"sharded: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    dist.barrier()  # whoever leaves first takes the connection with it
    dist.destroy_process_group()


def resume_alone(folder: str) -> None:
    """Load the shards into one process and go on."""
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters())
    weights, memory = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": memory}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses = train(model, optimizer, 70)
    print(f"alone: loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_sharded, (folder,), nprocs=WORLD)
        resume_alone(folder)
