"""The three stages of every rule family, against independent formulas."""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from learned_optim import UpdateRule, build_rule
from learned_optim.rules import log_and_sign
from learned_optim.rules.lstm import lstm_step
from learned_optim.rules.rule import Memory
from tests.cases import RULE_CASES, copies, small_rule

N = 7
ADAM_CASES = [case for case in RULE_CASES if case.startswith("adam")]
PAPER_CASES = [case for case in RULE_CASES if case.startswith("paper")]


def at_step(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(step, dtype=dtype)


def scale_of(rule: UpdateRule, value: float = 0.5) -> Tensor | None:
    return rule.tensor_scale(torch.full((3,), value, dtype=rule.readout.weight.dtype))


def unroll(rule: UpdateRule, gradients: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Memory]:
    """Return the updates ``(K, N)`` for gradients ``(K, N)`` and the last memory."""
    memory = rule.initial_memory(gradients.shape[1], gradients)
    scale = scale_of(rule) if scale is None else scale
    updates = []
    for step, gradient in enumerate(gradients, 1):
        update, memory, _ = rule(gradient, memory, at_step(step, gradient.dtype), scale)
        updates.append(update)
    return torch.stack(updates), memory


# The LSTM


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_fused_sequence_equals_the_loop_of_cells(rule: UpdateRule, dtype: torch.dtype, tolerance: float) -> None:
    rule = rule.to(dtype)
    inputs = torch.randn(6, N, rule.lstm.input_size, dtype=dtype)
    carry = (torch.randn(N, rule.memory_width, dtype=dtype), torch.randn(N, rule.memory_width, dtype=dtype))
    hidden, (last_hidden, last_cell) = rule.recur(inputs, carry)
    fused, (fused_hidden, fused_cell) = rule.recur(inputs, carry, fused=True)
    assert hidden.shape == (6, N, rule.config.hidden_size)
    torch.testing.assert_close(fused, hidden, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused_hidden, last_hidden, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused_cell, last_cell, rtol=tolerance, atol=tolerance)


def test_one_step_equals_lstm_cells_stacked(rule: UpdateRule) -> None:
    rule = rule.double()
    lstm = rule.lstm
    inputs = torch.randn(N, lstm.input_size, dtype=torch.float64)
    hidden, cell = (torch.randn(N, rule.memory_width, dtype=torch.float64) for _ in range(2))
    top, (new_hidden, new_cell) = lstm_step(lstm, inputs, (hidden, cell))

    below = inputs
    for layer in range(lstm.num_layers):
        reference = nn.LSTMCell(below.shape[1], lstm.hidden_size, dtype=torch.float64)
        reference.load_state_dict(
            {name: getattr(lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        )
        own = slice(layer * lstm.hidden_size, (layer + 1) * lstm.hidden_size)
        below, expected_cell = reference(below, (hidden[:, own], cell[:, own]))
        torch.testing.assert_close(new_hidden[:, own], below, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(new_cell[:, own], expected_cell, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(top, below, rtol=1e-12, atol=1e-12)


# log_and_sign


def test_log_and_sign_follows_appendix_a_on_both_sides() -> None:
    p = 3.0
    grad = torch.tensor([math.exp(-2.0), -math.exp(1.0), math.exp(-4.0), -math.exp(-5.0), 0.0], dtype=torch.float64)
    expected = [[-2 / p, 1.0], [1 / p, -1.0], [-1.0, math.exp(-1.0)], [-1.0, -math.exp(-2.0)], [-1.0, 0.0]]
    torch.testing.assert_close(log_and_sign(grad, p), torch.tensor(expected, dtype=torch.float64))


def test_log_and_sign_is_continuous_where_its_branches_meet() -> None:
    threshold = math.exp(-10.0)
    below, above = threshold * (1 - 1e-9), threshold * (1 + 1e-9)
    features = log_and_sign(torch.tensor([below, above], dtype=torch.float64))
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-8)
    torch.testing.assert_close(features[1], torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-8)


def test_log_and_sign_is_finite_up_to_the_largest_p() -> None:
    config = build_rule("paper", inputs="log_and_sign", preprocess_p=87).config
    grad = torch.tensor([0.0, 1e-38, -1e-30, 3e38], requires_grad=True)
    features = log_and_sign(grad, config.preprocess_p)
    (derivative,) = torch.autograd.grad(features.sum(), grad)
    assert features.isfinite().all()
    assert derivative.isfinite().all()


def test_log_and_sign_is_even_in_the_logarithm_and_odd_in_the_sign() -> None:
    grad = torch.randn(50) * 10 ** torch.linspace(-8, 3, 50)
    plus, minus = log_and_sign(grad), log_and_sign(-grad)
    torch.testing.assert_close(plus[:, 0], minus[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(plus[:, 1], -minus[:, 1], rtol=0, atol=0)


def test_log_and_sign_has_a_finite_derivative_everywhere() -> None:
    grad = torch.tensor([0.0, 1e-30, -1e-6, math.exp(-10.0), 1.0, -1e20], requires_grad=True)
    (derivative,) = torch.autograd.grad(log_and_sign(grad).sum(), grad)
    assert derivative.isfinite().all()
    assert derivative[0] == pytest.approx(math.exp(10.0), rel=1e-5)  # Only the linear branch is alive at 0.


# What the two families compute


@pytest.mark.parametrize("inputs", ["raw", "log_and_sign"])
def test_a_paper_rule_is_a_linear_readout_of_its_lstm(inputs: str) -> None:
    rule = build_rule("paper", inputs=inputs, input_scale=3.0, preprocess_p=5.0, output_scale=0.1).double()
    gradients = torch.randn(4, N, dtype=torch.float64)
    updates, _ = unroll(rule, gradients)
    seen = 3.0 * gradients.unsqueeze(-1) if inputs == "raw" else log_and_sign(gradients, 5.0)
    hidden, _ = rule.lstm(seen)
    torch.testing.assert_close(updates, 0.1 * rule.readout(hidden).squeeze(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", PAPER_CASES)
def test_a_paper_rule_with_zero_readout_does_not_move(case: str) -> None:
    rule = small_rule(case)
    nn.init.zeros_(rule.readout.weight)
    nn.init.zeros_(rule.readout.bias)
    updates, _ = unroll(rule, torch.randn(3, N))
    assert not updates.any()


def test_an_untrained_adam_modulation_is_adam_relative_to_the_tensor() -> None:
    rule = build_rule("adam-modulation").double()
    gradients = torch.randn(20, N, dtype=torch.float64)
    updates, _ = unroll(rule, gradients, torch.tensor(0.25, dtype=torch.float64))
    param = nn.Parameter(torch.zeros(N, dtype=torch.float64))
    adam = torch.optim.Adam([param], lr=3e-3 * 0.25, betas=(0.9, 0.999), eps=0.0)
    for gradient, update in zip(gradients, updates, strict=True):
        before = param.detach().clone()
        param.grad = gradient
        adam.step()
        torch.testing.assert_close(update, param.detach() - before, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam_modulation_follows_its_documented_formula(case: str) -> None:
    rule = small_rule(case).double()
    config = rule.config
    gradients = torch.randn(5, N, dtype=torch.float64)
    scale = torch.tensor(0.3, dtype=torch.float64)
    updates, _ = unroll(rule, gradients, scale)

    fast = slow = second = torch.zeros(N, dtype=torch.float64)
    inputs, directions = [], []
    for step, gradient in enumerate(gradients, 1):
        if config.outlier_bound and step > 1:
            bound = config.outlier_bound * (second / (1 - config.second_moment_decay**step)).sqrt()
            gradient = gradient.clamp(-bound, bound)
        fast = config.fast_decay * fast + (1 - config.fast_decay) * gradient
        slow = config.slow_decay * slow + (1 - config.slow_decay) * gradient
        second = config.second_moment_decay * second + (1 - config.second_moment_decay) * gradient**2
        root = (second / (1 - config.second_moment_decay**step)).sqrt()
        direction = fast / (1 - config.fast_decay**step) / root
        features = [gradient / root, direction, slow / (1 - config.slow_decay**step) / root]
        features.append(0.1 * torch.log((gradient / root) ** 2 + 1e-8))
        features += [torch.full((N,), math.tanh(step / tau - 1), dtype=torch.float64) for tau in config.time_scales]
        inputs.append(torch.stack(features, -1))
        directions.append(direction)
    magnitude, addend = rule.readout(rule.lstm(torch.stack(inputs))[0]).unbind(-1)
    gain = torch.exp(config.log_gain * torch.tanh(magnitude / config.log_gain))
    steps = torch.arange(1, 6, dtype=torch.float64).unsqueeze(1)
    gain = gain * (1 + (steps - config.anneal_start).clamp(min=0) / config.anneal_steps) ** -config.anneal_power
    expected = -config.step_size * scale * gain * (torch.stack(directions) + torch.tanh(addend))
    torch.testing.assert_close(updates, expected, rtol=1e-9, atol=0)


# Properties that hold for all rules or for a family


def test_a_coordinate_with_no_gradient_yet_stays_at_rest_and_wakes_with_its_first(rule: UpdateRule) -> None:
    gradients = torch.randn(4, N)
    gradients[:3, 2] = 0.0
    updates, _ = unroll(rule, gradients)
    assert not updates[:3, 2].any()
    assert updates[3, 2] != 0
    assert (updates[:, [0, 1, 3, 4, 5, 6]] != 0).all()
    _, memory = unroll(rule, gradients[:3])
    assert not any(values[2].any() for values in memory.values())


def test_a_zero_gradient_later_lets_the_memory_run_on(rule: UpdateRule) -> None:
    gradients = torch.randn(3, N)
    gradients[2] = 0.0
    updates, memory = unroll(rule, gradients)
    _, before = unroll(rule, gradients[:2])
    assert (updates[2] != 0).all()
    assert (memory["cell"] != before["cell"]).any(-1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_skips_its_coordinate_and_no_other(rule: UpdateRule, bad: float) -> None:
    gradients = torch.randn(5, N)
    _, before = unroll(rule, gradients[:3])
    clean, clean_memory = unroll(rule, gradients)
    gradients[3, 1] = bad
    updates, memory = unroll(rule, gradients)
    _, after = unroll(rule, gradients[:4])
    assert updates[3, 1] == 0
    assert updates[4, 1] != 0
    assert updates.isfinite().all()
    others = [0, 2, 3, 4, 5, 6]
    torch.testing.assert_close(updates[:, others], clean[:, others], rtol=1e-6, atol=0)
    for name, values in memory.items():
        assert torch.equal(after[name][1], before[name][1]), name
        torch.testing.assert_close(values[others], clean_memory[name][others], rtol=1e-6, atol=1e-7)


def test_huge_and_tiny_finite_gradients_leave_the_rule_usable(rule: UpdateRule) -> None:
    gradients = torch.randn(8, N)
    gradients[2, 0], gradients[2, 1], gradients[2, 2], gradients[0, 3] = 1e25, -3e38, 1e-30, 1e-42
    updates, memory = unroll(rule, gradients)
    assert updates.isfinite().all()
    assert all(values.isfinite().all() for values in memory.values())
    assert (updates[-1] != 0).all()


def test_a_gradient_is_encoded_alike_from_the_part_of_a_memory_that_is_read(rule: UpdateRule) -> None:
    gradient, (_, memory) = torch.randn(N), unroll(rule, torch.randn(2, N))
    gradient[:2], memory["cell"][0] = 0.0, 0.0  # The first is at rest, the second is not.
    step, scale = torch.tensor(3.0), torch.tensor(0.5) if rule.uses_scale else None
    whole, part = (rule.encode(gradient, one, step, scale) for one in (memory, rule.read_by_encode(memory)))
    for got, want in zip(part[:3], whole[:3], strict=True):
        assert torch.equal(got, want)
    assert all(torch.equal(part.moments[name], values) for name, values in whole.moments.items())


def test_forward_changes_none_of_its_arguments(rule: UpdateRule) -> None:
    gradient = torch.randn(N)
    gradient[0] = math.nan
    _, memory = unroll(rule, torch.randn(2, N))
    kept, kept_gradient = copies(memory.values()), gradient.clone()
    rule(gradient, memory, at_step(3), scale_of(rule))
    assert all(torch.equal(now, then) for now, then in zip(memory.values(), kept, strict=True))
    assert torch.equal(gradient.nan_to_num(9.0), kept_gradient.nan_to_num(9.0))


def test_step_and_scale_may_differ_by_coordinate(rule: UpdateRule) -> None:
    gradient, (_, memory) = torch.randn(N), unroll(rule, torch.randn(2, N))
    scales = [scale_of(rule, value) for value in (0.1, 0.7)]
    halves = [rule(gradient, memory, at_step(step), scale)[0] for step, scale in zip((3, 40), scales, strict=True)]
    step = torch.tensor([3.0] * 4 + [40.0] * (N - 4))
    both = None if scales[0] is None else torch.stack(scales)[[0] * 4 + [1] * (N - 4)]
    update, _, _ = rule(gradient, memory, step, both)
    torch.testing.assert_close(update, torch.cat((halves[0][:4], halves[1][4:])), rtol=1e-5, atol=1e-8)


def test_every_meta_parameter_receives_a_gradient(rule: UpdateRule) -> None:
    updates, _ = unroll(rule, torch.randn(4, N))
    (updates * torch.randn(4, N)).sum().backward()
    for name, parameter in rule.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("case", ADAM_CASES)
@pytest.mark.parametrize("factor", [1e-4, 1e-2, 1e2, 1e4])
def test_adam_modulation_ignores_the_scale_of_the_gradient(case: str, factor: float) -> None:
    rule = small_rule(case)
    gradients = torch.randn(10, N)
    updates, _ = unroll(rule, gradients)
    scaled, _ = unroll(rule, gradients * factor)
    torch.testing.assert_close(scaled, updates, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam_modulation_is_bounded_whatever_the_lstm_says(case: str) -> None:
    rule = small_rule(case)
    config = rule.config
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.mul_(100)
    gradients = torch.randn(300, 200) * 10 ** (3 * torch.randn(300, 200)) * (torch.rand(300, 200) < 0.1)
    updates, _ = unroll(rule, gradients, torch.tensor(0.5))
    # By Cauchy-Schwarz, |m| / sqrt(v) is at most this; early bias correction stays below it.
    ratio = (1 - config.fast_decay) / math.sqrt(
        (1 - config.second_moment_decay) * (1 - config.fast_decay**2 / config.second_moment_decay)
    )
    bound = config.step_size * 0.5 * math.exp(config.log_gain) * (ratio + 1)
    assert updates.isfinite().all()
    assert updates.abs().max() <= bound
    assert updates.abs().max() > bound / 50  # The test reached the neighbourhood of the bound.


def test_an_outlier_neither_makes_a_big_step_nor_stops_the_next() -> None:
    gradients = torch.randn(50, 200)
    gradients[30] *= 1e4

    def steps(**config: float) -> tuple[float, float, float]:
        rule = build_rule("adam-modulation", second_moment_decay=0.99, fast_decay=0.0, **config)
        sizes = unroll(rule, gradients, torch.tensor(1.0))[0].abs().median(1).values
        return sizes[:30].median().item(), sizes[30].item(), sizes[31:].median().item()

    usual, at_outlier, after = steps(outlier_bound=3.0)
    assert at_outlier < 4 * usual
    assert after == pytest.approx(usual, rel=0.2)
    usual, at_outlier, after = steps()
    assert at_outlier > 6 * usual
    assert after < 0.01 * usual


def test_a_coordinate_at_rest_wakes_up_in_full() -> None:
    gradients = torch.zeros(3, 5)
    gradients[2] = 7.0
    bounded, free = (unroll(build_rule("adam-modulation", outlier_bound=bound), gradients)[0] for bound in (2.0, 0.0))
    assert torch.equal(bounded, free)
    assert (bounded[2] != 0).all()


@pytest.mark.parametrize(("value", "expected"), [(0.0, 1e-2), (0.2, 0.2), (-0.2, 0.2), (50.0, 1.0)])
def test_the_tensor_scale_is_a_clamped_root_mean_square(value: float, expected: float) -> None:
    rule = small_rule("adam-modulation")
    for shape in ((), (1,), (3, 4)):
        scale = rule.tensor_scale(torch.full(shape, value))
        assert scale.shape == ()
        assert scale.item() == pytest.approx(expected)


@pytest.mark.parametrize(("numel", "floor"), [(1, 0.3), (16, 0.25), (10_000, 0.05), (160_000, 0.025), (810_000, 0.02)])
def test_the_scale_of_a_small_tensor_has_a_higher_floor(numel: int, floor: float) -> None:
    rule = build_rule("adam-modulation", min_scale=0.02, small_min_scale=0.3)
    for start in (torch.zeros(numel), torch.zeros(1, numel, 1)):
        assert rule.tensor_scale(start).item() == pytest.approx(floor)
        assert rule.tensor_scale(start + 0.35).item() == pytest.approx(0.35)
    assert build_rule("adam-modulation", min_scale=0.02).tensor_scale(torch.zeros(numel)).item() == pytest.approx(0.02)
    capped = build_rule("adam-modulation", min_scale=0.02, small_min_scale=0.3, max_scale=0.2)
    assert capped.tensor_scale(torch.zeros(1)).item() == pytest.approx(0.2)


@pytest.mark.parametrize("shapes", [((), (3,), (100, 30)), ((2, 2),)])
def test_the_scales_of_many_tensors_at_once_are_those_of_each(
    shapes: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = build_rule("adam-modulation", min_scale=0.1, small_min_scale=0.3, max_scale=0.5, agreement_gain=0.5)
    params = [start * torch.ones(shape) for shape in shapes for start in (0.0, 0.4, 2.0)]
    memories = [{"exp_avg_slow": param / 10, "exp_avg_sq": param.square()} for param in params]
    done = [torch.tensor(float(step)) for step in range(len(params))]
    expected = [rule.tensor_scale(*each) for each in zip(params, memories, done, strict=True)]
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    with mock.patch.object(rule, "tensor_scale", side_effect=AssertionError("one by one")):
        torch.testing.assert_close(rule.tensor_scales(params, memories, done), expected)


# Agreement
AGREEING = {"slow_decay": 0.98, "second_moment_decay": 0.995, "agreement_gain": 6.0, "agreement_limit": 8.0}


def factor_after(gradients: Tensor, **config: float) -> float:
    """The factor after as many steps as there are rows."""
    rule = build_rule("adam-modulation", **AGREEING | config)
    memory = rule.initial_memory(gradients.shape[1], gradients)
    for step, gradient in enumerate(gradients, 1):
        memory |= rule.encode(gradient, memory, torch.tensor(float(step)), torch.tensor(1.0)).moments
    scales = [rule.tensor_scale(torch.ones(3), known, torch.tensor(float(len(gradients)))) for known in (memory, None)]
    return float(scales[0] / scales[1])


def test_steps_are_longer_where_gradients_agree() -> None:
    noise = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    assert factor_after(noise) == 1.0
    assert factor_after(noise + 1.0) == pytest.approx(8.0)
    assert factor_after(noise + 1.0, agreement_limit=3.0) == pytest.approx(3.0)
    assert factor_after(noise + 1.0, agreement_gain=0.0) == 1.0
    weak = factor_after(noise + 0.1, agreement_gain=1.0, agreement_floor=1.0)
    # Mean square of the momentum over noise of variance 1: noise alone, and the mean.
    share = 0.02 / 1.98
    expected = math.exp(((share + 0.01) / (1.01 * share)) ** 0.5 - 1.0)
    assert weak == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_few_steps_of_noise_are_not_longer(steps: int) -> None:
    assert factor_after(torch.randn(steps, 500, generator=torch.Generator().manual_seed(0))) == 1.0


def test_neither_rare_nor_shrinking_gradients_count_as_agreement() -> None:
    noise = torch.randn(300, 2000, generator=torch.Generator().manual_seed(0))
    rare = noise * (torch.rand(noise.shape, generator=torch.Generator().manual_seed(1)) < 0.01)
    assert factor_after(rare) == 1.0
    assert factor_after(noise * torch.logspace(0, -6, 300).unsqueeze(1)) == 1.0


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e18, math.nan, math.inf])
def test_agreement_stays_within_its_limit_whatever_the_memory(value: float) -> None:
    rule = build_rule("adam-modulation", **AGREEING)
    memory = {"exp_avg_slow": torch.full((3,), value), "exp_avg_sq": torch.full((3,), value)}
    for done in (0.0, 1.0, 1e6):
        scale = rule.tensor_scale(torch.ones(3), memory, torch.tensor(done))
        assert scale is not None
        assert 1.0 <= float(scale) <= 8.0


@pytest.mark.parametrize("case", PAPER_CASES)
def test_paper_rules_take_no_tensor_scale(case: str) -> None:
    assert small_rule(case).tensor_scale(torch.ones(3)) is None


# Configuration


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("adam", {}, "unknown rule family 'adam'.*adam-modulation, paper"),
        ("paper", {"hiden_size": 3}, "no option hiden_size; it has .*hidden_size"),
        ("paper", {"hidden_size": 0}, "hidden_size must lie between 1 and 65,536, got 0"),
        ("paper", {"num_layers": 0}, "num_layers must lie between 1 and 65,536, got 0"),
        ("paper", {"hidden_size": True}, "hidden_size must be an integer, got True"),
        ("paper", {"num_layers": 2.0}, "num_layers must be an integer, got 2.0"),
        ("paper", {"output_scale": math.inf}, "output_scale must be a number, finite in float32, got inf"),
        ("paper", {"input_scale": 1e39}, r"input_scale must be a number, finite in float32, got 1e\+39"),
        ("paper", {"output_scale": True}, "output_scale must be a number, finite in float32, got True"),
        ("paper", {"output_scale": "1"}, "output_scale must be a number, finite in float32, got '1'"),
        ("paper", {"preprocess_p": 88}, "preprocess_p must be at most 87, or e.-p underflows in float32, got 88.0"),
        ("paper", {"inputs": "log"}, "inputs must be 'raw' or 'log_and_sign', got 'log'"),
        ("paper", {"preprocess_p": 0.0}, "preprocess_p must be positive"),
        ("paper", {"input_scale": 0.0}, "input_scale must be positive"),
        ("paper", {"output_scale": -1.0}, "output_scale must be positive"),
        ("adam-modulation", {"hidden_size": 0}, "hidden_size must lie between 1"),
        ("adam-modulation", {"fast_decay": 1.0}, r"fast_decay must lie in \[0, 1\), got 1.0"),
        ("adam-modulation", {"slow_decay": -0.1}, "slow_decay must lie in"),
        ("adam-modulation", {"second_moment_decay": 1.5}, "second_moment_decay must lie in"),
        ("adam-modulation", {"step_size": 0.0}, "step_size must be positive"),
        ("adam-modulation", {"min_scale": 0.0}, "min_scale must be positive"),
        ("adam-modulation", {"max_scale": math.nan}, "max_scale must be a number, finite in float32, got nan"),
        ("adam-modulation", {"log_gain": -3.0}, "log_gain must be positive"),
        ("adam-modulation", {"anneal_power": -0.5}, "anneal_power must not be negative, got -0.5"),
        ("adam-modulation", {"small_min_scale": -0.1}, "small_min_scale must not be negative, got -0.1"),
        ("adam-modulation", {"outlier_bound": -5.0}, "outlier_bound must not be negative, got -5"),
        ("adam-modulation", {"anneal_start": -1.0}, "anneal_start must not be negative, got -1"),
        ("adam-modulation", {"anneal_steps": 0.0}, "anneal_steps must be positive"),
        ("adam-modulation", {"time_scales": (10.0, 0.0)}, "time_scales must be positive"),
        ("adam-modulation", {"time_scales": (10.0, math.inf)}, "time_scales must be a number, finite in float32, got inf"),
        ("adam-modulation", {"anneal_start": math.inf}, "anneal_start must be a number, finite in float32, got inf"),
    ],
)
def test_a_meaningless_configuration_is_refused_with_its_name(family: str, config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_rule(family, **config)


def test_a_frozen_rule_computes_the_same_and_has_no_graph(rule: UpdateRule) -> None:
    gradients = torch.randn(3, N)
    expected, _ = unroll(rule, gradients)
    rule.freeze()
    updates, _ = unroll(rule, gradients)
    assert torch.equal(updates, expected)
    assert not updates.requires_grad


def test_a_configuration_rebuilds_the_rule(rule: UpdateRule) -> None:
    again = build_rule(rule.family, **rule.config.to_dict())
    assert again.config == rule.config
    again.load_state_dict(rule.state_dict())
    gradients = torch.randn(3, N)
    assert torch.equal(unroll(again, gradients)[0], unroll(rule, gradients)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_a_large_tensor_is_taken_piece_by_piece(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = small_rule("adam-modulation")
    for shape in ((1000,), (1, 999), (40, 25), (3, 333)):
        param = (torch.randn(shape) * 0.1).to(dtype)
        for each in (param, param.t() if param.dim() > 1 else param[::2]):
            monkeypatch.setattr("learned_optim.rules.rule.PIECE", 2**20)
            whole = rule.tensor_scale(each)
            for piece in (1, 7, 64):
                monkeypatch.setattr("learned_optim.rules.rule.PIECE", piece)
                torch.testing.assert_close(rule.tensor_scale(each), whole, rtol=1e-6, atol=0)
