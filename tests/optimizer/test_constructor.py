"""Arguments, parameter groups and named parameters."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from learned_optim import LearnedOptimizer, UpdateRule, Weights
from tests.cases import assert_identical, copies, draw_gradients, make_params, small_rule, take_steps

ONE = [(3,)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        ({"lr": torch.tensor(-0.5)}, ValueError, "Invalid learning rate"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        ({"backend": "warp"}, ValueError, "Invalid backend: 'warp'; choose one of auto, reference"),
        ({"fused": True}, RuntimeError, "`fused=True` is not an option.*backend="),
        ({"differentiable": True}, RuntimeError, "not differentiable.*meta_train"),
        ({"state_dtype": torch.float16}, ValueError, "Invalid state_dtype: torch.float16; choose one of float32"),
        ({"state_dtype": "int4"}, ValueError, "Invalid state_dtype: 'int4'; choose one of float32, bfloat16, int8"),
        ({"moment_dtype": torch.int8}, ValueError, "Invalid moment_dtype: torch.int8; choose one of float32, bfloat16"),
        ({"momentum": 0.9}, TypeError, "momentum= is not needed here: remove it"),
        ({"betas": (0.9, 0.999)}, TypeError, "betas= is not needed here: remove it"),
        ({"eps": 1e-8}, TypeError, "eps= is not needed here: remove it"),
        ({"amsgrad": True}, TypeError, "amsgrad= is not needed here: remove it"),
        ({"lr": None}, ValueError, "lr= is not needed here: remove it"),
        ({"lr": "fast"}, ValueError, "Invalid learning rate: fast"),
        ({"weight_decay": None}, ValueError, "Invalid weight_decay value: None"),
        ({"warp": 1}, TypeError, "unexpected keyword argument 'warp'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LearnedOptimizer(make_params(ONE), weights=small_rule(), **arguments)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (torch.ones(3), TypeError, "params argument given to the optimizer should be an iterable"),
        ([], ValueError, "optimizer got an empty parameter list"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
        ([{"lr": 1.0}], KeyError, "params"),
    ],
)
def test_bad_params_are_refused_as_by_every_torch_optimizer(params: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LearnedOptimizer(params, weights=small_rule())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"weight_decay": -1.0}, "Invalid weight_decay"),
        ({"state_dtype": "float16"}, "Invalid state_dtype"),
        ({"moment_dtype": "float16"}, "Invalid moment_dtype"),
        ({"fused": True}, "Invalid fused"),
        ({"differentiable": True}, "Invalid differentiable"),
    ],
)
def test_bad_options_of_a_group_are_refused_and_the_group_is_not_added(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([{"params": make_params(ONE), **option}], weights=small_rule())
    optimizer = LearnedOptimizer(make_params(ONE), weights=small_rule())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": make_params(ONE), **option})
    assert len(optimizer.param_groups) == 1


def test_options_are_checked_before_parameters() -> None:
    for name, value in (("lr", -1.0), ("weight_decay", -1.0), ("guard", 2), ("state_dtype", "int4")):
        with pytest.raises(ValueError, match=rf"Invalid .*: '?{value}"):
            LearnedOptimizer(None, **{name: value})  # type: ignore[arg-type]


def test_a_parameter_in_two_groups_is_refused() -> None:
    params = make_params(ONE)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        LearnedOptimizer([{"params": params}, {"params": params}], weights=small_rule())


def test_defaults_and_positional_order() -> None:
    optimizer = LearnedOptimizer(make_params(ONE))
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.param_groups[0]["weights"] == "default"
    optimizer = LearnedOptimizer(make_params(ONE), 0.5, small_rule(), 0.1)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_every_option_in_a_group_is_a_scalar_a_string_or_a_tensor() -> None:
    group = LearnedOptimizer(make_params(ONE), weights=small_rule()).param_groups[0]
    assert {type(value) for name, value in group.items() if name != "params"} <= {float, int, str, bool, type(None)}


def test_options_taken_from_other_optimizers_are_accepted() -> None:
    params = make_params(ONE)
    optimizer = LearnedOptimizer(params, weights=small_rule(), foreach=True, fused=False, differentiable=False)
    take_steps(optimizer, params, 1)
    assert "LearnedOptimizer" in repr(optimizer)
    assert "lr: 1.0" in repr(optimizer)


def test_constructing_and_stepping_leave_the_global_generator_alone() -> None:
    params = make_params(ONE)
    before = torch.get_rng_state()
    optimizer = LearnedOptimizer(params)
    take_steps(optimizer, params, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_options_are_per_group(rule: UpdateRule) -> None:
    options: list[dict[str, Any]] = [
        {"lr": 0.5},
        {"weight_decay": 30.0},
        {"maximize": True},
        {"state_dtype": torch.bfloat16},
        {},
    ]
    together = [make_params(seed=seed) for seed in range(len(options))]
    groups = [{"params": params, **option} for params, option in zip(together, options, strict=True)]
    optimizer = LearnedOptimizer(groups, weights=rule)
    for step in range(3):
        take_steps(optimizer, [param for params in together for param in params], 1, first=step)
    alone = [make_params(seed=seed) for seed in range(len(options))]
    gradients = [draw_gradients([param for params in alone for param in params], step) for step in range(3)]
    start = 0
    for params, option, expected in zip(alone, options, together, strict=True):
        single = LearnedOptimizer(params, weights=rule, **option)
        for step in range(3):
            for param, gradient in zip(params, gradients[step][start:], strict=False):
                param.grad = gradient
            single.step()
        start += len(params)
        torch.testing.assert_close(expected, params, rtol=1e-6, atol=1e-7)


def test_groups_may_have_weights_of_their_own() -> None:
    rules = [small_rule("paper-raw"), small_rule("adam-modulation")]
    together = [make_params(ONE), make_params(ONE)]
    optimizer = LearnedOptimizer(
        [{"params": together[0]}, {"params": together[1], "weights": Weights(rules[1], "other")}], weights=rules[0]
    )
    assert [group["weights"] for group in optimizer.param_groups] == ["custom", "other"]
    gradient = draw_gradients(together[0], 0)[0]
    together[0][0].grad = together[1][0].grad = gradient
    optimizer.step()
    for rule, params in zip(rules, together, strict=True):
        alone = make_params(ONE)
        alone[0].grad = gradient
        LearnedOptimizer(alone, weights=rule).step()
        assert_identical(params, alone)
        assert not torch.equal(params[0], make_params(ONE)[0])
    assert not torch.equal(together[0][0], together[1][0])


def test_a_group_added_late_starts_fresh_and_leaves_the_others_alone(rule: UpdateRule) -> None:
    early, late = make_params(), make_params(seed=1)
    optimizer = LearnedOptimizer(early, weights=rule)
    take_steps(optimizer, early, 2)
    optimizer.add_param_group({"params": late, "lr": 0.5})
    for param, gradient in zip(late, draw_gradients(late, 7), strict=True):
        param.grad = gradient
    take_steps(optimizer, early, 1, first=2)
    assert [optimizer.state[params[0]]["step"].item() for params in (early, late)] == [3, 1]

    uninterrupted, fresh = make_params(), make_params(seed=1)
    take_steps(LearnedOptimizer(uninterrupted, weights=rule), uninterrupted, 3)
    take_steps(LearnedOptimizer(fresh, weights=rule, lr=0.5), fresh, 1, first=7)
    assert_identical(early, uninterrupted)
    assert_identical(late, fresh)


def test_the_caller_s_dict_is_the_group() -> None:
    first, second = ({"params": make_params(ONE), "weights": small_rule(), "lr": 0.5} for _ in range(2))
    optimizer = LearnedOptimizer([first], weights=small_rule())
    optimizer.add_param_group(second)
    assert optimizer.param_groups[0] is first
    assert optimizer.param_groups[1] is second
    first["lr"] = second["lr"] = 0.0
    params = [*first["params"], *second["params"]]
    before = copies(params)
    take_steps(optimizer, params, 1)
    assert_identical(copies(params), before)


def test_a_group_that_is_refused_is_left_as_it_was() -> None:
    group = {"params": make_params(ONE), "weights": small_rule(), "state_dtype": torch.bfloat16, "lr": -1.0}
    before = dict(group)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        LearnedOptimizer([group], weights=small_rule())
    assert group == before


def test_the_groups_of_one_optimizer_make_another() -> None:
    groups = [{"params": make_params(ONE), "weights": Weights(small_rule(seed=3), "mine")}, {"params": make_params(ONE)}]
    first = LearnedOptimizer(groups, weights=small_rule())
    second = LearnedOptimizer(groups)
    assert [group["weights"] for group in second.param_groups] == ["mine", "custom"]
    assert second._weights_of(groups[0]) is first._weights_of(groups[0])
    groups[0]["weights"] = "quadratic"  # The name counts where it was changed by hand.
    assert LearnedOptimizer(groups).param_groups[0]["fingerprint"] == Weights.from_pretrained("quadratic").fingerprint


def test_params_may_be_a_generator_a_dict_view_or_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    assert len(LearnedOptimizer(model.parameters(), weights=small_rule()).param_groups[0]["params"]) == 4
    named = LearnedOptimizer(model.named_parameters(), weights=small_rule())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    take_steps(named, list(model.parameters()), 2)
    again = LearnedOptimizer(model.named_parameters(), weights=small_rule())
    again.load_state_dict(named.state_dict())
    assert again.param_groups[0]["param_names"] == named.param_groups[0]["param_names"]
    assert_identical(again.state_dict()["state"], named.state_dict()["state"])


def test_parameters_replaced_in_a_group_are_the_ones_stepped() -> None:
    # accelerate and FSDP2 replace the objects in `group["params"]`.
    old, new = make_params(ONE), make_params(ONE)
    optimizer = LearnedOptimizer(old, weights=small_rule())
    take_steps(optimizer, old, 1)
    optimizer.param_groups[0]["params"] = new
    before = copies(old)
    take_steps(optimizer, new, 1)
    assert_identical(copies(old), before)
    assert_identical(new, old)  # The same first step.
    take_steps(optimizer, new, 1)
    assert not torch.equal(new[0], old[0])
