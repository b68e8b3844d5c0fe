"""Opponents that torch does not give as one class: Muon with AdamW beside it, and our own rule without its LSTM."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.optimizer import ParamsT

from learned_optim import LearnedOptimizer
from learned_optim.weights import Weights, resolve_weights

_EMBEDDINGS = ("embed", "position")
"""Last parts of the names of embeddings, without ``weight``, in the models of the judging tasks."""


class MuonAndAdamW(Optimizer):
    """Muon for hidden matrices and AdamW for the rest, at one rate and without weight decay.

    Muon's authors advise this split. Muon moves tensors with two or more dimensions; convolutions are flattened to
    ``(out, rest)``. AdamW moves vectors, embeddings, which are known by their names, and the readout layer, the last
    matrix. Updates of Muon are scaled to AdamW's root mean square (``adjust_lr_fn="match_rms_adamw"``), so one rate
    serves both.

    Args:
        params: Parameters in the order of the model, named or not; without names no embedding is recognised.
        lr: Rate.
    """

    def __init__(self, params: ParamsT, lr: float) -> None:
        named = [entry if isinstance(entry, tuple) else ("", entry) for entry in params]
        every = [(name, cast(Tensor, param)) for name, param in named]
        matrices = [param for name, param in every if param.dim() >= 2 and not _is_embedding(name)]
        hidden = matrices[:-1]
        chosen = set(map(id, hidden))
        rest = [param for _, param in every if id(param) not in chosen]
        groups = [{"params": part} for part in (hidden, rest) if part]
        super().__init__(groups, {"lr": lr})
        self._hidden = hidden
        self._views = [nn.Parameter(param.detach().view(len(param), -1)) for param in hidden]
        options: dict[str, Any] = {"lr": lr, "weight_decay": 0.0}
        self._muon = Muon(self._views, **options, adjust_lr_fn="match_rms_adamw") if hidden else None
        self._adamw = AdamW(rest, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step.

        Args:
            closure: Computes the loss and its gradients anew.

        Returns:
            The closure's result.
        """
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        for view, param in zip(self._views, self._hidden, strict=True):
            view.grad = None if param.grad is None else param.grad.view_as(view)
        for part in (self._muon, self._adamw):
            if part:
                part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
                part.step()
        return loss


def _is_embedding(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS


@functools.cache
def nominal_rule() -> Weights:
    """Return the bundled ``default`` with zero meta-parameters: its nominal step and matrix stage, without the LSTM."""
    weights = resolve_weights("default")
    rule = copy.deepcopy(weights.rule)
    for parameter in rule.parameters():
        nn.init.zeros_(parameter)
    return Weights(rule, "default without its LSTM")


def nominal(params: ParamsT, lr: float) -> Optimizer:
    """Build the optimizer of :func:`nominal_rule`.

    Args:
        params: The parameters to optimize.
        lr: Factor on the nominal step.

    Returns:
        The optimizer.
    """
    return LearnedOptimizer(params, lr=lr, weights=nominal_rule())
