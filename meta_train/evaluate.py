"""Judge optimizers: every one, learned or not, runs through the same ``torch.optim`` path on optimizees it has never seen.

Baselines are tuned on optimizees of their own (purpose ``"tuning"``), then everything is reported on fresh ones (purpose
``"evaluation"``). A curve holds the losses ``f(theta_0) ... f(theta_T)``; its *sum* adds ``f(theta_0) ... f(theta_{T-1})``,
the losses an ordinary training loop prints, and its *final* loss is ``f(theta_T)``, where losses are those of minibatches
the mean of the last few.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT

from learned_optim import LearnedOptimizer
from learned_optim.weights import Weights
from meta_train.baselines import (
    CIFAR,
    CIFAR_TWO,
    CLASSIFICATION,
    FIXED,
    LBFGS_STEPS,
    MNIST,
    PICTURES,
    QUADRATIC,
    QUARTIC,
    UNTUNED,
    MakeOptimizer,
    Setting,
    best_setting,
)
from meta_train.files import write_atomically
from meta_train.parts import part_of
from meta_train.provenance import environment, here, read_environment
from meta_train.tasks import Cifar, Mixture, Mnist, NeuralArt, Optimizee, Quadratic, Quartic, Task, derive_seed, with_data
from meta_train.workers import Each

Row = dict[str, str | int | float]
Rows = list[Row]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]

LEARNED = "LSTM"
HORIZONS = (100, 200)
CRITERIA = ("sum", "final")


@dataclass(frozen=True)
class Arena:
    """What optimizers are judged on.

    Args:
        task: Where optimizees come from.
        sweep: Every setting of every baseline.
        untuned: Settings that are reported as they are.
        tuning: Optimizees to tune baselines on.
        fresh: Optimizees to report on.
        last: Losses averaged into the final one; 1 where the loss has no noise.
        horizons: Inner steps to report at; curves are drawn of baselines as tuned for the first.
        tuning_task: Where the optimizees to tune on come from; by default the same task.
        criteria: What to report, of :data:`CRITERIA`.
    """

    task: Task
    sweep: Sequence[Setting]
    untuned: Sequence[Setting] = ()
    tuning: int = 10
    fresh: int = 20
    last: int = 1
    horizons: Sequence[int] = HORIZONS
    tuning_task: Task | None = None
    criteria: Sequence[str] = CRITERIA

    def on(self, data: Path | None) -> Arena:
        """Return the arena with the real data of a directory, where its tasks need any."""
        tuning_task = with_data(self.tuning_task, data) if self.tuning_task else None
        return replace(self, task=with_data(self.task, data), tuning_task=tuning_task)


def _neural_art(**changes: Any) -> Arena:
    """Judge pictures of new contents; baselines are tuned on other contents, but the same style and resolution."""
    task = NeuralArt(split="test", **changes)
    tuning_task = NeuralArt(split="tuning", **changes)
    return Arena(task, PICTURES, LBFGS_STEPS, tuning=5, horizons=(128,), tuning_task=tuning_task)


def _mnist(*hidden: int, activation: Literal["sigmoid", "relu"] = "sigmoid") -> Arena:
    """Judge on the half of MNIST that nothing was meta-trained on."""
    return Arena(Mnist(hidden, activation, half="second"), MNIST, UNTUNED, tuning=5, last=10)


ANIMALS = (2, 3, 4, 5, 7)
"""Classes of CIFAR-5, and the first two of CIFAR-2; the others can be meta-trained on alone."""


def _cifar(*labels: int, sweep: Sequence[Setting] = CIFAR) -> Arena:
    """Judge on the half of CIFAR-10 that nothing was meta-trained on, some classes of it or all; minutes a run."""
    task = Cifar("second", labels or tuple(range(10)))
    return Arena(task, sweep, tuning=1, last=20, horizons=(1000, 100), criteria=("final",))


ARENAS = {
    "quadratic": Arena(Quadratic(), QUADRATIC, FIXED),
    "quartic": Arena(Quartic(functions=1), QUARTIC, UNTUNED, tuning=20, fresh=50),
    "digits": Arena(Mixture(problems=1, kinds=("digit-mlp",)), CLASSIFICATION, UNTUNED, last=10),
    "mnist": _mnist(20),
    "mnist-relu": _mnist(20, activation="relu"),
    **{f"mnist-{size}x{depth}": _mnist(*[size] * depth) for size in (5, 10, 20, 40, 80) for depth in (1, 2)},
    "cifar": _cifar(),
    "cifar-5": _cifar(*ANIMALS),
    "cifar-2": _cifar(*ANIMALS[:2], sweep=CIFAR_TWO),
    "neural-art": _neural_art(),
    "neural-art-style": _neural_art(style="the_scream"),
    "neural-art-double": _neural_art(size=128),
}
"""Arenas by name: the paper's quadratics, the quartic toy, small dense classifiers of 8x8 digits, MNIST with nets of many
sizes, CIFAR-10 and five and two of its classes, and neural art with new contents, with a new style too, and at double
resolution."""


def run(
    optimizee: Optimizee, make_optimizer: MakeOptimizer, horizon: int, schedule: MakeSchedule | None = None
) -> list[float]:
    """Train one optimizee with a ``torch.optim`` optimizer.

    Args:
        optimizee: Freshly sampled, a single problem (P = 1).
        make_optimizer: From named parameters to optimizer.
        horizon: Inner steps, T.
        schedule: From optimizer and horizon to a schedule of the rate.

    Returns:
        T + 1 losses, before each step and after the last; infinite from where it diverged.

    Raises:
        ValueError: If the optimizee holds several problems, which would share what an optimizer knows of a tensor.
    """
    if optimizee.num_problems != 1:
        raise ValueError(f"evaluate one problem at a time, got {optimizee.num_problems} side by side")
    params = {name: nn.Parameter(value[0].clone()) for name, value in optimizee.params.items()}
    optimizer = make_optimizer(params.items())
    scheduler = schedule(optimizer, horizon) if schedule else None
    losses = []

    def forward() -> Tensor:
        optimizer.zero_grad()
        return optimizee.losses({name: value.unsqueeze(0) for name, value in params.items()}).sum()

    def closure() -> float:
        loss = forward()
        loss.backward()
        return loss.item()

    for step in range(horizon + 1):
        loss = forward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses[:-1] + [math.inf] * (horizon + 1 - step)
        if step < horizon:
            loss.backward()
            optimizer.step(closure if isinstance(optimizer, LBFGS) else None)
            if scheduler:
                scheduler.step()
    return losses


def curves(
    task: Task,
    make_optimizer: MakeOptimizer,
    horizon: int,
    purpose: str,
    count: int,
    schedule: MakeSchedule | None = None,
) -> Tensor:
    """Train ``count`` fresh optimizees.

    Args:
        task: Where they come from.
        make_optimizer: From parameters to optimizer.
        horizon: Inner steps, T.
        purpose: ``"tuning"`` or ``"evaluation"``: their optimizees are disjoint.
        count: How many.
        schedule: From optimizer and horizon to a schedule of the rate.

    Returns:
        Losses ``(count, T + 1)``; infinite from where one diverged.
    """
    sampled = (task.sample(derive_seed(0, purpose, index)) for index in range(count))
    return torch.tensor([run(one, make_optimizer, horizon, schedule) for one in sampled], dtype=torch.float64)


def measure(criterion: str, losses: Tensor, horizon: int, last: int = 1) -> Tensor:
    """Reduce curves to one number each.

    Args:
        criterion: ``"sum"`` or ``"final"``.
        losses: ``(count, >= horizon + 1)``.
        horizon: Inner steps to look at.
        last: Losses averaged into the final one.

    Returns:
        Tensor of shape ``(count,)``.
    """
    if criterion == "sum":
        return losses[:, :horizon].sum(1)
    return losses[:, horizon + 1 - last : horizon + 1].mean(1)


@dataclass(frozen=True)
class Judgement:
    """Everything one evaluation found, as rows of tables.

    Args:
        sweep: Every setting tried while tuning.
        curves: Mean loss and standard error at each inner step; baselines as tuned for the final loss of the first horizon,
            and untuned optimizers that are no baseline.
        summary: Each criterion at each horizon, and its ratio to the best baseline's.
        fixed: The same for untuned settings.
    """

    sweep: Rows = field(default_factory=list)
    curves: Rows = field(default_factory=list)
    summary: Rows = field(default_factory=list)
    fixed: Rows = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class WeightsOfParts:
    """Weights that share a model.

    Args:
        name: In tables.
        weights: By the beginning of the names of the parameters that they move.
    """

    name: str
    weights: Mapping[str, Weights]

    @property
    def fingerprint(self) -> str:
        """The fingerprints of all, joined by ``+``."""
        return "+".join(weights.fingerprint for weights in self.weights.values())

    def make(self, params: ParamsT) -> Optimizer:
        """Build the shipped optimizer, with a group for each part.

        Args:
            params: Named parameters.

        Returns:
            The optimizer.
        """
        groups: list[dict[str, Any]] = [{"params": [], "weights": weights} for weights in self.weights.values()]
        for name, param in dict(params).items():  # type: ignore[arg-type]
            groups[part_of(self.weights, name)]["params"].append((name, param))
        return LearnedOptimizer(groups)


AnyWeights = Weights | WeightsOfParts


def of_all_parts(learned: AnyWeights) -> tuple[Weights, ...]:
    """Return the weights of every part of a model."""
    return tuple(learned.weights.values()) if isinstance(learned, WeightsOfParts) else (learned,)


Contestant = Setting | AnyWeights


def _ways(contestant: Contestant) -> tuple[MakeOptimizer, MakeSchedule | None]:
    if isinstance(contestant, Setting):
        return contestant.make, contestant.schedule
    return learned_with(contestant), None


def _file(task: Task, contestant: Contestant, horizon: int, purpose: str, cache: Path, index: int) -> Path:
    """Return where a finished run is kept: the name is a hash of all that decides it."""
    who = f"{contestant.optimizer} {contestant}" if isinstance(contestant, Setting) else contestant.fingerprint
    digest = hashlib.sha256(repr((task, who, horizon, purpose, index)).encode()).hexdigest()[:16]
    return cache / f"{digest}.json"


def _curve(task: Task, contestant: Contestant, horizon: int, purpose: str, cache: Path | None, index: int) -> list[float]:
    file = _file(task, contestant, horizon, purpose, cache, index) if cache else None
    if file and file.exists():
        kept = json.loads(file.read_text())
        return kept["losses"] if isinstance(kept, dict) else kept  # Earlier versions kept the losses alone.
    make, schedule = _ways(contestant)
    losses = run(task.sample(derive_seed(0, purpose, index)), make, horizon, schedule)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**here(), "losses": losses}).encode())
    return losses


class _Runs:
    """Curves of baselines and rules, each made once for each horizon it needs; with a directory, once for all."""

    def __init__(self, arena: Arena, cache: Path | None, each: Each, used: set[Path] | None = None) -> None:
        self.tasks = {"tuning": arena.tuning_task or arena.task, "evaluation": arena.task}
        self.counts = {"tuning": arena.tuning, "evaluation": arena.fresh}
        self.last, self.drawn, self.longest = arena.last, arena.horizons[0], max(arena.horizons)
        self.cache, self.each, self.used = cache, each, set() if used is None else used
        self.kept: dict[tuple[Contestant, int, str], Tensor] = {}

    def of(self, contestant: Contestant, end: int, purpose: str) -> Tensor:
        """Return the curves of a contestant: where no schedule depends on a horizon, longer ones serve shorter ones too."""
        scheduled = _ways(contestant)[1] is not None
        shared = purpose == "tuning" or end == self.drawn or (contestant, self.longest, purpose) in self.kept
        horizon = self.longest if shared and not scheduled else end
        key = (contestant, horizon, purpose)
        if key not in self.kept:
            task, indices = self.tasks[purpose], range(self.counts[purpose])
            curve = functools.partial(_curve, task, contestant, horizon, purpose, self.cache)
            self.kept[key] = torch.tensor(list(self.each(curve, indices)), dtype=torch.float64)
            if self.cache:
                self.used |= {_file(task, contestant, horizon, purpose, self.cache, index) for index in indices}
        return self.kept[key]

    def score(self, contestant: Contestant, criterion: str, end: int, purpose: str = "evaluation") -> Tensor:
        """Return one number for each optimizee."""
        return measure(criterion, self.of(contestant, end, purpose), end, self.last)

    def diverges(self, contestant: Contestant, end: int) -> bool:
        """Return whether any fresh optimizee ends above where they all start."""
        losses = self.of(contestant, end, "evaluation")
        return bool(losses[:, end].max() > losses[:, 0].max())


def judge(
    learned: Sequence[AnyWeights],
    arena: Arena,
    *,
    cache: Path | None = None,
    each: Each = map,
    progress: Callable[[Iterable[Setting]], Iterable[Setting]] = iter,
    used: set[Path] | None = None,
) -> Judgement:
    """Compare learned rules with tuned baselines.

    Each baseline gets, for each criterion and horizon, the setting that is best for it; one that is best at the edge of what
    was tried is an error.

    Args:
        learned: Rules, of different names; they are not tuned.
        arena: What they are judged on.
        cache: Directory of finished runs, each a file named by a hash of task (its ``repr``), contestant, horizon and
            optimizee; what it holds is not run again.
        each: Calls a function with each of several optimizees' numbers; ``map``, or that of a pool of processes.
        progress: Wraps the settings while tuning, to show how far it is.
        used: Collects the files of the finished runs that the judgement is made of.

    Returns:
        The judgement.
    """
    runs, judgement = _Runs(arena, cache, each, used), Judgement()
    settings = list(dict.fromkeys(arena.sweep))
    for setting in progress(settings):
        scores = {
            f"{criterion}_{end}": _rounded(runs.score(setting, criterion, end, "tuning").mean())
            for end in arena.horizons
            for criterion in arena.criteria
        }
        hyperparameters: Row = {"lr": setting.lr, "momentum": setting.momentum}
        judgement.sweep.append({"optimizer": setting.optimizer, **hyperparameters, **scores, "n": arena.tuning})
    for end in arena.horizons:
        for criterion in arena.criteria:
            chosen = _tuned(runs, settings, criterion, end)
            judgement.summary.extend(_summary(runs, chosen, learned, criterion, end))
            if (criterion, end) == ("final", arena.horizons[0]):
                others = {setting.optimizer: setting for setting in arena.untuned if setting.optimizer not in chosen}
                judgement.curves.extend(_curves(runs, chosen | others, learned, end))
            for setting in arena.untuned:
                row: Row = {"horizon": end, "criterion": criterion, "optimizer": setting.optimizer, "setting": str(setting)}
                judgement.fixed.append({**row, **_statistics(runs.score(setting, criterion, end))})
    return judgement


def learned_with(weights: AnyWeights) -> MakeOptimizer:
    """Return a maker of the shipped optimizer with the given weights."""
    if isinstance(weights, WeightsOfParts):
        return weights.make

    def make(params: ParamsT) -> Optimizer:
        return LearnedOptimizer(params, weights=weights)

    return make


def _tuned(runs: _Runs, settings: Sequence[Setting], criterion: str, end: int) -> dict[str, Setting]:
    """Choose each baseline's best setting, passing over any that diverges on a fresh optimizee: that can only help them."""
    chosen = {}
    for optimizer in dict.fromkeys(setting.optimizer for setting in settings):
        group = [setting for setting in settings if setting.optimizer == optimizer]
        scores = {str(setting): float(runs.score(setting, criterion, end, "tuning").mean()) for setting in group}
        while runs.diverges(best := best_setting(scores, group), end):
            scores[str(best)] = math.inf
        chosen[optimizer] = best
    return chosen


def _summary(
    runs: _Runs, chosen: Mapping[str, Setting], learned: Sequence[AnyWeights], criterion: str, end: int
) -> Iterator[Row]:
    results = {name: (str(setting), runs.score(setting, criterion, end)) for name, setting in chosen.items()}
    best = min(float(values.mean()) for _, values in results.values())
    ours = {f"{LEARNED} ({weights.name})": ("", runs.score(weights, criterion, end)) for weights in learned}
    for name, (text, values) in (results | ours).items():
        ratio = _rounded(float(values.mean()) / best) if best > 0 else ""
        row: Row = {"horizon": end, "criterion": criterion, "optimizer": name, "setting": text}
        yield {**row, **_statistics(values), "ratio_to_best_baseline": ratio}


def _curves(runs: _Runs, chosen: Mapping[str, Setting], learned: Sequence[AnyWeights], end: int) -> Iterator[Row]:
    contestants: dict[str, Contestant] = {f"{LEARNED} ({weights.name})": weights for weights in learned}
    for name, contestant in (contestants | dict(chosen)).items():
        text = str(contestant) if isinstance(contestant, Setting) else ""
        for step, column in enumerate(runs.of(contestant, end, "evaluation").T):
            yield {"optimizer": name, "setting": text, "inner_step": step, **_statistics(column)}


def _statistics(values: Tensor) -> dict[str, float | int]:
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)
    return {"mean": _rounded(values.mean()), "standard_error": _rounded(error), "n": len(values)}


def size_table(places: Iterable[Path]) -> Rows:
    """Collect how good optimizers are on sigmoid nets of many sizes, at the first horizon.

    Args:
        places: Directories of evaluations; those of other arenas are passed over.

    Returns:
        A row for each net and optimizer.
    """
    table: Rows = []
    for place in places:
        name = read_environment(place / "environment.json", "task")["task"]
        arena = ARENAS.get(name)
        if arena is None or not isinstance(arena.task, Mnist) or arena.task.activation != "sigmoid":
            continue
        size: Row = {"units": arena.task.hidden[0], "layers": len(arena.task.hidden)}
        for row in read_rows(place / "summary.csv"):
            if (row["criterion"], row["horizon"]) == ("final", str(arena.horizons[0])):
                table.append({**size, **{key: row[key] for key in ("optimizer", "setting", "mean", "standard_error", "n")}})
    return table


def _rounded(value: Tensor | float) -> float:
    return float(f"{float(value):.6g}")


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
            updates = {"learned": _rounded(ours.item() - before[0]), "adam": _rounded(theirs.item() - before[1])}
            rows.append({"gradient": name, "inner_step": step, "value": _rounded(scale * gradient(step)), **updates})
    return rows


def write_judgement(judgement: object, out: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write the tables of a judgement and where they were made.

    Args:
        judgement: A dataclass whose every field is a table, such as :class:`Judgement`.
        out: Directory; created if missing.
        about: Anything else that a reader needs to make them again, for ``environment.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in vars(judgement).items():
        if rows:
            write_rows(out / f"{name}.csv", rows)
    write_atomically(out / "environment.json", (json.dumps({**environment(), **(about or {})}, indent=2) + "\n").encode())


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as CSV, atomically.

    Args:
        path: The file.
        rows: At least one; all with the same columns.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV written by :func:`write_rows`.

    Args:
        path: The file.

    Returns:
        One dict a row, every value a string.
    """
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
