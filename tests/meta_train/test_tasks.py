import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from meta_train.tasks import Mixture, Optimizee, Quadratic, Quartic, derive_seed, module_optimizee
from meta_train.tasks.held_out import HELD_OUT_KINDS, HeldOut
from meta_train.tasks.mixture import KINDS, rescale
from meta_train.tasks.models import Norm
from meta_train.training.roll_out import loss_and_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_every_kind_is_decided_by_its_seed_and_reaches_every_parameter(kind: str, seed: int) -> None:
    task = Mixture(problems=3, kinds=(kind,))
    optimizee, twin = task.sample(seed), task.sample(seed)
    params = optimizee.flat_params()
    total = torch.zeros_like(params)
    for _ in range(3):
        losses, grad = loss_and_grad(optimizee, params)
        again, grad_again = loss_and_grad(twin, twin.flat_params())
        assert losses.shape == (3,)
        assert losses.isfinite().all()
        assert torch.equal(losses, again)
        assert torch.equal(grad, grad_again)
        total += grad.abs()
    for name, reached in optimizee.unflatten(total).items():
        assert reached.flatten(1).any(1).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_problems_side_by_side_are_independent(kind: str) -> None:
    optimizee = Mixture(problems=2, kinds=(kind,)).sample(0)
    params = optimizee.flat_params().requires_grad_()
    losses = optimizee.losses(optimizee.unflatten(params))
    (grad,) = torch.autograd.grad(losses[0], params)
    assert grad[0].any()
    assert not grad[1].any()


def test_a_kind_held_out_starts_where_the_judged_model_starts() -> None:
    for seed in range(3):
        start = HeldOut(separate_streams=True).sample(seed).params.values()
        judged = [list(kind.case(seed).module.parameters()) for kind in HELD_OUT_KINDS]
        same = [
            all(torch.equal(one[0], other) for one, other in zip(start, params, strict=True))
            for params in judged
            if [one.shape[1:] for one in start] == [other.shape for other in params]
        ]
        assert any(same)


def test_a_recipe_from_before_keeps_its_validation() -> None:
    """The figures inside published weights were measured on kinds whose data come from the stream of their weights."""
    kind = HELD_OUT_KINDS[random.Random(0).randrange(len(HELD_OUT_KINDS))]
    torch.manual_seed(0)
    case = kind.make(0)
    first = case.loss(case.module, case.next_batch(torch.Generator().manual_seed(1)))
    optimizee = HeldOut().sample(0)
    assert optimizee.losses(optimizee.params).item() == pytest.approx(first.item(), rel=1e-5)


def test_initial_weights_do_not_know_the_data() -> None:
    """From the stream of the data, the weights of a linear regression are a multiple of its features' logarithmic scales."""
    linear = next(kind for kind in HELD_OUT_KINDS if kind.name == "linear")
    for seed in range(4):
        weight = linear.case(seed).module.weight[0]
        torch.manual_seed(derive_seed(seed, "data"))
        flawed = nn.Linear(30, 1).weight[0]
        assert torch.corrcoef(torch.stack([weight, flawed]))[0, 1].abs().item() < 0.6


def test_the_quadratic_is_the_mean_over_functions() -> None:
    optimizee = Quadratic(dimension=3, functions=4).sample(7)
    generator = torch.Generator().manual_seed(7)
    weight, target = torch.randn(4, 3, 3, generator=generator), torch.randn(4, 3, generator=generator)
    theta = torch.randn(4, 3)
    by_hand = sum(float((weight[i] @ theta[i] - target[i]).square().sum()) for i in range(4)) / 4
    assert not optimizee.params["theta"].any()
    assert optimizee.losses({"theta": theta.unsqueeze(0)}).item() == pytest.approx(by_hand, rel=1e-5)


def test_the_quartic_has_its_deep_minimum_on_the_right() -> None:
    optimizee = Quartic(dimension=1, functions=1).sample(3)
    width = 0.5 + torch.rand(1, 1, generator=torch.Generator().manual_seed(3)).item()
    grid = torch.linspace(-2, 2, 4001)
    values = torch.stack([optimizee.losses({"x": (1 + z / width).view(1, 1)}) for z in grid]).flatten()
    by_hand = (grid + 1) * (grid + 0.5) * grid * (grid - 1)
    torch.testing.assert_close(values, by_hand, rtol=1e-3, atol=1e-5)
    assert grid[values.argmin()].item() == pytest.approx(0.663, abs=0.002)


def test_rescaling_changes_units_and_nothing_else() -> None:
    original, scaled = (Mixture(problems=2, kinds=("digit-mlp",)).sample(5) for _ in range(2))
    scaled = rescale(scaled, 8.0)
    losses, grad = loss_and_grad(original, original.flat_params())
    losses_scaled, grad_scaled = loss_and_grad(scaled, scaled.flat_params())
    torch.testing.assert_close(losses_scaled, losses)
    torch.testing.assert_close(grad_scaled, 8 * grad)


def test_a_module_alone_and_side_by_side() -> None:
    def make(problems: int) -> Optimizee:
        return module_optimizee(
            lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
            lambda module, batch: (module(batch[0]) - batch[1]).square().mean(),
            lambda g: (torch.randn(1, 8, 3, generator=g).expand(problems, -1, -1), torch.ones(problems, 8, 1)),
            seed=2,
            num_problems=problems,
        )

    alone, three = make(1), make(3)
    assert torch.equal(alone.flat_params()[0], three.flat_params()[0])
    assert not torch.equal(three.flat_params()[0], three.flat_params()[1])
    torch.testing.assert_close(
        loss_and_grad(alone, alone.flat_params())[1][0], loss_and_grad(three, three.flat_params())[1][0]
    )


@pytest.mark.parametrize("over_batch", [False, True])
def test_norm_normalises_each_problem_by_itself(over_batch: bool) -> None:
    norm = Norm(3, 5, over_batch).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 7 + 2 * torch.randn(3, 6, 5, dtype=torch.float64)
    centred = x - x.mean(1 if over_batch else 2, keepdim=True)
    deviation = (centred.square().mean(1 if over_batch else 2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), centred / deviation * norm.weight + norm.bias)


def with_module(make: Callable[[], nn.Module], problems: int, *, whole: bool = False) -> Optimizee:
    """A regression of a module on noise, or where ``whole`` on the same examples at every step."""

    def next_batch(generator: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.ones(problems, 16, 4) if whole else torch.randn(problems, 16, 4, generator=generator)
        return x, torch.ones(problems, 16, 1)

    return module_optimizee(make, lambda m, b: (m(b[0]) - b[1]).square().mean(), next_batch, 3, problems)


@pytest.mark.parametrize("whole", [False, True], ids=["minibatches", "all examples at once"])
@pytest.mark.parametrize("problems", [1, 2])
def test_dropout_follows_from_the_seed(problems: int, whole: bool) -> None:
    runs = []
    for _ in range(2):
        torch.rand(3)  # What others draw must not matter.
        optimizee = with_module(
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)), problems, whole=whole
        )
        runs.append(torch.stack([optimizee.losses(optimizee.params) for _ in range(3)]))
    assert torch.equal(*runs)
    assert len(runs[0].unique()) == runs[0].numel(), "every call and problem has noise of its own"


@pytest.mark.parametrize("problems", [1, 2])
def test_frozen_parameters_stay_as_they_are(problems: int) -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        net[0].requires_grad_(False)
        return net

    optimizee = with_module(make, problems)
    assert list(optimizee.params) == ["2.weight", "2.bias"]
    assert optimizee.losses(optimizee.params).shape == (problems,)
    with pytest.raises(ValueError, match="nothing to optimize"):
        with_module(lambda: nn.Linear(4, 1).requires_grad_(False), problems)
