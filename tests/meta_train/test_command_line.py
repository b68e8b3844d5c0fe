"""The verbs together: tables with short names, figures from tables alone, a verify that cannot pass by accident."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from learned_optim import Weights, __version__, available_weights
from learned_optim.weights import write_weights
from meta_train import __main__ as command_line
from meta_train import interrupts
from meta_train.__main__ import main
from meta_train.judging import runner
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import Setting, settings
from meta_train.rows import read_rows, write_rows
from meta_train.tasks import Quadratic
from meta_train.training.publish import publish
from meta_train.training.recipe import parse_recipe
from meta_train.training.recipe_text import with_seed
from meta_train.training.run_dir import RunDir, training_table
from tests.cases import small_rule
from tests.meta_train.test_recipe import TINY

ARENA = Arena(
    Quadratic(dimension=2, functions=3),
    settings("Adam", [0.001, 1.0, 300.0]),
    untuned=[Setting("Adam", 0.1)],
    tuning=2,
    fresh=3,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weight files with a run behind them, evaluated."""
    place = tmp_path_factory.mktemp("place")
    for seed in (0, 1):
        assert list(RunDir(place / f"run-{seed}", TINY.replace("seed = 0", f"seed = {seed}")).train())
        assert main(["publish", str(place / f"run-{seed}"), "--name", f"tiny-{seed}", "--to", str(place)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARENAS, "quadratic", ARENA)
        names = [str(place / f"tiny-{seed}.safetensors") for seed in (0, 1)]
        assert main(["evaluate", *names, "--task", "quadratic", "--out", str(place / "results")]) == 0
    return place


@pytest.fixture(autouse=True)
def tiny_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARENAS, "quadratic", ARENA)


def test_tables_carry_short_names_and_no_paths(place: Path) -> None:
    rows = read_rows(place / "results" / "summary.csv")
    assert {row["optimizer"] for row in rows} == {"Adam", "LSTM (tiny-0)", "LSTM (tiny-1)"}
    assert all(str(place) not in path.read_text() for path in (place / "results").iterdir())
    about = json.loads((place / "results" / "environment.json").read_text())
    assert {"torch", "commit", "processor", "task", "optimizees", "command", "fingerprints"} <= set(about)
    assert about["trained_to"] == 12
    weights = Weights.from_pretrained(place / "tiny-0.safetensors")
    assert about["fingerprints"]["tiny-0"] == weights.fingerprint


def test_every_table_counts_its_optimizees(place: Path) -> None:
    for name, count in (("summary", 3), ("curves", 3), ("fixed", 3), ("sweep", 2)):
        rows = read_rows(place / "results" / f"{name}.csv")
        assert {row["n"] for row in rows} == {str(count)}, name


def test_figures_come_from_tables_alone(place: Path) -> None:
    results = str(place / "results")
    assert main(["figures", results, "--runs", str(place / "run-0"), str(place / "run-1")]) == 0
    pictures = {path: path.read_bytes() for path in (place / "results").iterdir() if path.suffix == ".svg"}
    assert {path.name for path in pictures} == {f"{n}.svg" for n in ("curves", "probe", "training")}
    for path in pictures:
        path.unlink()
    assert main(["figures", results]) == 0
    for path, before in pictures.items():
        assert path.read_bytes() == before, path.name
    svg = (place / "results" / "curves.svg").read_text()
    assert "LSTM (learned)" in svg
    assert "date" not in svg


def test_a_run_is_drawn_before_anything_was_evaluated(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["figures", str(tmp_path / "new"), "--runs", str(place / "run-0")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"training.csv", "training.svg"}
    assert capsys.readouterr().out == "".join(
        f"wrote {tmp_path / 'new' / name}\n" for name in ("training.csv", "training.svg")
    )


def test_the_training_table_is_the_metrics(place: Path) -> None:
    rows = training_table([place / "run-0"], rows_per_run=4)
    records = [json.loads(line) for line in (place / "run-0" / "metrics.jsonl").read_text().splitlines()]
    assert [row["outer_step"] for row in rows] == [3, 6, 9, 12]
    assert float(rows[1]["meta_loss"]) == pytest.approx(sum(r["meta_loss"] for r in records[3:6]) / 3, rel=1e-5)
    assert [bool(row["validation"]) for row in rows] == [False, True, True, True]
    with pytest.raises(ValueError, match="no run directory"):
        training_table([place])


def test_verify_agrees_with_its_own_tables(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(place / "tiny-0.safetensors"), "--results", str(place / "results")]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": equal") == 4
    assert "expect agreement within two standard errors" in printed


def test_verify_fails_where_the_figures_differ(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (place / "results").glob("*.[cj]s*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = read_rows(tmp_path / "summary.csv")
    changed = [{**row, "mean": float(row["mean"]) + 3 * float(row["standard_error"])} for row in rows]
    write_rows(tmp_path / "summary.csv", changed)  # type: ignore[arg-type]
    assert main(["verify", str(place / "tiny-0.safetensors"), "--results", str(tmp_path)]) == 1
    assert "DIFFERS by more than two standard errors" in capsys.readouterr().out


def test_verify_never_passes_on_tables_of_something_else(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Weights(small_rule("paper-raw")).save(tmp_path / "stranger.safetensors")
    assert main(["verify", str(tmp_path / "stranger.safetensors"), "--results", str(place / "results")]) == 2
    assert "say nothing of 'stranger'" in capsys.readouterr().err
    # Other weights under a name the tables know: told apart by their fingerprint.
    Weights(small_rule("paper-raw")).save(tmp_path / "tiny-0.safetensors")
    main(["verify", str(tmp_path / "tiny-0.safetensors"), "--results", str(place / "results")])
    assert "OTHER weights" in capsys.readouterr().out
    name = available_weights()[0]
    for path in (place / "results").glob("*.[cj]s*"):
        (tmp_path / path.name).write_text(path.read_text().replace("tiny-0", name))
    monkeypatch.setattr(command_line, "RESULTS", tmp_path.parent)
    assert main(["verify", name, "--results", str(tmp_path)]) == 1


def test_validate_repeats_what_weights_were_chosen_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = TINY.replace("horizon = 8\n", "horizon = 8\nfinal_horizon = 12\n")
    assert list(RunDir(tmp_path / "run", recipe).train())
    (path,) = publish(tmp_path / "run", "tiny", tmp_path)
    capsys.readouterr()
    assert main(["validate", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["validation", "final validation"]
    assert all(line.endswith(": equal") for line in lines)
    assert lines[0].split("now")[1] != lines[1].split("now")[1], "of other horizons"


def test_validate_finds_weights_that_are_not_what_they_say(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Weights.from_pretrained(place / "tiny-0.safetensors")
    for factor, verdict, status in ((1.02, "agrees within 3%", 0), (1.04, "DIFFERS by more than 3%", 1)):
        about = {**kept.metadata, "validation": f"{factor * float(kept.metadata['validation']):.6g}"}
        write_weights(tmp_path / "other.safetensors", Weights(kept.rule, "other", kept.recipe, about))
        assert main(["validate", str(tmp_path / "other.safetensors")]) == status
        assert verdict in capsys.readouterr().out
    Weights(kept.rule, "bare").save(tmp_path / "bare.safetensors")
    assert main(["validate", str(tmp_path / "bare.safetensors")]) == 2
    assert "bare does not say how it was validated" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_publish_takes_names_not_paths(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(place / "run-0"), "--name", name, "--to", str(place)]) == 2
    assert "cannot name weights" in capsys.readouterr().err


def test_mistakes_are_explained_in_a_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(place / "tiny-0.safetensors")
    other = place / "elsewhere"
    other.mkdir()
    (other / "tiny-0.safetensors").write_bytes((place / "tiny-0.safetensors").read_bytes())
    (tmp_path / "bad.toml").write_text(TINY.replace("lr = 0.01", "lrr = 0.01"))
    cases = {
        ("train", str(tmp_path / "bad.toml"), "--out", str(tmp_path)): "`lrr`",
        ("train", tiny, "--out", str(tmp_path)): "tiny-0.safetensors",
        ("train", str(place / "tiny-0.toml"), "--out", str(place / "run-1")): "another recipe",
        ("train", str(place / "tiny-0.toml"), "--out", tiny): "File exists",
        ("evaluate", tiny, str(other / "tiny-0.safetensors"), "--out", str(tmp_path)): "different names",
        ("figures", str(tmp_path / "none")): "No such file",
        ("figures", str(place / "results"), "--runs", str(tmp_path)): "no run directory",
        ("publish", str(tmp_path), "--name", "x", "--to", str(tmp_path)): "holds no best.safetensors",
        ("publish", str(place / "run-0"), "--name", "x", "--to", tiny): "File exists",
    }
    for arguments, message in cases.items():
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, (arguments, error)
        assert error.count("\n") == 1
        assert "Errno" not in error


@pytest.mark.parametrize("text", [TINY, TINY.replace("seed = 0\n", ""), TINY.replace("seed = 0", "seed=-1 # x")])
def test_a_seed_is_replaced_or_added(text: str) -> None:
    changed = with_seed(text, 7)
    assert parse_recipe(changed).seed == 7
    assert parse_recipe(changed).outer == parse_recipe(text).outer


def test_an_interrupted_run_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "RunDir", interrupt)
    assert main(["train", str(place / "tiny-0.toml"), "--out", str(place / "new")]) == 130
    assert "resumes when it is started again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_judgement_says_what_is_kept_and_goes_on_with_it(
    number: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(place / "tiny-0.safetensors"), "--task", "quadratic"]
    command += ["--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    made: list[runner.Run] = []

    def stop_at(count: int) -> None:
        def make(cache: Path | None, run: runner.Run) -> Any:
            if len(made) == count:
                os.kill(os.getpid(), number)
            made.append(run)
            return real(cache, run)

        monkeypatch.setattr(runner, "_make", make)

    real = runner._make
    for count, kept in ((0, "0 finished runs are kept"), (1, "1 finished run is kept"), (4, "4 finished runs are kept")):
        made[:] = made[:count]
        stop_at(count)
        assert main(command) == 128 + number
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{kept} in {tmp_path / 'arenas'}, and the same command goes on with what is missing" in error
    stop_at(-1)
    assert main(command) == 0
    assert len(made) == len({run.file for run in made}), "no run was made twice"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["validate", "verify"])
def test_what_keeps_nothing_says_so_when_interrupted(
    verb: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(names: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(command_line, "load_contestants", load)
    assert main([verb, "default"]) == 128 + number
    assert "interrupted; nothing of it is kept, and the same command begins again" in capsys.readouterr().err


def test_a_second_request_to_stop_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "ONE_REQUEST", 0.0)
    with interrupts.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(interrupts.Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_directory_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "recipe.toml", "--out", ""])
    assert "name a directory" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_at_a_checkpoint(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    out, update = tmp_path / "run", command_line.tqdm.update

    def stop_at_two(bar: Any, n: float = 1) -> Any:
        if bar.n == 1:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # `timeout` sends one to the process and one to its group.
        return update(bar, n)

    monkeypatch.setattr(command_line.tqdm, "update", stop_at_two)
    train = ["train", str(tmp_path / "tiny.toml"), "--out", str(out)]
    assert main(train) == 128 + number
    assert "stopped after outer step 2 of 12; run it again" in capsys.readouterr().err
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert RunDir(out, TINY).run.step == 2
    assert main(train) == 0


def test_a_bare_call_shows_help_and_a_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: python -m meta_train")
    assert "evaluate" in said.out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"learned-optim {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["burn"], "invalid choice: 'burn' (choose from"),
        (["train"], "required: recipe, --out; see python -m meta_train train --help"),
        (["evaluate", "default", "--suite", "nope", "--out", "x"], "invalid choice: 'nope' (choose from"),
        (
            ["evaluate", "default", "--task", "nope", "--out", "x"],
            "there is no task 'nope'; choose one of quadratic, quartic",
        ),
    ],
)
def test_an_error_of_usage_is_one_line_with_the_choices(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(arguments)
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
