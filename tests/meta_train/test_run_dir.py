import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from learned_optim.weights import read_weights
from meta_train.tasks import derive_seed
from meta_train.training.outer_loop import MetaTraining
from meta_train.training.recipe import parse_recipe
from meta_train.training.run_dir import BEST, LAST, METRICS, RunDir
from tests.meta_train.test_recipe import TINY

MIXTURE = TINY.replace('name = "quadratic"\ndimension = 3\nfunctions = 4', 'name = "mixture"\nproblems = 2').replace(
    'family = "paper"\nhidden_size = 3\nnum_layers = 1\noutput_scale = 0.1', 'family = "adam-modulation"'
)

TRAIN = """
import sys, time, torch
torch.set_num_threads(1)
from meta_train.training.run_dir import RunDir
for record in RunDir(sys.argv[1], open(sys.argv[2]).read()).train(checkpoint_every=3):
    print(record.step, flush=True)
    time.sleep(0.02)
"""


@pytest.mark.parametrize("recipe", [TINY, MIXTURE], ids=["quadratic", "mixture"])
def test_resuming_goes_on_bit_for_bit(recipe: str) -> None:
    whole = MetaTraining(parse_recipe(recipe))
    records = list(whole)
    for stop in (1, 7):
        first, second = MetaTraining(parse_recipe(recipe)), MetaTraining(parse_recipe(recipe))
        for record in first:
            if record.step == stop:
                break
        second.load_state_dict(first.state_dict())
        assert list(second) == records[stop:]
        for name, value in whole.rule.state_dict().items():
            assert torch.equal(value, second.rule.state_dict()[name]), name
    assert whole.best.validation < float("inf")


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_point_it_ends_with_the_same_bits(seed: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TINY)
    for _ in RunDir(tmp_path / "whole", TINY).train(checkpoint_every=3):
        pass
    rng = random.Random(seed)
    for attempt in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", TRAIN, tmp_path / "killed", recipe],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            if attempt < 3:
                for _ in range(rng.randint(1, 5)):
                    process.stdout.readline()
                time.sleep(rng.random() * 0.03)
                os.kill(process.pid, signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, errors
    for name in (BEST, LAST, METRICS):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert len((tmp_path / "whole" / METRICS).read_text().splitlines()) == 12


def test_weights_say_what_they_were_chosen_by(tmp_path: Path) -> None:
    recipe = TINY.replace("horizon = 8\n", "horizon = 8\nfinal_horizon = 12\n")
    opened = RunDir(tmp_path, recipe)
    *_, last = opened.train()
    about = read_weights(tmp_path / BEST).metadata
    assert about["final_validation"] == f"{last.final:.6g}"
    assert about["outer_steps"] == str(opened.run.best.step)
    assert "final_validation" not in read_weights(tmp_path / LAST).metadata


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    RunDir(tmp_path, TINY)
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        RunDir(tmp_path, TINY.replace("seed = 0", "seed = 1"))


def test_meta_training_lowers_the_loss_of_quadratics() -> None:
    text = (
        TINY.replace("steps = 12", "steps = 150")
        .replace("horizon = [6, 12]", "horizon = [15, 15]")
        .replace("horizon = 8", "horizon = 15")
    )
    run = MetaTraining(parse_recipe(text.replace("every = 4", "every = 50").replace("optimizees = 2", "optimizees = 10")))
    validations = [record.validation for record in run if record.validation is not None]
    untrained = 3.0  # E ||y||^2 in three dimensions: what a rule that does not move is left with.
    assert validations[-1] < 0.75 * untrained
    assert run.best.validation == min(validations)


def test_seeds_never_meet() -> None:
    seeds = {
        derive_seed(seed, purpose, i)
        for seed in (0, 1)
        for purpose in ("train", "validation", "tuning", "evaluation")
        for i in range(500)
    }
    assert len(seeds) == 4000
