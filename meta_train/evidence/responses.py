"""What a rule learned: its response to synthetic gradients, beside the response of an Adam step of the same nominal size.

:func:`responses` uses the shipped optimizer, coordinate by coordinate, on a parameter that is put back after every step:
only the gradients tell, and no model is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from learned_optim import LearnedOptimizer
from learned_optim.weights import Weights
from meta_train.rows import Row, Rows, rounded
from meta_train.tasks.task import seeded

COORDINATES = 4000
STEPS = 10_000
SIGNAL_TO_NOISE = (0.0, 0.1, 0.3, 1.0, 3.0)
CORRELATIONS = (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9)
LAGS = 40
_SETTLED = 500
_SCALE = 0.3  # Root mean square of the parameter.


def responses(weights: Weights, nominal: float, steps: int = STEPS) -> Rows:
    """Measure three responses of a rule and of Adam.

    ``step size``: root mean square of the updates over inner steps, relative to Adam's, for gradients of a mean and noise
    around it in several proportions. ``momentum``: how much of an update is due to the gradient of some steps before, under
    pure noise. ``correlation``: root mean square of the updates where gradients follow one another alike (positive) or in
    turns (negative), relative to Adam's.

    Args:
        weights: The rule.
        nominal: Size of its nominal step relative to the parameter; Adam's rate is chosen to take steps of that size.
        steps: Inner steps of the first response.

    Returns:
        Rows with ``response``, ``series``, ``x``, ``learned`` and ``adam``.
    """
    makers: dict[str, Callable[[nn.Parameter], Optimizer]] = {
        "learned": lambda param: LearnedOptimizer([param], weights=weights),
        "adam": lambda param: Adam([param], lr=nominal * _SCALE),
    }
    rows: Rows = []
    drawn = {round(1.25**k) for k in range(100)}
    for ratio in SIGNAL_TO_NOISE:
        sizes = {
            name: [
                (step, float(update.square().mean().sqrt()))
                for step, update in enumerate(updates(make, noisy(ratio), steps), 1)
                if step in drawn
            ]
            for name, make in makers.items()
        }
        for (step, ours), (_, theirs) in zip(sizes["learned"], sizes["adam"], strict=True):
            rows.append(_row("step size", f"{ratio:g}", step, ours / theirs, 1.0))
    kernels = {name: impulse_response(make) for name, make in makers.items()}
    for lag in range(LAGS):
        rows.append(_row("momentum", "noise", lag, *(float(kernels[name][lag]) for name in makers)))
    for correlation in CORRELATIONS:
        size = {}
        for name, make in makers.items():
            last = list(updates(make, correlated(correlation), _SETTLED))[-50:]
            size[name] = float(torch.stack(last).square().mean().sqrt())
        rows.append(_row("correlation", "noise", correlation, size["learned"] / size["adam"], 1.0))
    return rows


def updates(
    make: Callable[[nn.Parameter], Optimizer], gradients: Callable[[torch.Generator], Iterator[Tensor]], steps: int
) -> Iterator[Tensor]:
    """Yield the updates of a parameter that is put back after each.

    Args:
        make: From the parameter to its optimizer.
        gradients: From a generator to an endless stream of gradients, ``(N,)``.
        steps: Inner steps.

    Yields:
        Updates, ``(N,)``.
    """
    param = nn.Parameter(torch.full((COORDINATES,), _SCALE))
    optimizer = make(param)
    for _, gradient in zip(range(steps), gradients(seeded(0)), strict=False):
        param.grad = gradient
        optimizer.step()
        with torch.no_grad():
            yield param - _SCALE
            param.fill_(_SCALE)


def noisy(ratio: float) -> Callable[[torch.Generator], Iterator[Tensor]]:
    """Return gradients of mean ``ratio`` under noise of variance 1, at an arbitrary scale."""

    def gradients(generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            yield 1e-2 * (ratio + torch.randn(COORDINATES, generator=generator))

    return gradients


def correlated(correlation: float) -> Callable[[torch.Generator], Iterator[Tensor]]:
    """Return noise of variance 1 whose successive values correlate."""

    def gradients(generator: torch.Generator) -> Iterator[Tensor]:
        value = torch.randn(COORDINATES, generator=generator)
        while True:
            yield 1e-2 * value
            fresh = torch.randn(COORDINATES, generator=generator)
            value = correlation * value + (1 - correlation**2) ** 0.5 * fresh

    return gradients


def impulse_response(make: Callable[[nn.Parameter], Optimizer]) -> Tensor:
    """Return the share of an update that each of the gradients before it accounts for, newest first.

    Under white noise the regression of updates on past gradients is their covariance; it is scaled to sum to 1.

    Args:
        make: From the parameter to its optimizer.

    Returns:
        ``(LAGS,)``.
    """
    stream, generator = noisy(0.0), seeded(0)
    past = [gradient for _, gradient in zip(range(_SETTLED), stream(generator), strict=False)]
    moved = list(updates(make, stream, _SETTLED))
    last = range(_SETTLED - 100, _SETTLED)
    covariance = torch.stack([torch.stack([-moved[t] * past[t - lag] for t in last]).mean() for lag in range(LAGS)])
    return covariance / covariance.sum()


def _row(response: str, series: str, x: float, learned: float, adam: float) -> Row:
    return {"response": response, "series": series, "x": x, "learned": f"{learned:.4g}", "adam": f"{adam:.4g}"}


GRADIENTS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "pulse": lambda step: 1.0 if step < 5 else 0.0,
    "alternating": lambda step: (-1.0) ** step,
    "decaying": lambda step: 0.95**step,
}


def probe(weights: Weights, scale: float = 1.0, adam_lr: float = 0.1, steps: int = 60) -> Rows:
    """Record what a rule does with simple gradients over time, beside Adam.

    Args:
        weights: The rule.
        scale: Size of the gradients.
        adam_lr: Adam's rate.
        steps: Inner steps.

    Returns:
        A row for each gradient and inner step, with both updates.
    """
    rows: Rows = []
    for name, gradient in GRADIENTS.items():
        ours, theirs = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        optimizers = (LearnedOptimizer([ours], weights=weights), Adam([theirs], lr=adam_lr))
        for step in range(steps):
            before = (ours.item(), theirs.item())
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = torch.full((1,), scale * gradient(step))
                optimizer.step()
            updates = {"learned": rounded(ours.item() - before[0]), "adam": rounded(theirs.item() - before[1])}
            rows.append({"gradient": name, "inner_step": step, "value": rounded(scale * gradient(step)), **updates})
    return rows
