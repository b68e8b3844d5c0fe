"""The optimizer in the company it keeps: scalers, clipping, accumulation, averaging, wrappers, the compiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from learned_optim import LearnedOptimizer, UpdateRule
from tests.cases import assert_identical, copies, draw_gradients, make_params, memories, needs_dynamo, small_rule, take_steps


def make_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def batch(step: int, size: int = 8) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs) - inputs.sum(-1, keepdim=True)).square().mean()


# Gradient scaling, clipping, accumulation


def test_a_grad_scaler_changes_nothing_and_skips_bad_steps_whole(rule: UpdateRule) -> None:
    scaled, plain = make_model(), make_model()
    optimizer = LearnedOptimizer(scaled.parameters(), weights=rule)
    other = LearnedOptimizer(plain.parameters(), weights=rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, batch(step))).backward()
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        loss_of(plain, batch(step)).backward()
        other.step()
    assert_identical(list(scaled.parameters()), list(plain.parameters()))

    params = list(scaled.parameters())
    before, memory = copies(params), memories(optimizer, params)
    optimizer.zero_grad()
    scaler.scale(loss_of(scaled, batch(3)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_identical(copies(params), before)
    assert_identical(memories(optimizer, params), memory)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_inside_autocast_equals_one_outside(backend: str) -> None:
    inside, outside = make_params(((5,), (3, 4))), make_params(((5,), (3, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        take_steps(LearnedOptimizer(inside, weights=small_rule(), backend=backend), inside, 3)
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16  # What it was set to holds again.
    take_steps(LearnedOptimizer(outside, weights=small_rule(), backend=backend), outside, 3)
    assert_identical(inside, outside)


def test_unscaled_and_clipped_gradients_are_what_the_rule_sees(rule: UpdateRule) -> None:
    clipped, by_hand = make_model(), make_model()
    optimizer = LearnedOptimizer(clipped.parameters(), weights=rule)
    other = LearnedOptimizer(by_hand.parameters(), weights=rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(clipped, batch(0))).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3)
    scaler.step(optimizer)
    loss_of(by_hand, batch(0)).backward()
    for param in by_hand.parameters():
        param.grad.mul_(1e-3 / (norm + 1e-6))
    other.step()
    torch.testing.assert_close(list(clipped.parameters()), list(by_hand.parameters()))


def test_accumulated_gradients_equal_one_large_batch(rule: UpdateRule) -> None:
    accumulated, whole = make_model().double(), make_model().double()
    optimizer = LearnedOptimizer(accumulated.parameters(), weights=rule)
    other = LearnedOptimizer(whole.parameters(), weights=rule)
    for step in range(2):
        inputs = batch(step).double()
        optimizer.zero_grad()
        for part in inputs.chunk(4):
            (loss_of(accumulated, part) / 4).backward()
        optimizer.step()
        other.zero_grad()
        loss_of(whole, inputs).backward()
        other.step()
    # The untouched difference is the order of summation; the second moment's root magnifies it.
    torch.testing.assert_close(list(accumulated.parameters()), list(whole.parameters()), rtol=1e-9, atol=1e-11)


def test_create_graph_leaks_no_graph(rule: UpdateRule) -> None:
    model, plain = make_model(), make_model()
    optimizer = LearnedOptimizer(model.parameters(), weights=rule)
    other = LearnedOptimizer(plain.parameters(), weights=rule)
    for step in range(2):
        optimizer.zero_grad()
        gradients = torch.autograd.grad(loss_of(model, batch(step)), list(model.parameters()), create_graph=True)
        for param, gradient in zip(model.parameters(), gradients, strict=True):
            param.grad = gradient
        assert gradients[0].requires_grad
        optimizer.step()
        other.zero_grad()
        loss_of(plain, batch(step)).backward()
        other.step()
    assert_identical(list(model.parameters()), list(plain.parameters()))
    for memory in optimizer.state.values():
        assert not any(value.requires_grad for value in memory.values())


# Averaging


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)])
def test_averaged_models_follow_and_do_not_interfere(average: Any) -> None:
    model, plain = make_model(), make_model()
    optimizer = LearnedOptimizer(model.parameters(), weights=small_rule())
    averaged = AveragedModel(model, multi_avg_fn=average)
    other = LearnedOptimizer(plain.parameters(), weights=small_rule())
    seen = []
    for step in range(3):
        take_steps(optimizer, list(model.parameters()), 1, first=step)
        averaged.update_parameters(model)
        take_steps(other, list(plain.parameters()), 1, first=step)
        seen.append(copies(plain.parameters())[0])
    assert_identical(list(model.parameters()), list(plain.parameters()))
    weights = [1 / 3] * 3 if average is None else [0.25, 0.25, 0.5]
    expected = sum(weight * value for weight, value in zip(weights, seen, strict=True))
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)


# One optimizer for each parameter


def test_one_instance_per_parameter_inside_backward_equals_one_for_all(rule: UpdateRule) -> None:
    layerwise, whole = make_model(), make_model()
    optimizers = {param: LearnedOptimizer([param], weights=rule) for param in layerwise.parameters()}

    def step(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in layerwise.parameters():
        param.register_post_accumulate_grad_hook(step)
    optimizer = LearnedOptimizer(whole.parameters(), weights=rule)
    for number in range(3):
        loss_of(layerwise, batch(number)).backward()
        optimizer.zero_grad()
        loss_of(whole, batch(number)).backward()
        optimizer.step()
    assert all(param.grad is None for param in layerwise.parameters())
    torch.testing.assert_close(list(layerwise.parameters()), list(whole.parameters()), rtol=1e-6, atol=1e-7)


# torch's own import compiles functional optimizers with the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_s_apply_optimizer_in_backward(rule: UpdateRule) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    layerwise, whole = make_model(), make_model()
    _apply_optimizer_in_backward(LearnedOptimizer, layerwise.parameters(), {"weights": rule, "lr": 0.5})
    optimizer = LearnedOptimizer(whole.parameters(), weights=rule, lr=0.5)
    for number in range(2):
        loss_of(layerwise, batch(number)).backward()
        optimizer.zero_grad()
        loss_of(whole, batch(number)).backward()
        optimizer.step()
    torch.testing.assert_close(list(layerwise.parameters()), list(whole.parameters()), rtol=1e-6, atol=1e-7)


# Subclasses and wrappers


def test_a_class_made_at_run_time_wraps_it_as_lightning_does(rule: UpdateRule) -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            mixed = (type(self), type(optimizer))
            self.__class__ = type("Lightning" + type(optimizer).__name__, mixed, {})
            self.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
            self.wrapped = optimizer

        def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
            return self.wrapped.step(closure)

    params, expected = make_params(), make_params()
    wrapper = Wrapper(LearnedOptimizer(params, weights=rule))
    assert isinstance(wrapper, LearnedOptimizer)
    take_steps(wrapper, params, 2)
    take_steps(LearnedOptimizer(expected, weights=rule), expected, 2)
    assert_identical(params, expected)
    wrapper.load_state_dict(wrapper.state_dict())


def test_a_subclass_may_add_arguments_of_its_own(rule: UpdateRule) -> None:
    class Noisy(LearnedOptimizer):
        def __init__(self, params: Any, noise: float, **options: Any) -> None:
            super().__init__(params, **options)
            self.defaults["noise"] = noise
            for group in self.param_groups:
                group.setdefault("noise", noise)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                for param in group["params"]:
                    param.add_(group["noise"])
            return loss

    params, expected = make_params(), make_params()
    noisy = Noisy(params, 0.25, weights=rule)
    take_steps(noisy, params, 1)
    take_steps(LearnedOptimizer(expected, weights=rule), expected, 1)
    assert_identical([param.detach() for param in params], [param.detach() + 0.25 for param in expected])
    noisy.load_state_dict(noisy.state_dict())
    assert noisy.param_groups[0]["noise"] == 0.25


def test_state_moved_by_a_wrapper_is_used_from_where_it_is(rule: UpdateRule) -> None:
    # Lightning and accelerate replace every state tensor by a copy on another device.
    params, expected = make_params(), make_params()
    optimizer, other = LearnedOptimizer(params, weights=rule), LearnedOptimizer(expected, weights=rule)
    take_steps(optimizer, params, 2)
    take_steps(other, expected, 2)
    for memory in optimizer.state.values():
        for name, value in memory.items():
            memory[name] = value.clone()
    take_steps(optimizer, params, 2, first=2)
    take_steps(other, expected, 2, first=2)
    assert_identical(params, expected)


# torch.compile


@needs_dynamo
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("case", ["paper-log-and-sign", "adam-modulation-time"])
def test_a_compiled_step_equals_the_eager_one_without_breaks_or_recompiles(case: str) -> None:
    rule = small_rule(case, seed=99)  # Weights that no other test has cast before.
    params, expected = make_params([(), (5,), (3, 4)]), make_params([(), (5,), (3, 4)])
    lr = torch.tensor(1.0)
    optimizer = LearnedOptimizer(params, lr=lr, weights=rule)
    other = LearnedOptimizer(expected, weights=rule)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    counts = []
    for number in range(5):
        rate = 1.0 / (number + 1)
        lr.fill_(rate)
        other.param_groups[0]["lr"] = rate
        for tensors in (params, expected):
            for param, gradient in zip(tensors, draw_gradients(tensors, number), strict=True):
                param.grad = gradient
        step()
        other.step()
        counts.append(counter.frame_count)
    # Once to create the state, once to use it, then never again.
    assert counts[0] == 1
    assert counts[1:] == [2] * 4
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@needs_dynamo
@pytest.mark.usefixtures("each_backend")
def test_a_compiled_step_takes_complex_parameters_too() -> None:
    (param,), (expected,) = make_params([(3,)], torch.complex64), make_params([(3,)], torch.complex64)
    optimizer = LearnedOptimizer([param], lr=torch.tensor(1.0), weights=small_rule(seed=98))
    other = LearnedOptimizer([expected], weights=small_rule(seed=98))
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager")
    for number in range(3):
        for tensor in (param, expected):
            (tensor.grad,) = draw_gradients([tensor], number)
        step()
        other.step()
    torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
