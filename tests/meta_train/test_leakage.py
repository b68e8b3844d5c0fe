"""Nothing is tuned, chosen or meta-trained on what it is judged on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from learned_optim import Weights
from meta_train.judging import arena_report as evaluate
from meta_train.judging import runner as runner_module
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import Learned, learned
from meta_train.judging.real_further import judging_tasks
from meta_train.judging.report import judge_suite
from meta_train.judging.runner import CaseTrials, OptimizeeTrials, Run, Runner
from meta_train.judging.suites import SEEDS, SUITES, TUNING_SEED, Suite, SuiteRunner
from meta_train.judging.trial import Outcome
from meta_train.tasks import Cifar, Mnist, NeuralArt, Optimizee, Quadratic, Quartic, derive_seed
from meta_train.tasks.case import Case, JudgingTask, regression_loss
from meta_train.tasks.held_out import HELD_OUT_KINDS
from meta_train.training.outer_loop import MetaTraining, validate
from meta_train.training.recipe import parse_recipe, read_recipe
from tests.cases import small_rule
from tests.meta_train.judged_runs import WrittenRunner
from tests.meta_train.test_recipe import TINY, WEIGHTS


class Noting:
    """A task that notes which seeds were asked for."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def sample(self, seed: int) -> Optimizee:
        """Note the seed."""
        self.seeds.append(seed)
        return Quadratic(dimension=2, functions=3).sample(seed)


@pytest.mark.parametrize("apart", [False, True], ids=["one task", "a task to tune on"])
def test_baselines_are_tuned_on_other_optimizees_than_they_are_reported_on(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Noting()
    tuning_task = Noting() if apart else task
    asked: dict[str, set[int]] = {}
    make = runner_module._make

    def noted(cache: Path | None, run: Run) -> Outcome:
        assert isinstance(run.trials, OptimizeeTrials)
        assert isinstance(run.trials.task, Noting)
        seeds = run.trials.task.seeds
        before = len(seeds)
        outcome = make(cache, run)
        who = "rule" if isinstance(run.contestant, Learned) else "baseline"
        asked.setdefault(f"{who}, {run.trials.purpose}", set()).update(seeds[before:])
        return outcome

    monkeypatch.setattr(runner_module, "_make", noted)
    sweep = [Setting("Adam", lr) for lr in (1e-6, 0.1, 1e3)]
    arena = Arena(task, sweep, tuning=3, fresh=4, horizons=(5,), tuning_task=tuning_task if apart else None)
    evaluate.judge([learned(Weights(small_rule("paper-raw"), "mine"))], arena)
    tuning = {derive_seed(0, "tuning", index) for index in range(3)}
    fresh = {derive_seed(0, "evaluation", index) for index in range(4)}
    assert asked == {"baseline, tuning": tuning, "baseline, evaluation": fresh, "rule, evaluation": fresh}
    assert set(tuning_task.seeds) - fresh == tuning
    if apart:
        assert set(tuning_task.seeds) == tuning
        assert set(task.seeds) == fresh


def test_what_is_best_on_fresh_optimizees_is_not_chosen_for_that() -> None:
    ends = {0.1: (0.1, 0.9), 0.2: (0.5, 0.2)}  # When tuned, and on fresh ones.
    group = [Setting("SGD", lr) for lr in (0.01, 0.1, 0.2, 1.0)]
    runner = WrittenRunner(lambda contestant, purpose: ends.get(contestant.lr, (1.0, 1.0))[purpose == "evaluation"])
    runs = evaluate.ArenaRuns(Arena(Quadratic(), group, tuning=2, fresh=2), runner)
    assert evaluate._tuned(runs, group, ("final", 100)) == {"SGD": Setting("SGD", 0.1)}


class Scripted(SuiteRunner):
    """A suite whose outcomes are a function of the run; it notes them all."""

    asked: list[Run]

    def complete(self, runs: object) -> None:
        """Note what is asked for."""
        self.asked = [*getattr(self, "asked", []), *runs]  # type: ignore[misc]

    def outcome(self, run: Run) -> Outcome:
        """Let the middle rate be best in tuning and the highest on other seeds."""
        best = 1e-2 if run.seed == TUNING_SEED else 3e-2
        loss = 1.0 + abs(run.contestant.lr - best)
        return Outcome(torch.full((run.horizon,), loss), final_loss={10: loss, 30: loss})


def test_a_suite_tunes_on_a_seed_that_is_never_reported(tmp_path: Path) -> None:
    assert TUNING_SEED not in SEEDS
    task = JudgingTask("any", "any", lambda seed: pytest.fail("nothing is to be trained"), (10, 30))
    suite = Suite("any", lambda *_: [task], {"Adam": (3e-3, 1e-2, 3e-2), "AdamW+cosine": (3e-3, 1e-2, 3e-2)}, {}, ())
    runner = Scripted(suite, tmp_path)
    best = runner.tune()
    assert {run.seed for run in runner.asked} == {TUNING_SEED}
    assert {setting.lr for setting in best.values()} == {1e-2}
    runner.asked = []
    mine = Learned("mine", "0" * 64)
    judge_suite(runner, [mine])
    reported = [run for run in runner.asked if run.seed != TUNING_SEED]
    assert {run.seed for run in reported} == set(SEEDS)
    assert {run.seed for run in reported if run.contestant == mine} == {run.seed for run in runner.asked} - {TUNING_SEED}
    assert {run.contestant.lr for run in reported if run.contestant != mine} == {1e-2}


def test_arenas_judge_on_the_half_that_was_not_trained_on() -> None:
    halves = {
        name: (arena.task.half, arena.tuning_task) for name, arena in ARENAS.items() if isinstance(arena.task, Mnist | Cifar)
    }
    assert set(halves) == {
        *("mnist", "mnist-relu", "cifar", "cifar-5", "cifar-2"),
        *(f"mnist-{size}x{depth}" for size in (5, 10, 20, 40, 80) for depth in (1, 2)),
    }
    assert set(halves.values()) == {("second", None)}


def test_pictures_are_judged_and_tuned_on_photos_of_their_own() -> None:
    splits = {
        name: (arena.task.split, arena.tuning_task.split)  # type: ignore[union-attr]
        for name, arena in ARENAS.items()
        if isinstance(arena.task, NeuralArt)
    }
    assert splits == dict.fromkeys(("neural-art", "neural-art-style", "neural-art-double"), ("test", "tuning"))
    for name in splits:
        arena = ARENAS[name]
        assert repr(arena.tuning_task).replace("tuning", "test") == repr(arena.task), "the same but for the split"


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_recipes_meta_train_and_validate_on_nothing_that_judges(path: Path) -> None:
    recipe = read_recipe(path)
    for task in (recipe.task, recipe.validation.task or recipe.task):
        if isinstance(task, Mnist | Cifar):
            assert task.half == "first"
        if isinstance(task, NeuralArt):
            assert task.split == ("train" if task is recipe.task else "validation")


def test_validation_draws_from_the_task_that_is_named_for_it() -> None:
    recipe = parse_recipe(TINY + '[validation.task]\nname = "quartic"\ndimension = 2\nfunctions = 5\n')
    named = Quartic(dimension=2, functions=5)
    run = MetaTraining(recipe)
    figures = {record.validation for record in run if record.is_best}
    assert validate(run.best.rule, named, recipe) == run.best.validation in figures
    assert validate(run.best.rule, recipe.task, recipe) != run.best.validation


LINE = JudgingTask(
    "line", "fit a line", lambda seed: Case(nn.Linear(1, 1), regression_loss, lambda _: NotImplemented), (30,)
)


def test_a_run_of_a_suite_is_kept_under_all_that_decides_it() -> None:
    run = Run(CaseTrials(LINE), Setting("NAG", 0.1, 0.9), 30, 2)
    tasks = [LINE, *(replace(LINE, **{what: "other"}) for what in ("name", "about", "data"))]
    who = [
        Setting("NAG", 0.2, 0.9),
        Setting("NAG", 0.1, 0.8),
        Setting("Adam", 0.1),
        learned("default"),
        learned("quadratic"),
    ]
    runs = [run, replace(run, horizon=40), replace(run, seed=3), *(replace(run, contestant=one) for one in who)]
    files = {replace(run, trials=CaseTrials(task)).file for task in tasks} | {one.file for one in runs}
    assert len(files) == len(tasks) + len(runs) - 1
    # Finished runs are found again by this name, so it stays as it is.
    assert replace(run, trials=CaseTrials(replace(LINE, data="d"))).file == "line-fa8f220ff99b2272.safetensors"


def test_a_run_of_an_arena_is_kept_under_all_that_decides_it(tmp_path: Path) -> None:
    task, sgd = Quadratic(dimension=2, functions=3), Setting("SGD", 0.1)
    keys = [
        (task, sgd, 3, "tuning", 0),
        (task, sgd, 3, "evaluation", 0),
        (task, sgd, 3, "evaluation", 1),
        (task, sgd, 2, "evaluation", 0),
        (task, Setting("SGD", 0.2), 3, "evaluation", 0),
        (Quadratic(dimension=3, functions=3), sgd, 3, "evaluation", 0),
    ]
    runs = [Run(OptimizeeTrials(task, purpose), who, horizon, seed) for task, who, horizon, purpose, seed in keys]

    def losses(runner: Runner) -> list[list[float]]:
        return [runner.outcome(run).losses.tolist() for run in runs]

    first = losses(Runner(tmp_path))
    assert len(list(tmp_path.iterdir())) == len(keys)
    assert losses(Runner(tmp_path)) == first
    assert losses(Runner()) == first, "each found its own"
    assert runs[0].file == "1e3ad8b899db1a05.safetensors", "the name by which a finished run is found again stays as it is"


def test_the_suite_for_choosing_and_the_one_for_judging_share_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {task.name for task in SUITES["held-out-kinds"].tasks(tmp_path, None)}
    data = {"adult_x": torch.zeros(1, 3)}
    monkeypatch.setattr("meta_train.judging.suites.prepared", lambda *_: (data, "fingerprint of the data"))
    judging = SUITES["judge"].tasks(tmp_path, None)
    assert len(judging) == len({task.name for task in judging}) == 21
    assert {task.data for task in judging} == {"fingerprint of the data"}
    assert chosen.isdisjoint(task.name for task in judging)


def test_real_data_do_not_depend_on_the_seed_that_initialises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the held-out kinds do, from a stream of their own."""
    generator = torch.Generator().manual_seed(0)
    texts = ("text", "text_held_out", "other_text", "other_text_held_out")
    data = {name: torch.randint(65, (500,), generator=generator) for name in texts}
    shapes = {"mnist": (28, 28), "cifar": (3, 32, 32), "kin": (8,), "california": (8,), "adult": (5,)}
    for name, shape in shapes.items():
        for part in ("", "_held_out"):
            data[f"{name}_x{part}"] = torch.rand(30, *shape, generator=generator)
            labels = torch.arange(30) % (10 if name in ("mnist", "cifar") else 2)
            data[f"{name}_y{part}"] = labels if name in ("mnist", "cifar", "adult") else labels.unsqueeze(1).float()
    monkeypatch.setattr("meta_train.judging.real_further.PRETRAINING_STEPS", 2)
    tasks = judging_tasks(data, "any")
    assert len(tasks) == 21
    for task in tasks:
        first, second = (task.make(seed) for seed in (0, 1))
        batches = [case.next_batch(torch.Generator().manual_seed(5)) for case in (first, second)]
        for one, other in zip([*batches[0], *first.held_out[0]], [*batches[1], *second.held_out[0]], strict=True):
            assert torch.equal(one, other), task.name
        assert first.loss(first.module, batches[0]).isfinite()
    linear = next(kind for kind in HELD_OUT_KINDS if kind.name == "linear")
    made = [linear.make(seed).next_batch(torch.Generator().manual_seed(5))[0] for seed in (0, 1)]
    assert not torch.equal(*made)
