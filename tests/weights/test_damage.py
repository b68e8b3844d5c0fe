"""Damaged and made-up files: each is refused with a WeightsError, soon and with little memory, or holds what was written."""

import io
import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learned_optim import Weights, WeightsError, available_weights
from learned_optim.weights import file_format
from learned_optim.weights.file_format import CHECKS, from_bytes, to_bytes
from learned_optim.weights.l2l_pickle import read_arrays
from learned_optim.weights.model_card import model_card
from learned_optim.weights.registry import bundled_file
from meta_train.training.run_dir import CHECKPOINT, read_checkpoint
from tests.cases import RULE_CASES, small_rule
from tests.meta_train.test_recipe import TINY
from tests.meta_train.test_run_files import start
from tests.sonnet_files import by_dill, sonnet_variables

SECONDS, MEBIBYTES = 1.0, 100


def flipped(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield copies with one bit changed."""
    draw = random.Random(seed)
    for bit in draw.sample(range(8 * len(data)), count):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def content(weights: Weights) -> tuple[Any, ...]:
    """Return all that a weight file says, numbers as bytes."""
    numbers = {name: value.numpy().tobytes() for name, value in weights.rule.state_dict().items()}
    return weights.fingerprint, weights.rule.config, numbers, weights.title, weights.recipe, dict(weights.metadata)


@pytest.mark.parametrize("source", ["default", *RULE_CASES])
def test_no_weight_file_with_a_flipped_bit_loads_as_other_numbers(source: str) -> None:
    if source == "default":
        data = bundled_file(source).path.read_bytes()
    else:
        data = to_bytes(Weights(small_rule(source), "mïne", TINY, {"commit": "abc"}))
    written, loaded = content(Weights.from_record(from_bytes(data))), 0
    for damaged in flipped(data, 1000):
        try:
            read = Weights.from_record(from_bytes(damaged))
        except WeightsError:
            continue
        loaded += 1
        assert content(read) == written
    assert loaded < 20, "the spaces behind the header at most"


def leaves(state: dict[str, Any]) -> list[Any]:
    """Return all values of a nested state, tensors as bytes."""
    found = torch.utils._pytree.tree_flatten(state)[0]
    return [(str(one.dtype), one.shape, one.numpy().tobytes()) if isinstance(one, torch.Tensor) else one for one in found]


@pytest.mark.parametrize("name", available_weights())
def test_bundled_files_carry_their_checks(name: str) -> None:
    data = bundled_file(name).path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    assert set(CHECKS) <= set(json.loads(data[8 : 8 + size])["__metadata__"])


def test_no_checkpoint_with_a_flipped_bit_goes_on_as_other_numbers(tmp_path: Path) -> None:
    start(tmp_path, 4)
    path = tmp_path / CHECKPOINT
    data, loaded = path.read_bytes(), 0
    written = leaves(read_checkpoint(path))
    end = [bytes((*data[:-39], *(byte ^ (1 << bit) if at == place else byte for at, byte in enumerate(data[-39:]))))
           for place in range(39) for bit in (0, 7)]  # fmt: skip
    for damaged in [*flipped(data, 1000), *end]:
        path.write_bytes(damaged)
        try:
            state = read_checkpoint(path)
        except ValueError:
            continue
        loaded += 1
        assert leaves(state) == written
    assert loaded < 40, "where the mark before the digest is damaged"


# made-up weight files

ODD: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.choice([None, True, -1, 0, 10**19, 2**63, 1e308, -1e-320, "", "\x1b[31m", "\ud800", [], {}]),
    lambda draw: json.loads("[" * (depth := draw.choice([3, 500])) + "]" * depth),
    lambda draw: ["x"] * draw.choice([1, 5, 1000]),
    lambda draw: [draw.choice([0, -1, 1, 2**40, 2**63, 1.5, "1"]) for _ in range(draw.randrange(10))],
    lambda draw: draw.choice(["F32", "F64", "F8_E8M0", "F4", "BOOL", "I8", "adam-modulation", "paper", "raw", "nan"]),
]


def spoiled(value: Any, draw: random.Random) -> Any:
    """Return JSON with one value somewhere replaced by an odd one, or a key renamed, added or lost."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        changed, key = dict(value), draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[draw.choice(["", "family", "num_layers", "hidden_size", "\0", "x" * 300])] = changed.pop(key)
        elif kind == 2:
            changed[draw.choice(["extra", "time_scales"])] = draw.choice(ODD)(draw)
        else:
            changed[key] = spoiled(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.5:
        at = draw.randrange(len(value))
        return [*value[:at], spoiled(value[at], draw), *value[at + 1 :]]
    return draw.choice(ODD)(draw)


def made_up_weights(seed: int) -> bytes:
    """Return a weight file whose header was tampered with, mostly with checks that fit what was tampered with."""
    draw = random.Random(seed)
    data = MOULDS[seed % len(MOULDS)]
    (size,) = struct.unpack("<Q", data[:8])
    table, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]
    strings = table["__metadata__"]
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(3)
        if place == 0:
            strings["rule"] = json.dumps(spoiled(json.loads(strings["rule"]), draw))
        elif place == 1:
            key = draw.choice([name for name in table if name != "__metadata__"] or ["readout.bias"])
            table[key] = spoiled(table.get(key, {}), draw)
        else:
            strings[draw.choice(list(strings))] = draw.choice(["", "[" * 3000, "a = " + "[" * 3000, "1" * 5000, "\x00", "2"])
        if not isinstance(strings.get("rule"), str) or strings["rule"][:1] != "{":
            break
    if draw.random() < 0.1:
        table = spoiled(table, draw)
    elif draw.random() < 0.9:
        for name in draw.choice([("checksum", "fingerprint"), ("fingerprint",), ()]):
            strings.pop(name, None)
        if "fingerprint" in strings or draw.random() < 0.3:
            strings["checksum"] = file_format._checksum(strings)
    header = json.dumps(table).encode(errors="replace")
    if draw.random() < 0.1:
        tensors = tensors[: draw.randrange(len(tensors) + 1)] * draw.choice([1, 2])
    return struct.pack("<Q", len(header)) + header + tensors


MOULDS = [to_bytes(Weights(small_rule(case), "mine", TINY, {"license": "mit"})) for case in RULE_CASES]


def bounded(read: Callable[[bytes], object], data: bytes, about: object) -> bool:
    """Read a file; return whether that succeeded. Nothing but a WeightsError may come of it, within bounds."""
    began, message = time.process_time(), ""
    tracemalloc.start()
    try:
        read(data)
    except WeightsError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - began < SECONDS, about
    assert peak < MEBIBYTES * 2**20, about
    assert len(message) < 2000, about
    return not message


def read_and_show(data: bytes) -> None:
    """Read a weight file, and show it as the Hub would."""
    weights = Weights.from_record(from_bytes(data))
    assert "\x1b" not in model_card(weights, "owner/repo", "mit", "")


def test_made_up_weight_files_are_refused_or_read_within_bounds() -> None:
    read = [bounded(read_and_show, made_up_weights(seed), seed) for seed in range(400)]
    assert 20 < sum(read) < 300


# made-up pickles

WHOLE = by_dill(sonnet_variables(hidden=2))
GLOBALS = ("numpy dtype", "numpy.core.multiarray _reconstruct", "_codecs encode", "builtins dict", "dill._dill _get_attr")


def made_up_pickle(seed: int) -> bytes:
    """Return a pickle: pieces of an honest one in another order, or opcodes at random with arguments at random."""
    draw = random.Random(seed)
    if seed % 3 == 0:
        cuts = sorted(draw.randrange(len(WHOLE)) for _ in range(4))
        pieces = [WHOLE[: cuts[0]], WHOLE[cuts[0] : cuts[1]] * draw.choice([0, 1, 2, 200]), WHOLE[cuts[1] : cuts[2]]]
        return b"".join([*pieces, WHOLE[cuts[2] :]])[: 10**6]
    if seed % 3 == 1:
        spoilt = bytearray(WHOLE)
        for _ in range(draw.randint(1, 4)):
            spoilt[draw.randrange(len(spoilt))] = draw.choice(b"()]}.0abcdeghijlpqrstuR\x85\x86\x87\x88\x94\xff\x00")
        return bytes(spoilt)
    out = io.BytesIO()
    out.write(b"\x80\x04")
    for _ in range(draw.choice([3, 30, 3000])):
        out.write(draw.choice(PIECES)(draw))
    out.write(b".")
    return out.getvalue()


PIECES: list[Callable[[random.Random], bytes]] = [
    lambda draw: bytes([draw.choice(b"(]})012N\x88\x89\x94aesu")]),
    lambda draw: bytes([draw.choice(b"\x85\x86\x87tldRb\x93")]),
    lambda draw: b"h" + bytes([draw.randrange(30)]),
    lambda draw: b"q" + bytes([draw.randrange(30)]),
    lambda draw: b"r" + struct.pack("<I", draw.choice([0, 5, 2**31, 2**32 - 1])),
    lambda draw: b"c" + draw.choice(GLOBALS).replace(" ", "\n").encode() + b"\n",
    lambda draw: b"\x8c" + bytes([4]) + draw.choice([b"f4\0\0", b"abcd", b"lstm"]),
    lambda draw: b"X" + struct.pack("<I", draw.choice([0, 3, 2**31])) + b"abc",
    lambda draw: b"\x8a" + bytes([draw.choice([1, 8, 255])]) + bytes(draw.randrange(256) for _ in range(8)),
    lambda draw: b"I" + draw.choice([b"1", b"-1", b"9" * 4000, b"01"]) + b"\n",
    lambda draw: b"G" + struct.pack(">d", draw.choice([0.0, 1e308, float("nan")])),
    lambda draw: b"C" + bytes([3]) + b"abc",
]


def test_made_up_pickles_are_refused_or_read_within_bounds() -> None:
    def read(data: bytes) -> None:
        for variables in read_arrays(data, "a pickle").values():
            assert all(value.dtype == torch.float32 for value in variables.values())

    outcomes = [bounded(read, made_up_pickle(seed), seed) for seed in range(600)]
    assert 20 < sum(outcomes) < 500
