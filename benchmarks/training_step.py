"""Whole training steps of real models: forward, backward and optimizer, the default rule beside Adam.

python -m benchmarks.training_step [--threads N]
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from benchmarks.timing import side_by_side, write_table
from learned_optim import LearnedOptimizer
from meta_train.tasks.case import classification_loss
from meta_train.tasks.modules import CharTransformer, conv_net, mlp

MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]] = {
    "MLP 784-20-10, batch 128": lambda: (
        mlp([784, 20, 10], nn.Sigmoid),
        (torch.randn(128, 784), torch.randint(0, 10, (128,))),
    ),
    "MLP 784-128-128-10, batch 128": lambda: (
        mlp([784, 128, 128, 10], nn.ReLU),
        (torch.randn(128, 784), torch.randint(0, 10, (128,))),
    ),
    "convolutions 16-32-32, batch norm, batch 32": lambda: (
        conv_net([3, 16, 32, 32], 32, 10, batch_norm=True),
        (torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))),
    ),
    "transformer, width 128, depth 4, 64 x 16": lambda: (
        CharTransformer(64, 64, 128, 4),
        (torch.randint(0, 64, (16, 64)), torch.randint(0, 64, (16, 64))),
    ),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Adam": Adam,
    "Adam, fused": lambda params: Adam(params, fused=True),
    "LearnedOptimizer": LearnedOptimizer,
    "LearnedOptimizer, average=True": lambda params: LearnedOptimizer(params, average=True),
    "LearnedOptimizer, matrix=False": lambda params: LearnedOptimizer(params, matrix=False),
}


def training_step(model: str, optimizer: str) -> tuple[Callable[[], object], int]:
    """Return a function that trains a fresh model for one step, and the model's size."""
    torch.manual_seed(0)
    module, batch = MODELS[model]()
    params = list(module.parameters())
    update = OPTIMIZERS[optimizer](params)

    def step() -> None:
        update.zero_grad()
        classification_loss(module, batch).backward()
        update.step()

    return step, sum(param.numel() for param in params)


def main() -> None:
    """Time every model with every optimizer side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    torch.set_num_threads(parser.parse_args().threads)
    rows = []
    for model in MODELS:
        steps = {name: training_step(model, name) for name in OPTIMIZERS}
        seconds = side_by_side({name: run for name, (run, _) in steps.items()}, repeats=20)
        for name, value in seconds.items():
            ratio, size = value / seconds["Adam"], steps[name][1]
            print(f"{model:<46}{name:<32}{ratio:>6.2f} x Adam")
            rows.append({"model": model, "parameters": size, "optimizer": name, "times_adam": f"{ratio:.3f}"})
    write_table("training_step", rows)


if __name__ == "__main__":
    main()
