"""``LearnedOptimizer.step`` is the rule: nothing about packing, chunks or grouping shows in the numbers."""

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, UpdateRule
from learned_optim.rules.orthogonal import matrix_shape
from tests.cases import SHAPES, assert_identical, draw_gradients, make_params, memories, take_steps

pytestmark = pytest.mark.usefixtures("each_backend")
STEPS = 10
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def by_hand(rule: UpdateRule, start: Tensor, gradients: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Call the rule on one whole tensor, as its definition says."""
    rule = rule.to(start.dtype)
    param, memory = start.clone(), rule.initial_memory(start.numel(), start)
    for step, gradient in enumerate(gradients, 1):
        scale = rule.tensor_scale(param, memory, torch.tensor(step - 1.0))
        update, memory, _ = rule(gradient.reshape(-1), memory, torch.tensor(step, dtype=start.dtype), scale)
        if rule.matrix_stage and rule.matrix_stage.applies_to(param.shape):
            momentum, sides = rule.raw_momentum(memory), (1, *matrix_shape(param.shape))
            assert momentum is not None
            update = rule.matrix_stage.shape(update.view(sides), momentum.view(sides))
        param = param + update.view_as(param)
    return param, memory


@pytest.mark.parametrize("chunk", [1, 7, 65_536])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, {"rtol": 1e-4, "atol": 1e-5})])
def test_ten_steps_equal_the_rule_called_by_hand(
    rule: UpdateRule, chunk: int, dtype: torch.dtype, tolerance: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learned_optim.backends.reference.CHUNK", chunk)
    params, start = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer = LearnedOptimizer(params, weights=rule)
    take_steps(optimizer, params, STEPS)
    gradients = [draw_gradients(params, step) for step in range(STEPS)]
    for index, (param, before) in enumerate(zip(params, start, strict=True)):
        expected, memory = by_hand(rule, before.detach(), [drawn[index] for drawn in gradients])
        torch.testing.assert_close(param.detach(), expected, **tolerance)
        assert param.numel() == 0 or not torch.equal(param, before)
        for name, value in memory.items():
            torch.testing.assert_close(optimizer.state[param][name].reshape(value.shape), value, **tolerance)


@pytest.mark.parametrize("grouping", ["one group each", "one optimizer each", "another order"])
def test_grouping_and_order_change_nothing(rule: UpdateRule, grouping: str) -> None:
    together, apart = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    one = LearnedOptimizer(together, weights=rule)
    if grouping == "one group each":
        others = [LearnedOptimizer([{"params": [param]} for param in apart], weights=rule)]
    elif grouping == "another order":
        others = [LearnedOptimizer(list(reversed(apart)), weights=rule)]
    else:
        others = [LearnedOptimizer([param], weights=rule) for param in apart]
    for step in range(3):
        take_steps(one, together, 1, first=step)
        for param, gradient in zip(apart, draw_gradients(apart, step), strict=True):
            param.grad = gradient
        for other in others:
            other.step()
    torch.testing.assert_close(apart, together, **EXACT)


def test_parameters_of_one_group_count_their_own_steps(rule: UpdateRule) -> None:
    early, late = make_params([(3,), (4,)], torch.float64)
    together = LearnedOptimizer([early, late], weights=rule)
    (alone,) = make_params([(3,), (4,)], torch.float64)[1:]
    single = LearnedOptimizer([alone], weights=rule)
    for step in range(6):
        early.grad, gradient = draw_gradients([early, late], step)
        late.grad = alone.grad = gradient if step >= 3 else None
        together.step()
        single.step()
    torch.testing.assert_close(late, alone, **EXACT)
    assert [together.state[param]["step"].item() for param in (early, late)] == [6, 3]


def test_permuting_coordinates_permutes_updates(rule: UpdateRule) -> None:
    (plain,) = make_params([(4, 6)], torch.float64)
    order = torch.randperm(24)
    shuffled = nn.Parameter(plain.detach().view(-1)[order].view(4, 6))
    optimizer, other = (LearnedOptimizer([each], weights=rule, matrix=False) for each in (plain, shuffled))
    for step in range(3):
        (plain.grad,) = draw_gradients([plain], step)
        shuffled.grad = plain.grad.view(-1)[order].view(4, 6)
        optimizer.step()
        other.step()
    torch.testing.assert_close(shuffled.detach().view(-1), plain.detach().view(-1)[order], **EXACT)
    hidden = [opt.state[param]["hidden"].view(24, -1) for opt, param in ((optimizer, plain), (other, shuffled))]
    torch.testing.assert_close(hidden[1], hidden[0][order], **EXACT)


def test_two_runs_are_identical_to_the_last_bit(rule: UpdateRule) -> None:
    runs = []
    for _ in range(2):
        params = make_params(SHAPES)
        optimizer = LearnedOptimizer(params, weights=rule)
        take_steps(optimizer, params, 3)
        runs.append(([param.detach() for param in params], memories(optimizer, params)))
    assert_identical(runs[0], runs[1])


def test_the_rule_given_is_copied_and_left_alone(rule: UpdateRule) -> None:
    params, expected = make_params(), make_params()
    optimizer = LearnedOptimizer(params, weights=rule)
    take_steps(LearnedOptimizer(expected, weights=rule), expected, 2)
    assert all(parameter.requires_grad for parameter in rule.parameters())
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.zero_()
    take_steps(optimizer, params, 2)
    assert_identical(params, expected)
