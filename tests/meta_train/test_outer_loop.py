"""What the outer loop promises beyond resuming: weights that are derivatives of what is reported, and no poisoned steps."""

import copy
import math

import msgspec
import pytest
import torch
from torch import Tensor

from learned_optim.weights import resolve_weights
from meta_train.tasks import Optimizee, Quadratic, derive_seed, seeded
from meta_train.training import episodes, outer_loop
from meta_train.training.episodes import OBJECTIVES, meta_loss, whole_episode
from meta_train.training.meta_gradient import backpropagate
from meta_train.training.outer_loop import MetaTraining, cosine, validate
from meta_train.training.parts import Parts
from meta_train.training.recipe import OuterLoop, parse_recipe
from meta_train.training.roll_out import (
    Sample,
    roll_out,
    sample_coordinates,
    start_episode,
)
from tests.cases import COORDINATE_CASES, small_rule
from tests.meta_train.test_recipe import FROM_DEFAULT, TINY


@pytest.mark.parametrize("objective", ["mean", "log"])
def test_weights_are_the_derivative_of_the_reported_meta_loss(objective: str) -> None:
    outer = OuterLoop(steps=1, lr=0.1, objective=objective)  # type: ignore[arg-type]
    losses = (0.1 + torch.rand(5, 3, dtype=torch.float64)).requires_grad_()
    initial = torch.full((3,), 2.0, dtype=torch.float64)
    weights = OBJECTIVES[objective](outer)(losses.detach(), initial)
    for index in ((0, 0), (2, 1), (4, 2)):
        ends = []
        for sign in (1, -1):
            moved = losses.detach().clone()
            moved[index] += sign * 1e-6
            ends.append(meta_loss(outer, moved, initial))
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(weights[index]), rel=1e-6)


def test_relative_weights_are_one_over_the_level_of_each_problem() -> None:
    outer = OuterLoop(steps=1, lr=0.1, objective="relative")
    losses, initial = torch.tensor([[1.0, 10.0], [3.0, 30.0]]), torch.tensor([4.0, 40.0])
    weights = OBJECTIVES["relative"](outer)(losses, initial)
    torch.testing.assert_close(weights, torch.tensor([[1 / 8, 1 / 80], [1 / 8, 1 / 80]]))


def test_last_weights_are_the_relative_ones_of_the_last_tenth() -> None:
    last, relative = (
        OBJECTIVES[name](OuterLoop(steps=1, lr=0.1, objective=name))  # type: ignore[arg-type]
        for name in ("last", "relative")
    )
    losses, initial = torch.rand(20, 3, generator=seeded(0)), torch.ones(3)
    weights = last(losses, initial)
    assert not weights[:18].any()
    torch.testing.assert_close(weights[18:], relative(losses[18:], initial))
    assert last(losses[:4], initial).count_nonzero() == 3, "of a short truncation the last step alone"


@pytest.mark.parametrize("objective", ["log", "relative"])
def test_losses_below_the_floor_weigh_no_more_than_the_floor(objective: str) -> None:
    outer = OuterLoop(steps=1, lr=0.1, objective=objective, loss_floor=0.01)  # type: ignore[arg-type]
    tiny = OBJECTIVES[objective](outer)(torch.full((2, 1), 1e-9), torch.ones(1))
    torch.testing.assert_close(tiny, torch.full((2, 1), 1 / (0.01 * 2)))


def test_a_reported_meta_loss_is_no_lower_than_the_floor() -> None:
    losses, initial = torch.tensor([[1e-9, 1e-9], [0.5, 0.5]]), torch.ones(2)
    expected = {0.01: (math.log(0.01) + math.log(0.5)) / 2, 0.0: (math.log(1e-9) + math.log(0.5)) / 2}
    for floor, value in expected.items():
        outer = OuterLoop(steps=1, lr=0.1, objective="relative", loss_floor=floor)
        assert meta_loss(outer, losses, initial) == pytest.approx(value, rel=1e-5)


def test_horizons_are_drawn_log_uniformly_and_vary() -> None:
    run = MetaTraining(parse_recipe(TINY.replace("horizon = [6, 12]", "horizon = [10, 1000]")))
    (phase,) = run.phases
    horizons = torch.tensor([run._draw(phase).horizon for _ in range(400)], dtype=torch.float64)
    assert (horizons.min() < 15, horizons.max() > 700) == (True, True)
    assert (horizons.min() >= 10, horizons.max() <= 1000) == (True, True)
    # Half of them below the geometric mean of the ends, 100; a uniform draw would have a tenth there.
    assert float((horizons < 100).double().mean()) == pytest.approx(0.5, abs=0.08)
    assert [run._draw(phase).horizon for _ in range(3)] != [run._draw(phase).horizon for _ in range(3)]


@pytest.mark.parametrize("case", COORDINATE_CASES)
def test_the_meta_gradient_is_a_finite_difference_with_gradients_held_constant(case: str) -> None:
    """The definition itself: replay a recorded gradient sequence with moved meta-parameters, add up updates, weigh."""
    rule = Parts.whole(small_rule(case).double())
    optimizee = Quadratic(dimension=2, functions=3).sample(4)
    record, _ = roll_out(rule, optimizee, start_episode(rule, optimizee), 5)
    weights = torch.rand(5, 1, dtype=torch.float64, generator=seeded(0))
    backpropagate(rule, record, weights)

    def first_order_meta_loss() -> float:
        hidden, cell = record.start
        moved, total = torch.zeros(6, dtype=torch.float64), 0.0
        for step in range(5):
            top, (hidden, cell) = rule.shared.advance(record.inputs[step], (hidden, cell), record.active[step])
            moved = moved + rule.shared.decode(top, record.contexts[step])
            total += float(weights[step, 0] * (record.grads[step] * moved).sum())
        return total

    for parameter in rule.parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=seeded(1))
        ends = []
        with torch.no_grad():
            for sign in (1, -2):  # up, then down by twice as much
                parameter.add_(sign * 1e-6 * direction)
                ends.append(first_order_meta_loss())
            parameter.add_(1e-6 * direction)
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-4, abs=1e-9)


STAGE = """
[[stages]]
steps = 6
lr = 0.02
truncation = 8
"""


@pytest.mark.parametrize(
    "change", ["", "second_derivatives = true", "evolution = {noise = 0.1, pairs = 2}", "stages", "finalists", "imitation"]
)
@pytest.mark.parametrize("objective", ["mean", "log", "relative", "last"])
def test_resuming_from_a_checkpoint_file_goes_on_bit_for_bit(objective: str, change: str, tmp_path) -> None:
    final = "final_horizon = [3, 12]\n" if change == "finalists" else ""
    stages, change = (STAGE.replace("= 6", "= 3") + STAGE, "") if change in ("stages", "finalists") else ("", change)
    if change == "imitation":
        stages, change = '[imitation]\nteacher = "default"\nsteps = 7\nlr = 0.1\n', ""
    outer = f'[outer]\nobjective = "{objective}"\nloss_floor = 1e-3\n{change}'
    text = TINY.replace("horizon = 8\n", f"horizon = 8\n{final}").replace("[outer]", outer)
    recipe = parse_recipe(text.replace("steps = 12", "steps = 4" if stages else "steps = 12") + stages)
    whole = MetaTraining(recipe)
    records = list(whole)
    stopped = MetaTraining(recipe)
    for record in stopped:
        if record.step == 5:
            break
    torch.save(stopped.state_dict(), tmp_path / "checkpoint.pt")
    resumed = MetaTraining(recipe)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert list(resumed) == records[5:]
    for name, value in whole.best.rule.state_dict().items():
        assert torch.equal(value, resumed.best.rule.state_dict()[name]), name
    assert [one.final for one in whole.finalists] == [one.final for one in resumed.finalists]
    assert len(whole.finalists) > 0 or not final


def test_evolution_strategies_estimate_the_gradient_of_whole_episodes() -> None:
    evolution = "evolution = {noise = 0.01, pairs = 300, only = 'readout.bias'}"
    recipe = parse_recipe(TINY.replace("steps = 12", f"steps = 1\nclip = 1e9\n{evolution}").replace("[6, 12]", "[9, 9]"))
    run = MetaTraining(recipe)
    rule, seeds = copy.deepcopy(run.rule), [derive_seed(recipe.seed, "train", index) for index in range(300)]
    next(iter(run))

    def mean(shift: float) -> float:
        moved = copy.deepcopy(rule)
        moved.shared.readout.bias.data += shift
        return sum(whole_episode(moved, run.task.sample(seed), 9, recipe.outer) for seed in seeds) / len(seeds)

    slope = (mean(0.01) - mean(-0.01)) / 0.02
    assert float(run.rule.shared.readout.bias.grad) == pytest.approx(slope, rel=0.25)
    moved = [name for name, value in run.rule.named_parameters() if not torch.equal(value, rule.get_parameter(name))]
    assert moved == ["rules.0.readout.bias"]


def test_a_run_that_starts_from_weights_starts_from_just_these() -> None:
    run = MetaTraining(parse_recipe(FROM_DEFAULT.replace("lr =", "readout = 0.1\nlr =")))
    for name, value in resolve_weights("default").rule.state_dict().items():
        assert torch.equal(run.rule.state_dict()[f"rules.0.{name}"], value), name


def test_a_rule_that_imitates_adam_becomes_like_it() -> None:
    recipe = parse_recipe(TINY + "[imitation]\nteacher = 0.1\nsteps = 300\nlr = 0.03\n")
    run = MetaTraining(recipe)
    distances = [record.meta_loss for record, _ in zip(run, range(300), strict=False)]
    assert sum(distances[:10]) > 9
    assert sum(distances[-10:]) < 2


def test_what_is_validated_and_kept_is_the_rule_in_use_and_what_is_trained_is_not() -> None:
    plain = MetaTraining(parse_recipe(TINY + STAGE))
    asleep = MetaTraining(parse_recipe(TINY + STAGE + "[use]\noutput_scale = 1e-12\n"))
    trained, validated = [], []
    for records in zip(plain, asleep, strict=True):
        if records[0].step <= 12:  # the stage after it starts from the best, and which that is depends on the use
            trained.append([record.meta_loss for record in records])
        validated.append(records[1].validation)
    assert all(one == other for one, other in trained)
    assert len({value for value in validated if value is not None}) == 1, "a rule that does nothing is always as good"
    assert asleep.best.rule.shared.config.output_scale == 1e-12
    assert plain.best.rule.shared.config.output_scale != 1e-12


def test_options_of_the_validation_reach_what_is_validated_and_not_what_is_kept() -> None:
    run = MetaTraining(parse_recipe(TINY + "[validation.use]\noutput_scale = 1e-12\n"))
    validated = {record.validation for record in run} - {None}
    assert len(validated) == 1, "a rule that does nothing is always as good"
    assert run.best.rule.shared.config == run.rule.shared.config


class Exploding:
    """Every optimizee breaks after a few inner steps."""

    def sample(self, seed: int) -> Optimizee:
        calls = iter(range(10_000))

        def losses(params: dict[str, Tensor]) -> Tensor:
            return params["x"].square().sum(-1) * (1.0 if next(calls) < 3 else math.inf)

        return Optimizee({"x": torch.ones(1, 4)}, losses, seeded(seed))


def test_an_optimizee_that_breaks_is_replaced_and_never_poisons_the_rule() -> None:
    run = MetaTraining(parse_recipe(TINY), Exploding())
    records = list(run)
    assert len(records) == 12
    assert all(parameter.isfinite().all() for parameter in run.rule.parameters())
    assert run.episodes_started == 2 * 12
    assert all(record.validation in (None, math.inf) for record in records)


def test_validation_is_the_mean_loss_of_fixed_episodes() -> None:
    recipe, rule = parse_recipe(TINY), Parts.whole(small_rule("paper-raw"))
    assert validate(rule, recipe.task, recipe) == validate(rule, recipe.task, recipe)
    with torch.no_grad():
        for parameter in rule.shared.readout.parameters():
            parameter.zero_()
    still = [float(one.losses(one.params).mean()) for one in map(recipe.task.sample, _validation_seeds())]
    assert validate(rule, recipe.task, recipe) == pytest.approx(sum(still) / 2, rel=1e-5)


def test_each_optimizee_is_validated_to_the_next_of_several_horizons() -> None:
    recipe, rule = parse_recipe(TINY), Parts.whole(small_rule("paper-raw"))

    def validated(*horizons: int) -> float:
        validation = msgspec.structs.replace(recipe.validation, optimizees=3, horizon=horizons)
        return validate(rule, recipe.task, msgspec.structs.replace(recipe, validation=validation))

    first, second, third = (recipe.task.sample(derive_seed(0, "validation", index)) for index in range(3))
    ends = ((first, 5), (second, 9), (third, 5))
    each = [whole_episode(rule, optimizee, end, recipe.outer) for optimizee, end in ends]
    assert validated(5, 9) == pytest.approx(sum(each) / 3)
    assert validated(9, 5) != pytest.approx(sum(each) / 3)


def test_a_recipe_may_name_several_horizons_of_validation_but_not_none() -> None:
    several = "optimizees = 2\nhorizon = [5, 9]\n"
    text = TINY.replace("optimizees = 2\nhorizon = 8\n", several)
    assert parse_recipe(text).validation.horizon == (5, 9)
    with pytest.raises(ValueError, match="validation"):
        parse_recipe(text.replace("[5, 9]", "[]"))


def test_the_best_of_each_phase_meet_over_the_final_horizons(monkeypatch: pytest.MonkeyPatch) -> None:
    finals, asked = iter([-3.0, -5.0, -4.0]), []

    def scripted(rule: object, task: object, recipe: object, horizon: object, each: object) -> float:
        asked.append(horizon)
        return -float(len(asked)) if horizon is None else next(finals)

    monkeypatch.setattr(outer_loop, "validate", scripted)
    text = TINY.replace("steps = 12", "steps = 7").replace("horizon = 8\n", "horizon = 8\nfinal_horizon = [5, 9]\n")
    run = MetaTraining(parse_recipe(text + STAGE + STAGE))
    kept, finals_at = {}, {}
    for record in run:
        if record.final is not None:
            finals_at[record.step] = record.final
            kept[record.step] = run.finalists[-1].rule
    assert finals_at == {7: -3.0, 13: -5.0, 19: -4.0}
    assert asked.count((5, 9)) == 3
    assert run.best.rule is kept[13], "not the last, although every validation was better than the one before"
    assert (run.best.step, run.best.final) == (13, -5.0)


def test_a_phase_that_finds_nothing_better_is_no_finalist_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rising = iter(range(100))
    monkeypatch.setattr(outer_loop, "validate", lambda *arguments: float(next(rising)))
    text = TINY.replace("steps = 12", "steps = 7").replace("horizon = 8\n", "horizon = 8\nfinal_horizon = 9\n")
    run = MetaTraining(parse_recipe(text + STAGE))
    finals = [record.final for record in run if record.final is not None]
    assert finals == [2.0, 2.0], "validations at 4 and 7 came before; the second phase asks no more"
    assert (len(run.finalists), run.best.step) == (1, 4)


def _validation_seeds() -> list[int]:
    return [derive_seed(0, "validation", index) for index in range(2)]


def test_a_stage_goes_on_from_the_best_with_a_rate_and_episodes_of_its_own() -> None:
    run = MetaTraining(parse_recipe(TINY.replace("steps = 12", "steps = 7") + STAGE))
    records = []
    for record in run:
        records.append(record)
        if record.step == 7:
            best = copy.deepcopy(run.best.rule.state_dict())
            with torch.no_grad():
                for parameter in run.rule.parameters():
                    parameter.fill_(torch.nan)
        if record.step == 8:
            assert run.episodes_started >= 4
            moved = [(value - best[name]).abs().max() for name, value in run.rule.state_dict().items()]
            # Adam's first step is as long as its rate.
            assert max(moved) == pytest.approx(0.02, rel=1e-2)
            assert {slot.carry.step for slot in run.episodes if slot} <= {8}
    assert [record.lr for record in records][7:] == [0.02 * cosine(step / 6, 0.02) for step in range(6)]
    assert [record.step for record in records if record.validation is not None] == [4, 7, 8, 12, 13]
    assert len(records) == 13


def test_the_rate_decays_from_all_to_the_final_share() -> None:
    assert cosine(0.0, 0.02) == 1.0
    assert cosine(1.0, 0.02) == pytest.approx(0.02)
    assert cosine(0.5, 0.0) == pytest.approx(0.5)


def test_how_the_rule_starts_is_the_recipe_s_choice() -> None:
    plain = MetaTraining(parse_recipe(TINY)).rule.shared
    small = MetaTraining(parse_recipe(TINY.replace("[outer]", "[outer]\nreadout = 0.25\nforget_bias = 2.0"))).rule.shared
    assert torch.equal(small.readout.weight, plain.readout.weight * 0.25)
    gates = small.lstm.bias_ih_l0.view(4, -1) - plain.lstm.bias_ih_l0.view(4, -1)
    torch.testing.assert_close(gates[1], torch.full_like(gates[1], 2.0))
    assert not gates[[0, 2, 3]].any()


def test_a_stage_may_draw_coordinates_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []

    def recorded(*args: object, by_tensor: bool) -> Sample:
        draws.append(by_tensor)
        return sample_coordinates(*args, by_tensor=by_tensor)  # type: ignore[arg-type]

    monkeypatch.setattr(episodes, "sample_coordinates", recorded)
    stage = STAGE.replace("truncation = 8", 'sampling = "uniform"')
    run = MetaTraining(parse_recipe(TINY.replace("[outer]", '[outer]\nsampling = "tensors"') + stage))
    assert len(list(run)) == 12 + 6
    assert draws == [True] * 2 * 12 + [False] * 2 * 6


def test_a_stage_may_run_longer_episodes() -> None:
    run = MetaTraining(parse_recipe(TINY + STAGE.replace("truncation = 8", "horizon = [20, 20]")))
    for record in run:
        horizons = [episode.horizon for episode in run.episodes if episode is not None]
        if horizons:
            assert set(horizons) == {20} if record.step > 12 else max(horizons) <= 12
    assert horizons, "at the end of this run episodes are under way"


def test_weight_decay_of_the_meta_parameters_is_decoupled() -> None:
    plain, decaying = (
        MetaTraining(parse_recipe(TINY.replace("[outer]", f"[outer]\nweight_decay = {decay}"))) for decay in (0.0, 0.5)
    )
    start = plain.rule.shared.readout.weight.detach().clone()
    lr = next(iter(plain)).lr
    next(iter(decaying))
    torch.testing.assert_close(plain.rule.shared.readout.weight - decaying.rule.shared.readout.weight, lr * 0.5 * start)
