"""How the matrix stage of `default` was chosen on held-out kinds, and what it and averaged weights gain.

    nice -n 10 python -m experiments.orthogonal_updates run --seeds 0 1
    python -m experiments.orthogonal_updates table

Every contestant trains the same models on the same minibatches. Training losses are those of 20 fresh minibatches, the same
for all, at the last weights and at weights averaged with a half-life of a twentieth of the steps taken. Rates of opponents
are tuned a kind and horizon on the very runs that are reported, which favours opponents. A run is a file in
``runs/orthogonal-updates/``, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.guard import nominal
from learned_optim.rules.orthogonal import has_matrix, matrix_shape, orthogonalize
from learned_optim.weights.weights import Weights, resolve_weights
from meta_train.files import write_atomically
from meta_train.tasks.case import Case, JudgingTask
from meta_train.tasks.held_out import HELD_OUT_KINDS, LONG_KINDS

HORIZONS, MINIBATCHES, HALF_LIFE = (200, 1000), 20, 0.05
WEIGHTS = ("last", "averaged")
KINDS = {
    kind.name: kind for kind in (*HELD_OUT_KINDS, *(k for k in LONG_KINDS if k.name in ("image-autoencoder", "photo-vit")))
}
RUNS = Path("runs/orthogonal-updates")
RESULTS = Path(__file__).parent / "results"
GRID = tuple(10 ** (half / 2) for half in range(-7, 0))
START = range(1, 5)
"""Rates that are always tried, by position in the grid; a best one at their edge adds the next."""


@dataclass(frozen=True)
class Shaped:
    """How the experiment moves the update of ``default-v1``.

    Args:
        blend: From 0, raw, to 1, orthogonal.
        of: What is orthogonalised: ``"update"``; ``"momentum"``, a Nesterov momentum of the gradient; or ``"mix"``, the
            sum of both after each is divided by its norm.
        share: Factor on the momentum in that sum.
        decays: Of the momentum, which is the mean of one for each decay.
        nesterov: Whether the momentum looks one step ahead.
        gain: Factor on the length of an orthogonal update.
        amplitude: One magnitude a tensor, the root mean square of the rule's amplitudes, instead of the update's norm.
        smallest_side: Fewest rows and columns.
        ends: Whether embeddings and the readout take part.
        lr: Of the optimizer.
        nominal: The rule without its LSTM.
        stage: The optimizer's own matrix stage, by ``matrix_momentum`` and ``matrix_gain``, in place of all that.
    """

    blend: float = 1.0
    of: str = "update"
    share: float = 1.0
    decays: tuple[float, ...] = (0.95,)
    nesterov: bool = True
    gain: float = 1.0
    amplitude: bool = False
    smallest_side: int = 2
    ends: bool = True
    lr: float = 1.0
    nominal: bool = False
    stage: tuple[float, float] | None = None


VARIANTS = {
    "default-v1": Shaped(blend=0),
    "default": Shaped(stage=(0.5, 0.85)),
    "orthogonal": Shaped(),
    "orthogonal, lr 2": Shaped(lr=2),
    "one magnitude": Shaped(amplitude=True),
    "momentum": Shaped(of="momentum"),
    "no ends": Shaped(ends=False),
    "blend .5": Shaped(blend=0.5),
    "side 8": Shaped(smallest_side=8),
    "nominal orthogonal": Shaped(nominal=True),
    "nominal orthogonal, lr 2": Shaped(nominal=True, lr=2),
    "default-v1, lr 2": Shaped(blend=0, lr=2),
    "orthogonal, lr 4": Shaped(lr=4),
    "nominal orthogonal, lr 4": Shaped(nominal=True, lr=4),
    "blend .75": Shaped(blend=0.75),
    "side 16": Shaped(smallest_side=16),
    "side 4": Shaped(smallest_side=4),
    "default-v1, lr 4": Shaped(blend=0, lr=4),
    "nominal orthogonal, lr .5": Shaped(nominal=True, lr=0.5),
    "momentum, no ends": Shaped(of="momentum", ends=False),
    "one magnitude, no ends": Shaped(amplitude=True, ends=False),
    "mix 1": Shaped(of="mix"),
    "mix 1, both": Shaped(of="mix", decays=(0.8, 0.98)),
    "mix .5, both": Shaped(of="mix", share=0.5, decays=(0.8, 0.98)),
    "mix 2, both": Shaped(of="mix", share=2.0, decays=(0.8, 0.98)),
    "momentum, both": Shaped(of="momentum", decays=(0.8, 0.98)),
    "momentum, sum": Shaped(of="momentum", decays=(0.8, 0.98), nesterov=False),
    "mix 1, sum": Shaped(of="mix", decays=(0.8, 0.98), nesterov=False),
    "mix 1, sum, gain .7": Shaped(of="mix", decays=(0.8, 0.98), nesterov=False, gain=0.7),
    "mix 1, sum, gain .5": Shaped(of="mix", decays=(0.8, 0.98), nesterov=False, gain=0.5),
    "mix 1, sum, nominal": Shaped(of="mix", decays=(0.8, 0.98), nesterov=False, nominal=True),
    "stage .35, gain .85": Shaped(stage=(0.35, 0.85)),
    "stage .65, gain .7": Shaped(stage=(0.65, 0.7)),
    "stage .5, gain 1": Shaped(stage=(0.5, 1.0)),
    "stage .65, gain .85": Shaped(stage=(0.65, 0.85)),
    "mix 1, sum, blend .7": Shaped(of="mix", decays=(0.8, 0.98), nesterov=False, blend=0.7),
}
OPPONENTS = ("Adam", "Muon", "Muon + cosine")


def ends_of(module: nn.Module) -> set[nn.Parameter]:
    """Embeddings, positions and the last dense layer."""
    found = {layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)}
    found |= {param for name, param in module.named_parameters() if name.endswith("position")}
    return found | {[layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1].weight}


class ByHand:
    """The rule's own three stages, which tell the amplitudes that the optimizer keeps to itself."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.rule, self.steps = resolve_weights("default-v1").rule, 0
        self.params = list(params)
        self.memory = [self.rule.initial_memory(param.numel(), param.detach()) for param in self.params]
        self.amplitudes: dict[nn.Parameter, Tensor] = {}

    def step(self) -> None:
        """Step, and keep the root mean square of each tensor's amplitudes."""
        self.steps += 1
        step, bound = torch.tensor(float(self.steps)), self.rule.config.log_gain
        for position, param in enumerate(self.params):
            scale = self.rule.tensor_scale(param)
            encoded = self.rule.encode(param.grad.flatten(), self.memory[position], step, scale)
            carry = self.memory[position]["hidden"], self.memory[position]["cell"]
            hidden, (new_hidden, new_cell) = self.rule.advance(encoded.inputs, carry, encoded.active)
            self.memory[position] = {**encoded.moments, "hidden": new_hidden, "cell": new_cell}
            gain = torch.exp(bound * torch.tanh(self.rule.read(hidden)[0] / bound))
            self.amplitudes[param] = (encoded.context[:, 1] * gain).square().mean().sqrt()
            param.add_(self.rule.decode(hidden, encoded.context).view_as(param))


def staged(stage: tuple[float, float]) -> Weights:
    """Return ``default-v1`` with a matrix stage."""
    rule = copy.deepcopy(resolve_weights("default-v1").rule)
    rule.config = dataclasses.replace(rule.config, matrix_blend=1.0, matrix_momentum=stage[0], matrix_gain=stage[1])
    return Weights(rule, f"default, stage {stage}")


class ShapedOptimizer:
    """``default-v1`` whose updates are moved after it made them."""

    def __init__(self, module: nn.Module, shaped: Shaped) -> None:
        weights = staged(shaped.stage) if shaped.stage else resolve_weights("default-v1")
        self.shaped, self.params = shaped, list(module.parameters())
        options = {"weights": nominal(weights) if shaped.nominal else weights, "lr": shaped.lr}
        self.inner = ByHand(self.params) if shaped.amplitude else LearnedOptimizer(self.params, **options)
        left_out = set() if shaped.ends else ends_of(module)
        chosen = [p for p in self.params if has_matrix(p.shape, shaped.smallest_side) and p not in left_out]
        self.chosen = chosen if shaped.blend and not shaped.stage else []
        self.momenta = {param: [torch.zeros_like(param) for _ in shaped.decays] for param in self.chosen}

    @torch.no_grad()
    def step(self) -> None:
        """Take a step and move it."""
        before = [param.clone() for param in self.chosen]
        self.inner.step()
        for param, old in zip(self.chosen, before, strict=True):
            update = param - old
            source = update if self.shaped.of == "update" else self._momentum(param)
            if self.shaped.of == "mix":
                source = update / update.norm().clamp(min=1e-30) + source * (
                    self.shaped.share / source.norm().clamp(min=1e-30)
                )
            direction = orthogonalize(source.reshape(1, *matrix_shape(source.shape))).view_as(update)
            length = update.norm()
            if self.shaped.amplitude:
                length = self.inner.amplitudes[param] * update.numel() ** 0.5
            shaped = direction * (self.shaped.gain * length / direction.norm().clamp(min=1e-30))
            param.copy_(old + torch.lerp(update, shaped, self.shaped.blend))

    def _momentum(self, param: nn.Parameter) -> Tensor:
        """Advance the momenta of a parameter, and return the direction against them."""
        total = torch.zeros_like(param)
        for decay, momentum in zip(self.shaped.decays, self.momenta[param], strict=True):
            momentum.lerp_(param.grad, 1 - decay)
            total -= torch.lerp(param.grad, momentum, decay) if self.shaped.nesterov else momentum
        return total / len(self.shaped.decays)


class MuonAndAdamW:
    """torch's Muon on hidden matrices, convolutions flattened, AdamW on the rest; no weight decay; one rate for both."""

    def __init__(self, module: nn.Module, rate: float, horizon: int | None) -> None:
        ends = ends_of(module)
        self.matrices = [p for p in module.parameters() if p.dim() >= 2 and p not in ends]
        rest = [p for p in module.parameters() if p.dim() < 2 or p in ends]
        self.views = [nn.Parameter(p.data.view(len(p), -1)) for p in self.matrices]
        options = {"lr": rate, "weight_decay": 0.0}
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, **options)]
        if self.views:
            self.parts.append(torch.optim.Muon(self.views, **options, adjust_lr_fn="match_rms_adamw"))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR
        self.schedules = [schedule(part, horizon) for part in self.parts] if horizon else []

    def step(self) -> None:
        """Step both."""
        for view, param in zip(self.views, self.matrices, strict=True):
            view.grad = param.grad.view_as(view)
        for part in (*self.parts, *self.schedules):
            part.step()


def adam(module: nn.Module, rate: float, horizon: None) -> torch.optim.Adam:
    """Plain Adam at a constant rate."""
    return torch.optim.Adam(module.parameters(), lr=rate)


Losses = dict[str, list[float]]
"""By inner step: the loss at the last weights and at averaged ones."""


def train(kind: JudgingTask, make: Callable[[nn.Module], object], seed: int, horizons: tuple[int, ...]) -> Losses:
    """Train one case and look at it at each horizon."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = kind.make(seed)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    params = list(case.module.parameters())
    optimizer, average = make(case.module), [param.detach().clone() for param in params]
    found: Losses = {}
    for step in range(1, horizons[-1] + 1):
        for param in params:
            param.grad = None
        loss = case.loss(case.module, case.next_batch(generator))
        if not loss.isfinite():
            return found | {str(h): [math.inf, math.inf] for h in horizons if h >= step}
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, [param.detach() for param in params], 1 - 0.5 ** (1 / (HALF_LIFE * step)))
        if step in horizons:
            found[str(step)] = [look(case, None), look(case, average)]
    return found


@torch.no_grad()
def look(case: Case, weights: list[Tensor] | None) -> float:
    """Return the loss of fresh minibatches, with the batch statistics of training, at other weights if given."""
    module = copy.deepcopy(case.module)
    for param, value in zip(module.parameters(), weights or [], strict=False):
        param.copy_(value)
    generator = torch.Generator().manual_seed(77_777)
    return sum(float(case.loss(module, case.next_batch(generator))) for _ in range(MINIBATCHES)) / MINIBATCHES


def cached(
    name: str, kind: str, seed: int, make: Callable[[nn.Module], object], horizons: tuple[int, ...] = HORIZONS
) -> Losses:
    """Return the losses of one run, and keep them."""
    path = RUNS / f"{name}__{kind}__{seed}.json".replace(" ", "_").replace(",", "")
    if not path.exists():
        RUNS.mkdir(parents=True, exist_ok=True)
        losses = train(KINDS[kind], make, seed, horizons)
        write_atomically(path, json.dumps({"name": name, "kind": kind, "seed": seed, "losses": losses}).encode())
    return json.loads(path.read_text())["losses"]


def tune(name: str, kind: str, seed: int) -> None:
    """Run an opponent at all rates that its grid needs; the best one at a horizon never lies at the edge of what was run."""
    for horizons in [(h,) for h in HORIZONS] if "cosine" in name else [HORIZONS]:
        tried: dict[int, Losses] = {}
        wanted = set(START)
        while wanted - set(tried):
            for position in sorted(wanted - set(tried)):
                rate = GRID[position]
                label = f"{name} {rate:.2g}" + (f" T{horizons[0]}" if "cosine" in name else "")
                decay = horizons[0] if "cosine" in name else None
                make = partial(adam if name == "Adam" else MuonAndAdamW, rate=rate, horizon=decay)
                tried[position] = cached(label, kind, seed, make, horizons)
            for key in ((str(h), at) for h in horizons for at in (0, 1)):
                best = min(tried, key=lambda position, key=key: nan_to_inf(tried[position][key[0]][key[1]]))
                wanted |= {position for position in (best - 1, best + 1) if 0 <= position < len(GRID)}


def nan_to_inf(value: float) -> float:
    """A loss that is no number is the worst."""
    return value if math.isfinite(value) else math.inf


def run(seeds: Iterable[int]) -> None:
    """Do what is missing: the most telling contestants first, all kinds before the next seed."""
    for seed in seeds:
        for name in (*list(VARIANTS)[:3], *OPPONENTS, *list(VARIANTS)[3:]):
            for kind in KINDS:
                if name in OPPONENTS:
                    tune(name, kind, seed)
                else:
                    cached(name, kind, seed, lambda module, name=name: ShapedOptimizer(module, VARIANTS[name]))


Row = dict[str, str | int | float]


def results() -> Iterator[Row]:
    """Every run's losses, a row a horizon."""
    for path in sorted(RUNS.glob("*.json")):
        found = json.loads(path.read_text())
        for horizon, (last, averaged) in found["losses"].items():
            row = {"contestant": found["name"], "kind": found["kind"], "seed": found["seed"], "horizon": int(horizon)}
            yield {**row, "last": float(f"{last:.5g}"), "averaged": float(f"{averaged:.5g}")}


Key = tuple[str, str, int, int, str]
"""Contestant, kind, seed, horizon, and which weights: ``"last"`` or ``"averaged"``."""


def best_losses(rows: Iterable[Row]) -> dict[Key, float]:
    """Return each contestant's loss; of an opponent, at the best of its rates."""
    found: dict[Key, float] = {}
    for row in rows:
        name = str(row["contestant"])
        longest_first = sorted(OPPONENTS, key=len, reverse=True)
        label = next((known for known in longest_first if name.startswith(f"{known} ")), name)
        for at in WEIGHTS:
            key = (label, str(row["kind"]), int(row["seed"]), int(row["horizon"]), at)
            found[key] = min(found.get(key, math.inf), nan_to_inf(float(row[at])))
    return found


def ratios(
    losses: dict[Key, float], name: str, horizon: int, at: str, against: str = "Adam"
) -> dict[tuple[str, int], float]:
    """Return ratios to another contestant's loss at its last weights, by kind and seed."""
    return {
        (kind, seed): losses[name, kind, seed, horizon, at] / losses[against, kind, seed, horizon, "last"]
        for one, kind, seed, steps, weights in losses
        if (one, steps, weights) == (name, horizon, at) and (against, kind, seed, horizon, "last") in losses
    }


def mean(values: Iterable[float]) -> str:
    """Return the geometric mean, as tables print it."""
    logs = [math.log(value) for value in values]
    return f"{math.exp(sum(logs) / len(logs)):.3f}" if logs else ""


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def table() -> None:
    """Write all runs as a csv, and the geometric means of ratios as markdown."""
    rows = list(results())
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "orthogonal_updates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    losses = best_losses(rows)
    done = [name for name in (*OPPONENTS, *VARIANTS) if ratios(losses, name, HORIZONS[-1], "last")]
    columns = [(against, horizon, at) for against in ("default-v1", "Adam") for horizon in HORIZONS for at in WEIGHTS]
    overview, by_kind = [], []
    for name in done:
        last = ratios(losses, name, HORIZONS[-1], "last")
        worst = max(last, key=lambda pair: last[pair])
        cells = [mean(ratios(losses, name, horizon, at, against).values()) for against, horizon, at in columns]
        overview.append([name, str(len(last)), *cells, f"{last[worst]:.2f} {worst[0]}"])
        averaged = ratios(losses, name, HORIZONS[-1], "averaged")
        by_kind.append([name, *(mean(value for pair, value in averaged.items() if pair[0] == kind) for kind in KINDS)])
    seeds = sorted({int(row["seed"]) for row in rows})
    text = (
        "Made by `python -m experiments.orthogonal_updates run` and `table`. Training losses of 20 fresh minibatches; "
        f"{len(KINDS)} held-out kinds, seeds {seeds}; n counts pairs of kind and seed. Rates of Adam and Muon are the "
        "best of their half-decades on these very runs.\n\n"
        "A row with a smaller n lacks kinds and must not be compared with the others; the second table sets contestants "
        "side by side kind by kind.\n\n"
        "Geometric means of the ratio to `default-v1` and to tuned Adam, both at their last weights; inner steps and "
        "weights in the header:\n\n"
    )
    heads = [f"{at} {horizon} / {against}" for against, horizon, at in columns]
    text += markdown(["contestant", "n", *heads, f"worst last {HORIZONS[-1]} / Adam"], overview)
    text += f"\nBy kind: averaged weights after {HORIZONS[-1]} steps / tuned Adam's last weights:\n\n"
    text += markdown(["contestant", *KINDS], by_kind)
    (RESULTS / "orthogonal_updates.md").write_text(text)
    print(text)


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.verb == "run":
        run(options.seeds)
    else:
        table()


if __name__ == "__main__":
    main()
