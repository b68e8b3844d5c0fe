"""Mistakes are met with a sentence that names them, before anything is written."""

import json
import re
import sys
from pathlib import Path

import pytest

from learned_optim import Weights
from meta_train.__main__ import main
from meta_train.judging import arena_report as evaluate
from meta_train.judging.runner import Runner
from meta_train.judging.suites import SUITES, SuiteRunner
from meta_train.rows import Rows, write_rows
from meta_train.training.recipe import parse_recipe
from meta_train.training.recipe_text import with_seed
from meta_train.training.run_dir import ENVIRONMENT, METRICS, RunDir
from tests.cases import small_rule
from tests.meta_train.test_judging import TINY as SUITE
from tests.meta_train.test_recipe import TINY

MIXTURE = re.sub(r'name = "quadratic"\ndimension = 3\nfunctions = 4', 'name = "mixture"', TINY)
MNIST = MIXTURE.replace('"mixture"', '"mnist"')
PICTURES = MIXTURE.replace('"mixture"', '"neural-art"')


def of_task(recipe: str, line: str) -> str:
    return re.sub(r'(\[task\]\nname = "[\w-]+"\n)', rf"\1{line}\n", recipe)


def of_rule(line: str) -> str:
    return re.sub(rf"{line.split(' ')[0]} = .*", line, TINY)


def of_outer(line: str) -> str:
    kept = "" if line.startswith("lr") else "lr = 0.01\n"
    return TINY.replace("lr = 0.01\n", f"{kept}{line}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (of_rule('hidden_size = "3"'), "hidden_size must be an integer, got '3'"),
        (of_rule("hidden_size = 3.5"), r"hidden_size must be an integer, got 3\.5"),
        (of_rule('output_scale = "a"'), "output_scale"),
        (of_rule('family = "adam-modulation"\ntime_scales = 3').replace("output_scale = 0.1\n", ""), "type.*time_scales"),
        (of_task(MIXTURE, 'kinds = ["digit-mpl"]'), r"kinds has no 'digit-mpl'; there are digit-mlp, .*\$\.task"),
        (of_task(MIXTURE, "problems = 0"), r">= 1.*\$\.task\.problems"),
        (of_task(MIXTURE, "reparametrise = 0.0"), r">= 1.*\$\.task\.reparametrise"),
        (of_task(MNIST, "initial_std = -1.0"), r">= 0.*\$\.task\.initial_std"),
        (of_task(PICTURES, "size = 0"), r">= 1.*\$\.task\.size"),
        (of_task(PICTURES, "problems = 0"), r">= 1.*\$\.task\.problems"),
        (of_task(PICTURES, "smooth = -1.0"), r">= 0.*\$\.task\.smooth"),
        (TINY.replace("dimension = 3", "dimension = -3"), r">= 1.*\$\.task\.dimension"),
        (TINY.replace("dimension = 3", "dimension = 0"), r">= 1.*\$\.task\.dimension"),
        (TINY.replace("functions = 4", "functions = 0"), r">= 1.*\$\.task\.functions"),
        (of_outer("loss_floor = -1.0"), r">= 0.*\$\.outer\.loss_floor"),
        (of_outer("final_lr = -1.0"), r">= 0.*\$\.outer\.final_lr"),
        (of_outer("lr = nan"), r"must be finite, got nan - at `\$\.outer\.lr`"),
        (of_outer("clip = inf"), r"must be finite, got inf - at `\$\.outer\.clip`"),
        (TINY + "[[stages]]\nsteps = 1\nlr = nan\n", r"got nan - at `\$\.stages\[0\]\.lr`"),
    ],
)
def test_a_value_without_meaning_is_named_with_its_place(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text != TINY
    (tmp_path / "recipe.toml").write_text(text)
    assert main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that is not met would otherwise be hours of judging."""
    monkeypatch.setattr(Runner, "complete", lambda *_: pytest.fail("a suite was run"))
    monkeypatch.setattr(evaluate, "judge", lambda *_, **__: pytest.fail("a task was run"))


@pytest.fixture
def weights(tmp_path: Path) -> list[str]:
    """Two weight files of one stem."""
    paths = [tmp_path / name / "same.safetensors" for name in ("a", "b")]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        Weights(small_rule("paper-raw", seed), "same").save(path)
    return list(map(str, paths))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2, arguments
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_suite_s_contestants_have_different_names(
    weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--suite", "held-out-kinds", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert "different names to share a table, got (same), (same)" in refused(["evaluate", *weights, *place], capsys)
    assert "different names" in refused(["evaluate", weights[0], weights[0], *place], capsys)
    error = refused(["evaluate", weights[0], *place, "--lr", "0.5", "1", "0.5"], capsys)
    assert "--lr needs different factors, got 0.5, 1, 0.5" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--horizon", "0"), "a longest horizon of 0 leaves nothing of quadratic; its shortest is 100"),
        (("--tasks", "vit"), "the arena quadratic has no task 'vit'; it has quadratic"),
        (("--baselines", "docs/results/judge"), "docs/results/judge"),
        (("--lr", "1", "1"), "--lr needs different factors"),
    ],
)
def test_an_arena_takes_the_flags_of_a_suite_and_refuses_their_mistakes(
    option: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(["evaluate", "quadratic", "--task", "quadratic", "--out", str(tmp_path / "out"), *option], capsys)
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("horizon", ["0", "-5", "99"])
def test_a_horizon_below_the_shortest_is_refused(
    horizon: str, weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--suite", "held-out-kinds", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    error = refused(["evaluate", weights[0], *place, "--horizon", horizon], capsys)
    assert f"a longest horizon of {horizon} leaves nothing of fine-tuned-transformer; its shortest is 100" in error


def test_tasks_without_a_horizon_that_is_short_enough_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    stress, long = SUITES["stress"], "layer-norm-mlp, long"
    assert long in SuiteRunner(stress, tmp_path).tasks
    assert set(SuiteRunner(stress, tmp_path).tasks) - set(SuiteRunner(stress, tmp_path, horizon=1000).tasks) == {long}
    assert set(SuiteRunner(stress, tmp_path, horizon=200).tasks) == {"ten-million"}
    with pytest.raises(ValueError, match="1000 leaves nothing of layer-norm-mlp, long; its shortest is 20000"):
        SuiteRunner(stress, tmp_path, horizon=1000, only=["ten-million", long])


@pytest.mark.parametrize("verb", ["train", "evaluate", "verify", "validate"])
def test_a_misspelt_directory_of_data_is_not_taken_for_the_hub(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(MNIST)
    what = str(tmp_path / "recipe.toml") if verb == "train" else "mnist-mlp"
    out = ["--out", str(tmp_path / "out")] if verb in ("train", "evaluate") else []
    error = refused([verb, what, *out, "--data", str(tmp_path / "dta")], capsys)
    assert f"--data {tmp_path / 'dta'} is no directory" in error
    assert not (tmp_path / "out").exists()


def test_verify_says_that_it_does_not_repeat_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(__file__).parent.parent.parent / "docs" / "results" / "judge"
    error = refused(["verify", "default", "--results", str(results)], capsys)
    assert "the tables in judge are of a suite, not of a task" in error


def test_a_run_that_has_only_just_begun_cannot_be_drawn_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDir(tmp_path / "run", TINY)
    error = refused(["figures", str(tmp_path / "results"), "--runs", str(tmp_path / "run")], capsys)
    assert "has no outer step to draw yet; wait for its first" in error
    assert (tmp_path / "run" / METRICS).exists()
    assert not (tmp_path / "results").exists()


def test_an_environment_that_says_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert list(RunDir(run, TINY).train())
    (run / ENVIRONMENT).write_text("{}")
    (tmp_path / "recipe.toml").write_text(TINY)
    error = refused(["train", str(tmp_path / "recipe.toml"), "--out", str(run)], capsys)
    assert f"{run / ENVIRONMENT} does not say torch, processor, commit, threads; restore it" in error
    error = refused(["publish", str(run), "--name", "x", "--to", str(tmp_path)], capsys)
    assert "does not say processor, threads" in error


def test_verify_needs_to_know_which_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: Rows = [{"optimizer": "LSTM (quadratic)", "n": 1}]
    write_rows(tmp_path / "summary.csv", rows)
    about = tmp_path / "environment.json"
    for text, message in (({}, "does not say task, fingerprints"), ({"task": "x", "fingerprints": {}}, "unknown task 'x'")):
        about.write_text(json.dumps(text))
        assert message in refused(["verify", "quadratic", "--results", str(tmp_path)], capsys)


@pytest.mark.parametrize(("package", "baseline"), [("prodigyopt", "Prodigy"), ("schedulefree", "ScheduleFree")])
def test_a_baseline_that_is_not_installed_is_missed_before_any_tuning(
    package: str, baseline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("prodigyopt")
    judge = SUITES["judge"]
    monkeypatch.setitem(SUITES, "judge", type(judge)("judge", SUITE.tasks, judge.grids, {}, judge.untuned))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(SuiteRunner, "tune", lambda self: pytest.fail("baselines were tuned"))
    place = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--workers", "0"]
    error = refused(["evaluate", "default", "--suite", "judge", *place], capsys)
    assert f"the baseline {baseline} needs {package}: pip install -e '.[judge]' in the clone" in error


@pytest.mark.parametrize("seed", ["1_000", "0x1F", "-1", "+5", "1_000  # a seed"])
def test_a_seed_is_replaced_however_it_is_written(seed: str) -> None:
    text = TINY.replace("seed = 0", f"seed = {seed}")
    assert parse_recipe(text)
    changed = with_seed(text, 5)
    assert parse_recipe(changed).seed == 5
    assert changed.splitlines()[1].startswith("seed = 5")
    assert ("# a seed" in changed) == ("#" in seed)
