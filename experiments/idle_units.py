"""How many hidden units of a ReLU net on MNIST are switched off by an optimizer: zero on every one of a thousand digits.

    python -m experiments.idle_units --data DIR

Nets of 784-20-10 units as `evaluate --task mnist-relu` judges them. Beside the rule that was meta-trained on sigmoids,
`default` and Adam at the rate that is best there.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import write_table
from learned_optim import Weights
from meta_train.judging.arenas import ARENAS
from meta_train.judging.baselines import MakeOptimizer, Setting
from meta_train.judging.contestants import learned_with
from meta_train.tasks.images import MNIST, read_images
from meta_train.tasks.mnist import HALVES

NETS, DIGITS, STEPS = 20, 1000, (0, 5, 20, 100)


def idle_share(make: MakeOptimizer, data: Path, images: Tensor, seed: int) -> list[float]:
    """Train one net; return the share of its hidden units that are off after each of the steps."""
    optimizee = ARENAS["mnist-relu"].on(data).task.sample(seed)
    params = {name: nn.Parameter(value[0].clone()) for name, value in optimizee.params.items()}
    optimizer = make(params.items())
    shares = []
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            off = images @ params["weight0"] + params["bias0"] <= 0
            shares.append(float(off.all(0).float().mean()))
        optimizer.zero_grad()
        optimizee.losses({name: value.unsqueeze(0) for name, value in params.items()}).sum().backward()
        optimizer.step()
    return shares


def main() -> None:
    """Train nets with each optimizer, print and keep the mean shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with ylecun/mnist")
    data = parser.parse_args().data
    images = read_images(MNIST, data, "train", HALVES["second"])[0][:DIGITS].flatten(1).float() / 255
    rules = {name: learned_with(Weights.from_pretrained(name)) for name in ("mnist-mlp", "default")}
    rows = []
    for name, make in {**rules, "Adam(0.0316)": Setting("Adam", 0.0316).make}.items():
        shares = torch.tensor([idle_share(make, data, images, seed) for seed in range(NETS)]).mean(0)
        row = {f"off_after_{step}": f"{share:.2f}" for step, share in zip(STEPS, shares.tolist(), strict=True)}
        rows.append({"optimizer": name, **row, "nets": NETS, "digits": DIGITS})
        print(json.dumps(rows[-1]))
    write_table("idle_units", rows, Path(__file__).parent)


if __name__ == "__main__":
    main()
