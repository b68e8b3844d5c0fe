"""What a step refuses before it writes anything, and what it takes although it was set by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.backends import native
from tests.cases import small_rule

BACKENDS = ["reference", "native", "compiled"]


def optimizer_of(params: Any, **options: Any) -> LearnedOptimizer:
    return LearnedOptimizer(params, weights=small_rule("adam-modulation"), **options)


def stepped(backend: str = "auto", **options: Any) -> tuple[list[nn.Parameter], LearnedOptimizer]:
    """Two parameters in two groups that have taken two steps, with gradients for the next."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 2))]
    groups = [{"params": [param]} for param in params]
    optimizer = optimizer_of(groups, **options)
    for _ in range(2):
        draw(params)
        optimizer.step()
    draw(params)
    optimizer.backend = backend  # What is refused is refused whatever would have run, and be it not available here.
    return params, optimizer


def draw(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.randn_like(param)


def everything(params: list[nn.Parameter], optimizer: LearnedOptimizer) -> list[Any]:
    return copy.deepcopy([[param.detach() for param in params], [dict(optimizer.state[param]) for param in params]])


def shorten(name: str) -> Callable[[Tensor, dict[str, Any]], None]:
    return lambda param, memory: memory.update({name: memory[name][1:].clone()})


def put(name: str, value: Callable[[Tensor], Any]) -> Callable[[Tensor, dict[str, Any]], None]:
    return lambda param, memory: memory.update({name: value(memory[name])})


def prune(param: Tensor, memory: dict[str, Any]) -> None:
    param.data = param.data[1:]


BREAKS = {
    **{
        f"{name} too short": (shorten(name), rf"has shape \(3, 2\).*'{name}' has shape \(2, 2")
        for name in ("hidden", "cell", "exp_avg", "exp_avg_slow", "exp_avg_sq")
    },
    "a moment transposed": (put("exp_avg", lambda x: x.t()), r"'exp_avg' has shape \(2, 3\) where \(3, 2\)"),
    "a moment missing": (lambda param, memory: memory.pop("exp_avg"), "'exp_avg' of parameter 1 is missing"),
    "a moment of integers": (put("exp_avg_sq", lambda x: x.int()), "'exp_avg_sq' of parameter 1 is torch.int32"),
    "hidden of bools": (put("hidden", lambda x: x > 0), "'hidden' of parameter 1 is torch.bool"),
    "memory elsewhere": (put("cell", lambda x: x.to("meta")), "lies on cpu, but its 'cell' on meta"),
    "sparse memory": (put("exp_avg", lambda x: x.to_sparse()), "'exp_avg' of parameter 1.*not a dense tensor"),
    "a step of two numbers": (put("step", lambda x: torch.ones(2)), "'step' of parameter 1.*not one number"),
    "a step that is a word": (put("step", lambda x: "three"), "'step' of parameter 1 is 'three'"),
    "a parameter pruned after backward": (prune, r"has shape \(2, 2\), but its gradient has shape \(3, 2\)"),
    "a sparse gradient": (
        lambda param, memory: setattr(param, "grad", param.grad.to_sparse()),
        "does not support sparse gradients, and parameter 1",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", BREAKS)
def test_what_does_not_fit_is_refused_before_anything_moves(kind: str, backend: str) -> None:
    params, optimizer = stepped(backend)
    change, message = BREAKS[kind]
    change(params[1], optimizer.state[params[1]])
    others = everything(params[:1], optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert_same(everything(params[:1], optimizer), others)


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("lr", "fast"), ("weight_decay", -0.1), ("state_dtype", "int4")],
)
def test_an_option_set_out_of_range_is_refused_before_any_group_moves(option: str, value: Any) -> None:
    params, optimizer = stepped("reference")
    new = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [new]})
    draw([new])
    optimizer.param_groups[2][option] = value
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match=r"Invalid (learning rate|weight_decay value|state_dtype)"):
        optimizer.step()
    assert_same(everything(params, optimizer), before)
    assert new not in optimizer.state or not optimizer.state[new]


def test_the_name_of_a_parameter_is_said_where_it_is_known() -> None:
    model = nn.Linear(3, 2)
    optimizer = optimizer_of(model.named_parameters())
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    optimizer.state[model.weight]["exp_avg"] = torch.zeros(5)
    with pytest.raises(RuntimeError, match="parameter 'weight' has shape"):
        optimizer.step()


needs_kernels = pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_kernels)])
def test_state_of_any_strides_and_a_count_that_is_a_number_just_work(backend: str) -> None:
    results = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(2, 3, 4, 4))
        optimizer = optimizer_of([param], backend=backend)
        for step in range(4):
            param.grad = torch.randn_like(param)
            if by_hand and step == 2:
                memory = optimizer.state[param]
                for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq"):
                    memory[name] = memory[name].contiguous(memory_format=torch.channels_last)
                memory["hidden"] = memory["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
                memory["step"] = 2
            optimizer.step()
        results.append((param.detach(), dict(optimizer.state[param])))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("value", [-1.0, "fast"])
def test_a_repeated_step_refuses_options_like_a_full_one(value: Any) -> None:
    params, optimizer = stepped()
    optimizer.param_groups[1]["lr"] = value
    before = everything(params, optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match="Invalid learning rate"):
            optimizer.step()
        assert_same(everything(params, optimizer), before)


def test_a_count_set_out_of_range_in_a_later_group_stops_the_earlier_one_too() -> None:
    params, optimizer = stepped()
    optimizer.state[params[1]]["step"] = -2
    before = everything(params[:1], optimizer)
    with pytest.raises(RuntimeError, match="a count of steps is 0 or more"):
        optimizer.step()
    assert_same(everything(params[:1], optimizer), before)


def test_eight_bit_memory_under_a_parameter_made_double_is_refused() -> None:
    params, optimizer = stepped(state_dtype="int8")
    params[1].data = params[1].data.double()
    params[1].grad = torch.ones_like(params[1])
    before = everything(params, optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 is torch.float64, but its memory is 8-bit"):
        optimizer.step()
    assert_same(everything(params, optimizer), before)


def test_a_rate_stays_on_the_device_of_the_parameters() -> None:
    """Elsewhere every step would wait for the device, and no CUDA graph could hold it."""
    optimizer = optimizer_of([nn.Parameter(torch.ones(3, device="meta"))])
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0, device="meta")
    (group,) = optimizer._planned_groups()
    assert isinstance(group.options.lr, Tensor)
    assert group.options.lr.device.type == "meta"
