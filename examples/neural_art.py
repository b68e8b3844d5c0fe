"""Turn a photo into a painting with LearnedOptimizer, Adam and L-BFGS, and write the three side by side.

    python -m examples.neural_art --content photo.jpg --style painting.jpg --network squeezenet.safetensors --out art.png

Needs `pip install -e ".[art]"` in a clone and a network: SqueezeNet v1.0 as safetensors, or any other with a `--description`
in TOML (meta_train/tasks/features.py says what it holds). Without a photo it paints a texture in the painting's style. All
start from the same noise and take the same number of steps on one loss; Adam runs at every rate of a small grid and its best
is shown; a step of L-BFGS evaluates the loss several times.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

from learned_optim import LearnedOptimizer
from meta_train.judging.baselines import LBFGS_STEPS, MakeOptimizer
from meta_train.tasks.features import SQUEEZENET, feature_extractor, read_network
from meta_train.tasks.neural_art import NeuralArt, read_picture, start
from meta_train.tasks.task import LossFunction

ADAM_RATES = (0.03, 0.1, 0.3)


def paint(
    name: str, make_optimizer: MakeOptimizer, noise: Tensor, loss: LossFunction, steps: int
) -> tuple[Tensor, list[float]]:
    """Paint one picture with a progress bar; return it and its loss before each step and after the last."""
    picture = nn.Parameter(noise.clone())
    optimizer = make_optimizer([picture])

    def closure() -> float:
        optimizer.zero_grad()
        value = loss({"picture": picture}).sum()
        value.backward()
        return value.item()

    losses = []
    with tqdm(range(steps), desc=f"{name:<16}", unit="step") as bar:
        for _ in bar:
            losses.append(optimizer.step(closure))
            bar.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
    with torch.no_grad():
        losses.append(float(loss({"picture": picture}).sum()))
    return picture.detach()[0], losses


def main() -> None:
    """Paint, print the losses, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--content", type=Path, help="photo; default: none, a texture")
    parser.add_argument("--style", type=Path, required=True, help="painting")
    parser.add_argument("--network", type=Path, required=True, help="weights of the network, safetensors")
    parser.add_argument("--description", type=Path, help="what the network does, TOML; default: SqueezeNet v1.0")
    parser.add_argument("--weights", default="neural-art", help="update rule; default: %(default)s")
    parser.add_argument("--size", type=int, default=128, help="side of the picture; default: %(default)s")
    parser.add_argument("--steps", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("art.png"), help="default: %(default)s")
    options = parser.parse_args()

    network = read_network(options.description) if options.description else SQUEEZENET
    extract = feature_extractor(network, options.network)
    style = read_picture(options.style, options.size).unsqueeze(0)
    content = read_picture(options.content, options.size).unsqueeze(0) if options.content else None
    problem = NeuralArt(network=network) if options.content else NeuralArt(network=network, content_weight=0.0)
    loss = problem.loss(extract, style if content is None else content, style)
    noise = start(1, options.size, options.size, torch.Generator().manual_seed(0))

    task = (noise, loss, options.steps)
    learned, losses = paint("LearnedOptimizer", lambda p: LearnedOptimizer(p, weights=options.weights), *task)
    by_adam = [(f"Adam({lr:g})", *paint(f"Adam({lr:g})", lambda p, lr=lr: Adam(p, lr=lr), *task)) for lr in ADAM_RATES]
    best, adam, adam_losses = min(by_adam, key=lambda one: one[2][-1])
    lbfgs, lbfgs_losses = paint("L-BFGS", LBFGS_STEPS[0].make, *task)
    print(f"after {options.steps} steps:")
    for name, values in (("LearnedOptimizer", losses), (best, adam_losses), ("L-BFGS", lbfgs_losses)):
        print(f"{name:<18} loss {values[0]:.2f} at the start, {values[-1]:.2f} at the end")
    given = {"style": style[0]} if content is None else {"content": content[0], "style": style[0]}
    shown = given | {"LearnedOptimizer": learned, "Adam": adam, "L-BFGS": lbfgs}
    row = torch.cat(list(shown.values()), 2)
    Image.fromarray((row.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(options.out)
    print(f"wrote {options.out.name}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
