r"""The meta-gradient: one sequence pass, and no graph through the optimizee.

The paper drops second derivatives: gradients enter the rule as constants. With updates u_s, meta-loss
``L = sum_t w_t f(theta_t)`` and ``theta_t = theta_0 + sum_{s<t} u_s``, the meta-gradient is::

    dL/dphi = sum_s < G_s , d u_s / dphi >,      G_s = sum_{t>s} w_t grad f(theta_t)

So ``roll_out`` takes K inner steps without any graph and records what the rule saw and the gradients that the inner loop
computes anyway; :func:`backpropagate` forms G by a reverse cumulative sum and runs the recorded inputs through the LSTM as
one sequence. This is exact. Because coordinates are independent, a random sample of them gives an unbiased estimate
(:func:`sample_coordinates`).

Where the rule has a matrix stage P, an update is ``P(u_s)``. G is pulled back through it first, ``(dP/du at u_s)^T G_s``,
with one vector-Jacobian product for each step and matrix; for that :func:`roll_out` keeps whole updates.

:func:`unroll` differentiates step by step through autograd. It is the reference in tests, and the only way to keep second
derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learned_optim.backends.native.sequence import native_sequence, native_supports
from learned_optim.rules import UpdateRule
from meta_train.tasks.task import Optimizee
from meta_train.training.inner_steps import TensorScales, plain_step
from meta_train.training.parts import Parts
from meta_train.training.roll_out import Carry, RollOut

Objective = Callable[[Tensor, Tensor], Tensor]
"""Maps losses ``(K, P)`` of a truncation and initial losses ``(P,)`` to constant weights w_t ``(K, P)``."""


def backpropagate(
    rule: Parts, record: RollOut, weights: Tensor, discount: float = 1.0, *, straight_through: bool = False
) -> None:
    """Add the meta-gradient of a recorded truncation to the ``.grad`` of the rule's meta-parameters.

    Args:
        rule: The rule that made the record.
        record: From :func:`roll_out`.
        weights: w_t of the meta-loss, ``(K, P)``.
        discount: Factor for each step between an update and a later gradient that it answers for; 1 is exact.
        straight_through: Treat the matrix stage as the identity: faster, but biased.
    """
    if record.wholes is not None and not straight_through:
        wholes, chosen = record.wholes, record.chosen
        future = _suffix_sum(wholes.grads * weights.unsqueeze(-1), discount)
        future = wholes.matrices.pull_back(wholes.updates, future, wholes.momenta).flatten(1)[:, chosen]
        _backpropagate_updates(rule, record, future / record.share)
        return
    weighted = record.grads * weights[:, record.problem]
    _backpropagate_updates(rule, record, _suffix_sum(weighted, discount) / record.share)


def imitate(rule: Parts, record: RollOut) -> float:
    """Add the gradient of how far a rule was from its teacher to the ``.grad`` of its meta-parameters.

    The distance is half the mean of ``(u - u*)^2 / mean(u*^2)``, where u are the rule's updates and u* the teacher's. The
    mean in the denominator is over the recorded coordinates and steps of one tensor, since updates of different tensors
    differ by orders of magnitude.

    Args:
        rule: The rule that made the record.
        record: From :func:`roll_out` with a teacher.

    Returns:
        The mean, without the half: 1 for a rule that moves nothing, 0 for the teacher.

    Raises:
        ValueError: If no teacher took the steps of the record.
    """
    if record.updates is None or record.taught is None:
        raise ValueError("a record without a teacher's updates leaves nothing to imitate; give roll_out a teacher")
    squares, count = torch.zeros(2, int(record.tensor.max()) + 1, dtype=record.taught.dtype).unbind()
    squares.index_add_(0, record.tensor, record.taught.square().mean(0))
    count.index_add_(0, record.tensor, torch.ones_like(record.taught[0]))
    level = (squares / count)[record.tensor].clamp(min=torch.finfo(squares.dtype).tiny)
    error = record.updates - record.taught
    _backpropagate_updates(rule, record, error / (level * error.numel()))
    return float((error.square() / level).mean())


def _backpropagate_updates(rule: Parts, record: RollOut, future: Tensor) -> None:
    """Backpropagate the derivative of anything by the updates, ``(K, M)``."""
    for part, one in enumerate(rule):
        if len(rule) == 1:
            _replay(one, record.inputs, record.contexts, record.active, record.start, future)
        elif (own := record.part == part).any():
            start = (record.start[0][own], record.start[1][own])
            _replay(one, record.inputs[:, own], record.contexts[:, own], record.active[:, own], start, future[:, own])


def _replay(
    rule: UpdateRule, inputs: Tensor, contexts: Tensor, active: Tensor, start: tuple[Tensor, Tensor], future: Tensor
) -> None:
    """Run recorded inputs through one rule's LSTM and backpropagate G, ``future``, through its updates."""
    if native_supports(rule.lstm):
        hiddens = native_sequence(rule.lstm, inputs, start, active)
        (future * rule.decode(hiddens, contexts)).sum().backward()
        return
    whole = active.all(0)
    # The fused LSTM cannot hold a coordinate's memory, so coordinates that wake or are skipped on the way go step by step.
    for chosen, replay in ((whole, _replay_fused), (active.any(0) & ~whole, _replay_holding)):
        if chosen.any():
            hiddens = replay(rule, inputs[:, chosen], (start[0][chosen], start[1][chosen]), active[:, chosen])
            (future[:, chosen] * rule.decode(hiddens, contexts[:, chosen])).sum().backward()


def _suffix_sum(values: Tensor, discount: float) -> Tensor:
    """Return ``sum_{t>=s} discount^(t-s) values_t`` along the first dimension; entry s is gradient s+1 of the docstring."""
    if discount == 1.0:
        return values.flip(0).cumsum(0).flip(0)
    total = torch.zeros_like(values[0])
    sums = []
    for value in values.flip(0):
        total = discount * total + value
        sums.append(total)
    return torch.stack(sums[::-1])


def _replay_fused(rule: UpdateRule, inputs: Tensor, carry: tuple[Tensor, Tensor], active: Tensor) -> Tensor:
    return rule.recur(inputs, carry, fused=True)[0]


def _replay_holding(rule: UpdateRule, inputs: Tensor, carry: tuple[Tensor, Tensor], active: Tensor) -> Tensor:
    hiddens = []
    for step_inputs, step_active in zip(inputs, active, strict=True):
        hidden, carry = rule.advance(step_inputs, carry, step_active)
        hiddens.append(hidden)
    return torch.stack(hiddens)


def unroll(
    rule: Parts,
    optimizee: Optimizee,
    carry: Carry,
    truncation: int,
    objective: Objective,
    *,
    second_derivatives: bool = False,
) -> tuple[Tensor, Carry]:
    """Add the meta-gradient of K inner steps by plain autograd, step by step.

    Tests compare :func:`backpropagate` with this function. It can also keep second derivatives, which the one-pass form
    cannot.

    Args:
        rule: The rule being meta-trained; its ``.grad`` is added to.
        optimizee: Its minibatches advance. Its losses must be twice differentiable for second derivatives.
        carry: Where to start.
        truncation: Inner steps, K.
        objective: Gives the weights w_t, which are constants.
        second_derivatives: Differentiate through the optimizee's gradients too.

    Returns:
        Losses ``(K, P)`` and the carry after the last step.
    """
    params, memory = carry.params.detach(), carry.memory
    grad, losses, scales_at = carry.grad, [], TensorScales(rule, optimizee)
    for step in range(carry.step + 1, carry.step + truncation + 1):
        update, memory = plain_step(rule, optimizee, grad, memory, step, scales_at(params, memory, step - 1))
        params = params + update
        loss = optimizee.losses(optimizee.unflatten(params))
        losses.append(loss)
        (grad,) = torch.autograd.grad(loss.sum(), params, retain_graph=True, create_graph=second_derivatives)
        if not second_derivatives:
            grad = grad.detach()
    stacked = torch.stack(losses)
    (objective(stacked.detach(), carry.initial_loss) * stacked).sum().backward()
    memory = {name: value.detach() for name, value in memory.items()}
    last = losses[-1].detach()
    return stacked.detach(), Carry(params.detach(), memory, carry.step + truncation, last, grad.detach(), carry.initial_loss)
