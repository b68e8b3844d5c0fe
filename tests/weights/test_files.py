"""The weight file: what it holds, what is refused and how, and that writing is all or nothing."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from learned_optim import LearnedOptimizer, Weights, WeightsError, WeightsNotFoundError, available_weights, build_rule
from learned_optim.weights import file_format, read_weights, resolve_weights, write_weights
from learned_optim.weights.file_format import MAX_BYTES, from_bytes, to_bytes
from tests.cases import RULE_CASES, assert_identical, copies, make_params, small_rule, take_steps

Spoil = Callable[[bytes], bytes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "rule.safetensors"
    Weights(small_rule(), "mine", "schema = 1\n", {"commit": "abc"}).save(target)
    return target


def parts(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assemble(header: dict, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + tensors


def with_header(**changes: str | None) -> Spoil:
    """Change the header's strings; None takes one out. The checks go too, as in files from before there were any."""

    def spoil(data: bytes) -> bytes:
        header, tensors = parts(data)
        strings = {**header["__metadata__"], "checksum": None, "fingerprint": None, **changes}
        return assemble({**header, "__metadata__": {k: v for k, v in strings.items() if v is not None}}, tensors)

    return spoil


def with_rule(**changes: object) -> Spoil:
    """Change the rule that the header describes."""
    spec = {"family": "adam-modulation", **small_rule().config.to_dict(), **changes}
    return with_header(rule=json.dumps({name: value for name, value in spec.items() if value is not None}))


def with_tensor(name: str, **changes: object) -> Spoil:
    """Change what the header says of one tensor."""

    def spoil(data: bytes) -> bytes:
        header, tensors = parts(data)
        return assemble({**header, name: {**header[name], **changes}}, tensors)

    return spoil


def renamed(data: bytes) -> bytes:
    header, tensors = parts(data)
    header["readout.slope"] = header.pop("readout.bias")
    return assemble(header, tensors)


@pytest.mark.parametrize("case", RULE_CASES)
def test_a_round_trip_keeps_everything(case: str, tmp_path: Path) -> None:
    weights = Weights(small_rule(case), "mïne", 'schema = 1\n# "ß"\n', {"commit": "abc", "who": "Zoë"})
    weights.save(tmp_path / "a.safetensors")
    read = read_weights(tmp_path / "a.safetensors")
    assert (read.name, read.title, read.recipe) == ("mïne", "mïne", weights.recipe)
    assert (read.metadata, read.fingerprint) == (weights.metadata, weights.fingerprint)
    assert read.rule.config == weights.rule.config
    assert_identical(dict(read.rule.state_dict()), dict(weights.rule.state_dict()))
    mine, theirs = make_params(), make_params()
    take_steps(LearnedOptimizer(mine, weights=weights), mine, 3)
    take_steps(LearnedOptimizer(theirs, weights=tmp_path / "a.safetensors"), theirs, 3)
    assert_identical(copies(mine), copies(theirs))


LARGE = {
    "paper": {"input_scale": 10**6, "output_scale": 10**5, "preprocess_p": 87},
    "adam-modulation": {
        "anneal_power": 1,
        "anneal_start": 10**6,
        "anneal_steps": 10**5,
        "outlier_bound": 10**4,
        "time_scales": (10**7, 10**8),
    },
}


@pytest.mark.parametrize("family", LARGE)
def test_large_numbers_survive_a_small_file(family: str, tmp_path: Path) -> None:
    """Options say nothing of how much a file must hold; integers are what older files have."""
    rule, file = build_rule(family, hidden_size=1, num_layers=1, **LARGE[family]), tmp_path / "rule.safetensors"
    weights = Weights(rule)
    weights.save(file)
    header, tensors = parts(file.read_bytes())
    spec = {"family": family, "hidden_size": 1, "num_layers": 1, **LARGE[family]}
    header["__metadata__"] = {"learned_optim_format": "1", "name": "", "recipe": "", "rule": json.dumps(spec)}
    assert len(file.read_bytes()) < 10**4
    for read in (read_weights(file), from_bytes(assemble(header, tensors))):
        assert read.rule.config == rule.config
        assert read.fingerprint == weights.fingerprint
    optimizer = pickle.loads(pickle.dumps(LearnedOptimizer(make_params(), weights=rule)))
    assert optimizer.param_groups[0]["fingerprint"] == weights.fingerprint


def test_the_rule_of_bundled_weights_can_be_saved_as_ones_own(tmp_path: Path) -> None:
    for name in available_weights():
        bundled, file = resolve_weights(name), tmp_path / f"{name}.safetensors"
        Weights(bundled.rule).save(file)
        assert read_weights(file).fingerprint == bundled.fingerprint


def test_equal_weights_give_equal_bytes_whatever_the_path_and_the_process(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    elsewhere = tmp_path / "elsewhere.safetensors"
    for source in (path, elsewhere):  # From a file, then from the file written of it.
        Weights.from_pretrained(source).save(elsewhere)
        assert elsewhere.read_bytes() == data
    scrambled = Weights(small_rule(), "mine", "schema = 1\n", {"commit": "abc"})
    scrambled.metadata = dict(reversed({**scrambled.metadata}.items()))
    assert to_bytes(scrambled) == data


def test_the_format_is_what_it_was() -> None:
    """A file of format 1, put together by hand, must be readable for ever, and its fingerprint must not change."""
    shapes = {
        "lstm.bias_hh_l0": [8],
        "lstm.bias_ih_l0": [8],
        "lstm.weight_hh_l0": [8, 2],
        "lstm.weight_ih_l0": [8, 1],
        "readout.bias": [1],
        "readout.weight": [1, 2],
    }
    header: dict[str, object] = {
        "__metadata__": {
            "learned_optim_format": "1",
            "rule": '{"family": "paper", "hidden_size": 2, "num_layers": 1, "output_scale": 0.5}',
            "name": "by hand",
            "recipe": "",
        }
    }
    tensors, value = b"", 0
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        content = struct.pack(f"<{size}f", *[(value + i) / 64 for i in range(size)])
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(tensors), len(tensors) + len(content)]}
        tensors, value = tensors + content, value + size
    weights = from_bytes(assemble(header, tensors))
    assert weights.rule.readout.weight.tolist() == [[41 / 64, 42 / 64]]
    assert weights.fingerprint == "4f38850876d119db4871f397fadf934ea613b5fa51590831db73112c7819bda8"


BAD_FILES: dict[str, tuple[Spoil, str]] = {
    "empty": (lambda data: b"", "is empty"),
    "three bytes": (lambda data: data[:3], r"truncated, corrupt or not a safetensors file \(3 bytes"),
    "cut": (lambda data: data[: len(data) // 2], "truncated"),
    "one byte short": (lambda data: data[:-1], "truncated"),
    "one byte long": (lambda data: data + b"\0", "corrupt"),
    "noise": (lambda data: struct.pack("<Q", 40) + bytes(range(200)), "not a safetensors file"),
    "vast header": (lambda data: struct.pack("<Q", 2**60) + data[8:], "not a safetensors file"),
    "LFS pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
    "pickle": (lambda data: pickle.dumps({"a": list(range(9))}), "is a pickle, which can run code"),
    "old pickle": (lambda data: pickle.dumps({"a": list(range(9))}, protocol=2), "is a pickle, which can run code"),
    "foreign": (with_header(learned_optim_format=None), "not of learned-optim"),
    "newer": (with_header(learned_optim_format="2"), "format '2'.*reads '1'; upgrade learned-optim"),
    "odd version": (with_header(learned_optim_format="²"), "format '²'"),
    "no recipe": (with_header(recipe=None), "the header lacks recipe"),
    "bad JSON": (with_header(rule="{"), "describes no rule of this version"),
    "JSON of another kind": (with_header(rule="[]"), "describes no rule of this version"),
    "deep JSON": (with_header(rule="[" * 100_000), "describes no rule of this version"),
    "no family": (with_rule(family=None), "the rule in its header has no 'family'"),
    "unknown family": (with_rule(family="x"), "unknown rule family 'x'.*upgrade"),
    "unknown option": (with_rule(zeal=1), "has no option zeal"),
    "bad value": (with_rule(slow_decay=2), r"slow_decay must lie in \[0, 1\)"),
    "value of another kind": (with_rule(hidden_size="8"), "describes no rule"),
    "no number": (with_rule(step_size=float("inf")), "Infinity is no setting"),
    "endless layers": (with_rule(num_layers=10**9), "num_layers = 1000000000 is more than a file"),
    "other shape": (with_rule(hidden_size=9), r"tensor 'lstm.bias_hh_l0' has shape \(32,\).*needs \(36,\)"),
    "more layers": (with_rule(num_layers=2), "num_layers = 2 is more than a file of .* bytes and 6 tensors can hold"),
    "vast layers": (with_rule(hidden_size=10**9), "hidden_size = 1000000000 is more than a file"),
    "a number without bound": (with_rule(anneal_start=10**400), "a number of 401 digits"),
    "other name": (renamed, "'readout.bias' of shape .* is missing"),
    "other family": (with_header(rule='{"family": "paper", "hidden_size": 8, "num_layers": 1}'), "has shape"),
    "other dtype": (with_tensor("readout.bias", dtype="I32"), "'readout.bias' is I32, weight files hold F32"),
    "not finite": (lambda data: data[:-4] + struct.pack("<f", float("nan")), "holds NaN or Inf"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_explained(kind: str, path: Path) -> None:
    spoil, message = BAD_FILES[kind]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(WeightsError, match=message) as error:
        LearnedOptimizer([torch.ones(1, requires_grad=True)], weights=path)
    assert str(path) in str(error.value)


def test_layers_are_counted_before_any_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making them takes time that grows with their square."""
    monkeypatch.setattr(file_format, "build_rule", lambda *_, **__: pytest.fail("a rule was built"))
    path.write_bytes(with_header(recipe="#" * 20_000)(with_rule(num_layers=20_000)(path.read_bytes())))
    with pytest.raises(WeightsError, match=r"num_layers = 20000 is more than .* 6 tensors can hold"):
        read_weights(path)


def test_a_large_file_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(path, MAX_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it was read"))
    with pytest.raises(WeightsError, match=r"has 16,777,217 bytes, and an update rule has kilobytes.* may hold a model"):
        resolve_weights(path)


def test_weights_too_large_to_be_read_are_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(file_format, "MAX_BYTES", len(before) - 1)
    with pytest.raises(WeightsError, match=f"would be a file of {len(before):,} bytes"):
        Weights(small_rule(), "mine", "schema = 1\n", {"commit": "abc"}).save(path)
    assert path.read_bytes() == before


def test_a_surplus_tensor_is_explained(path: Path) -> None:
    header, tensors = parts(path.read_bytes())
    header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(tensors), len(tensors) + 4]}
    path.write_bytes(assemble(header, tensors + b"\0\0\0\0"))
    with pytest.raises(WeightsError, match="'extra' does not belong to the rule"):
        read_weights(path)


def test_no_cut_of_a_file_is_mistaken_for_weights(path: Path) -> None:
    data = path.read_bytes()
    for end in range(0, len(data), 37):
        path.write_bytes(data[:end])
        with pytest.raises(WeightsError):
            read_weights(path)


def test_a_model_is_not_taken_for_a_rule(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="not of learned-optim"):
        read_weights(tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "pkl", "ckpt", "safetensors"])
def test_a_pickle_is_never_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    torch.save(small_rule().state_dict(), file)
    with pytest.raises(WeightsError, match="is a pickle, which can run code"):
        resolve_weights(str(file))


def test_an_unreadable_path_is_explained(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"cannot read weights from .*directory"):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file; check the path"):
        read_weights(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(failing, fail)
    expected = WeightsError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"No space left|^$"):
        Weights(small_rule(seed=1)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_where_nothing_can_be_written_is_explained(path: Path) -> None:
    weights = read_weights(path)
    with pytest.raises(WeightsError, match="No such file or directory; make the directory"):
        weights.save(path.parent / "missing" / "rule.safetensors")
    with pytest.raises(WeightsError, match=r"weight files end in \.safetensors"):
        weights.save(path.with_suffix(".pt"))
    (path.parent / "taken.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"cannot write weights to .*directory"):
        weights.save(path.parent / "taken.safetensors")
    assert sorted(os.listdir(path.parent)) == ["rule.safetensors", "taken.safetensors"]


def test_writers_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    made = [Weights(small_rule(seed=seed)) for seed in range(4)]
    target = tmp_path / "rule.safetensors"
    threads = [threading.Thread(target=write_weights, args=(target, weights)) for weights in made * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_weights(target).fingerprint in {weights.fingerprint for weights in made}
    assert os.listdir(tmp_path) == [target.name]


def test_what_could_not_be_read_back_is_not_written(path: Path) -> None:
    before = path.read_bytes()
    rule = small_rule()
    nn.init.constant_(rule.readout.bias, float("nan"))
    bad = {
        r"'readout\.bias' holds NaN or Inf": Weights(rule),
        "metadata 'recipe': 'x' cannot be written": Weights(small_rule(), metadata={"recipe": "x"}),
        "metadata 'steps': 3 cannot be written": Weights(small_rule(), metadata={"steps": 3}),  # type: ignore[dict-item]
    }
    for message, weights in bad.items():
        with pytest.raises(WeightsError, match=message):
            weights.save(path)
    with pytest.raises(WeightsError, match="NaN or Inf"):
        pickle.dumps(Weights(rule))
    assert path.read_bytes() == before


def test_reading_draws_no_random_numbers(path: Path) -> None:
    state = torch.get_rng_state()
    read_weights(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pickled_optimizer_needs_neither_the_file_nor_the_process_it_came_from(path: Path, tmp_path: Path) -> None:
    params = make_params([(3, 4)])
    optimizer = LearnedOptimizer(params, weights=path)
    take_steps(optimizer, params, 2)
    (tmp_path / "optimizer.pickle").write_bytes(pickle.dumps(optimizer))
    path.unlink()
    code = """
import pickle, sys
import torch
optimizer = pickle.loads(open("optimizer.pickle", "rb").read())
(param,) = optimizer.param_groups[0]["params"]
param.grad = torch.ones_like(param)
optimizer.step()
weights = next(iter(optimizer._weights.values()))
print(param.tolist(), [weights.name, weights.title, weights.recipe, dict(weights.metadata)], sep="\\n")
assert "huggingface_hub" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    values, known = done.stdout.splitlines()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    torch.testing.assert_close(torch.tensor(json.loads(values)), params[0].detach(), rtol=1e-6, atol=1e-7)
    assert known == str([str(path), "mine", "schema = 1\n", {"commit": "abc"}])


def test_copies_share_the_network(path: Path) -> None:
    weights = resolve_weights(path)
    for twin in (copy.copy(weights), copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert twin is weights
    assert weights.called("other").rule is weights.rule


def test_the_fingerprint_is_of_the_numerics_alone() -> None:
    rule = small_rule()
    same = Weights(rule, "a").fingerprint
    assert Weights(copy.deepcopy(rule).double(), "b", "schema = 1\n", {"c": "d"}).fingerprint == same
    other = build_rule("adam-modulation", step_size=0.1)
    other.load_state_dict(rule.state_dict())
    assert Weights(other).fingerprint != same
    with torch.no_grad():
        rule.readout.bias[0] += 1e-6
    assert Weights(rule).fingerprint != same


WRITTEN_TWICE: list[tuple[str, dict[str, int]]] = [
    ("paper", {"input_scale": 100, "output_scale": 2, "preprocess_p": 5}),
    (
        "adam-modulation",
        {
            "fast_decay": 0,
            "slow_decay": 0,
            "second_moment_decay": 0,
            "outlier_bound": 20,
            "step_size": 1,
            "min_scale": 1,
            "small_min_scale": 1,
            "max_scale": 2,
            "anneal_power": 1,
            "anneal_steps": 2500,
            "anneal_start": 5000,
            "log_gain": 4,
        },
    ),
]


@pytest.mark.parametrize(("family", "options"), WRITTEN_TWICE)
def test_an_integer_and_the_same_float_are_one_rule(family: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    rule = build_rule(family, **options)
    for name, value in options.items():
        twin = build_rule(family, **{**options, name: float(value)})
        twin.load_state_dict(rule.state_dict())
        assert Weights(twin).fingerprint == Weights(rule).fingerprint, name
        assert to_bytes(Weights(twin)) == to_bytes(Weights(rule)), name


def test_fingerprints_are_what_they_were() -> None:
    """Of bundled weights some options were integers and others floats; checkpoints hold the fingerprints."""
    rule = build_rule("adam-modulation", anneal_power=1.0, anneal_start=5000, anneal_steps=2500, outlier_bound=20.0)
    for parameter in rule.parameters():
        nn.init.zeros_(parameter)
    assert Weights(rule).fingerprint == "d6658e3066d82e653d7fce52a9821d64bf96f29451b58e8ec5f1e359b4964393"


def test_a_missing_file_can_be_told_from_a_bad_one(path: Path) -> None:
    assert issubclass(WeightsNotFoundError, (WeightsError, FileNotFoundError))
    assert issubclass(WeightsError, ValueError)
    path.write_bytes(b"")
    with pytest.raises(WeightsError) as caught:
        resolve_weights(path)
    assert not isinstance(caught.value, FileNotFoundError)
    missing = WeightsNotFoundError("gone")
    assert str(pickle.loads(pickle.dumps(missing))) == str(missing) == "gone"
