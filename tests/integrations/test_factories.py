"""Registration by name, as docs/integrations.md shows it."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from learned_optim import LearnedOptimizer
from tests.cases import assert_identical, copies
from tests.integrations.training import loss_of, make_batches, make_model


def train(model: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
    for batch in make_batches(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return copies(model.parameters())


def expected(**options: float) -> list[torch.Tensor]:
    """Decay matrices and not vectors, as both factories do."""
    model = make_model()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], **options},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    return train(model, LearnedOptimizer(groups))


def test_pytorch_optimizer_creates_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = pytest.importorskip("pytorch_optimizer")
    monkeypatch.setitem(factory.optimizer.OPTIMIZERS, "learned", LearnedOptimizer)
    assert factory.load_optimizer("learned") is LearnedOptimizer
    model = make_model()
    optimizer = factory.create_optimizer(model, "learned", lr=1.0, weight_decay=0.5)
    assert_identical(train(model, optimizer), expected(weight_decay=0.5))


@pytest.mark.parametrize("wrapper", ["Lookahead", "ScheduleFreeWrapper"])
def test_wrappers_of_pytorch_optimizer_train_with_it(wrapper: str) -> None:
    factory = pytest.importorskip("pytorch_optimizer")
    model = make_model()
    optimizer = getattr(factory, wrapper)(LearnedOptimizer(model.parameters()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    (batch,) = make_batches(1)
    before = loss_of(model, batch).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert loss_of(model, batch).item() < 0.5 * before


def test_timm_creates_it_by_name() -> None:
    factory = pytest.importorskip("timm.optim")
    factory._optim_factory.default_registry.register(factory.OptimInfo("learned", LearnedOptimizer, has_eps=False))
    model = make_model()
    optimizer = factory.create_optimizer_v2(model, "learned", weight_decay=0.5, eps=1e-8)
    assert_identical(train(model, optimizer), expected(weight_decay=0.5))
