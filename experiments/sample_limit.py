"""What the digits of a hundred minibatches teach a net that may look at them as often as it likes.

    python -m experiments.sample_limit --data DIR

An optimizer of `evaluate --task mnist` sees each minibatch once. Here Adam trains the same net on what the minibatches of
so many steps hold, for thousands of steps; the lowest loss on that half of MNIST is kept. Thereabouts an optimizer would end
that wasted nothing of what it saw; a little above, as the lowest is chosen by the loss that is reported.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import write_table
from meta_train.tasks.images import MNIST, read_images
from meta_train.tasks.mnist import HALVES, Mnist

NETS, RATE, STEPS, EVERY = 10, 3e-3, 4000, 50
BEFORE_LAST = {100: 95, 200: 195}
"""The loss at a step is the mean of ten minibatches; of those before it, about so many were learned from."""


def lowest_loss(images: torch.Tensor, labels: torch.Tensor, minibatches: int, seed: int) -> float:
    """Train one net on a fixed sample; return its lowest loss on all images."""
    task, generator = Mnist(), torch.Generator().manual_seed(seed)
    seen = torch.randint(len(images), (minibatches * task.batch,), generator=generator)
    start = task.sample_from(images, labels, seed).params
    w0, b0, w1, b1 = params = [value[0].clone().requires_grad_() for value in start.values()]
    x = images.flatten(1).float() / 255
    optimizer, lowest = torch.optim.Adam(params, lr=RATE), float("inf")
    for step in range(1, STEPS + 1):
        batch = seen[torch.randint(len(seen), (task.batch,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(torch.sigmoid(x[batch] @ w0 + b0) @ w1 + b1, labels[batch]).backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                lowest = min(lowest, F.cross_entropy(torch.sigmoid(x @ w0 + b0) @ w1 + b1, labels).item())
    return lowest


def main() -> None:
    """Train nets on both samples, print and keep the mean of their lowest losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with ylecun/mnist")
    images, labels = read_images(MNIST, parser.parse_args().data, "train", HALVES["second"])
    rows = []
    for step, minibatches in BEFORE_LAST.items():
        losses = torch.tensor([lowest_loss(images, labels, minibatches, seed) for seed in range(NETS)])
        error = losses.std() / NETS**0.5
        row = {
            "inner_step": step,
            "minibatches": minibatches,
            "mean": f"{losses.mean():.3f}",
            "standard_error": f"{error:.3f}",
        }
        rows.append({**row, "nets": NETS, "rate": RATE, "steps": STEPS})
        print(json.dumps(rows[-1]))
    write_table("sample_limit", rows, Path(__file__).parent)


if __name__ == "__main__":
    main()
