"""Processes that share a run: the same bits as one process, and none left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meta_train import __main__ as command_line
from meta_train.__main__ import main
from meta_train.judging.arenas import ARENAS
from meta_train.training.outer_loop import MetaTraining
from meta_train.training.publish import publish
from meta_train.training.recipe import parse_recipe
from meta_train.training.run_dir import BEST, LAST, METRICS, RunDir
from meta_train.workers import Workers
from tests.meta_train.test_command_line import ARENA
from tests.meta_train.test_outer_loop import STAGE
from tests.meta_train.test_recipe import TINY
from tests.meta_train.test_run_dir import MIXTURE


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as processes:
        yield processes


RECIPES = {
    "quadratic": TINY + STAGE,
    "mixture": MIXTURE,
    "every coordinate": TINY.replace("coordinates = 7", "coordinates = 0"),
    "second derivatives": TINY.replace("[outer]", "[outer]\nsecond_derivatives = true"),
    "evolution": TINY.replace("[outer]", "[outer]\nevolution = {noise = 0.1, pairs = 3, only = 'readout'}"),
    "imitation": TINY + '[imitation]\nteacher = "default"\nsteps = 7\nlr = 0.1\n',
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=list(RECIPES))
def test_a_run_has_the_same_bits_whatever_is_computed_where(text: str, workers: Workers) -> None:
    recipe = parse_recipe(text)
    alone, shared = MetaTraining(recipe), MetaTraining(recipe, each=workers.map)
    assert list(shared) == list(alone)
    for name, value in alone.best.rule.state_dict().items():
        assert torch.equal(shared.best.rule.state_dict()[name], value), name


def test_a_run_may_go_on_with_another_number_of_workers(tmp_path: Path, workers: Workers) -> None:
    assert list(RunDir(tmp_path / "alone", MIXTURE).train())
    for each, until in ((workers.map, 4), (map, 8), (workers.map, 12)):
        # Checkpoints are made after steps 3, 6, 9 and 12, so some steps are taken twice, by one and by the other.
        for record in RunDir(tmp_path / "shared", MIXTURE, each=each).train(checkpoint_every=3):
            if record.step == until:
                break
    for name in (BEST, LAST, METRICS):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def test_the_command_line_has_one_thread_beside_workers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ARENAS, "quadratic", ARENA)
    recipe, run, out = tmp_path / "recipe.toml", tmp_path / "run", tmp_path / "out"
    recipe.write_text(TINY)
    torch.set_num_threads(2)
    try:
        assert main(["train", str(recipe), "--out", str(run), "--workers", "1"]) == 0
        (path, *_) = publish(run, "mine", tmp_path)
        assert main(["evaluate", str(path), "--out", str(out), "--cache", str(tmp_path / "cache"), "--workers", "1"]) == 0
        assert torch.get_num_threads() == 2, "as before"
    finally:
        torch.set_num_threads(1)
    for place in (run, out):
        assert json.loads((place / "environment.json").read_text())["threads"] == 1
    assert main(["validate", str(path), "--workers", "1"]) == 0
    assert "equal" in capsys.readouterr().out
    assert main(["train", str(recipe), "--out", str(run), "--workers", "-1"]) == 2
    assert "--workers must not be negative, got -1" in capsys.readouterr().err


def test_a_worker_that_dies_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dying(*arguments: object, each: object = None) -> object:
        with Workers(1) as processes:
            return list(processes.map(os._exit, [1]))

    (tmp_path / "recipe.toml").write_text(TINY)
    monkeypatch.setattr(command_line, "RunDir", dying)
    assert main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 2
    assert "a worker was killed" in capsys.readouterr().err


def _doubled(value: Tensor) -> Tensor:
    return 2 * value


def _who(_: object) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def test_results_come_in_order_and_not_through_shared_memory(workers: Workers) -> None:
    sent = [torch.full((1000,), float(number)) for number in range(8)]
    for value, result in zip(sent, workers.map(_doubled, sent), strict=True):
        assert torch.equal(result, 2 * value)
        assert not value.is_shared()
        assert not result.is_shared()


def test_workers_have_one_thread_and_leave_interruptions_to_their_parent(workers: Workers) -> None:
    found = set(workers.map(_who, range(20)))
    assert os.getpid() not in {process for process, _ in found}
    assert {threads for _, threads in found} == {1}
    for process, _ in found:
        os.kill(process, signal.SIGINT)
    time.sleep(0.2)
    assert len(list(workers.map(_who, range(20)))) == 20, "had one ended, so would all"


def _group(_: object) -> int:
    return os.getpgrp()


def test_a_signal_to_the_process_group_reaches_the_parent_alone(workers: Workers) -> None:
    assert os.getpgrp() not in set(workers.map(_group, range(4)))


SIGNALLED = """
import signal, subprocess
from meta_train.workers import Workers
from tests.meta_train.test_workers import _who
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)  # The parent has its own way to heed it.
    with Workers(2) as processes:
        answers = processes.map(_who, range(4))
        subprocess.run(["sh", "-c", "kill -TERM 0"])  # The workers are still starting.
        print(len(list(answers)), flush=True)
"""


def test_a_signal_to_the_group_harms_no_worker_that_is_still_starting(tmp_path: Path) -> None:
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "signalled.py")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, start_new_session=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_an_interruption_while_workers_finish_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**options: object) -> None:
        raise KeyboardInterrupt

    workers = Workers(1)
    monkeypatch.setattr(workers._pool, "shutdown", interrupt)
    running = workers._pool.submit(time.sleep, 600)
    while not running.running():
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
        workers.__exit__()
    assert running.exception(timeout=30) is not None


PARENT = """
import time
from meta_train.workers import Workers
from tests.meta_train.test_workers import _who
if __name__ == "__main__":
    with Workers(1) as processes:
        print(next(processes.map(_who, [0]))[0], flush=True)
        time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    here = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": here}
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        # The worker holds the other end of this pipe until it ends.
        assert parent.communicate(timeout=30)[0] == ""
