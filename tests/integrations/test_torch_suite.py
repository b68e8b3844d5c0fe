"""What torch asks of every optimizer of its own: the generic checks of its test suite, run from an ``OptimizerInfo``.

``torch.testing._internal.common_optimizers`` comes with torch, and with it the inputs that must be refused, the schedulers
and the helpers. The checks themselves stand in torch's repository (``test/test_optim.py``) and are written anew here, under
their names there. Those that do not apply are listed in :data:`NOT_RUN` with the reason.
"""

import copy
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau

from learned_optim import LearnedOptimizer

pytest.importorskip("expecttest", reason="torch's test helpers need it: pip install 'learned-optim[integrations]'")
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
)

pytestmark = pytest.mark.filterwarnings("ignore:LearnedOptimizer runs with a small lr:UserWarning")

NOT_RUN = {
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs",
    "test_state_dict_with_cuda_params": "needs a GPU; tests/backends/test_triton.py moves state between devices",
    "test_mixed_device_dtype": "needs a GPU; mixed dtypes are checked here",
    "test_foreach_matches_forloop": "there is one implementation: `foreach` is accepted and changes nothing (checked here)",
    "test_foreach_large_tensor": "the same",
    "test_peak_memory_foreach": "needs a GPU; tests/optimizer/test_memory.py measures the memory of a step",
    "test_fused_matches_forloop": "`fused=True` is refused: kernels are chosen by `backend=`",
    "test_fused_large_tensor": "the same",
    "test_fused_error_on_params_on_meta": "the same",
    "test_fused_does_not_step_if_foundinf": "the same; a GradScaler skips the whole step (tests/optimizer/test_company.py)",
    "test_cpu_load_state_dict": "checks fused and capturable kernels of torch on a GPU",
    "test_defaults_changed_to_foreach": "the same as for `foreach`",
    "test_second_order_optims_return_consistent_types": "for LBFGS and the like, which step by closures alone",
    "test_rosenbrock_sparse": "sparse gradients are refused (tests/optimizer/test_step.py)",
    "test_sparse": "the same",
    "test_complex_2d": "the same problem as test_complex, which is run",
    "test_capturable": "on the CPU nothing is captured; tests/optimizer/test_step.py covers the option",
    "test_differentiable": "`differentiable=True` is refused: `step` builds no graph",
}
"""Generic checks of torch that are not run, and why."""


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Return options of the constructor, each as torch's own optimizers list theirs."""
    options: list[tuple[dict[str, Any], str]] = [
        ({}, "default"),
        ({"lr": 0.5}, "non-default lr"),
        ({"lr": torch.tensor(0.5)}, "tensor lr"),
        ({"weight_decay": 0.1}, "nonzero weight_decay"),
        ({"weight_decay": 0.1, "maximize": True}, "maximize"),
        ({"capturable": True}, "capturable"),
        ({"state_dtype": "bfloat16"}, "bfloat16 memory"),
        ({"state_dtype": "int8"}, "8-bit memory"),
        ({"weights": "quadratic"}, "other weights"),
        ({"backend": "reference"}, "reference"),
    ]
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for kwargs, desc in options]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """Return torch's inputs that every optimizer refuses, and those of this one."""
    own = [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
        ({"fused": True}, RuntimeError, "`fused=True` is not an option"),
        ({"differentiable": True}, RuntimeError, "not differentiable"),
    ]
    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(OptimizerInput(params=None, kwargs=kwargs, desc=text), error_type=kind, error_regex=text)
        for kwargs, kind, text in own
    ]


INFO = OptimizerInfo(
    LearnedOptimizer,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=next(info.scheduler_inputs for info in optim_db if info.name == "Adam"),
    supported_impls=("foreach",),
    not_og_supported_flags=("foreach", "maximize", "capturable"),
    has_capturable_arg=True,
    supports_complex=True,
    supports_multiple_devices=True,
)
ALL_INPUTS = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)


def every_input() -> list[Any]:
    return [pytest.param(each.kwargs, id=each.desc.replace(" ", "-")) for each in ALL_INPUTS]


with_every_input = pytest.mark.parametrize("options", every_input())


def made(params: Any, options: dict[str, Any]) -> LearnedOptimizer:
    return LearnedOptimizer(params, **copy.deepcopy(options))


class Problem:
    """Torch's small least-squares problem."""

    def __init__(self, contiguous: bool = True, dtype: torch.dtype = torch.float32) -> None:
        if contiguous:
            self.weight, self.bias = Parameter(torch.randn(10, 5, dtype=dtype)), Parameter(torch.randn(10, dtype=dtype))
        else:
            self.weight = Parameter(torch.randn(10, 5, 2, dtype=dtype)[..., 0])
            self.bias = Parameter(torch.randn(10, 2, dtype=dtype)[..., 0])
        self.input = torch.randn(5, dtype=dtype)
        self.params = [self.weight, self.bias]

    def closure(self, optimizer: LearnedOptimizer) -> Callable[[], Tensor]:
        def run() -> Tensor:
            optimizer.zero_grad()
            loss = (self.weight.mv(self.input) + self.bias).abs().pow(2).sum()
            loss.backward()
            return loss

        return run

    def train(self, optimizer: LearnedOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(self.closure(optimizer))

    def twin(self) -> "Problem":
        twin = copy.copy(self)
        twin.weight, twin.bias = (Parameter(param.detach().clone()) for param in self.params)
        twin.params = [twin.weight, twin.bias]
        return twin


def same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("error", error_inputs("cpu", torch.float32), ids=lambda e: e.optimizer_error_input.desc[:30])
def test_errors(error: ErrorOptimizerInput) -> None:
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    case = error.optimizer_error_input
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            LearnedOptimizer(case.params, **case.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            LearnedOptimizer(case.params, **case.kwargs)


def test_optim_infos_do_not_specify_global_cliquey_kwargs() -> None:
    assert not any({"foreach", "fused", "differentiable"} & set(each.kwargs) for each in inputs("cpu"))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [(), *INFO.scheduler_inputs], ids=lambda s: f"{len(s)} schedulers")
@with_every_input
def test_forloop_goes_right_direction(options: dict[str, Any], schedulers: Any, contiguous: bool) -> None:
    problem = Problem(contiguous)
    optimizer = made(problem.params, options)
    attached = [scheduler(optimizer) for scheduler in schedulers]
    start = problem.closure(optimizer)().item()
    for _ in range(20):
        loss = optimizer.step(problem.closure(optimizer))
        for scheduler in attached:
            scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    end = problem.closure(optimizer)().item()
    assert end > start if options.get("maximize") else end < start


@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=lambda s: f"{len(s)} schedulers")
def test_param_group_with_lrscheduler_goes_right_direction(schedulers: Any) -> None:
    problem = Problem()
    optimizer = LearnedOptimizer([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
    attached = [scheduler(optimizer) for scheduler in schedulers]
    start = problem.closure(optimizer)().item()
    for _ in range(20):
        loss = optimizer.step(problem.closure(optimizer))
        for scheduler in attached:
            scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    assert problem.closure(optimizer)().item() < start


@with_every_input
def test_tensor_lr(options: dict[str, Any]) -> None:
    first = Problem()
    second = first.twin()
    rest = {name: value for name, value in options.items() if name != "lr"}
    plain, tensor = made(first.params, {**rest, "lr": 0.5}), made(second.params, {**rest, "lr": torch.tensor(0.5)})
    for _ in range(5):
        first.train(plain, 1)
        second.train(tensor, 1)
        same(first.params, second.params)


@pytest.mark.parametrize("impl", [impl for impl in INFO.supported_impls])
@with_every_input
def test_supported_implementations_agree(options: dict[str, Any], impl: str) -> None:
    first = Problem()
    second = first.twin()
    rest = {name: value for name, value in options.items() if name != impl}
    for problem, flag in ((first, True), (second, False)):
        problem.train(made(problem.params, {**rest, impl: flag}), 3)
    same(first.params, second.params)


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_param_groups(option: str) -> None:
    """Groups with options of their own are as many optimizers with these options."""
    together = Problem()
    apart = together.twin()
    values = (0.3, 0.7)
    joined = LearnedOptimizer([{"params": [p], option: v} for p, v in zip(together.params, values, strict=True)])
    single = [LearnedOptimizer([p], **{option: v}) for p, v in zip(apart.params, values, strict=True)]
    for _ in range(5):
        together.train(joined, 1)
        apart.closure(single[0])()
        for param, gradient in zip(apart.params, together.params, strict=True):
            torch.testing.assert_close(param.grad, gradient.grad)
            param.grad = gradient.grad.clone()
        for optimizer in single:
            optimizer.step()
        for optimizer in single:
            optimizer.zero_grad()
    torch.testing.assert_close(together.params, apart.params)


@with_every_input
def test_complex(options: dict[str, Any]) -> None:
    """A complex parameter steps as its pairs of reals."""
    number = Parameter(torch.randn(10, 5, dtype=torch.complex64))
    pairs = Parameter(torch.view_as_real(number).detach().clone())
    optimizers = made([number], options), made([pairs], options)
    for _ in range(3):
        number.grad = torch.randn_like(number)
        pairs.grad = torch.view_as_real(number.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(torch.view_as_real(number), pairs)


@with_every_input
def test_mixed_dtypes(options: dict[str, Any]) -> None:
    params = [Parameter(torch.randn(4, 3).to(dtype)) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    before = [param.detach().clone() for param in params]
    optimizer = made(params, options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(not torch.equal(param, old) and param.dtype == old.dtype for param, old in zip(params, before, strict=True))


@with_every_input
def test_param_group_with_empty_gradients(options: dict[str, Any]) -> None:
    """Torch calls these ``test_grads_are_never_inplaced_into`` and ``test_step_is_noop_when_params_have_no_grad``."""
    problem = Problem()
    optimizer = made(problem.params, options)
    before = [param.detach().clone() for param in problem.params]
    optimizer.step()
    same([param.detach() for param in problem.params], before)
    problem.closure(optimizer)()
    versions = [param.grad._version for param in problem.params]
    optimizer.step()
    assert [param.grad._version for param in problem.params] == versions


@with_every_input
def test_step_is_noop_for_zero_grads(options: dict[str, Any]) -> None:
    param = Parameter(torch.randn(5, 1))
    before, state = param.detach().clone(), {}
    optimizer = made([param], {**options, "weight_decay": 0.0})
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        same(param.detach(), before)
        state = optimizer.state[param]
    assert not any(value.any() for name, value in state.items() if name != "step")


@with_every_input
def test_state_dict_deterministic(options: dict[str, Any]) -> None:
    first = Problem()
    optimizer = made(first.params, options)
    first.train(optimizer, 3)
    second = first.twin()
    other = made(second.params, options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        first.train(optimizer, 1)
        second.train(other, 1)
        same(first.params, second.params)
    same(optimizer.state_dict()["state"], other.state_dict()["state"])
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


@with_every_input
def test_can_load_older_state_dict(options: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = made(problem.params, options)
    problem.train(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for group, flag in itertools.product(state["param_groups"], INFO.not_og_supported_flags):
        group.pop(flag, None)
    optimizer.load_state_dict(state)
    problem.train(optimizer, 1)


@with_every_input
def test_load_nontensor_step(options: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = made(problem.params, options)
    problem.train(optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for memory in state["state"].values():
        memory["step"] = memory["step"].item()
    optimizer.load_state_dict(state)
    same([memory["step"] for memory in optimizer.state.values()], [torch.tensor(3.0)] * 2)
    problem.train(optimizer, 2)


@with_every_input
def test_save_load_equality_with_weights_only(options: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = made(problem.params, options)
    problem.train(optimizer, 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    same(loaded["state"], optimizer.state_dict()["state"])
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)])
def test_state_dict_with_param_names(named: tuple[bool, bool]) -> None:
    """Torch calls these ``test_save_load_...param_names``: names are loaded where there are none, and cause no error."""
    problem = Problem()
    held = list(zip(("weight", "bias"), problem.params, strict=True))
    first, second = (LearnedOptimizer(held if each else problem.params) for each in named)
    problem.train(first, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second.load_state_dict(first.state_dict())
    same(second.state_dict()["state"], first.state_dict()["state"])


@with_every_input
def test_deepcopy_copies_all_public_attrs(options: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = made(problem.params, options)
    problem.train(optimizer, 2)
    twin = copy.deepcopy(optimizer)

    def public(each: LearnedOptimizer) -> set[str]:
        return {name for name in vars(each) if not name.startswith("_")}

    assert public(optimizer) == public(twin)
    assert optimizer.defaults == twin.defaults
    same(optimizer.state_dict()["state"], twin.state_dict()["state"])


def test_state_dict_and_step_hooks_fire_in_order() -> None:
    """Torch calls these ``test_state_dict_{pre,post}_hook``, ``test_step_{pre,post}_hook``, ``test_step_all_hooks``."""
    problem = Problem()
    optimizer = LearnedOptimizer(problem.params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    problem.train(optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


def test_non_empty_state_is_typed_as_the_module_is_converted() -> None:
    """A bfloat16 model loads what a float32 one saved."""
    model = nn.Linear(5, 2)
    optimizer = LearnedOptimizer(model.parameters())
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    narrow = nn.Linear(5, 2, dtype=torch.bfloat16)
    other = LearnedOptimizer(narrow.parameters())
    other.load_state_dict(optimizer.state_dict())
    narrow(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()
    other.step()
