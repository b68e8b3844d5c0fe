"""What stands in a run directory, and what it survives."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learned_optim import Weights
from learned_optim.weights import resolve_weights
from meta_train import files
from meta_train.evidence import figures
from meta_train.files import write_atomically
from meta_train.provenance import environment
from meta_train.training.publish import publish
from meta_train.training.run_dir import (
    BEST,
    CHECKPOINT,
    COST,
    ENVIRONMENT,
    LAST,
    METRICS,
    RECIPE,
    RunDir,
    training_table,
)
from tests.meta_train.test_recipe import FROM_DEFAULT, TINY


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished")
    assert list(RunDir(path, TINY).train(checkpoint_every=5))
    return path


def start(path: Path, steps: int, checkpoint_every: int = 3) -> None:
    """Train a little and stop where a kill would."""
    for record in RunDir(path, TINY).train(checkpoint_every):
        if record.step == steps:
            break


def test_it_holds_what_is_promised_and_nothing_else(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {RECIPE, ENVIRONMENT, METRICS, COST, CHECKPOINT, BEST, LAST}
    assert (finished / RECIPE).read_text() == TINY


def test_the_environment_names_no_machine_and_no_place(finished: Path) -> None:
    kept = json.loads((finished / ENVIRONMENT).read_text())
    assert set(kept) == {"python", "torch", "system", "processor", "cores", "threads", "commit"}
    text = json.dumps(environment())
    assert platform.node() not in text
    assert str(Path.cwd()) not in text


def test_the_cost_adds_up_over_all_sessions(tmp_path: Path) -> None:
    start(tmp_path, 5)
    (tmp_path / COST).write_text('{"minutes": 100.0, "peak_memory_mib": 1.0}')
    assert list(RunDir(tmp_path, TINY).train())
    cost = json.loads((tmp_path / COST).read_text())
    assert 100 < cost["minutes"] < 101
    assert 50 < cost["peak_memory_mib"] < 100_000
    (path,) = publish(tmp_path, "tiny", tmp_path)
    metadata = Weights.from_pretrained(path).metadata
    assert float(metadata["minutes"]) == pytest.approx(cost["minutes"], rel=1e-3)
    assert float(metadata["peak_memory_mib"]) == pytest.approx(cost["peak_memory_mib"], rel=1e-3)


def test_the_training_table_leaves_imitation_out(tmp_path: Path) -> None:
    assert list(RunDir(tmp_path, TINY + "[imitation]\nteacher = 0.1\nsteps = 5\nlr = 0.1\n").train())
    assert [row["outer_step"] for row in training_table([tmp_path])] == list(range(6, 18))


def test_weights_say_what_their_run_started_from(tmp_path: Path) -> None:
    assert list(RunDir(tmp_path, FROM_DEFAULT).train())
    best = Weights.from_pretrained(tmp_path / "best-theta.safetensors")
    assert best.metadata["start"] == resolve_weights("default").fingerprint


def test_each_weight_file_carries_its_own_step_and_validation(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / METRICS).read_text().splitlines()]
    validated = [record for record in records if "validation" in record]
    best = [record for record in validated if record["is_best"]][-1]
    for name, record in ((BEST, best), (LAST, validated[-1])):
        metadata = Weights.from_pretrained(finished / name).metadata
        assert metadata["outer_steps"] == str(record["step"]), name
        assert float(metadata["validation"]) == pytest.approx(record["validation"], rel=1e-5), name
    assert best["validation"] == min(record["validation"] for record in validated)


def test_a_finished_run_changes_nothing_when_started_again(finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert list(RunDir(finished, TINY).train()) == []
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_comment_may_change_and_a_value_may_not(tmp_path: Path) -> None:
    start(tmp_path, 4)
    assert RunDir(tmp_path, "# a better comment\n" + TINY).run.step == 3
    assert (tmp_path / RECIPE).read_text() == TINY
    with pytest.raises(ValueError, match="another recipe"):
        RunDir(tmp_path, TINY.replace("lr = 0.01", "lr = 0.02"))


def test_metrics_after_the_checkpoint_are_dropped_even_half_a_line(tmp_path: Path, finished: Path) -> None:
    start(tmp_path, 5)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "meta_l')
    run = RunDir(tmp_path, TINY)
    assert run.run.step == 3
    assert len((tmp_path / METRICS).read_text().splitlines()) == 3
    assert list(run.train())
    for name in (BEST, LAST, METRICS):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


def test_metrics_that_lost_lines_are_not_passed_over(tmp_path: Path) -> None:
    start(tmp_path, 4)
    (tmp_path / METRICS).write_text("")
    with pytest.raises(ValueError, match="has 0 records, the checkpoint beside it 3 steps"):
        RunDir(tmp_path, TINY)


@pytest.mark.parametrize("missing", [(ENVIRONMENT,), (RECIPE, ENVIRONMENT), (RECIPE,)])
def test_a_kill_between_the_first_files_is_no_harm(missing: tuple[str, ...], tmp_path: Path, finished: Path) -> None:
    RunDir(tmp_path, TINY)
    for name in missing:
        (tmp_path / name).unlink()
    assert list(RunDir(tmp_path, TINY).train())
    assert (tmp_path / BEST).read_bytes() == (finished / BEST).read_bytes()


def test_a_checkpoint_of_another_version_says_so(tmp_path: Path) -> None:
    start(tmp_path, 5)
    checkpoint = tmp_path / CHECKPOINT
    state = torch.load(checkpoint, weights_only=True)
    del state["finalists"]
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match="lacks 'finalists': another version of meta_train wrote it"):
        RunDir(tmp_path, TINY)


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    start(tmp_path, 4)
    (tmp_path / f".{CHECKPOINT}.123").write_bytes(b"half")
    (tmp_path / ".notes").write_text("mine")
    RunDir(tmp_path, TINY)
    assert not (tmp_path / f".{CHECKPOINT}.123").exists()
    assert (tmp_path / ".notes").exists()


def test_no_weights_are_called_best_before_a_finite_validation(tmp_path: Path) -> None:
    start(tmp_path, 3)  # checkpointed, but the first validation comes at step 4
    assert (tmp_path / CHECKPOINT).exists()
    assert not (tmp_path / BEST).exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_resuming_under_other_conditions_is_noticed(tmp_path: Path) -> None:
    run = RunDir(tmp_path, TINY)
    assert run.changes_since_start() == []
    kept = json.loads((tmp_path / ENVIRONMENT).read_text())
    (tmp_path / ENVIRONMENT).write_text(json.dumps({**kept, "threads": 64}))
    assert run.changes_since_start() == [f"threads 64 -> {kept['threads']}"]


def test_one_process_at_a_time_has_a_run(tmp_path: Path) -> None:
    """Two would mix their metrics, and each begins by dropping what the other wrote after its checkpoint."""
    pytest.importorskip("fcntl")
    first = RunDir(tmp_path, TINY)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    message = f"another process is at work in {tmp_path}; wait for its end, or choose another --out"

    def elsewhere(code: str) -> str:
        command = [sys.executable, "-c", f"import sys; from pathlib import Path; {code}", tmp_path]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip().rpartition("\n")[2]

    start = "RunDir(sys.argv[1], (Path(sys.argv[1]) / 'recipe.toml').read_text())"
    train = f"from meta_train.training.run_dir import RunDir; {start}"
    lock = "from meta_train.files import lock; lock(Path(sys.argv[1]))"
    assert elsewhere(train) == elsewhere(lock) == f"ValueError: {message}"
    again = RunDir(tmp_path, TINY)  # This process may, as in a notebook whose cell is run again.
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    del first
    assert elsewhere(lock), "one of the two is still here"
    del again
    assert not elsewhere(lock)


def test_a_run_that_could_not_be_opened_is_free_for_others(tmp_path: Path) -> None:
    RunDir(tmp_path, TINY)
    with pytest.raises(ValueError, match="another recipe") as error:
        RunDir(tmp_path, TINY.replace("lr = 0.01", "lr = 0.02"))
    assert error.traceback, "it still holds the one that failed"
    assert not files._locked


def test_metrics_of_another_run_are_not_taken_for_this_one_s(tmp_path: Path) -> None:
    start(tmp_path, 4)
    kept = (tmp_path / METRICS).read_text().splitlines(keepends=True)
    mixed = {"that of outer step 1": [kept[0], kept[0], *kept[1:]], "no record": [kept[0], "{\n", *kept[1:]]}
    for what, lines in mixed.items():
        (tmp_path / METRICS).write_text("".join(lines))
        with pytest.raises(ValueError, match=f"line 2 of .*{METRICS} is {what}: .* restore or remove it"):
            RunDir(tmp_path, TINY)
        with pytest.raises(ValueError, match=f"line 2 of .* is {what}"):
            training_table([tmp_path])
        assert (tmp_path / METRICS).read_text() == "".join(lines), "nothing is thrown away"


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_checkpoint_that_cannot_be_read_is_named(damage: str, tmp_path: Path, finished: Path) -> None:
    start(tmp_path, 4)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} cannot be read; restore it, or remove it to begin again"):
        RunDir(tmp_path, TINY)
    (tmp_path / CHECKPOINT).unlink()
    assert list(RunDir(tmp_path, TINY).train(checkpoint_every=5))
    assert (tmp_path / BEST).read_bytes() == (finished / BEST).read_bytes()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"run": "a", "outer_step": "1", "meta_loss": "1", "validation": "1", "measure": "optimizee loss"}]
    picture = tmp_path / "training.svg"
    figures.training_process(rows, picture)
    before = picture.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            figures.training_process(rows * 2, picture)
    assert picture.read_bytes() == before


NOT_OURS = (".notes.2024", ".bash_history.17", ".best-of.txt.3", "notes")


@pytest.mark.parametrize("place", ["a new run", "a run of this recipe", "a run of another recipe"])
def test_files_of_others_are_left_alone(place: str, tmp_path: Path) -> None:
    if place != "a new run":
        start(tmp_path, 4)
    for name in NOT_OURS:
        (tmp_path / name).write_text("keep")
    # Weight files are written under the numbers of process and thread.
    leftovers = [tmp_path / f".{name}" for name in (f"{CHECKPOINT}.123", f"{BEST}.123.456", "best-first.safetensors.1.2")]
    for path in leftovers:
        path.write_text("half")
    if place == "a run of another recipe":
        with pytest.raises(ValueError, match="another recipe"):
            RunDir(tmp_path, TINY + "[imitation]\nteacher = 0.1\nsteps = 5\nlr = 0.1\n")
        assert all(path.exists() for path in leftovers)
    else:
        RunDir(tmp_path, TINY)
        assert not any(path.exists() for path in leftovers)
    assert all((tmp_path / name).read_text() == "keep" for name in NOT_OURS)


def test_a_half_written_file_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_text("keep")
    monkeypatch.setattr(files.time, "time_ns", lambda: 7)
    (tmp_path / f".file.{os.getpid()}7").symlink_to(target)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"new")
    assert target.read_text() == "keep"


def test_no_damaged_checkpoint_goes_on(tmp_path: Path) -> None:
    start(tmp_path, 4)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    for place in range(0, len(whole) - 40, len(whole) // 25):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        (tmp_path / CHECKPOINT).write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=rf"{CHECKPOINT} is damaged"):
            RunDir(tmp_path, TINY)
    (tmp_path / CHECKPOINT).write_bytes(whole)
    assert RunDir(tmp_path, TINY).run.step == 3


def test_a_checkpoint_of_an_earlier_version_has_no_digest(tmp_path: Path, finished: Path) -> None:
    start(tmp_path, 4)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:-39])
    assert list(RunDir(tmp_path, TINY).train(checkpoint_every=5))
    assert (tmp_path / BEST).read_bytes() == (finished / BEST).read_bytes()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"minutes": "long"}'])
def test_a_damaged_cost_does_not_cost_the_run(text: str, tmp_path: Path) -> None:
    start(tmp_path, 4)
    (tmp_path / COST).write_text(text)
    assert list(RunDir(tmp_path, TINY).train())
    assert json.loads((tmp_path / COST).read_text())["peak_memory_mib"] > 0
