"""Where a command meets the system: outputs that are closed or full, odd names, pipes, files that somebody emptied."""

import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from learned_optim import Weights
from meta_train.__main__ import main
from meta_train.training.publish import publish
from meta_train.training.run_dir import BEST, COST, LAST, RunDir, costs
from tests.meta_train.test_recipe import TINY

Output = pytest.CaptureFixture[str]
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    assert list(RunDir(tmp_path / "run", TINY).train())
    return tmp_path / "run"


@needs_full
def test_an_output_that_is_full_is_one_line_and_the_run_is_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "meta_train: [Errno 28] No space left on device"
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0


def test_a_reader_that_leaves_is_no_success(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as cut:
        monkeypatch.setattr(sys, "stdout", cut)
        assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 141
        monkeypatch.undo()


@pytest.mark.parametrize("stderr", ["none", pytest.param("full", marks=needs_full)])
def test_a_terminal_that_is_gone_ends_no_training(
    stderr: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    with open("/dev/full", "w", buffering=1) if stderr == "full" else io.StringIO() as stream:
        monkeypatch.setattr(sys, "stderr", stream if stderr == "full" else None)
        assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
        assert main(["train", str(tmp_path / "none.toml"), "--out", str(tmp_path / "run")]) == 2
        monkeypatch.undo()
        with suppress(OSError):
            stream.close()
    assert capsys.readouterr().out.startswith("best weights: "), "what is for stderr is not printed to stdout instead"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_unicode_are_taken_and_shown_escaped(recipe: Path, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/r\xff"
    command = [sys.executable, "-m", "meta_train", "train", str(recipe), "--out", out]
    for locale in ("C.UTF-8", "C"):
        done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": locale}, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert b"r\\udcff/best.safetensors" in done.stdout
    assert os.path.exists(out + b"/best.safetensors")


@needs_pipes
@pytest.mark.parametrize("verb", ["train", "validate", "evaluate", "upload"])
def test_a_pipe_is_refused_at_once(verb: str, tmp_path: Path, capsys: Output) -> None:
    pipe = tmp_path / ("pipe.toml" if verb == "train" else "pipe.safetensors")
    os.mkfifo(pipe)
    more = {"train": ["--out", str(tmp_path / "run")], "evaluate": ["--out", str(tmp_path / "out")], "upload": ["a/b"]}
    assert main([verb, str(pipe), *more.get(verb, [])]) == 2
    assert "is no regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = \xff\n", "is not UTF-8"),
        (b"a = " + b"[" * 20_000, "nested too deep"),
        (b".".join([b"a"] * 20_000) + b" = 1", "nested too deep"),
        (b"#" * (2**20 + 1), "at most 1,048,576 are read"),
        (TINY.replace("seed = 0", "seed = 1" + "0" * 5000).encode(), "a number in it has thousands of digits"),
    ],
    ids=["Latin-1", "lists", "dotted keys", "large", "digits"],
)
def test_what_is_no_recipe_is_refused(content: bytes, message: str, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    assert main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_nul_or_an_over_long_name_is_one_line(recipe: Path, tmp_path: Path, capsys: Output) -> None:
    out = str(tmp_path / "run")
    for name in ("a\0b", "x" * 300, "x/" * 3000):
        for arguments in (["train", name, "--out", out], ["train", str(recipe), "--out", str(tmp_path / name)]):
            assert main(arguments) == 2
            assert capsys.readouterr().err.count("\n") == 1


HUGE = str(10**20)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr = 1e38", "<= 1000000000.0"),
        ("lr = 1e308", "<= 1000000000.0"),
        ("lr = 0.01\nweight_decay = 1e38", "weight_decay"),
        ("lr = 0.01\nreadout = 1e308", "readout"),
        ("lr = 0.01\nforget_bias = -1e308", "forget_bias"),
        ("lr = 0.01\nevolution = {noise = 1e38}", "noise"),
        (f"lr = 0.01\nevolution = {{noise = 0.1, pairs = {HUGE}}}", "pairs"),
        (f"hidden_size = {HUGE}", "hidden_size must lie between 1 and 65,536"),
        ("hidden_size = 1e20", "hidden_size must be an integer"),
        (f"num_layers = {HUGE}", "num_layers must lie between 1 and 65,536"),
        (f"dimension = {HUGE}", "dimension"),
        ("dimension = 1000000000", "not enough memory"),
        (f"functions = {HUGE}", "functions"),
        (f"steps = {HUGE}", "steps"),
        (f"episodes = {HUGE}", "episodes"),
        ("episodes = 1000000000", "episodes"),
        (f"optimizees = {HUGE}", "optimizees"),
        (f"truncation = {HUGE}", "truncation"),
        (f"horizon = [1, {HUGE}]", "horizon"),
    ],
)
def test_absurd_numbers_are_one_line(line: str, message: str, tmp_path: Path, capsys: Output) -> None:
    key = line.split(" ")[0]
    lines = [line if given.startswith(f"{key} = ") else given for given in TINY.splitlines()]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    assert "\n".join(lines) != TINY
    assert main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("meta_train: ")
    assert message in error


@pytest.mark.parametrize("name", [BEST, LAST])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["missing", "empty"])
def test_weights_that_a_finished_run_lost_come_back_from_its_checkpoint(name: str, damage: object, run: Path) -> None:
    before = Weights.from_pretrained(run / name)
    damage(run / name)  # type: ignore[operator]
    assert list(RunDir(run, TINY).train()) == []
    assert Weights.from_pretrained(run / name).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"minutes": 1.5}', {"minutes": 1.5}),
        ('{"peak_memory_mib": 7}', {"peak_memory_mib": 7.0}),
        ('{"minutes": "long", "peak_memory_mib": null}', {}),
        ('{"minutes": NaN, "peak_memory_mib": -1}', {}),
        ('{"minutes": 1' + "0" * 400 + "}", {}),
        ("[" * 100_000, {}),
        ("[1]", {}),
        ("", {}),
        (None, {}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_costs_without_a_key_or_damaged_hinder_neither_run_nor_publication(
    content: str | None, kept: dict[str, float], run: Path
) -> None:
    (run / COST).unlink()
    if content is not None:
        (run / COST).write_text(content)
    assert costs(run / COST) == kept
    metadata = Weights.from_pretrained(publish(run, "mine", run)[0]).metadata
    assert {name: float(metadata[name]) for name in ("minutes", "peak_memory_mib") if name in metadata} == kept
    (run / LAST).unlink()
    assert list(RunDir(run, TINY).train()) == []
    assert set(json.loads((run / COST).read_text())) == {"minutes", "peak_memory_mib"}
