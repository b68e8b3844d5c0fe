"""Judging whole models: curves, tuning, the cache, and the tables."""

import functools
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from meta_train.__main__ import main
from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import learned
from meta_train.judging.real_data import prepared
from meta_train.judging.real_further import judging_tasks
from meta_train.judging.report import Report, judge_suite, read_baselines
from meta_train.judging.runner import CaseTrials, Run
from meta_train.judging.stress import stress_tasks
from meta_train.judging.suites import SUITES, Suite, SuiteRunner
from meta_train.judging.trial import smoothed_final, train_case
from meta_train.rows import read_rows, write_judgement
from meta_train.tasks.case import Case, JudgingTask, classification_loss, regression_loss
from meta_train.tasks.held_out import HELD_OUT_KINDS, LONG_KINDS, SHIPPED_KINDS
from meta_train.tasks.modules import CharLSTM, CharTransformer, VisionTransformer, conv_net, mlp, residual_net
from meta_train.tasks.pretraining import fine_tuned, pretrained
from meta_train.workers import Workers


def _line(seed: int) -> Case:
    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(16, 3, generator=generator)
        return x, x.sum(1, keepdim=True)

    held_out = batch(torch.Generator().manual_seed(99))
    return Case(nn.Linear(3, 1), regression_loss, batch, [held_out])


LINE = JudgingTask("line", "fit a line", _line, (10, 30))
TINY = Suite(
    "tiny", lambda cache, data: (LINE,), {"Adam": (1e-3, 3e-3), "AdamW+cosine": (1e-2, 3e-2)}, {}, (Setting("Adam", 1e-3),)
)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "tiny", TINY)
    return SuiteRunner(TINY, tmp_path)


def test_a_run_is_decided_by_its_seed_and_ends_with_a_held_out_loss():
    first, again, other = (train_case(LINE, Setting("Adam", 0.1).make, 30, seed) for seed in (0, 0, 1))
    assert torch.equal(first.losses, again.losses)
    assert not torch.equal(first.losses, other.losses)
    assert first.held_out.keys() == {10, 30}
    assert first.held_out[30] < first.held_out[10]


def test_a_run_that_diverges_is_infinite_to_the_end():
    losses = train_case(LINE, Setting("SGD", 1e20).make, 30, 0).losses
    assert losses[0] < 100
    assert losses[-1] == math.inf
    assert smoothed_final(losses, 30) == math.inf


def test_tuning_extends_the_grid_until_the_best_rate_lies_inside(runner):
    best = runner.tune()
    for (task, name, _), setting in best.items():
        rates = [tried.lr for tried in runner.tried[task, name]]
        assert min(rates) < setting.lr < max(rates)
    assert best["line", "Adam", 30].lr > 3e-3
    assert all(
        rate in {1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0} for rate in (t.lr for t in runner.tried["line", "Adam"])
    )


def test_only_what_changed_is_run_again(runner, monkeypatch):
    judge_suite(runner, [learned("default")], seeds=(0, 1))
    calls = []
    monkeypatch.setattr("meta_train.judging.runner.train", lambda *args: calls.append(args))
    judge_suite(runner, [learned("default")], seeds=(0, 1))
    assert not calls
    kept = {runner.cache / run.file for run in runner.runs_of(learned("default"), LINE, (0,))}
    other = {runner.cache / run.file for run in runner.runs_of(learned("default", lr=0.5), LINE, (0,))}
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in other)


def test_the_report_compares_at_every_horizon(runner):
    report = judge_suite(runner, [learned("default")], seeds=(0, 1))
    assert {(row["against"], row["horizon"]) for row in report.summary} == {
        (name, horizon) for name in ("Adam(0.001)", "Adam, tuned", "AdamW+cosine, tuned") for horizon in (10, 30)
    }
    ratio = next(row for row in report.ratios if row["against"] == "Adam(0.001)" and row["horizon"] == 30)
    finals = {row["optimizer"]: row["final"] for row in report.results if row["horizon"] == 30}
    assert ratio["ratio"] == pytest.approx(finals["LSTM (default)"] / finals["Adam(0.001)"], rel=1e-4)
    assert next(row for row in report.summary if row["against"] == "Adam(0.001)")["wins"] == 1


def test_a_judgement_is_written_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "held-out-kinds", TINY)
    out, cache = str(tmp_path / "out"), str(tmp_path / "cache")
    evaluate = ["evaluate", "default", "--suite", "held-out-kinds", "--out", out, "--cache", cache, "--workers", "0"]
    assert main(evaluate) == 0
    assert "against Adam, tuned" in capsys.readouterr().out
    assert main(["figures", out]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"{name}.csv" for name in ("results", "ratios", "summary", "sweep", "curves", "shipped", "shipped_summary")),
        "environment.json",
        "curves.svg",
    }


def test_baselines_of_an_earlier_judgement_are_not_run_again(tmp_path, runner, monkeypatch):
    first = judge_suite(runner, [learned("default")], seeds=(0, 1))
    write_judgement(first, tmp_path / "first")
    taken = read_baselines(tmp_path / "first")
    fresh = SuiteRunner(runner.suite, tmp_path / "fresh")
    monkeypatch.setattr(SuiteRunner, "tune", lambda self: pytest.fail("baselines were tuned"))
    second = judge_suite(fresh, [learned("default")], seeds=(0, 1), baselines=taken)
    assert second.ratios == first.ratios
    assert second.summary == first.summary
    write_judgement(second, tmp_path / "second")
    for table in ("results", "sweep"):
        assert (tmp_path / "second" / f"{table}.csv").read_text() == (tmp_path / "first" / f"{table}.csv").read_text()
    assert sorted(read_rows(tmp_path / "second" / "curves.csv"), key=str) == sorted(
        read_rows(tmp_path / "first" / "curves.csv"), key=str
    )


def test_baselines_must_be_there_and_of_the_same_tasks(tmp_path, runner):
    with pytest.raises(ValueError, match=r"results\.csv is missing"):
        read_baselines(tmp_path)
    with pytest.raises(ValueError, match="the baselines have no line at 10 steps"):
        judge_suite(runner, [learned("default")], seeds=(0,), baselines=Report())


def test_baselines_of_another_suite_are_refused(tmp_path, capsys):
    row = {"task": "t", "horizon": 1, "optimizer": "Adam", "setting": "lr=1", "final": 1.0}
    tables = Report(results=[row], sweep=[row], curves=[row])
    write_judgement(tables, tmp_path / "earlier", {"suite": "stress"})
    arguments = [
        "evaluate",
        "default",
        "--suite",
        "held-out-kinds",
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path),
    ]
    assert main([*arguments, "--baselines", str(tmp_path / "earlier")]) == 2
    assert "a judgement of 'stress', not of 'held-out-kinds'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_suite_can_be_judged_in_part(tmp_path):
    suite = SUITES["held-out-kinds"]
    assert list(SuiteRunner(suite, tmp_path, only=["vit", "linear"]).tasks) == ["vit", "linear"]
    with pytest.raises(ValueError, match="the suite held-out-kinds has no task 'resnet'; it has wide-mlp, "):
        SuiteRunner(suite, tmp_path, only=["vit", "resnet"])


def test_processes_give_the_same_bits(tmp_path):
    suite, losses = SUITES["held-out-kinds"], []
    with Workers(1) as workers:
        for name, each in (("here", map), ("there", workers.map)):
            runner = SuiteRunner(suite, tmp_path / name, each=each)
            losses.append(runner.outcome(Run(runner.trials["linear"], Setting("Adam", 1e-2), 20, 0)).losses)
    assert torch.equal(*losses)


def test_a_task_of_no_suite_cannot_leave_its_process():
    with pytest.raises(TypeError, match="'line' belongs to no registered suite"):
        pickle.dumps(CaseTrials(LINE))


@pytest.mark.parametrize(
    ("module", "inputs", "outputs"),
    [
        (mlp([6, 5, 4], nn.ReLU, norm=True), torch.randn(2, 6), (2, 4)),
        (conv_net([3, 4, 5], 8, 10, batch_norm=True), torch.randn(2, 3, 8, 8), (2, 10)),
        (residual_net((4, 6, 6), 10), torch.randn(2, 3, 8, 8), (2, 10)),
        (VisionTransformer(8, 1, 4, 16, 1, 10), torch.randn(2, 1, 8, 8), (2, 10)),
        (CharTransformer(7, 6, 16, 1), torch.randint(0, 7, (2, 6)), (2, 6, 7)),
        (CharLSTM(7, 8), torch.randint(0, 7, (2, 6)), (2, 6, 7)),
    ],
)
def test_models_map_to_what_they_say(module, inputs, outputs):
    assert module(inputs).shape == outputs


def test_the_transformer_looks_only_back():
    model, symbols = CharTransformer(7, 6, 16, 2), torch.randint(0, 7, (1, 6))
    changed = symbols.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 7
    before, after = model(symbols), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("task", HELD_OUT_KINDS + LONG_KINDS + SHIPPED_KINDS, ids=lambda task: task.name)
def test_held_out_kinds_can_be_trained(task, monkeypatch):
    monkeypatch.setattr("meta_train.tasks.held_out.PRETRAINING_STEPS", 5)
    losses = train_case(task, Setting("Adam", 1e-2).make, 20, 0).losses
    assert losses[-5:].mean() < losses[:5].mean()


def test_fine_tuning_starts_from_trained_weights_but_for_a_readout_of_other_classes():
    def batch(generator):
        x = torch.randn(16, 3, generator=generator)
        return x, (x[:, 0] > 0).long()

    make = functools.partial(mlp, [3, 8, 2], nn.ReLU)
    before = torch.get_rng_state()
    state = pretrained(make, classification_loss, batch, 1, 400)
    assert torch.equal(torch.get_rng_state(), before), "the stream of initial weights goes on as if nothing had been trained"
    assert all(torch.equal(value, state[name]) for name, value in fine_tuned(make(), state).state_dict().items())
    examples = batch(torch.Generator().manual_seed(9))
    start, tuned = (classification_loss(module, examples).item() for module in (make(), fine_tuned(make(), state)))
    assert tuned < 0.8 * start
    fresh = mlp([3, 8, 5], nn.ReLU)
    readout = fresh[2].weight.clone()
    tuned = fine_tuned(fresh, state)
    assert torch.equal(tuned[0].weight, state["0.weight"])
    assert torch.equal(tuned[2].weight, readout)


def test_sizes_are_what_tables_say():
    sizes = {"char-gpt": 3.2e6, "cifar-resnet": 2.4e6}
    found = {task.name: sum(p.numel() for p in task.case(0).module.parameters()) for task in _judging_tasks(sizes)}
    assert found == pytest.approx(sizes, rel=0.03)


def _judging_tasks(names):
    data = {"adult_x": torch.zeros(1, 5)}
    for part in ("", "_held_out"):
        data |= {
            f"text{part}": torch.zeros(300),
            f"cifar_x{part}": torch.zeros(20, 3, 32, 32),
            f"cifar_y{part}": torch.zeros(20),
        }
    return [task for task in judging_tasks(data, "any") if task.name in names]


def test_stress_changes_units_and_nothing_else():
    kinds, stressed = ({task.name: task for task in tasks} for tasks in (HELD_OUT_KINDS, stress_tasks()))
    plain, case = kinds["vit"].make(0), stressed["vit, loss x 10000"].make(0)
    case.module.load_state_dict(plain.module.state_dict())
    batch = case.next_batch(torch.Generator().manual_seed(1))
    torch.testing.assert_close(case.loss(case.module, batch), 1e4 * plain.loss(plain.module, batch))
    small = stressed["vit, inputs x 0.1"].make(0).next_batch(torch.Generator().manual_seed(1))
    torch.testing.assert_close(small[0], 0.1 * batch[0])
    assert torch.equal(small[1], batch[1])
    assert sum(p.numel() for p in stressed["ten-million"].make(0).module.parameters()) == pytest.approx(1e7, rel=0.1)


def test_real_data_must_be_given_once(tmp_path: Path):
    with pytest.raises(ValueError, match="--data DIR"):
        prepared(tmp_path, None)


def test_the_command_says_what_data_it_needs(tmp_path, capsys):
    arguments = ["evaluate", "default", "--suite", "judge", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    assert main(arguments) == 2
    assert "--data DIR" in capsys.readouterr().err
