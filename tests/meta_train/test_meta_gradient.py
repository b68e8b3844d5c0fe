import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.backends.native import step as native_backend
from learned_optim.rules import plain_adam
from meta_train.tasks import Optimizee, Quadratic, Quartic, module_optimizee, seeded
from meta_train.training import meta_gradient
from meta_train.training.inner_steps import CompiledSteps, PlainSteps, TensorScales, plain_step
from meta_train.training.meta_gradient import backpropagate, imitate, unroll
from meta_train.training.parts import Parts
from meta_train.training.roll_out import (
    Carry,
    Sample,
    loss_and_grad,
    no_coordinate,
    roll_out,
    sample_coordinates,
    start_episode,
)
from tests.cases import COORDINATE_CASES, RULE_CASES, small_rule


def waking(seed: int) -> Optimizee:
    """Some coordinates have no gradient until their input first appears, and some never."""
    generator = seeded(seed)
    inputs = torch.randn(200, 2, 6, generator=generator)
    calls = itertools.count()

    def losses(params: dict[str, Tensor]) -> Tensor:
        call = next(calls)
        shown = inputs[call % 200] * torch.tensor([1.0, 1.0, 1.0, call >= 7, call >= 12, 0.0])
        return (1 + (params["a"] * shown.to(params["a"])).sum(-1) + (params["b"] - 1).square().sum(-1)).square()

    return Optimizee({"a": torch.ones(2, 6) / 3, "b": torch.zeros(2, 3)}, losses, generator)


def net(seed: int) -> Optimizee:
    """Two nets side by side, each with two matrices of one shape, one of another, a convolution and vectors."""

    def make() -> nn.Module:
        dense = nn.Sequential(
            nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)
        )
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), dense)

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.mse_loss(module(batch[0].to(next(module.parameters()).dtype)), torch.ones(6, 4))

    return module_optimizee(make, loss, lambda generator: (torch.randn(2, 6, 1, 3, 3, generator=generator),), seed, 2)


OPTIMIZEES = {
    "net": net,
    "quadratic": Quadratic(dimension=4, functions=6).sample,
    "quartic": Quartic(4, 5).sample,
    "waking": waking,
}


def whole(case: str = "adam-modulation") -> Parts:
    return Parts.whole(small_rule(case))


def objective(losses: Tensor, initial: Tensor) -> Tensor:
    return 1 / (losses.detach().abs() + 1) / losses.numel()


def gradients(rule: Parts) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in rule.parameters()]


def in_float64(optimizee: Optimizee) -> Optimizee:
    optimizee.params = {name: value.double() for name, value in optimizee.params.items()}
    return optimizee


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    pairs = list(zip(got, want, strict=True))
    return float(torch.stack([(a - b).norm() for a, b in pairs]).norm() / torch.stack([b.norm() for _, b in pairs]).norm())


@pytest.mark.parametrize("case", RULE_CASES)
@pytest.mark.parametrize("name", OPTIMIZEES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("native", [True, False])
def test_one_pass_equals_the_unroll(
    case: str, name: str, dtype: torch.dtype, tolerance: float, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(meta_gradient, "native_supports", lambda lstm: False)
        monkeypatch.setattr(native_backend, "supports", lambda rule: False)
    rule = whole(case).to(dtype)
    once, again = OPTIMIZEES[name](1), OPTIMIZEES[name](1)
    if dtype == torch.float64:
        once, again = in_float64(once), in_float64(again)
    carry, twin = start_episode(rule, once), start_episode(rule, again)
    for _ in range(2):  # The second truncation starts from a memory that is not at rest.
        rule.zero_grad()
        record, carry = roll_out(rule, once, carry, 10)
        backpropagate(rule, record, objective(record.losses, carry.initial_loss))
        one_pass = gradients(rule)
        rule.zero_grad()
        losses, twin = unroll(rule, again, twin, 10, objective)
        assert relative_error(one_pass, gradients(rule)) < tolerance
        torch.testing.assert_close(record.losses, losses, rtol=1e3 * tolerance, atol=1e-5)


@pytest.mark.parametrize("case", COORDINATE_CASES)
@pytest.mark.parametrize("teacher_case", ["adam", "adam-modulation-time"])
@pytest.mark.parametrize("native", [True, False])
def test_imitation_is_the_derivative_of_the_distance_from_the_teacher(
    case: str, teacher_case: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(meta_gradient, "native_supports", lambda lstm: False)
        monkeypatch.setattr(native_backend, "supports", lambda rule: False)
    rule, teacher = whole(case), plain_adam(0.05) if teacher_case == "adam" else small_rule(teacher_case, 1)
    teaching, once, again = Parts.whole(teacher), waking(1), waking(1)
    carry, twin = start_episode(rule, once, teacher=teacher), start_episode(teaching, again)
    memory = carry.memory
    scales_of, scales_of_teacher = TensorScales(rule, again), TensorScales(teaching, again)
    for first in (0, 6):  # The second truncation starts from memories that are not at rest.
        rule.zero_grad()
        record, carry = roll_out(rule, once, carry, 6, teacher=teacher)
        distance = imitate(rule, record)
        one_pass = gradients(rule)
        rule.zero_grad()
        updates, taught, params, grad = [], [], twin.params, twin.grad
        for step in range(first + 1, first + 7):
            scales = scales_of_teacher(params, twin.memory, step - 1)
            update, memory = plain_step(rule, again, grad, memory, step, scales_of(params, memory, step - 1))
            with torch.no_grad():
                lesson, twin.memory = plain_step(teaching, again, grad, twin.memory, step, scales)
            params = params + lesson
            _, grad = loss_and_grad(again, params)
            updates.append(update)
            taught.append(lesson)
        twin.params, twin.grad = params, grad
        memory = {name: value.detach() for name, value in memory.items()}
        total = torch.zeros(())
        for problem, tensor in itertools.product(range(2), (slice(0, 6), slice(6, 9))):
            own, shown = (torch.stack(each)[:, problem, tensor] for each in (updates, taught))
            total = total + (own - shown).square().sum() / shown.square().mean()
        mean = total / (6 * 18)
        (mean / 2).backward()
        assert distance == pytest.approx(mean.item(), rel=1e-4)
        assert relative_error(one_pass, gradients(rule)) < 1e-4
        torch.testing.assert_close(carry.params, params, rtol=1e-5, atol=1e-6)


def test_there_is_nothing_to_imitate_without_a_teacher() -> None:
    rule, optimizee = whole(), OPTIMIZEES["quadratic"](0)
    record, _ = roll_out(rule, optimizee, start_episode(rule, optimizee), 3)
    with pytest.raises(ValueError, match="give roll_out a teacher"):
        imitate(rule, record)
    with pytest.raises(ValueError, match="give start_episode the same"):
        roll_out(rule, optimizee, start_episode(rule, optimizee), 3, teacher=plain_adam(0.1))


@pytest.mark.parametrize("case", RULE_CASES)
def test_a_random_part_of_the_coordinates_is_unbiased(case: str) -> None:
    rule, total = whole(case), []
    parts = [Sample(index, torch.full((6,), 6 / 24)) for index in torch.randperm(24, generator=seeded(0)).split(6)]
    for part in (None, *parts):
        optimizee = OPTIMIZEES["quadratic"](3)
        record, _ = roll_out(rule, optimizee, start_episode(rule, optimizee), 8, part)
        rule.zero_grad()
        backpropagate(rule, record, objective(record.losses, record.losses))
        total.append(gradients(rule))
    mean = [torch.stack(pieces).mean(0) for pieces in zip(*total[1:], strict=True)]
    assert relative_error(mean, total[0]) < 1e-5


@pytest.mark.parametrize("by_tensor", [False, True])
def test_what_is_chosen_stands_for_all_coordinates(by_tensor: bool) -> None:
    sizes = (50, 3, 200, 1)
    params = {f"tensor{number}": torch.zeros(2, size) for number, size in enumerate(sizes)}
    optimizee = Optimizee(params, lambda params: params["tensor0"].sum(1), seeded(0))
    member = optimizee.tensor_index.repeat(2)
    index, share = sample_coordinates(optimizee, 80, seeded(1), by_tensor=by_tensor)
    assert len(index) == len(share) == len(index.unique()) == 80
    assert float((1 / share).sum()) == pytest.approx(2 * sum(sizes))
    if by_tensor:
        assert member[index].bincount().tolist() == [36, 6, 36, 2]
        for tensor, size in enumerate(sizes):
            assert float((1 / share[member[index] == tensor]).sum()) == pytest.approx(2 * size)
        with pytest.raises(ValueError, match="3 coordinates cannot hold one of each of 4 tensors"):
            sample_coordinates(optimizee, 3, seeded(1), by_tensor=True)
    everything = sample_coordinates(optimizee, 10_000, seeded(1), by_tensor=by_tensor)
    assert everything.chosen.tolist() == list(range(2 * sum(sizes)))
    assert everything.share.eq(1).all()


def test_discount_is_the_geometric_suffix_sum() -> None:
    values = torch.randn(6, 3, dtype=torch.float64)
    expected = torch.stack([sum(0.9 ** (t - s) * values[t] for t in range(s, 6)) for s in range(6)])  # type: ignore[misc]
    torch.testing.assert_close(meta_gradient._suffix_sum(values, 0.9), expected)
    torch.testing.assert_close(meta_gradient._suffix_sum(values, 1.0), values.flip(0).cumsum(0).flip(0))


@pytest.mark.parametrize("case", ["paper-raw", "adam-modulation"])
def test_second_derivatives_are_those_of_the_true_meta_loss(case: str) -> None:
    rule = whole(case).double()

    def meta_loss() -> Tensor:
        optimizee = in_float64(OPTIMIZEES["quadratic"](5))
        losses, _ = unroll(rule, optimizee, start_episode(rule, optimizee), 6, ones, second_derivatives=True)
        return losses.sum()

    def ones(losses: Tensor, initial: Tensor) -> Tensor:
        return torch.ones_like(losses)

    meta_loss()
    exact = gradients(rule)
    for parameter, gradient in zip(rule.parameters(), exact, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=seeded(1))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
            ends.append(meta_loss().item())
            with torch.no_grad():
                parameter.sub_(sign * 1e-5 * direction)
        slope = (ends[0] - ends[1]) / 2e-5
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", RULE_CASES)
def test_a_roll_out_is_what_the_optimizer_does(case: str) -> None:
    rule, optimizee = whole(case), Quadratic(dimension=3, functions=4).sample(2)
    _, carry = roll_out(rule, optimizee, start_episode(rule, optimizee), 12)
    twin = Quadratic(dimension=3, functions=4).sample(2)
    param = nn.Parameter(twin.params["theta"][0].clone())
    optimizer = LearnedOptimizer([param], weights=rule.shared)
    for _ in range(12):
        optimizer.zero_grad()
        twin.losses({"theta": param.unsqueeze(0)}).sum().backward()
        optimizer.step()
    torch.testing.assert_close(param.detach().flatten(), carry.params.flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.state[param]["hidden"].view(12, -1), carry.memory["hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["adam-modulation-time", "adam-modulation-matrix"])
def test_a_roll_out_of_a_net_is_what_the_optimizer_does(case: str) -> None:
    rule, optimizee, twin = whole(case), net(2), net(2)
    _, carry = roll_out(rule, optimizee, start_episode(rule, optimizee), 12)
    problems = [{name: nn.Parameter(value[p].clone()) for name, value in twin.params.items()} for p in range(2)]
    optimizers = [LearnedOptimizer(params.values(), weights=rule.shared) for params in problems]
    for _ in range(12):
        twin.losses({name: torch.stack([params[name] for params in problems]) for name in twin.params}).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found = torch.stack([torch.cat([param.detach().flatten() for param in params.values()]) for params in problems])
    torch.testing.assert_close(found, carry.params, rtol=1e-4, atol=1e-5)


def test_a_straight_through_meta_gradient_takes_the_stage_for_the_identity() -> None:
    rule, optimizee = whole("adam-modulation-matrix"), net(1)
    carry = start_episode(rule, optimizee)
    record, _ = roll_out(rule, optimizee, carry, 5)
    weights, found = objective(record.losses, carry.initial_loss), []
    for straight_through in (True, False):
        rule.zero_grad()
        backpropagate(rule, record, weights, straight_through=straight_through)
        found.append(gradients(rule))
    record.wholes = None
    rule.zero_grad()
    backpropagate(rule, record, weights)
    assert all(map(torch.equal, found[0], gradients(rule)))
    assert relative_error(found[0], found[1]) > 0.01


def test_a_rule_with_a_matrix_stage_imitates_nobody() -> None:
    rule, teacher, optimizee = whole("adam-modulation-matrix"), plain_adam(0.1), net(0)
    with pytest.raises(ValueError, match="cannot imitate"):
        roll_out(rule, optimizee, start_episode(rule, optimizee, teacher=teacher), 3, teacher=teacher)


@pytest.mark.skipif(not native_backend.available(), reason="the kernels were not built: no C compiler")
@pytest.mark.parametrize("case", RULE_CASES)
@pytest.mark.parametrize("name", ["waking", "net"])
def test_compiled_inner_steps_are_the_plain_ones(case: str, name: str) -> None:
    rule, optimizee = whole(case), OPTIMIZEES[name](3)
    start = start_episode(rule, optimizee)
    ways = [way(rule, optimizee, start.params, start.memory) for way in (PlainSteps, CompiledSteps)]
    for step in range(1, 31):
        grad = torch.randn_like(start.params) * (torch.rand_like(start.params) > 0.1)
        for way in ways:
            way.take(grad, step, TensorScales(rule, optimizee)(way.params, way.memory, step - 1))
    torch.testing.assert_close(ways[1].params, ways[0].params, rtol=1e-5, atol=1e-6)
    for name, values in ways[0].memory.items():
        torch.testing.assert_close(ways[1].memory[name], values, rtol=1e-4, atol=1e-5)
    assert not start.memory["hidden"].any(), "the start was modified"


def test_nothing_leaks_into_the_optimizee_or_across_truncations() -> None:
    module = nn.Linear(3, 1)
    rule = whole()
    optimizee = module_optimizee(
        lambda: module, lambda m, batch: m(batch[0]).square().mean(), lambda g: (torch.randn(1, 4, 3, generator=g),), 0
    )
    record, carry = roll_out(rule, optimizee, start_episode(rule, optimizee), 3)
    backpropagate(rule, record, torch.ones_like(record.losses))
    assert module.weight.grad is None
    tensors = [carry.params, carry.grad, carry.loss, *carry.memory.values(), record.inputs, record.grads]
    assert isinstance(carry, Carry)
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_a_long_roll_out_holds_no_more_memory_than_a_short_one() -> None:
    def losses(params: dict[str, Tensor]) -> Tensor:
        wide = params["w"].expand(-1, 1_000_000).tanh()
        return wide.mean(1, keepdim=True).expand(-1, 500_000).tanh().mean(1)

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    rule, optimizee = whole("adam-modulation"), Optimizee({"w": torch.ones(1, 1)}, losses, torch.Generator())
    _, carry = roll_out(rule, optimizee, start_episode(rule, optimizee), 3, no_coordinate())
    before = resident_mib()
    roll_out(rule, optimizee, carry, 100, no_coordinate())
    # Small pieces kept from every step, between activations that come and go, once cost two to five megabytes a step.
    assert resident_mib() - before < 60
