"""One trial of the study of LightBench, without the package."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from experiments.lightbench import OnCPU, run_trial


class Bowl(nn.Module):
    """A square, whose weight shrinks by half a step at rate 0.25."""

    def __init__(self) -> None:
        super().__init__()
        self.param = nn.Parameter(torch.tensor(1.0))

    def forward(self) -> torch.Tensor:
        """Return the loss."""
        return self.param.square()


@pytest.mark.parametrize(
    ("lr", "steps", "seconds", "passed", "end", "taken"),
    [
        (0.25, 10, 60.0, True, "won", 3),  # Weights 1/2, 1/4, 1/8.
        (0.25, 2, 60.0, False, "steps", 2),
        (0.25, 10, 0.0, False, "time", 1),
        (math.inf, 10, 60.0, False, "loss", 2),
    ],
)
def test_a_trial_ends_with_what_comes_first(
    lr: float, steps: int, seconds: float, passed: bool, end: str, taken: int
) -> None:
    def won(model: Bowl, loss: float) -> tuple[bool, dict[str, float]]:
        return abs(model.param.item()) <= 0.125, {}

    trial = run_trial(lambda module: SGD(module.parameters(), lr=lr), steps, seconds, Bowl(), None, None, won)
    assert (trial.passed, trial.end, trial.steps) == (passed, end, taken)


def test_wishes_for_a_gpu_are_answered_by_the_cpu() -> None:
    with OnCPU():
        assert torch.zeros(2, device="cuda").to("cuda:0").device.type == "cpu"
