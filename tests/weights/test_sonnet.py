"""Weights of the original code: what comes out computes what Sonnet did, and nothing in a file is ever run."""

import os
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learned_optim import LearnedOptimizer, Weights, WeightsError, WeightsNotFoundError
from learned_optim.weights import read_sonnet
from learned_optim.weights.file_format import MAX_BYTES
from tests.sonnet_files import Variables, as_safetensors, by_dill, changed, sonnet_variables, zeros


def sonnet_updates(variables: Variables, gradients: np.ndarray, k: float | None, scale: float, epsilon: float) -> np.ndarray:
    """Compute updates as Sonnet 1 does, in float64 and knowing nothing of torch: gradients and updates ``(T, N)``."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    names = sorted(name for name in variables if name.startswith("lstm_"))
    count = gradients.shape[1]
    hidden = {name: np.zeros((count, len(variables["linear"]["w"]))) for name in names}
    cell = {name: value.copy() for name, value in hidden.items()}
    updates = []
    for g in gradients.astype(np.float64):
        if k is None:
            x = g[:, None]
        else:
            log = np.maximum(np.log(np.abs(g) + epsilon) / k, -1)
            x = np.stack((log, np.clip(g * np.exp(k), -1, 1)), 1)
        for name in names:
            gates = np.concatenate((x, hidden[name]), 1) @ variables[name]["w_gates"] + variables[name]["b_gates"]
            i, j, f, o = np.split(gates, 4, axis=1)
            cell[name] = sigmoid(f + 1.0) * cell[name] + sigmoid(i) * np.tanh(j)
            hidden[name] = sigmoid(o) * np.tanh(cell[name])
            x = hidden[name]
        updates.append(scale * (x @ variables["linear"]["w"] + variables["linear"]["b"])[:, 0])
    return np.stack(updates)


def learned_updates(weights: Weights, gradients: np.ndarray) -> np.ndarray:
    param = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer = LearnedOptimizer([param], weights=weights, backend="reference")
    updates = []
    for gradient in gradients:
        param.data.zero_()
        param.grad = torch.from_numpy(gradient)
        optimizer.step()
        updates.append(param.detach().numpy().copy())
    return np.stack(updates)


WRITERS: dict[str, Callable[[Variables], bytes]] = {
    **{f"pickle protocol {n}": lambda found, n=n: pickle.dumps(found, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
    "Python 2": by_dill,
    "numpy 2": lambda found: by_dill(found, "numpy 2"),
    "dill, get_attr": lambda found: by_dill(found, "dill", b"dill._dill\n_load_type\nU\x04dict"),
    "dill, create_array": lambda found: by_dill(found, "create_array", b"dill._dill\n_load_type\nU\x04dict"),
    "Fortran order": lambda found: pickle.dumps(
        {module: {name: np.asfortranarray(a) for name, a in inner.items()} for module, inner in found.items()}, 2
    ),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cw.l2l-0"


def gradients(steps: int = 6, count: int = 200) -> np.ndarray:
    """Draw gradients around and far from both branches of log-and-sign; none is zero."""
    draw = np.random.default_rng(1)
    return (draw.standard_normal((steps, count)) * 10 ** draw.uniform(-6, 2, (steps, count))).astype(np.float32)


@pytest.mark.parametrize("writer", WRITERS)
def test_every_way_of_writing_the_arrays_reads_the_same(writer: str, path: Path, tmp_path: Path) -> None:
    variables = sonnet_variables()
    path.write_bytes(WRITERS[writer](variables))
    expected = read_sonnet(as_safetensors(variables, tmp_path / "plain.safetensors"))
    assert read_sonnet(path).fingerprint == expected.fingerprint


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("num_inputs", [1, 2])
def test_the_rule_computes_what_sonnet_did(num_inputs: int, layers: int, path: Path) -> None:
    variables = sonnet_variables(num_inputs, layers=layers)
    path.write_bytes(by_dill(variables))
    weights = read_sonnet(path)
    k, scale = (None, 1.0) if num_inputs == 1 else (5.0, 0.01)
    updates = learned_updates(weights, gradients())
    np.testing.assert_allclose(updates, sonnet_updates(variables, gradients(), k, scale, 0.0), rtol=0, atol=2e-6 * scale)
    original = sonnet_updates(variables, gradients(), k, scale, np.finfo(np.float32).eps)
    np.testing.assert_allclose(updates, original, rtol=0, atol=1e-4 * scale)
    assert (weights.rule.config.hidden_size, weights.rule.config.num_layers) == (5, layers)


def test_the_stated_difference_of_the_first_input_is_a_bound_and_a_sharp_one(path: Path) -> None:
    path.write_bytes(by_dill(sonnet_variables()))
    differences = read_sonnet(path).metadata["differences"]
    assert "differs by 3.5e-06 at most" in differences
    assert "never had a non-zero gradient does not move" in differences
    g = np.exp(np.linspace(-12, 5, 100_001))
    ours, theirs = (np.maximum(np.log(g + epsilon) / 5, -1) for epsilon in (0, 2.0**-23))
    assert 3.4e-6 < np.abs(ours - theirs).max() < 3.55e-6


def test_other_settings_of_the_original_can_be_given(path: Path) -> None:
    variables = sonnet_variables()
    path.write_bytes(by_dill(variables))
    weights = read_sonnet(path, preprocess_p=10, output_scale=0.1, license="apache-2.0")
    expected = sonnet_updates(variables, gradients(), 10.0, 0.1, 0.0)
    np.testing.assert_allclose(learned_updates(weights, gradients()), expected, rtol=0, atol=2e-7)
    assert weights.metadata["license"] == "apache-2.0"
    for bad in ({"preprocess_p": 0.0}, {"preprocess_p": 1e4}, {"output_scale": -1.0}):
        with pytest.raises(WeightsError):
            read_sonnet(path, **bad)  # type: ignore[arg-type]


def test_converted_weights_round_trip_and_say_where_they_come_from(path: Path, tmp_path: Path) -> None:
    path.write_bytes(by_dill(sonnet_variables()))
    weights = read_sonnet(path)
    weights.save(tmp_path / "rule.safetensors")
    back = Weights.from_pretrained(tmp_path / "rule.safetensors")
    assert (back.fingerprint, back.title, back.metadata) == (weights.fingerprint, "cw", weights.metadata)
    assert back.metadata["converted_from"].startswith("cw.l2l-0, sha256 ")
    assert back.metadata["license"] == "unknown"
    published = as_safetensors(sonnet_variables(), tmp_path / "dm.safetensors", source="their place (MIT)")
    assert read_sonnet(published).metadata["source"] == "their place (MIT)"
    with pytest.raises(WeightsError, match="is a weight file already"):
        read_sonnet(tmp_path / "rule.safetensors")


class Run:
    """Pickled, it asks for a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    make = f"open({str(marker)!r}, 'w').close()"
    text = b"X" + len(make).to_bytes(4, "little") + make.encode()
    get_attr = b"\x80\x02cdill._dill\n_get_attr\ncdill._dill\n_import_module\n"
    return {
        "call": (pickle.dumps({"linear": Run(eval, make)}), "builtins.eval"),
        "call, protocol 0": (pickle.dumps(Run(eval, make), 0), "__builtin__.eval|builtins.eval"),
        "system": (pickle.dumps(Run(os.system, f"touch {marker}")), f"{os.name}.system"),
        "get_attr": (get_attr + b"U\x08builtins\x85RU\x04eval\x86R" + text + b"\x85R.", "builtins.eval"),
        "load_type": (b"\x80\x02cdill._dill\n_load_type\nU\x04type\x85R.", "builtins.type"),
        "dill function": (b"\x80\x02cdill._dill\n_create_function\n.", "dill._dill._create_function"),
        "NumPy itself": (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        "INST": (b"(S'" + make.encode().replace(b"'", b'"') + b"'\ni__builtin__\neval\n.", "uses INST"),
        "OBJ": (b"(c__builtin__\neval\n" + text + b"o.", "uses OBJ"),
        "NEWOBJ": (b"\x80\x02cnumpy\nndarray\n)\x81.", "uses NEWOBJ"),
        "persistent id": (b"Pid\n.", "uses PERSID"),
        "extension": (b"\x80\x02\x82\x01.", "uses EXT1"),
        "vast memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "numbers an object 2147483647"),
        "NumPy function with state": (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x08__code__Nsb.",
            "it changes a function",
        ),
        "an array by hand": (b"\x80\x02cnumpy\nndarray\n(tR.", "ndarray is called directly"),
        "object array": (pickle.dumps({"linear": {"w": np.array([print], object)}}), "builtins.print"),
    }


@pytest.mark.parametrize("kind", hostile(Path()))
def test_a_hostile_pickle_is_refused_by_name_and_not_run(kind: str, path: Path, tmp_path: Path) -> None:
    data, refused = hostile(tmp_path / "marker")[kind]
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=refused) as caught:
        read_sonnet(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_the_hostile_pickles_would_have_run(tmp_path: Path) -> None:
    for kind in ("call", "call, protocol 0", "system", "INST", "OBJ"):
        marker = tmp_path / kind.replace(" ", "")
        pickle.loads(hostile(marker)[kind][0])
        assert marker.exists(), kind


def test_reading_one_file_does_not_change_how_the_next_is_read(path: Path) -> None:
    for state in (b"}U\x04callNs", b"N}U\x04callNs\x86", b"N}U\x0c__setstate__Ns\x86"):
        path.write_bytes(b"\x80\x02cnumpy\ndtype\n" + state + b"b.")
        with pytest.raises(WeightsError):
            read_sonnet(path)
    path.write_bytes(by_dill(sonnet_variables()))
    assert read_sonnet(path).rule.config.hidden_size == 5


def test_every_truncation_is_explained(path: Path) -> None:
    data = by_dill(sonnet_variables(hidden=2))
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match="truncated, corrupt"):
            read_sonnet(path)


def test_a_damaged_file_is_refused_or_read_but_never_breaks_the_reader(path: Path) -> None:
    data, draw, refused = by_dill(sonnet_variables(hidden=2)), random.Random(0), 0
    for _ in range(500):
        spoiled = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            spoiled[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(spoiled)
        try:
            read_sonnet(path)
        except WeightsError:
            refused += 1
    assert 100 < refused < 500  # Most of a file is values of weights.


UNFIT: dict[str, tuple[Variables, str]] = {
    "no readout": (changed(drop="linear"), "differs in linear.b, linear.w"),
    "no LSTM": ({"linear": sonnet_variables()["linear"]}, "differs in lstm_1.w_gates"),
    "a layer missing": (changed(drop="lstm_1"), "differs in lstm_1.b_gates"),
    "unknown variable": (changed(linear__slope=zeros(1)), "differs in linear.slope"),
    "RNNprop": (changed(input_projection__w=zeros(2, 20)), r"it is RNNprop \(arXiv:1703.03633\).*bounded by tanh"),
    "peepholes": (changed(lstm_1__w_f_diag=zeros(5)), "its LSTM has peepholes"),
    "kernelwise": (changed(linear__w=zeros(5, 9), linear__b=zeros(9)), r"linear.w has shape \(5, 9\); a coordinatewise"),
    "three inputs": (sonnet_variables(3), "it reads 3 numbers"),
    "units differ": (
        changed(lstm_2__w_gates=zeros(12, 28), lstm_2__b_gates=zeros(28)),
        r"lstm_2.w_gates has shape \(12, 28\), and 5 units in every layer need \(10, 20\)",
    ),
    "wrong bias": (changed(lstm_1__b_gates=zeros(19)), r"lstm_1.b_gates has shape \(19,\).*need \(20,\)"),
    "wrong readout bias": (changed(linear__b=zeros(2)), r"linear.b has shape \(2,\), not \(1,\)"),
    "scalar": (changed(linear__w=zeros()), r"linear.w has shape \(\)"),
    "flat gates": (changed(lstm_1__w_gates=zeros(140)), "cannot be converted"),
    "double": (changed(linear__w=zeros(5, 1, dtype=np.float64)), "F64|<f8"),
    "integers": (changed(linear__w=zeros(5, 1, dtype=np.int32)), "I32|<i4"),
}


@pytest.mark.parametrize("as_pickle", [True, False], ids=["l2l", "safetensors"])
@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_represented_is_refused_with_the_reason(kind: str, as_pickle: bool, path: Path) -> None:
    variables, message = UNFIT[kind]
    if as_pickle:
        path.write_bytes(pickle.dumps(variables))
    else:
        path = as_safetensors(variables, path.with_suffix(".safetensors"))
    with pytest.raises(WeightsError, match=message):
        read_sonnet(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(sonnet_variables()["linear"]), "does not hold {module: {variable: array}}"),
        (pickle.dumps([1, 2]), "does not hold"),
        (pickle.dumps({"linear": {"w": "text"}}), "linear.w is no array"),
        (by_dill(changed(linear__w=np.ones((5, 1), ">f4"))).replace(b"U\x01<", b"U\x01>"), "is of type >f4"),
        (b"K\x05\x86" + b".", "truncated, corrupt or not an .l2l file"),
        (b"\0" * (MAX_BYTES + 1), "an update rule has kilobytes"),
        (b"", "truncated"),
    ],
)
def test_other_content_is_explained(content: bytes, message: str, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_sonnet(path)


def test_a_missing_or_broken_file_is_explained(path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="no such file"):
        read_sonnet(path)
    broken = path.with_suffix(".safetensors")
    broken.write_bytes(b"not one")
    with pytest.raises(WeightsError, match="truncated, corrupt"):
        read_sonnet(broken)


def test_reading_needs_neither_numpy_nor_dill(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(by_dill(sonnet_variables(), "dill"))
    for name in ("numpy", "dill", "dill._dill"):
        monkeypatch.setitem(sys.modules, name, None)
    assert read_sonnet(path).rule.config.num_layers == 2
