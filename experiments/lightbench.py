"""LightBench, an external suite of small tests that pass or fail: `default` beside Adam, AdamW and Muon, none of them tuned.

    pip install lightbench
    nice -n 10 python -m experiments.lightbench run --steps 2000 --seconds 60
    python -m experiments.lightbench table

LightBench searches hyperparameters over many trials on a GPU. Here every optimizer gets one trial at one rate, on the CPU.
A test passes once its own win condition holds; that is looked at after each step. Difficulties go up, and after the first
that fails the harder ones count as failed, as in LightBench. A finished test is a file in ``runs/lightbench/``, so an
interrupted study goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.overrides import TorchFunctionMode

from learned_optim import LearnedOptimizer
from meta_train.files import write_atomically
from meta_train.judging.opponents import MuonAndAdamW

DIFFICULTIES = ("trivial", "easy", "medium", "hard", "extreme", "nightmare")
SEED = 0x1239121
RUNS, RESULTS = Path("runs/lightbench"), Path(__file__).parent / "results"
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "default": lambda module: LearnedOptimizer(module.parameters()),
    "Adam(0.001)": lambda module: Adam(module.parameters(), lr=1e-3),
    "AdamW(0.001)": lambda module: AdamW(module.parameters(), lr=1e-3),
    "Muon(0.001)": lambda module: MuonAndAdamW(module.named_parameters(), lr=1e-3),
}
"""Muon's updates are scaled to those of AdamW, so AdamW's rate is its usual one."""
_NAMES = """
beale rosenbrock rastrigin quadratic_varying_scale quadratic_varying_target noisy_matmul xor_sequence
xor_digit xor_spot xor_sequence_rnn xor_digit_rnn xor_spot_rnn saddle_point discontinuous_gradient wide_linear
minimax plateau_navigation scale_invariant momentum_utilization batch_size_scaling sparse_gradient
layer_wise_scale parameter_scale gradient_delay adversarial_gradient dynamic_landscape multi_objective_pareto
class_imbalance_rare memory_constrained transfer_domain_shift plasticity_summod plasticity_weighted_summod
generalization_summod generalization_weighted_summod sparse_parameters quadratic_flip quadratic_outliers
quadratic_sparse quadratic_quantized_gradient absolute_varying_scale quadratic_quantization_aware_training
vanishing_gradient ill_conditioned ill_conditioned_mismatched gradient_noise_scale_instantaneous_brown
gradient_noise_scale_temporal_brown gradient_noise_scale_white gradient_noise_scale_heavy_tailed
constrained_optimization_relu constrained_optimization_log non_markovian
"""
TESTS = tuple(_NAMES.split())
"""What LightBench's own runner goes through."""


@dataclass(frozen=True)
class Trial:
    """How one trial ended.

    Args:
        passed: Whether the win condition held.
        end: ``won``, ``steps``, ``time``, ``loss`` where it is not finite, ``harder`` where an easier one failed, or an
            error.
        steps: Taken.
        loss: Of the last step.
    """

    passed: bool
    end: str
    steps: int = 0
    loss: float = math.nan


class OnCPU(TorchFunctionMode):
    """Answers every wish for a GPU with the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace devices."""
        args = tuple("cpu" if _is_gpu(value) else value for value in args)
        return func(*args, **{name: "cpu" if _is_gpu(value) else value for name, value in (kwargs or {}).items()})


def _is_gpu(value: object) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


def run_trial(
    make: Callable[[nn.Module], Optimizer], steps: int, seconds: float, model: nn.Module, data: Any, loss_fn: Any, won: Any
) -> Trial:
    """Train once, as LightBench does, until the test is won or there is no more to take."""
    optimizer, start, value = make(model), time.monotonic(), math.nan
    for step in range(1, steps + 1):
        inputs, targets = data() if data else (None, None)
        loss = model() if inputs is None else model(inputs)
        loss = loss_fn(loss, targets) if loss_fn else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if won(model, value)[0]:
            return Trial(True, "won", step, value)
        if not math.isfinite(value):
            return Trial(False, "loss", step, value)
        if time.monotonic() - start > seconds:
            return Trial(False, "time", step, value)
    return Trial(False, "steps", steps, value)


def attempt(test: str, difficulty: str, name: str, steps: int, seconds: float) -> Trial | None:
    """Make one trial of a test; None where it has no such difficulty."""
    from lightbench.utils import SkipConfig

    module = importlib.import_module(f"lightbench.{test}")
    found: list[Trial] = []

    def trial(model: nn.Module, data: Any, loss_fn: Any, won: Any, *args: Any, dtype: Any = None, **options: Any) -> None:
        wanted = dtype[0] if isinstance(dtype, list) else dtype
        model = model.to(dtype=getattr(torch, wanted) if isinstance(wanted, str) else wanted) if wanted else model
        torch.manual_seed(SEED)
        found.append(run_trial(OPTIMIZERS[name], steps, seconds, model, data, loss_fn, won))

    torch.manual_seed(SEED)
    options = {"steps": steps, "weight_decay": 0, "opt": [name], "trials": 1, "win_condition_multiplier": 1.0}
    dtype = ["float32"] if "list" in str(module.main.__annotations__.get("dtype", "")).lower() else "float32"
    try:
        with patch.object(module, "trial", trial):
            module.main(dtype=dtype, config=difficulty, **options)
    except SkipConfig:
        return None
    except Exception as error:  # A test that needs a GPU, or a package, is no verdict on an optimizer.
        return Trial(False, f"error: {type(error).__name__}: {error}"[:200])
    return found[0]


def run(tests: Sequence[str], steps: int, seconds: float) -> None:
    """Do what is missing."""
    RUNS.mkdir(parents=True, exist_ok=True)
    for test in tests:
        for name in OPTIMIZERS:
            path = RUNS / f"{test}__{name}.json"
            if path.exists():
                continue
            trials: dict[str, Trial] = {}
            for difficulty in DIFFICULTIES:
                failed = any(not trial.passed for trial in trials.values())
                limits = (0, 0.0) if failed else (steps, seconds)  # A trial of no steps tells whether there is such a one.
                trial = attempt(test, difficulty, name, *limits)
                if trial:
                    trials[difficulty] = Trial(False, "harder") if failed else trial
            about = {"test": test, "optimizer": name, "steps": steps, "seconds": seconds}
            kept = {difficulty: asdict(trial) for difficulty, trial in trials.items()}
            write_atomically(path, json.dumps({**about, "trials": kept}).encode())


def results() -> Iterator[dict[str, Any]]:
    """Every trial, as a row."""
    for path in sorted(RUNS.glob("*.json")):
        kept = json.loads(path.read_text())
        for difficulty, trial in kept["trials"].items():
            row = {"test": kept["test"], "difficulty": difficulty, "optimizer": kept["optimizer"]}
            yield {**row, **trial, "limit_steps": kept["steps"], "limit_seconds": kept["seconds"]}


def table() -> None:
    """Write every trial, and print success rates over the tests that ran for all optimizers."""
    rows = list(results())
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "lightbench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    broken = {row["test"] for row in rows if row["end"].startswith("error")}
    judged = [row for row in rows if row["test"] not in broken]
    for name in OPTIMIZERS:
        mine = [row["passed"] for row in judged if row["optimizer"] == name]
        print(f"{name:<14} {sum(mine):>3} of {len(mine)}")
    print(f"left out, because they do not run here: {', '.join(sorted(broken)) or 'none'}")


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one trial")
    options = parser.parse_args()
    if options.verb == "table":
        table()
        return
    torch.set_num_threads(1)
    same = {"cuda": lambda self, *_: self}
    cuda = {name: lambda *_: None for name in ("synchronize", "empty_cache", "manual_seed")}
    module, tensor = patch.multiple(nn.Module, **same), patch.multiple(torch.Tensor, **same)
    with OnCPU(), patch.multiple(torch.cuda, **cuda), module, tensor:
        run(options.tests, options.steps, options.seconds)


if __name__ == "__main__":
    main()
