import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from learned_optim import LearnedOptimizer, Weights, WeightsError, available_weights
from learned_optim.weights import read_weights, resolve_weights, write_weights
from tests.cases import RULE_CASES, small_rule


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "rule.safetensors"
    Weights(small_rule(), "mine", "schema = 1\n", {"commit": "abc"}).save(target)
    return target


def header_of(data: bytes) -> dict[str, object]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(data: bytes, **changes: str | None) -> bytes:
    header = header_of(data)
    metadata = {**header["__metadata__"], **changes}  # type: ignore[dict-item]
    header["__metadata__"] = {key: value for key, value in metadata.items() if value is not None}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.parametrize("case", RULE_CASES)
def test_round_trip_keeps_everything(case: str, tmp_path: Path) -> None:
    weights = Weights(small_rule(case), "mine", "schema = 1\n", {"commit": "abc"})
    weights.save(tmp_path / "a.safetensors")
    read = read_weights(tmp_path / "a.safetensors")
    assert (read.name, read.recipe, read.metadata) == ("mine", "schema = 1\n", {"commit": "abc"})
    assert read.fingerprint == weights.fingerprint
    assert read.rule.config == weights.rule.config
    write_weights(tmp_path / "b.safetensors", read)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_bytes_are_the_same_in_every_process(path: Path, tmp_path: Path) -> None:
    code = f"from learned_optim import Weights; Weights.from_pretrained({str(path)!r}).save('again.safetensors')"
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        again = read_weights(tmp_path / "again.safetensors", "mine")
        assert again.fingerprint == read_weights(path).fingerprint
        assert header_of((tmp_path / "again.safetensors").read_bytes())["readout.bias"]


NOT_WEIGHTS = {
    "empty": (lambda data: b"", "truncated or not a safetensors file"),
    "cut": (lambda data: data[: len(data) // 2], "truncated"),
    "tensors cut": (lambda data: data[:-5], "truncated or corrupt"),
    "noise": (lambda data: (40).to_bytes(8, "little") + bytes(range(200)), "corrupt or not a safetensors file"),
    "foreign": (lambda data: with_header(data, learned_optim_format=None), "not of learned-optim"),
    "newer": (lambda data: with_header(data, learned_optim_format="2"), "upgrade learned-optim"),
    "no recipe": (lambda data: with_header(data, recipe=None), "the header lacks recipe"),
    "bad json": (lambda data: with_header(data, rule="{"), "describes no rule of this version"),
    "unknown family": (lambda data: with_header(data, rule='{"family": "x"}'), "unknown rule family 'x'"),
    "unknown option": (lambda data: with_header(data, rule='{"family": "paper", "z": 1}'), "has no option z"),
    "other shape": (
        lambda data: with_header(data, rule='{"family": "adam-modulation", "hidden_size": 9}'),
        "the rule in its header needs",
    ),
}


@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_a_bad_file_is_explained(kind: str, path: Path) -> None:
    spoil, message = NOT_WEIGHTS[kind]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(WeightsError, match=message) as error:
        LearnedOptimizer([torch.ones(1, requires_grad=True)], weights=path)
    assert str(path) in str(error.value)


def test_numbers_that_are_not_finite_are_refused(path: Path) -> None:
    rule = small_rule()
    with torch.no_grad():
        rule.readout.bias[0] = float("nan")
    Weights(rule).save(path)
    with pytest.raises(WeightsError, match=r"'readout\.bias' holds NaN or Inf"):
        read_weights(path)


def test_a_plain_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="not of learned-optim"):
        read_weights(tmp_path / "other.safetensors")


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    bomb = tmp_path / "weights.pt"
    bomb.write_bytes(pickle.dumps(bomb))
    with pytest.raises(WeightsError, match="pickle"):
        resolve_weights(bomb)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quadratics", "unknown weights 'quadratics'; did you mean 'quadratic'"),
        ("nothing like it", "bundled are .*quadratic"),
        ("missing.safetensors", "cannot read weights from missing.safetensors: No such file"),
    ],
)
def test_unknown_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        resolve_weights(name)


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(WeightsError, match="No space left"):
        Weights(small_rule(seed=1)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_changed_file_is_read_again(path: Path) -> None:
    first = resolve_weights(path)
    Weights(small_rule(seed=1)).save(path)
    assert resolve_weights(path).fingerprint != first.fingerprint


def test_many_optimizers_share_one_network(path: Path) -> None:
    made = [LearnedOptimizer([torch.ones(1, requires_grad=True)], weights=path) for _ in range(3)]
    networks = {id(weights.rule) for optimizer in made for weights in optimizer._weights.values()}
    assert len(networks) == 1
    assert resolve_weights("default") is resolve_weights("default")


def test_loading_draws_no_random_numbers(path: Path) -> None:
    state = torch.get_rng_state()
    read_weights(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_bundled_file_lies_beside_its_recipe() -> None:
    assert {"default", "quadratic"} <= set(available_weights())
    for name in available_weights():
        weights = resolve_weights(name)
        recipe = Path(resolve_weights.__code__.co_filename).parent / f"{name}.toml"
        assert weights.recipe == recipe.read_text(), name
        assert weights.metadata["commit"], name
