"""``--log tensorboard``: the records of a run as events beside ``metrics.jsonl``."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from meta_train.__main__ import main
from meta_train.training.run_dir import RunDir
from meta_train.training.tensorboard import FOLDER, TIME
from tests.meta_train.test_recipe import TINY


def test_events_are_the_metrics_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "tiny.toml").write_text(TINY)
    run = tmp_path / "run"
    for record in (opened := RunDir(run, TINY)).train(checkpoint_every=3):
        if record.step == 5:  # Metrics of two steps after the checkpoint.
            break
    del opened
    train = ["train", str(tmp_path / "tiny.toml"), "--out", str(run), "--log", "tensorboard"]
    assert main(train) == 0
    events = EventAccumulator(str(run / FOLDER)).Reload()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for tag, name in (("meta-training/meta-loss", "meta_loss"), ("meta-training/gradient norm", "grad_norm")):
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == {r["step"]: pytest.approx(r[name], rel=1e-6) for r in records if r["step"] > 3}
    validated = {event.step: event.value for event in events.Scalars("validation/validation")}
    assert validated == {r["step"]: pytest.approx(r["validation"], rel=1e-6) for r in records if r["step"] in (4, 8, 12)}
    assert all(event.value > 0 for event in events.Scalars(TIME))
    assert main(train) == 0, "a finished run with its events"


def test_a_missing_package_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest)

    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run"), "--log", "tensorboard"]) == 2
    assert '--log tensorboard needs a package: pip install -e ".[tensorboard]" in the clone' in capsys.readouterr().err
