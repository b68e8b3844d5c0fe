import dataclasses
import math
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from learned_optim import Weights
from meta_train.__main__ import main
from meta_train.evidence import figures
from meta_train.evidence.responses import probe
from meta_train.judging import arena_report as evaluate
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import FIXED, Setting, rates, settings
from meta_train.judging.contestants import learned
from meta_train.judging.runner import Runner
from meta_train.judging.trial import Outcome
from meta_train.rows import read_rows, write_judgement, write_rows
from meta_train.tasks import NeuralArt, Quadratic, Quartic
from meta_train.training.publish import publish
from meta_train.training.run_dir import RunDir
from meta_train.workers import Workers
from tests.cases import small_rule
from tests.meta_train.judged_runs import best_of, losses_of
from tests.meta_train.pictures import NETWORK, make_data
from tests.meta_train.test_recipe import TINY

TASK = Quadratic(dimension=2, functions=3)
SWEEP = [*settings("SGD", rates(0.003, 3, 1)), *settings("Adam", rates(0.003, 3, 1))]


def test_adam_through_evaluate_is_adam_by_hand() -> None:
    losses = losses_of(TASK.sample(1), Setting("Adam", 0.1).make, 5)
    optimizee = TASK.sample(1)
    theta = torch.zeros(3, 2, requires_grad=True)
    adam, by_hand = torch.optim.Adam([theta], lr=0.1), []
    for _ in range(6):
        loss = optimizee.losses({"theta": theta.unsqueeze(0)})[0]
        by_hand.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses == by_hand


def test_several_problems_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="one problem at a time, got 5"):
        losses_of(Quartic(2, 5).sample(0), Setting("SGD", 0.1).make, 1)


def test_grids() -> None:
    assert rates(0.001, 0.1) == [0.001, 0.00316, 0.01, 0.0316, 0.1]
    assert len(settings("NAG", rates(0.1, 1, 1))) == 10
    with pytest.raises(ValueError, match="unknown baseline 'Adagrad'"):
        settings("Adagrad", [0.1])


def test_an_optimum_at_the_edge_is_an_error() -> None:
    group = settings("SGD", [0.1, 1.0, 10.0])
    assert best_of(group, [2, 1, math.nan]).lr == 1.0
    with pytest.raises(ValueError, match=r"best rate of SGD is 0\.1, at the edge"):
        best_of(group, [0, 1, 2])
    with pytest.raises(ValueError, match="every setting of SGD diverged"):
        best_of(group, [math.inf] * 3)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "refuse_edge", lambda best, group: [])
        weights = [learned(Weights(small_rule("paper-raw", seed), name)) for seed, name in enumerate("ab")]
        judgement = evaluate.judge(weights, Arena(TASK, SWEEP, FIXED, tuning=2, fresh=3))
    write_judgement(judgement, out)
    write_rows(out / "probe.csv", probe(weights[0].first, steps=8))
    return out


def test_tables_agree_with_each_other(judged: Path) -> None:
    curves, summary = read_rows(judged / "curves.csv"), read_rows(judged / "summary.csv")
    ours = [float(row["mean"]) for row in curves if row["optimizer"] == "LSTM (a)"]
    assert len(ours) == 201
    for row in summary:
        if row["optimizer"] == "LSTM (a)":
            end = int(row["horizon"])
            expected = sum(ours[:end]) if row["criterion"] == "sum" else ours[end]
            assert float(row["mean"]) == pytest.approx(expected, rel=1e-4)
    ratios = [float(row["ratio_to_best_baseline"]) for row in summary if not row["optimizer"].startswith("LSTM")]
    assert min(ratios) == pytest.approx(1)
    assert len(read_rows(judged / "sweep.csv")) == len(SWEEP)


def test_the_same_tables_give_the_same_pictures(judged: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows = read_rows(judged / "curves.csv")
        figures.learning_curves(rows, tmp_path / name / "curves.svg", trained_to=100)
        figures.update_probe(read_rows(judged / "probe.csv"), tmp_path / name / "probe.svg")
    for picture in ("curves.svg", "probe.svg"):
        first = (tmp_path / "one" / picture).read_bytes()
        assert first == (tmp_path / "two" / picture).read_bytes()
        assert len(first) > 5000


def test_publish_puts_weights_beside_their_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no best\.safetensors"):
        publish(tmp_path, "x")
    assert list(RunDir(tmp_path / "run", TINY).train())
    (path,) = publish(tmp_path / "run", "tiny", tmp_path)
    weights = Weights.from_pretrained(path)
    assert weights.recipe == (tmp_path / "tiny.toml").read_text() == TINY
    assert {"commit", "torch", "validation", "outer_steps", "processor"} <= set(weights.metadata)


def test_the_command_line_explains_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "no.toml"), "--out", str(tmp_path)]) == 2
    assert "no.toml" in capsys.readouterr().err
    assert main(["evaluate", "quadratik", "--out", str(tmp_path)]) == 2
    assert "did you mean 'quadratic'" in capsys.readouterr().err
    assert main(["verify", "default"]) == 2
    assert "no committed evidence for 'default'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["no-such-verb"])


def test_train_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    assert main(["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run"), "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert "best weights" in captured.out
    assert "meta-loss" in captured.err
    assert "seed = 3" in (tmp_path / "run" / "recipe.toml").read_text()


def test_what_was_judged_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(TASK, SWEEP, tuning=1, fresh=2, horizons=(6, 3))
    rules = [learned(Weights(small_rule("paper-raw"), "one"))]
    first = evaluate.judge(rules, arena, Runner(tmp_path))
    runs = []
    outcome = Outcome(torch.ones(7, dtype=torch.float64))
    monkeypatch.setattr("meta_train.judging.runner.train", lambda *_: runs.append(1) or outcome)
    assert evaluate.judge(rules, arena, Runner(tmp_path)) == first
    assert not runs
    evaluate.judge([learned(Weights(small_rule("paper-raw", 1), "one"))], arena, Runner(tmp_path))
    assert len(runs) == 2, "other weights of the same name, on two optimizees"


def test_processes_find_what_this_one_finds(tmp_path: Path) -> None:
    arena = Arena(TASK, SWEEP, tuning=1, fresh=2, horizons=(6, 3))
    rules = [learned(Weights(small_rule("paper-raw"), "one"))]
    with Workers(1) as workers:
        judgement = evaluate.judge(rules, arena, Runner(tmp_path, workers.map))
    assert judgement == evaluate.judge(rules, arena)


@pytest.mark.parametrize("name", ARENAS)
def test_finished_runs_are_kept_under_all_that_decides_a_task(name: str, tmp_path: Path) -> None:
    """Of opened tasks too: those of real data are classes of their own."""
    arena = ARENAS[name]
    if isinstance(arena.task, NeuralArt):
        make_data(tmp_path)
        small = {"size": 8, "network": NETWORK, "network_file": "net.safetensors", "style": "other"}
        test, tuning = (replace(task, **small) for task in (arena.task, arena.tuning_task))
        arena = dataclasses.replace(arena, task=test, tuning_task=tuning)
    opened, again = arena.on(tmp_path), arena.on(tmp_path)
    for what in ("task", "tuning_task"):
        task, closed = getattr(opened, what), getattr(arena, what)
        assert repr(task) == repr(getattr(again, what)), "an address says nothing"
        assert repr(closed) in repr(task), "nothing is left out"
        assert (task is closed) == (not hasattr(closed, "on")), "real data are opened"
