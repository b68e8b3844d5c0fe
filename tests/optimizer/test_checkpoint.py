"""``state_dict``, ``load_state_dict``, pickle, deepcopy and torch's distributed checkpoints."""

import copy
import io
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from learned_optim import LearnedOptimizer, UpdateRule, Weights
from learned_optim.rules.storage import decode
from learned_optim.sharding import zeros_like
from tests.cases import RULE_CASES, assert_identical, copies, draw_gradients, make_params, memories, small_rule, take_steps


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def trained(rule: UpdateRule, **options: Any) -> tuple[LearnedOptimizer, list[nn.Parameter]]:
    params = make_params(dtype=options.pop("dtype", torch.float32))
    optimizer = LearnedOptimizer(params, weights=rule, **options)
    take_steps(optimizer, params, 3)
    return optimizer, params


# Resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_resume_is_exact_through_a_weights_only_file(rule: UpdateRule, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    optimizer, params = trained(rule, dtype=dtype, state_dtype=state_dtype)
    state = through_a_file(optimizer.state_dict())
    resumed_params = clones(params)
    resumed = LearnedOptimizer(resumed_params, weights=rule, state_dtype=state_dtype)
    resumed.load_state_dict(state)
    assert_identical(memories(resumed, resumed_params), memories(optimizer, params))
    take_steps(optimizer, params, 3, first=3)
    take_steps(resumed, resumed_params, 3, first=3)
    assert_identical(resumed_params, params)
    assert_identical(memories(resumed, resumed_params), memories(optimizer, params))


def test_every_option_of_a_group_is_restored(rule: UpdateRule) -> None:
    optimizer, params = trained(rule, lr=0.3, weight_decay=2.0, maximize=True, state_dtype=torch.bfloat16)
    resumed = LearnedOptimizer(clones(params), weights=rule)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    live, saved = (dict(opt.param_groups[0]) for opt in (resumed, optimizer))
    del live["params"], saved["params"]
    assert live == saved
    assert live["lr"] == 0.3


def test_a_tensor_lr_survives(rule: UpdateRule) -> None:
    optimizer, params = trained(rule, lr=torch.tensor([0.5]))
    resumed = LearnedOptimizer(clones(params), weights=rule)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_identical(resumed.param_groups[0]["lr"], torch.tensor([0.5]))
    resumed.param_groups[0]["lr"].fill_(0.1)
    assert_identical(optimizer.param_groups[0]["lr"], torch.tensor([0.5]))


def test_an_empty_state_loads(rule: UpdateRule) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=rule)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    expected = make_params()
    take_steps(optimizer, params, 2)
    take_steps(LearnedOptimizer(expected, weights=rule), expected, 2)
    assert_identical(params, expected)


def test_state_of_only_some_parameters_loads(rule: UpdateRule) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=rule)
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    resumed_params = clones(params)
    resumed = LearnedOptimizer(resumed_params, weights=rule)
    resumed.load_state_dict(optimizer.state_dict())
    assert set(resumed.state) == {resumed_params[2]}
    take_steps(optimizer, params, 2)
    take_steps(resumed, resumed_params, 2)
    assert_identical(resumed_params, params)


# What a load must not touch


def test_loading_neither_aliases_nor_changes_the_checkpoint(rule: UpdateRule) -> None:
    optimizer, params = trained(rule)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    loaded = state["state"][2]
    borrowed = clones(params)
    other = LearnedOptimizer(borrowed, weights=rule)
    other.load_state_dict(state)
    assert state["state"][2] is loaded
    take_steps(other, borrowed, 2, first=3)
    for now in (state, optimizer.state_dict()):
        assert_identical(now["state"], kept["state"])
        assert now["param_groups"] == kept["param_groups"]


def test_loading_one_s_own_state_changes_nothing(rule: UpdateRule) -> None:
    optimizer, params = trained(rule)
    before = memories(optimizer, params)
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert_identical(memories(optimizer, params), before)


def test_saved_state_is_tensors_by_index_and_groups_are_plain(rule: UpdateRule) -> None:
    optimizer, params = trained(rule)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert list(state["state"]) == list(range(len(params)))
    assert all(isinstance(value, Tensor) for memory in state["state"].values() for value in memory.values())
    assert len(state["param_groups"][0]["fingerprint"]) == 64
    for group in state["param_groups"]:
        assert group["params"] == list(range(len(params)))
        options = {name: value for name, value in group.items() if name != "params"}
        assert all(value is None or type(value) in (bool, int, float, str) for value in options.values()), options


# Refusals


def refuses(optimizer: LearnedOptimizer, params: list[nn.Parameter], state: dict[str, Any], message: str) -> None:
    """Check that a load raises and changes nothing."""
    before = memories(optimizer, params)
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_identical(memories(optimizer, params), before)
    after = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    assert after == options
    take_steps(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())  # No check of the failed load is left behind.


def test_a_checkpoint_of_other_weights_is_refused_naming_both() -> None:
    first, second = Weights(small_rule(), "first"), Weights(small_rule(seed=1), "second")
    params = make_params()
    donor = LearnedOptimizer(params, weights=first)
    take_steps(donor, params, 1)
    optimizer, own = trained(small_rule())
    optimizer = LearnedOptimizer(own, weights=second)
    take_steps(optimizer, own, 1)
    refuses(optimizer, own, donor.state_dict(), r"'first' \(.{12}\).*'second' \(.{12}\).*weights='first'")


@pytest.mark.parametrize("missing", ["hidden", "cell_scale"])
def test_eight_bit_memory_without_its_scales_is_refused(missing: str) -> None:
    optimizer, params = trained(small_rule(), state_dtype="int8")
    state = copy.deepcopy(optimizer.state_dict())
    if missing == "cell_scale":
        del state["state"][2]["cell_scale"]
        refuses(optimizer, params, state, "lacks cell_scale of parameter 2")
    else:  # As torch.distributed.checkpoint leaves it that loads into an optimizer with memory of another dtype.
        for memory in state["state"].values():
            del memory["cell_scale"]
            memory |= {name: memory[name].float() for name in ("hidden", "cell")}
        refuses(optimizer, params, state, "memory of parameter 0 is float32.*state_dtype='int8'.*without its scales")


def test_equal_weights_under_another_name_are_the_same_weights() -> None:
    params = make_params()
    donor = LearnedOptimizer(params, weights=Weights(small_rule(), "first"))
    take_steps(donor, params, 1)
    other = LearnedOptimizer(clones(params), weights=Weights(small_rule(), "second"))
    other.load_state_dict(donor.state_dict())
    assert len(other.state) == len(params)


def test_a_checkpoint_of_adam_is_refused() -> None:
    optimizer, params = trained(small_rule())
    adam = torch.optim.Adam(clones(params))
    refuses(optimizer, params, adam.state_dict(), "not made by LearnedOptimizer.*name no weights")


def test_a_checkpoint_of_other_shapes_is_refused() -> None:
    rule = small_rule()
    optimizer, params = trained(rule)
    others = make_params([*reversed([tuple(param.shape) for param in params])])
    donor = LearnedOptimizer(others, weights=rule)
    take_steps(donor, others, 1)
    refuses(optimizer, params, donor.state_dict(), r"parameter 0 has shape \(\).*\(0, 3.*same order")


def test_a_checkpoint_of_other_groups_is_refused() -> None:
    rule = small_rule()
    optimizer, params = trained(rule)
    fewer = clones(params[:2])
    refuses(optimizer, params, LearnedOptimizer(fewer, weights=rule).state_dict(), "doesn't match the size")
    split = LearnedOptimizer([{"params": fewer[:1]}, {"params": fewer[1:]}], weights=rule)
    refuses(optimizer, params, split.state_dict(), "different number of parameter groups")


def test_a_checkpoint_without_its_memory_is_refused() -> None:
    optimizer, params = trained(small_rule())
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]["cell"], state["state"][1]["exp_avg"]
    refuses(optimizer, params, state, "lacks cell, exp_avg of parameter 1")


@pytest.mark.parametrize("name", ["hidden", "cell", "exp_avg"])
@pytest.mark.parametrize(
    "spoil", [lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x.numpy()], ids=["meta", "sparse", "numpy"]
)
def test_memory_that_is_no_dense_tensor_is_refused(name: str, spoil: Any) -> None:
    optimizer, params = trained(small_rule())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1][name] = spoil(state["state"][1][name])
    refuses(optimizer, params, state, "memory of parameter 1 in the checkpoint is not all of dense tensors")


@pytest.mark.parametrize("step", ["three", torch.ones(2), None])
def test_a_step_that_is_no_number_is_refused(step: Any) -> None:
    optimizer, params = trained(small_rule())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["step"] = step
    refuses(optimizer, params, state, "step of parameter 1 in the checkpoint")


def test_a_load_under_another_default_device_is_exact(rule: UpdateRule) -> None:
    optimizer, params = trained(rule)
    saved, before = copy.deepcopy(optimizer.state_dict()), memories(optimizer, params)
    with torch.device("meta"):
        optimizer.load_state_dict(saved)
    assert_identical(memories(optimizer, params), before)


def test_a_load_that_runs_out_of_memory_leaves_no_half_state(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = trained(small_rule())
    saved, before = copy.deepcopy(optimizer.state_dict()), memories(optimizer, params)
    made = iter(range(7))

    def zeros(*arguments: Any) -> Tensor:
        if next(made, None) is None:
            raise MemoryError("no room")
        return zeros_like(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("learned_optim.checkpoint.zeros_like", zeros)
        with pytest.raises(RuntimeError, match=r"could not be copied \(no room\); the optimizer has no state now"):
            optimizer.load_state_dict(saved)
    assert not optimizer.state
    optimizer.load_state_dict(saved)
    assert_identical(memories(optimizer, params), before)


# Older checkpoints


def test_options_that_an_older_checkpoint_lacks_take_their_defaults(rule: UpdateRule) -> None:
    optimizer, params = trained(rule)
    state = copy.deepcopy(optimizer.state_dict())
    for name in ("capturable", "foreach", "fused", "differentiable", "maximize", "state_dtype", "moment_dtype"):
        del state["param_groups"][0][name]
    resumed_params = clones(params)
    resumed = LearnedOptimizer(resumed_params, weights=rule)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["maximize"] is False
    assert resumed.param_groups[0]["state_dtype"] == "float32"
    take_steps(optimizer, params, 2, first=3)
    take_steps(resumed, resumed_params, 2, first=3)
    assert_identical(resumed_params, params)


@pytest.mark.parametrize("number", [3, 3.0])
def test_a_step_that_is_a_number_becomes_a_tensor(rule: UpdateRule, number: float) -> None:
    optimizer, params = trained(rule)
    state = copy.deepcopy(optimizer.state_dict())
    for memory in state["state"].values():
        memory["step"] = number
    resumed_params = clones(params)
    resumed = LearnedOptimizer(resumed_params, weights=rule)
    resumed.load_state_dict(state)
    assert_identical(resumed.state[resumed_params[0]]["step"], torch.tensor(3.0))
    take_steps(optimizer, params, 2, first=3)
    take_steps(resumed, resumed_params, 2, first=3)
    assert_identical(resumed_params, params)


# Dtypes


def cast(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Cast every tensor of a checkpoint, as some trainers do before they write it."""
    memories = {i: {name: value.to(dtype) for name, value in memory.items()} for i, memory in state["state"].items()}
    return {**state, "state": memories}


def flat(memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's memory, each tensor ``(N, ...)``."""
    dims = memory["hidden"].dim() - 1
    return {name: value.reshape(-1, *value.shape[dims:]) for name, value in memory.items() if name != "step"}


def layout_of(optimizer: LearnedOptimizer, params: list[nn.Parameter]) -> list[dict[str, torch.dtype]]:
    return [{name: value.dtype for name, value in optimizer.state[param].items()} for param in params]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_checkpoint_that_was_cast_comes_back_in_the_layout_of_its_options(
    rule: UpdateRule, state_dtype: str, dtype: torch.dtype
) -> None:
    optimizer, params = trained(rule, state_dtype=state_dtype)
    resumed = LearnedOptimizer(clones(params), weights=rule)
    resumed.load_state_dict(cast(optimizer.state_dict(), dtype))
    held = resumed.param_groups[0]["params"]
    assert layout_of(resumed, held) == layout_of(optimizer, params)
    exact = {"rtol": 0, "atol": 0} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 1e-30}
    torch.testing.assert_close(memories(resumed, held), memories(optimizer, params), **exact)
    take_steps(resumed, held, 2, first=3)


def test_no_float16_second_moment_that_underflowed_is_trained_on() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = LearnedOptimizer(params, weights=small_rule())
    params[0].grad, params[1].grad = torch.ones(3), torch.tensor([1.0, 1e-5, 1.0])
    optimizer.step()
    state = cast(optimizer.state_dict(), torch.float16)
    refuses(optimizer, params, state, "exp_avg_sq of parameter 1 .* is float16, and underflowed to zero.*without a cast")
    optimizer.load_state_dict(cast(optimizer.state_dict(), torch.bfloat16))


def test_float16_memory_is_converted_where_it_did_not_underflow_and_refused_where_it_overflowed() -> None:
    params = [nn.Parameter(torch.ones(3))]
    optimizer = LearnedOptimizer(params, weights=small_rule())
    params[0].grad = torch.tensor([0.0, 1.0, -1.0])  # A coordinate at rest has lost nothing.
    optimizer.step()
    optimizer.load_state_dict(cast(optimizer.state_dict(), torch.float16))
    assert optimizer.state[params[0]]["exp_avg_sq"].dtype == torch.float32
    params[0].grad = torch.full((3,), 1e6)
    optimizer.step()
    refuses(optimizer, params, cast(optimizer.state_dict(), torch.float16), "parameter 0 overflowed in float16")


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_run_may_go_on_in_another_precision_of_the_parameters(rule: UpdateRule, state_dtype: str) -> None:
    optimizer, params = trained(rule, state_dtype=state_dtype)
    wide = [nn.Parameter(param.detach().double()) for param in params]
    other = LearnedOptimizer(wide, weights=rule, state_dtype=state_dtype)
    other.load_state_dict(optimizer.state_dict())
    assert all(value.dtype == torch.float64 for name, value in other.state[wide[2]].items() if name != "step")
    back = LearnedOptimizer(clones(params), weights=rule)
    back.load_state_dict(other.state_dict())
    held = back.param_groups[0]["params"]
    assert layout_of(back, held) == layout_of(optimizer, params)
    if state_dtype == "int8":
        for now, before in zip(memories(back, held), memories(optimizer, params), strict=True):
            assert_identical(now["hidden"], before["hidden"])
            cells = [decode(rule, flat(memory), torch.float32)["cell"] for memory in (now, before)]
            torch.testing.assert_close(*cells, rtol=0.02, atol=0.02)
    else:
        assert_identical(memories(back, held), memories(optimizer, params))
    for opt, tensors in ((other, wide), (back, held)):
        take_steps(opt, tensors, 2, first=3)


@pytest.mark.parametrize("new", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("old", ["float32", "bfloat16", "int8"])
def test_the_options_of_a_checkpoint_may_name_another_layout(rule: UpdateRule, old: str, new: str) -> None:
    optimizer, params = trained(rule, state_dtype=old)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["state_dtype"] = getattr(torch, new)
    resumed = LearnedOptimizer(clones(params), weights=rule)
    resumed.load_state_dict(state)
    held = resumed.param_groups[0]["params"]
    assert resumed.param_groups[0]["state_dtype"] == new
    expected = LearnedOptimizer(clones(params), weights=rule, state_dtype=new)
    take_steps(expected, expected.param_groups[0]["params"], 1)
    assert layout_of(resumed, held) == layout_of(expected, expected.param_groups[0]["params"])
    assert sum(value.nbytes for memory in resumed.state.values() for value in memory.values()) == sum(
        resumed._state_bytes(param, resumed.param_groups[0]) for param in held
    )
    take_steps(optimizer, params, 1, first=3)
    take_steps(resumed, held, 1, first=3)
    torch.testing.assert_close(held, params, rtol=0.05, atol=0.05)


# Nothing is written unless everything fits


@pytest.mark.parametrize(
    "step",
    [
        10**400,
        pytest.param(10**5000, id="5000 digits"),
        math.nan,
        -1,
        -0.5,
        math.inf,
        torch.tensor(-3.0),
        torch.tensor(True),
        torch.tensor(1j),
        True,
    ],
)
def test_a_step_that_counts_no_steps_is_refused(step: Any) -> None:
    optimizer, params = trained(small_rule())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][5]["step"] = step
    refuses(optimizer, params, state, "step of parameter 5 in the checkpoint is")


@pytest.mark.parametrize("name", ["hidden", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8])
def test_memory_in_a_dtype_of_no_memory_is_refused(name: str, dtype: torch.dtype) -> None:
    optimizer, params = trained(small_rule())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][4][name] = state["state"][4][name].to(dtype)
    refuses(optimizer, params, state, f"the {name} of parameter 4 in the checkpoint is {dtype}, which no memory")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.update(state=[]), "needs a dict 'state' and a list 'param_groups', got list and list"),
        (lambda state: state.pop("param_groups"), "got dict and NoneType"),
        (lambda state: state.update(param_groups=[1]), "group 0 of the checkpoint is no dict"),
        (lambda state: state["param_groups"][0].pop("params"), "group 0 of the checkpoint is no dict with a list 'params'"),
        (lambda state: state["param_groups"][0].update(params=[[0]] * 6), "list 'params' of indices"),
        (lambda state: state["param_groups"][0].update(params=[0] * 6), "names a parameter twice"),
        (lambda state: state["state"].update({5: [1, 2]}), "state of parameter 5 in the checkpoint is a list, not a dict"),
        (lambda state: state["state"].update({5: torch.ones(2)}), "state of parameter 5 in the checkpoint is a Tensor"),
        (lambda state: state["param_groups"][0].update(lr="1"), "group 0 of the checkpoint.*Invalid learning rate"),
        (lambda state: state["param_groups"][0].update(lr=None), "group 0 of the checkpoint.*Invalid learning rate"),
        (lambda state: state["param_groups"][0].update(weight_decay=-1.0), "group 0 of the checkpoint.*weight_decay"),
        (
            lambda state: state["param_groups"][0].update(state_dtype="int4"),
            "group 0.*Invalid state_dtype",
        ),
        (lambda state: state["param_groups"][0].update(guard_long_updates="x"), "group 0.*Invalid guard_long_updates"),
        (lambda state: state["param_groups"][0].update(guard=3), "group 0 of the checkpoint.*Invalid guard"),
    ],
)
def test_a_checkpoint_of_the_wrong_build_is_refused(spoil: Any, message: str) -> None:
    optimizer, params = trained(small_rule())
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    refuses(optimizer, params, state, message)


def test_what_is_no_dict_is_no_checkpoint() -> None:
    optimizer, _ = trained(small_rule())
    with pytest.raises(TypeError, match=r"takes what state_dict\(\) returned, a dict; got list"):
        optimizer.load_state_dict([])  # type: ignore[arg-type]


def test_a_load_into_a_lazy_module_says_what_to_do() -> None:
    lazy = nn.LazyLinear(2)
    optimizer = LearnedOptimizer(lazy.parameters(), weights=small_rule())
    model = nn.Linear(3, 2)
    donor = LearnedOptimizer(model.parameters(), weights=small_rule())
    take_steps(donor, list(model.parameters()), 1)
    with pytest.raises(ValueError, match="parameter 0 has no shape yet: its module is lazy; run one forward pass"):
        optimizer.load_state_dict(donor.state_dict())
    assert not optimizer.state
    lazy(torch.ones(1, 3))
    optimizer.load_state_dict(donor.state_dict())
    assert optimizer.state


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("number", [7, 7.0])
def test_the_step_of_a_parameter_may_be_set_to_a_number(rule: UpdateRule, number: float, backend: str) -> None:
    optimizer, params = trained(rule, backend=backend)
    expected = LearnedOptimizer(clones(params), weights=rule, backend=backend)
    expected.load_state_dict(optimizer.state_dict())
    for memory, other in zip(optimizer.state.values(), expected.state.values(), strict=True):
        memory["step"], other["step"] = number, torch.tensor(7.0)
    take_steps(optimizer, params, 2, first=3)
    take_steps(expected, expected.param_groups[0]["params"], 2, first=3)
    assert_identical(params, expected.param_groups[0]["params"])
    assert_identical([memory["step"] for memory in optimizer.state.values()], [torch.tensor(9.0)] * len(params))


# Hooks


def test_state_dict_and_load_hooks_see_and_may_change_what_passes(rule: UpdateRule) -> None:
    optimizer, params = trained(rule)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1
    assert seen == ["state_dict pre"]

    other_params = clones(params)
    other = LearnedOptimizer(other_params, weights=rule)

    def renumber(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        steps = {index: {**memory, "step": torch.tensor(7.0)} for index, memory in state["state"].items()}
        return {**state, "state": steps}

    def double(loaded: Any) -> None:
        for memory in loaded.state.values():
            memory["step"] = memory["step"] * 2

    other.register_load_state_dict_pre_hook(renumber)
    other.register_load_state_dict_post_hook(double)
    other.load_state_dict(optimizer.state_dict())
    assert {memory["step"].item() for memory in other.state.values()} == {14.0}
    assert {memory["step"].item() for memory in optimizer.state.values()} == {3.0}


# Copies


@pytest.mark.parametrize("with_scheduler", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alone(rule: UpdateRule, how: str, with_scheduler: bool) -> None:
    optimizer, params = trained(rule, lr=0.5, backend="reference")
    if with_scheduler:  # It patches `step` and more into the instance.
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.register_step_pre_hook(lambda *_: None)
    pair = (optimizer, params)
    other, other_params = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert type(other) is LearnedOptimizer
    assert other.backend == "reference"
    assert {name for name in vars(optimizer) if not name.startswith("_")} - set(vars(other)) <= {"step"}
    assert other.param_groups[0]["params"][0] is other_params[0]
    before, state = copies(params), memories(optimizer, params)
    take_steps(other, other_params, 2, first=3)
    assert_identical(copies(params), before)
    assert_identical(memories(optimizer, params), state)
    take_steps(optimizer, params, 2, first=3)
    assert_identical(other_params, params)
    late = make_params([(2,)])
    other.add_param_group({"params": late, "weights": small_rule("paper-raw", seed=3)})
    take_steps(other, [*other_params, *late], 1)
    other.load_state_dict(other.state_dict())


def test_a_pickle_steps_in_a_fresh_process(tmp_path: Path) -> None:
    runs = [trained(small_rule(case)) for case in RULE_CASES]
    gradients = [draw_gradients(params, 3) for _, params in runs]
    (tmp_path / "in.pickle").write_bytes(pickle.dumps((runs, gradients)))
    script = """
import pickle, sys, torch
torch.set_num_threads(1)
runs, gradients = pickle.load(open(sys.argv[1], "rb"))
for (optimizer, params), drawn in zip(runs, gradients):
    for param, gradient in zip(params, drawn):
        param.grad = gradient
    optimizer.step()
torch.save([[param.detach() for param in params] for _, params in runs], sys.argv[2])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "in.pickle"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, timeout=60)
    for (optimizer, params), elsewhere in zip(runs, torch.load(tmp_path / "out.pt"), strict=True):
        take_steps(optimizer, params, 1, first=3)
        assert_identical(elsewhere, copies(params))


def test_a_hub_token_is_never_stored() -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=small_rule(), token="hf_secret", cache_dir="/private/cache")
    take_steps(optimizer, params, 1)
    for stored in (pickle.dumps(optimizer), repr(optimizer).encode(), str(optimizer.state_dict()).encode()):
        assert b"hf_secret" not in stored
        assert b"/private/cache" not in stored


def test_a_copy_shares_the_network_and_holds_it_in_neither_state_nor_groups() -> None:
    optimizer, _ = trained(small_rule("paper-raw"))
    twin = LearnedOptimizer(make_params(), weights=small_rule("paper-raw"))
    (mine,), (copied,), (other,) = (opt._weights.values() for opt in (optimizer, copy.deepcopy(optimizer), twin))
    assert mine is copied is other


# Distributed checkpoints, in one process


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_state_round_trips(rule: UpdateRule, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = Small()
    optimizer = LearnedOptimizer(model.parameters(), weights=rule, weight_decay=0.5)
    take_steps(optimizer, list(model.parameters()), 3)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if flatten:
        assert "state.first.weight.hidden" in state
        assert all(isinstance(value, (Tensor, int, float, str, type(None))) for value in state.values())
    twin = Small()
    twin.load_state_dict(model.state_dict())
    resumed = LearnedOptimizer(twin.parameters(), weights=rule)
    set_optimizer_state_dict(twin, resumed, through_a_file(state), options=options)
    assert resumed.param_groups[0]["weight_decay"] == 0.5
    for net, opt in ((model, optimizer), (twin, resumed)):
        take_steps(opt, list(net.parameters()), 2, first=3)
    assert_identical(list(twin.parameters()), list(model.parameters()))


def test_asking_a_fresh_optimizer_for_its_state_leaves_parameters_and_memory_at_rest(rule: UpdateRule) -> None:
    # torch initialises state with a step on zero gradients at lr = 0; as with Adam the step count is then 1.
    model = Small()
    before = copies(model.parameters())
    optimizer = LearnedOptimizer(model.parameters(), weights=rule, weight_decay=1.0)
    get_optimizer_state_dict(model, optimizer)
    assert_identical(copies(model.parameters()), before)
    for memory in optimizer.state.values():
        assert not any(value.any() for name, value in memory.items() if name != "step")
    assert optimizer.param_groups[0]["lr"] == 1.0
