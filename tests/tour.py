"""The notebook `examples/tour.ipynb`: its cells, and what runs them.

    python -m tests.tour

writes it with outputs. A test runs the cells again and compares the sources.
"""

import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tour.ipynb"

CELLS: tuple[tuple[str, str], ...] = (
    (
        "markdown",
        "# A tour of learned-optim\n\nFour things, in two minutes on a CPU: swap the optimizer in, look at what the rule does, "
        'evaluate averaged weights, and meta-train a rule of your own. Work in a clone, after `pip install -e ".[meta]"`, and '
        "start Jupyter in its root.",
    ),
    (
        "markdown",
        "## Swap it in\n\n`LearnedOptimizer` takes Adam's place. There is no rate to choose. Here both train a small net on the "
        "8x8 digits of scikit-learn, Adam at its usual 1e-3.",
    ),
    (
        "code",
        """import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from learned_optim import LearnedOptimizer, Recorder

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def train(make, steps=300, after=lambda optimizer: None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, losses = make(model.parameters()), []
    after(optimizer)
    for _ in range(steps):
        rows = torch.randint(1500, (32,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def held_out(model):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x[1500:]), y[1500:]).item()


adam, _, adam_losses = train(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
ours, optimizer, our_losses = train(LearnedOptimizer)
print(f"held-out loss: Adam(1e-3) {held_out(adam):.3f}, LearnedOptimizer {held_out(ours):.3f}")
print(optimizer.summary())""",
    ),
    (
        "code",
        """def smooth(losses, width=15):
    return [sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]


figure = Figure(figsize=(6, 3.2), layout="constrained")
axes = figure.subplots()
axes.plot(smooth(our_losses), label="LearnedOptimizer, no rate")
axes.plot(smooth(adam_losses), "--", label="Adam, 1e-3")
axes.set(xlabel="step", ylabel="training loss, mean of 15 minibatches", yscale="log")
axes.legend()
figure""",
    ),
    (
        "markdown",
        "## What the rule does over time\n\nA `Recorder` listens from outside. `update_ratio` is the size of a step relative to "
        "the size of the tensors: it falls by itself, without a schedule. `cosine_adam` says how far the rule follows the Adam "
        "step of its own moments.",
    ),
    (
        "code",
        """recorders = []
train(LearnedOptimizer, after=lambda optimizer: recorders.append(Recorder(optimizer, every=10)))
rows = recorders[0].rows
figure = Figure(figsize=(8, 2.8), layout="constrained")
for axes, name in zip(figure.subplots(1, 2), ("update_ratio", "cosine_adam")):
    axes.plot([row["step"] for row in rows], [row[name] for row in rows], "o-", ms=3)
    axes.set(xlabel="step", title=name)
figure""",
    ),
    (
        "markdown",
        "## Averaged weights\n\nWith `average=True` the optimizer keeps an average beside the weights. It needs no horizon.",
    ),
    (
        "code",
        """model, optimizer, _ = train(lambda parameters: LearnedOptimizer(parameters, average=True), steps=150)
print(f"held-out loss after 150 steps: last weights {held_out(model):.3f}", end=", ")
with optimizer.averaged():
    print(f"averaged weights {held_out(model):.3f}")""",
    ),
    (
        "markdown",
        "## Meta-train a rule\n\nA task is any object with `sample(seed)`: [own_task.py](own_task.py) has one. Its recipe starts "
        "from `default` and moves the readout of its LSTM by evolution strategies. Twenty of its sixty outer steps will do here. "
        "The figure is the loss after 100 steps relative to the first one.",
    ),
    (
        "code",
        """import math

from meta_train.training.outer_loop import MetaTraining
from meta_train.training.recipe import read_recipe

recipe = read_recipe("examples/own_task.toml")
run = MetaTraining(recipe.importing(recipe.own_tasks))
figures = {0: math.exp(run.validation_figure(run.rule))}
for record in run:
    if record.validation is not None:
        figures[record.step] = math.exp(record.validation)
    if record.step == 20:
        break
for step, figure in figures.items():
    print(f"after {step:2} outer steps: {figure:.4f}")
weights = run.weights("sines")
print(weights, dict(weights.metadata)["start"][:12])""",
    ),
    (
        "markdown",
        '`LearnedOptimizer(model.parameters(), weights=weights)` uses it, and `weights.save("sines.safetensors")` keeps it. '
        "[Your own task and weights](../docs/own-task.md) goes on from here.",
    ),
)


def run_cells() -> list[list[dict[str, Any]]]:
    """Run the code cells one after another.

    Returns:
        The outputs of each cell, as a notebook keeps them.
    """
    names: dict[str, Any] = {}
    outputs = []
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        for kind, source in CELLS:
            outputs.append(_run(source, names) if kind == "code" else [])
    return outputs


def _run(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    said, shown = io.StringIO(), None
    *body, last = source.splitlines()
    with contextlib.redirect_stdout(said):
        if last == "figure":
            exec("\n".join(body), names)
            shown = names["figure"]
        else:
            exec(source, names)
    found: list[dict[str, Any]] = []
    if said.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": said.getvalue().splitlines(keepends=True)})
    if isinstance(shown, Figure):
        picture = io.BytesIO()
        shown.savefig(picture, format="png", dpi=80)
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    return found


def notebook(outputs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the notebook, format 4.5.

    Args:
        outputs: Of every cell.

    Returns:
        Plain values.
    """
    cells = []
    for number, ((kind, source), found) in enumerate(zip(CELLS, outputs, strict=True)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        cells.append({**cell, "execution_count": None, "outputs": found} if kind == "code" else cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(notebook(run_cells()), indent=1) + "\n")
