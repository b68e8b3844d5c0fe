"""Memory in fewer bytes: what rounding may lose, and what it may not."""

import struct

import pytest
import torch
from torch import Tensor

from learned_optim import UpdateRule
from learned_optim.rules import Memory
from learned_optim.rules.storage import bfloat16_above, decode, encode, layout, noise, round_to_bfloat16
from tests.cases import assert_identical, small_rule

TWO_LAYERS = "adam-modulation-time"


def at_rest(rule: UpdateRule, count: int) -> Memory:
    return {name: torch.zeros(count, *entry.trailing, dtype=entry.dtype) for name, entry in layout(rule, torch.int8).items()}


def drawn(rule: UpdateRule, count: int) -> Memory:
    """Memory of every size, each layer's of its own."""
    shape = count, rule.config.num_layers, rule.config.hidden_size
    sizes = 10 ** (4 * torch.randn(count, rule.config.num_layers, 1))
    moments = {name: torch.randn(count) for name in rule.moment_names}
    return {
        **moments,
        "hidden": torch.rand(count, shape[1] * shape[2]) * 2 - 1,
        "cell": (torch.randn(shape) * sizes).flatten(1),
    }


def stored(
    rule: UpdateRule, memory: Memory, step: int, before: Memory | None = None, active: Tensor | None = None
) -> Memory:
    count = len(memory["hidden"])
    active = torch.ones(count, dtype=torch.bool) if active is None else active
    before = at_rest(rule, count) if before is None else before
    new = encode(rule, memory, before, active, noise(torch.arange(1.0, count + 1), torch.tensor(float(step))))
    return {name: new[name].to(before[name].dtype) for name in before}


@pytest.mark.parametrize(("case", "sizes"), [("adam-modulation", (76, 44, 26)), ("paper-raw", (320, 160, 84))])
def test_the_layout_has_the_bytes_promised(case: str, sizes: tuple[int, ...]) -> None:
    rule = small_rule(case)
    for dtype, size in zip((torch.float32, torch.bfloat16, torch.int8), sizes, strict=True):
        entries = layout(rule, dtype).values()
        assert sum(torch.Size(entry.trailing).numel() * entry.dtype.itemsize for entry in entries) == size
    assert {entry.dtype for entry in layout(rule, torch.int8, torch.float32, torch.float64).values()} == {torch.float64}


def test_a_round_trip_loses_less_than_one_128th_of_the_largest_of_the_layer(rule: UpdateRule) -> None:
    memory = drawn(rule, 500)
    back = decode(rule, stored(rule, memory, 1), torch.float32)
    assert (back["hidden"] - memory["hidden"]).abs().max() <= 0.5001 / 127
    cells, expected = (values["cell"].unflatten(1, (rule.config.num_layers, -1)) for values in (back, memory))
    assert ((cells - expected).abs() <= expected.abs().amax(-1, keepdim=True) / 126).all()
    assert (cells.abs().amax(-1) > 0).all()  # The paper's rules see by it who is at rest.
    for name in rule.moment_names:
        assert (back[name] - memory[name]).abs().le(memory[name].abs() * (0 if name == "exp_avg_sq" else 2**-7)).all()


@pytest.mark.parametrize("case", ["adam-modulation", TWO_LAYERS])
def test_rounding_is_right_on_average(case: str) -> None:
    rule, steps = small_rule(case), 2000
    memory = drawn(rule, 40)
    sums = {name: torch.zeros_like(values, dtype=torch.float64) for name, values in memory.items()}
    for step in range(steps):
        for name, values in decode(rule, stored(rule, memory, step), torch.float32).items():
            sums[name] += values
    for name in ("cell", "exp_avg", "exp_avg_slow"):
        exact, mean = memory[name].double(), sums[name] / steps
        if name == "cell":  # In quanta: each of a layer's rounds by at most one.
            exact, mean = (x.unflatten(1, (rule.config.num_layers, -1)) for x in (exact, mean))
            quantum = exact.abs().amax(-1, keepdim=True) / 127
        else:
            quantum = 2.0 ** (exact.abs().log2().floor() - 7)
        # Deviations of at most half a quantum a draw: 4.5 of the mean's, and to nearest would be off by up to 1/2.
        assert ((mean - exact) / quantum).abs().max() < 4.5 * 0.5 / steps**0.5
        assert ((stored(rule, memory, 0)[name].double().view(-1) - memory[name].view(-1)) != 0).any()


def test_what_arrives_in_small_amounts_arrives() -> None:
    """A cell that gains a tenth of a quantum a step, a momentum that gains a thousandth of itself."""
    rule = small_rule("adam-modulation")
    memory = {name: torch.zeros(64, *entry.trailing) for name, entry in layout(rule).items()}
    memory["cell"][:, 0], memory["cell"][:, 1:] = 1.0, 0.5
    memory["exp_avg_slow"] += 1.0
    now = stored(rule, memory, 0)
    for step in range(1, 301):
        memory = decode(rule, now, torch.float32)
        memory["cell"][:, 1:] += 0.1 / 127
        memory["exp_avg_slow"] *= 1.001
        now = stored(rule, memory, step, now)
    memory = decode(rule, now, torch.float32)
    assert memory["cell"][:, 1:].mean() == pytest.approx(0.5 + 30 / 127, rel=0.01)
    assert memory["exp_avg_slow"].mean() == pytest.approx(1.001**300, rel=0.01)


def test_who_is_not_active_keeps_every_byte() -> None:
    rule = small_rule(TWO_LAYERS)
    before = stored(rule, drawn(rule, 300), 1)
    active = torch.arange(300) % 2 == 0
    for step in range(2, 6):
        after = stored(rule, decode(rule, before, torch.float32), step, before, active)
        for name, values in before.items():
            # The rule holds moments itself, and hands back what it was given: a number that bfloat16 has.
            held = slice(None) if name in rule.moment_names else ~active
            assert_identical(after[name][held], values[held])


def test_rest_is_rest() -> None:
    rule = small_rule(TWO_LAYERS)
    rest = at_rest(rule, 5)
    for active in (torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)):
        assert_identical(stored(rule, decode(rule, rest, torch.float32), 3, rest, active), rest)


def test_noise_is_the_hash_that_it_is_said_to_be() -> None:
    def hashed(grad: float, step: int) -> int:
        x = struct.unpack("<I", struct.pack("<f", grad))[0] ^ (step * 0x9E3779B9) % 2**32
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    grads, step = [0.0, -0.0, 1.0, -1e-45, 3e38, 0.1], 100_001
    expected = [hashed(grad, step) for grad in grads]
    assert (noise(torch.tensor(grads), torch.tensor(float(step))).long() % 2**32).tolist() == expected
    assert noise(torch.tensor(grads), torch.full((6,), float(step))).long().remainder(2**32).tolist() == expected
    assert noise(torch.tensor(grads)[::2], torch.tensor(float(step))).long().remainder(2**32).tolist() == expected[::2]


def test_noise_is_even_over_steps_and_over_coordinates() -> None:
    over_steps = noise(torch.zeros(20_000), torch.arange(1.0, 20_001))
    over_coordinates = noise(torch.randn(20_000), torch.tensor(7.0))
    for bits in (over_steps, over_coordinates):
        for lowest in (28, 16):  # The uppermost four bits, and the lowest four in use.
            counts = torch.bincount((bits.long() >> lowest) & 15, minlength=16)
            assert (counts - 1250).abs().max() < 5 * 1250**0.5
        assert abs(torch.corrcoef(torch.stack((bits[1:].double(), bits[:-1].double())))[0, 1]) < 0.035


def test_roundings_at_their_ends() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 1.00390625, 1e-40, 3.3e38])
    halves = values.bfloat16().float()
    for draws in (0, 0xFFFF):
        drawn = torch.full((7,), draws, dtype=torch.int32)
        assert_identical(round_to_bfloat16(halves, drawn), halves)
    assert round_to_bfloat16(torch.tensor([1.001, -1.001]), torch.full((2,), 0xFFFF, dtype=torch.int32)).tolist() == [
        1.0078125,
        -1.0078125,
    ]
    positive = values.abs()
    assert (bfloat16_above(positive) >= positive).all()
    assert (bfloat16_above(positive) <= positive * (1 + 2**-7) + 1e-40).all()
    assert_identical(bfloat16_above(halves.abs()), halves.abs())
