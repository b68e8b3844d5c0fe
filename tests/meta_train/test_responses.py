"""What a rule does to synthetic gradients, measured on rules whose answer is known."""

from pathlib import Path

import pytest
import torch

from learned_optim import Weights, build_rule
from meta_train.__main__ import main
from meta_train.evidence import responses as module
from meta_train.evidence.responses import responses


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COORDINATES", 300)
    monkeypatch.setattr(module, "_SETTLED", 150)
    monkeypatch.setattr(module, "SIGNAL_TO_NOISE", (0.0, 1.0))


@pytest.mark.usefixtures("quick")
def test_an_untrained_modulation_responds_as_adam_does() -> None:
    rule = build_rule("adam-modulation", step_size=0.01)
    rule.freeze()
    for row in responses(Weights(rule), 0.01, steps=60):
        assert float(row["learned"]) == pytest.approx(float(row["adam"]), rel=2e-2, abs=2e-3), row


@pytest.mark.usefixtures("quick")
def test_a_larger_gain_shows_as_larger_steps() -> None:
    rule = build_rule("adam-modulation", step_size=0.01, log_gain=100.0)
    torch.nn.init.constant_(rule.readout.bias[:1], 1.0)
    rule.freeze()
    sizes = [float(row["learned"]) for row in responses(Weights(rule), 0.01, steps=20) if row["response"] == "step size"]
    assert sizes == pytest.approx([torch.e] * len(sizes), rel=1e-2)


def test_only_a_rule_that_modulates_adam_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", "quadratic", "--out", str(tmp_path)]) == 2
    assert "only a rule that modulates an Adam step" in capsys.readouterr().err
