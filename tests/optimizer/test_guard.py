"""``guard=True``: silent and invisible while the rule behaves; falls back, says so and remembers it when it does not."""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from learned_optim import LearnedOptimizer, UpdateRule
from learned_optim.guard import PATIENCE
from tests.cases import assert_identical, copies, draw_gradients, make_params, memories, small_rule, take_steps

CASES = ["paper-raw", "adam-modulation"]
SAYS = "LearnedOptimizer fell back to its nominal Adam step, from now on and starting afresh"


def broken_rule(case: str) -> UpdateRule:
    """A rule whose update is never finite."""
    rule = small_rule(case)
    nn.init.constant_(rule.readout.weight, math.nan)
    return rule


def rushing_rule() -> UpdateRule:
    """A rule that never stops: each update is about 5 long."""
    rule = small_rule("paper-raw")
    nn.init.zeros_(rule.readout.weight)
    nn.init.constant_(rule.readout.bias, 50.0)
    return rule


def tripped(case: str = "paper-raw") -> tuple[LearnedOptimizer, list[nn.Parameter]]:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=broken_rule(case), guard=True)
    with pytest.warns(UserWarning, match=SAYS):
        take_steps(optimizer, params, 1)
    return optimizer, params


def losing(optimizer: LearnedOptimizer, params: list[nn.Parameter], losses: list[float]) -> None:
    """Take a step for each loss; the gradients have nothing to do with it."""
    for step, loss in enumerate(losses):
        for param, gradient in zip(params, draw_gradients(params, step), strict=True):
            param.grad = gradient
        optimizer.step(lambda loss=loss: torch.tensor(loss, requires_grad=True))


# Healthy runs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_healthy_run_is_the_same_to_the_last_bit(case: str, dtype: torch.dtype) -> None:
    guarded, plain = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer = LearnedOptimizer(guarded, weights=small_rule(case), guard=True, weight_decay=1.0)
    other = LearnedOptimizer(plain, weights=small_rule(case), weight_decay=1.0)
    take_steps(optimizer, guarded, PATIENCE + 5)
    take_steps(other, plain, PATIENCE + 5)
    assert_identical(guarded, plain)
    assert_identical(memories(optimizer, guarded), memories(other, plain))


@pytest.mark.parametrize("weights", ["default", "quadratic"])
def test_bundled_weights_on_the_paper_s_quadratics_do_not_trip(weights: str) -> None:
    # From zero, so that the first updates are as long as the parameters.
    matrix, target = torch.randn(128, 10, 10), torch.randn(128, 10, 1)
    theta = nn.Parameter(torch.zeros(128, 10, 1))
    optimizer = LearnedOptimizer([theta], weights=weights, guard=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (matrix @ theta - target).square().sum((1, 2)).mean()
        loss.backward()
        return loss

    for _ in range(100):
        optimizer.step(closure)
    group = optimizer.param_groups[0]
    assert not group["guard_tripped"]
    assert group["guard_lowest_loss"] < group["guard_first_loss"] / 2


def test_bad_gradients_are_not_the_rule_s_fault(rule: UpdateRule) -> None:
    params = make_params([(3,)])
    optimizer = LearnedOptimizer(params, weights=rule, guard=True)
    for _ in range(PATIENCE + 1):
        params[0].grad = torch.full((3,), math.inf)
        optimizer.step()
    assert not optimizer.param_groups[0]["guard_tripped"]


def test_nor_are_bad_parameters() -> None:
    params = make_params([(3,)])
    with torch.no_grad():
        params[0][0] = math.nan
    optimizer = LearnedOptimizer(params, weights=small_rule("paper-raw"), guard=True)
    take_steps(optimizer, params, 3)
    assert not optimizer.param_groups[0]["guard_tripped"]


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 1e-3, 1e-6, *[1e-2] * 40],  # Noise near zero.
        [2.3] * 40 + [4.0] * (PATIENCE - 1) + [0.1] * 40,  # High, but not for long.
        [-1.0 - 0.1 * step for step in range(60)],
        [-1.0, -5.0, *[-4.0] * 40],
        [1.0, math.nan, 0.9] * 20,
    ],
)
def test_losses_that_are_no_reason(losses: list[float]) -> None:
    params = make_params()
    losing(LearnedOptimizer(params, weights=small_rule(), guard=True), params, losses)


# Misbehaving rules


@pytest.mark.parametrize("case", CASES)
def test_an_update_that_is_not_finite_is_undone(case: str) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=broken_rule(case), guard=True)
    with pytest.warns(UserWarning, match=rf"{SAYS} \(group 0: an update was not finite; that step was undone\)"):
        take_steps(optimizer, params, 1)
    assert_identical(params, make_params())
    assert not optimizer.state


def test_long_updates_in_a_row_trip() -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=rushing_rule(), guard=True)

    def steps(count: int, size: float) -> None:
        for step in range(count):
            with torch.no_grad():
                for param in params:
                    param.fill_(size)
            take_steps(optimizer, params, 1, first=step)

    steps(PATIENCE - 1, size=19.0)  # The update is a little longer than a quarter of that,
    steps(1, size=21.0)  # a little shorter than that.
    steps(PATIENCE - 1, size=0.0)
    with pytest.warns(UserWarning, match=rf"\(group 0: {PATIENCE} updates in a row were longer than 0.25 of .* 0.263\)"):
        steps(1, size=19.0)


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([2.3] * 10 + [50.0] * 40, r"for 20 steps the loss had risen to 4\d.* from 2.3"),
        ([2.3] + [0.01] * 60 + [2.3] * 60, "the loss had risen"),  # Back to chance.
        ([1.0] + [-5.0] * 60 + [20.0] * 60, "the loss had risen"),
        ([1.0] * 5 + [math.inf] * PATIENCE, "for 20 steps the loss was inf"),
        ([math.nan] * PATIENCE, "for 20 steps the loss was nan"),
    ],
)
def test_a_loss_that_rises_and_stays_trips(losses: list[float], reason: str) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=small_rule(), guard=True)
    with pytest.warns(UserWarning, match=reason):
        losing(optimizer, params, losses)


def test_groups_fall_back_one_by_one_and_only_where_guarded() -> None:
    together = [make_params(seed=seed) for seed in range(3)]
    groups: list[dict[str, Any]] = [
        {"params": together[0], "weights": broken_rule("paper-raw")},
        {"params": together[1]},
        {"params": together[2], "weights": broken_rule("paper-raw"), "guard": False},
    ]
    optimizer = LearnedOptimizer(groups, weights=small_rule(), guard=True)
    with pytest.warns(UserWarning, match=r"\(group 0: [^:]*\)") as caught:
        take_steps(optimizer, [param for params in together for param in params], 1)
    assert len(caught) == 1
    assert [bool(group.get("guard_tripped")) for group in optimizer.param_groups] == [True, False, False]
    assert not together[2][2].isfinite().any()


# After the fall


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_paper_s_rules_go_on_as_adam_and_say_nothing_more(dtype: torch.dtype) -> None:
    params, expected = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer = LearnedOptimizer(params, weights=broken_rule("paper-raw"), guard=True)
    with pytest.warns(UserWarning, match=SAYS):
        take_steps(optimizer, params, 1, first=9)
    take_steps(optimizer, params, 30)
    take_steps(torch.optim.Adam(expected, lr=1e-3, eps=0), expected, 30)
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(params[2], make_params(dtype=dtype)[2])


def test_the_default_family_goes_on_with_its_step_relative_to_the_tensor() -> None:
    params = make_params([(5,)])
    optimizer = LearnedOptimizer(params, weights=broken_rule("adam-modulation"), guard=True)
    with pytest.warns(UserWarning, match=SAYS):
        take_steps(optimizer, params, 1)
    before = copies(params)[0]
    take_steps(optimizer, params, 1)
    (gradient,) = draw_gradients(params, 0)
    step = 3e-3 * before.square().mean().sqrt().clamp(1e-2, 1.0)
    torch.testing.assert_close(params[0].detach(), before - step * gradient.sign(), rtol=1e-5, atol=1e-6)


def test_the_summary_says_it() -> None:
    optimizer, params = tripped("paper-raw")
    take_steps(optimizer, params, 1)
    lines = optimizer.summary().splitlines()
    assert "adam-modulation 1x1" in lines[1]
    assert lines[-1] == "group 0 fell back to its nominal Adam step: an update was not finite; that step was undone"
    allocated = sum(value.nbytes for memory in optimizer.state.values() for value in memory.values())
    assert f" {allocated:,} " in lines[2] + " "


# Memory of it


def through_a_file(optimizer: LearnedOptimizer) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guard", [True, False])
def test_a_checkpoint_after_the_fall_resumes_exactly(case: str, guard: bool) -> None:
    optimizer, params = tripped(case)
    take_steps(optimizer, params, 2)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = LearnedOptimizer(twins, weights=broken_rule(case), guard=guard)
    resumed.load_state_dict(through_a_file(optimizer))
    assert resumed.param_groups[0]["guard_tripped"]
    for opt, held in ((optimizer, params), (resumed, twins)):
        take_steps(opt, held, 2, first=2)
    assert_identical(twins, params)
    assert_identical(memories(resumed, twins), memories(optimizer, params))


def test_a_checkpoint_from_before_the_fall_brings_the_learned_rule_back() -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=small_rule("paper-raw"), guard=True)
    take_steps(optimizer, params, 2)
    earlier, start = through_a_file(optimizer), copies(params)
    with pytest.warns(UserWarning, match="loss was nan"):
        losing(optimizer, params, [math.nan] * PATIENCE)
    take_steps(optimizer, params, 1)
    optimizer.load_state_dict(earlier)
    twins = [nn.Parameter(param) for param in start]
    other = LearnedOptimizer(twins, weights=small_rule("paper-raw"))
    other.load_state_dict(earlier)
    with torch.no_grad():
        for param, value in zip(params, start, strict=True):
            param.copy_(value)
    for opt, held in ((optimizer, params), (other, twins)):
        take_steps(opt, held, 2, first=2)
    assert_identical(params, twins)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_remembers_how_near_the_fall_is(how: Callable) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=small_rule(), guard=True)
    losing(optimizer, params, [2.0, math.nan, math.nan])
    other, others = how((optimizer, params))
    assert other.param_groups[0]["guard_high_losses"] == 2
    with pytest.warns(UserWarning, match="for 20 steps"):
        losing(other, others, [math.nan] * (PATIENCE - 2))
    assert not optimizer.param_groups[0]["guard_tripped"]


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_carry_it(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def build() -> tuple[nn.Module, LearnedOptimizer]:
        model = nn.Linear(3, 2)
        return model, LearnedOptimizer(model.parameters(), weights=small_rule(), guard=True)

    model, optimizer = build()
    losing(optimizer, list(model.parameters()), [2.0, math.nan])
    state = get_optimizer_state_dict(model, optimizer, options=options)
    twin, resumed = build()
    set_optimizer_state_dict(twin, resumed, copy.deepcopy(state), options=options)
    group = resumed.param_groups[0]
    assert (group["guard"], group["guard_first_loss"], group["guard_high_losses"]) == (True, 2.0, 1)


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": "yes"}, "Invalid guard: 'yes'; it is True or False"),
        ({"guard": True, "capturable": True}, "guard=True reads every step on the host.*capturable"),
    ],
)
def test_options_it_cannot_work_with_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer(make_params(), weights=small_rule(), **options)
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([{"params": make_params(), **options}], weights=small_rule())


def test_several_processes_are_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    params = make_params()
    with pytest.raises(RuntimeError, match="guard=True watches one process"):
        take_steps(LearnedOptimizer(params, weights=small_rule(), guard=True), params, 1)
    assert_identical(params, make_params())
    take_steps(LearnedOptimizer(params, weights=small_rule()), params, 1)


def test_the_warning_points_at_the_caller_and_may_be_an_error() -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=broken_rule("paper-raw"), guard=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=SAYS):
            take_steps(optimizer, params, 1)
    assert optimizer.param_groups[0]["guard_tripped"]
    other = LearnedOptimizer(params, weights=broken_rule("paper-raw"), guard=True)
    with pytest.warns(UserWarning, match=SAYS) as caught:
        other.step()
    assert caught[0].filename == __file__
