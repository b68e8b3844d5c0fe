"""Where kept runs were made is known, and said where it was not here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from learned_optim import Weights
from meta_train import provenance
from meta_train.__main__ import main
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import Setting, settings
from meta_train.judging.runner import OptimizeeTrials, Run, Runner
from meta_train.judging.suites import SUITES, SuiteRunner
from meta_train.provenance import elsewhere, here, read_environment
from meta_train.tasks import Quadratic
from tests.cases import small_rule
from tests.meta_train.test_judging import TINY

THERE = {"torch": "1.0", "processor": "an abacus", "commit": "0123456789ab"}
ARENA = Arena(Quadratic(2, 3), settings("Adam", [1e-6, 0.1, 1e3]), tuning=1, fresh=2, horizons=(5,))


def test_a_run_of_a_suite_says_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "tiny", TINY)
    runner = SuiteRunner(TINY, tmp_path)
    run = Run(runner.trials["line"], Setting("Adam", 0.1), 30, 0)
    runner.complete([run])
    file = runner.cache / run.file
    with safe_open(file, "pt") as kept:
        assert here().items() <= kept.metadata().items()
    losses = runner.outcome(run).losses
    assert runner.used == {file}
    assert elsewhere(runner.used) == []
    # A file of an earlier version: no more than the outcome.
    save_file({"losses": losses.float()}, file, {"run": repr(run), "held_out": '{"30": 1.5}'})
    assert SuiteRunner(TINY, tmp_path).outcome(run).held_out == {30: 1.5}
    unknown = dict.fromkeys(("torch", "processor", "commit"), "unknown")
    assert elsewhere(runner.used) == [{**unknown, "runs": 1}]


def test_a_run_of_an_arena_says_where_it_was_made(tmp_path: Path) -> None:
    runner, run = Runner(tmp_path), Run(OptimizeeTrials(Quadratic(2, 3), "tuning"), Setting("SGD", 0.1), 4, 0)
    losses = runner.outcome(run).losses
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as kept:
        assert here().items() <= kept.metadata().items()
        assert torch.equal(kept.get_tensor("losses"), losses)
    assert elsewhere(runner.used) == []


@pytest.mark.parametrize("what", ["--task", "--suite"])
def test_tables_of_kept_runs_say_where_those_were_made(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARENAS, "quadratic", ARENA)
    monkeypatch.setitem(SUITES, "stress", TINY)
    Weights(small_rule("paper-raw"), "mine").save(tmp_path / "mine.safetensors")
    Weights(small_rule("paper-raw", 1), "other").save(tmp_path / "other.safetensors")
    name = "quadratic" if what == "--task" else "stress"

    def made(out: str, *weights: str) -> list[dict[str, object]] | None:
        names = [str(tmp_path / f"{one}.safetensors") for one in weights]
        place = ["--out", str(tmp_path / out), "--cache", str(tmp_path / "cache"), "--workers", "0"]
        assert main(["evaluate", *names, what, name, *place]) == 0
        return json.loads((tmp_path / out / "environment.json").read_text()).get("made")

    with monkeypatch.context() as elsewhere_now:
        for module in ("judging.runner", "provenance"):
            elsewhere_now.setattr(f"meta_train.{module}.here", lambda: THERE)
        assert made("there", "mine") is None
    there = made("kept", "mine")
    assert there is not None
    assert [{**place, "runs": 0} for place in there] == [{**THERE, "runs": 0}]
    files = [path for path in (tmp_path / "cache").rglob("*.*") if path.is_file()]
    # Of a tuned schedule there is a run for each horizon, and it may be the best at one alone.
    assert len(files) // 2 < int(str(there[0]["runs"])) <= len(files)
    both = made("both", "mine", "other")
    assert both is not None
    assert {place["commit"] for place in both} == {THERE["commit"], here()["commit"]}
    runs = {place["commit"]: place["runs"] for place in both}
    assert runs == {THERE["commit"]: there[0]["runs"], here()["commit"]: 2 if what == "--task" else 3}
    for table in ("summary.csv", "sweep.csv"):
        assert (tmp_path / "kept" / table).read_bytes() == (tmp_path / "there" / table).read_bytes()


def test_an_environment_that_says_too_little_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    for text, message in (("{", "is not valid JSON"), ("[]", "does not say anything"), ("{}", "does not say torch, commit")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path} {message}.*restore it"):
            read_environment(path, *(("torch", "commit") if text == "{}" else ()))


def test_every_run_asks_for_its_commit_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    here()
    monkeypatch.setattr(provenance, "environment", lambda: pytest.fail("asked again"))
    assert here()["torch"] == torch.__version__
