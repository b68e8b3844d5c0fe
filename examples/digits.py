"""Train the same classifier on real digits with Adam and with LearnedOptimizer, and compare.

    python -m examples.digits --plot demo.png

The data are the 1,797 handwritten 8x8 digits that ship with scikit-learn. `LearnedOptimizer` gets no rate; Adam runs at its
usual rate of 1e-3, and, so that the comparison is fair, at every rate of a small grid.
"""

import argparse
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from learned_optim import LearnedOptimizer

STEPS, BATCH, SEEDS = 500, 64, 5
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train images, train labels, test images, test labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=360, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.tensor(part) for part in parts)
    return train_x.float(), train_y, test_x.float(), test_y


def train(make_optimizer: MakeOptimizer, seed: int) -> tuple[list[float], float]:
    """Train one classifier; return its training losses and its test accuracy."""
    train_x, train_y, test_x, test_y = load(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = make_optimizer(model.parameters())
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(train_x), (BATCH,))
        loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    return losses, accuracy


def final(losses: Tensor) -> Tensor:
    """Average the last tenth of each run's losses, which are noisy."""
    return losses[:, -STEPS // 10 :].mean(1)


def main() -> None:
    """Train, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", help="write the loss curves here")
    plot = parser.parse_args().plot

    contestants: dict[str, MakeOptimizer] = {"LearnedOptimizer, no rate": lambda params: LearnedOptimizer(params)}
    for lr in GRID:
        contestants[f"Adam, lr={lr:g}"] = lambda params, lr=lr: Adam(params, lr=lr)
    curves, accuracy = {}, {}
    with tqdm(total=len(contestants) * SEEDS, unit="run") as bar:
        for name, make_optimizer in contestants.items():
            bar.set_description(name)
            runs = []
            for seed in range(SEEDS):
                runs.append(train(make_optimizer, seed))
                bar.update()
            curves[name] = torch.tensor([losses for losses, _ in runs])
            accuracy[name] = torch.tensor([score for _, score in runs])

    print(f"\n{STEPS} steps, batch {BATCH}, {SEEDS} seeds, mean +- standard deviation")
    print(f"{'':<28}{'loss, steps 91-100':>22}{'loss, last 50':>22}{'test accuracy':>20}")
    for name, losses in curves.items():
        cells = (losses[:, 90:100].mean(1), final(losses), accuracy[name])
        print(f"{name:<28}" + "".join(f"{c.mean():>12.4f} +- {c.std():.4f}" for c in cells))
    if plot:
        draw(curves, plot)
        print(f"\ncurves: {plot}")


def draw(curves: dict[str, Tensor], path: str) -> None:
    """Draw smoothed mean curves: ours, Adam at its usual rate, Adam at its best."""
    from matplotlib.figure import Figure

    names = list(curves)
    best = min(names[1:], key=lambda name: float(final(curves[name]).mean()))
    shown = {names[0]: ("#D55E00", "-"), best: ("#0072B2", "--"), "Adam, lr=0.001": ("#56B4E9", "--")}
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    kernel = torch.ones(1, 1, 15) / 15
    for name, (colour, style) in shown.items():
        smooth = F.conv1d(curves[name].unsqueeze(1), kernel).squeeze(1).log()
        mean, spread = smooth.mean(0), smooth.std(0)
        steps = range(8, 8 + len(mean))
        label = f"{name} (best of {len(GRID)} rates)" if name == best else name
        axes.plot(steps, mean.exp(), style, color=colour, lw=2, label=label)
        axes.fill_between(steps, (mean - spread).exp(), (mean + spread).exp(), color=colour, alpha=0.15, lw=0)
    axes.set(yscale="log", xlabel="step", ylabel="training loss", title=f"8x8 digits, dense net, {SEEDS} seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
