"""One thread, so that timings and rounding are the same everywhere, and a seed of its own for every test."""

from collections.abc import Iterator

import pytest
import torch

from learned_optim import LearnedOptimizer, UpdateRule
from tests.cases import RULE_CASES, small_rule

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=RULE_CASES)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    """A small random rule of each family."""
    return small_rule(request.param)


@pytest.fixture(params=["auto", "reference"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give optimizers that name no backend the one that users get, and then the one that defines the numbers."""
    monkeypatch.setitem(LearnedOptimizer.__init__.__kwdefaults__, "backend", request.param)
