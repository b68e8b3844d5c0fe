"""From what a user writes to weights, and how often they are loaded."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from learned_optim import LearnedOptimizer, Weights, WeightsError, WeightsNotFoundError, available_weights
from learned_optim.weights import file_format, hub, registry, resolve_weights
from learned_optim.weights import weights as weights_module
from tests.cases import make_params, small_rule


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "rule.safetensors"
    Weights(small_rule(), "mine").save(target)
    return target


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What the Hub is asked for; it has nothing."""
    seen: list[tuple[str, str | None]] = []

    def download(repo_id: str, revision: str | None, **_: object) -> None:
        seen.append((repo_id, revision))
        raise WeightsNotFoundError("not there")

    monkeypatch.setattr(hub, "download", download)
    return seen


@pytest.mark.parametrize("name", available_weights())
def test_every_bundled_file_loads_and_lies_beside_its_recipe(name: str) -> None:
    weights = Weights.from_pretrained(name)
    assert weights.name == weights.title == name
    part = weights.metadata.get("part")  # The parts of a model share a recipe.
    assert weights.recipe == (registry.BUNDLED / f"{name.removesuffix(f'-{part}')}.toml").read_text()
    assert weights.metadata["commit"]


def test_the_promised_names_are_bundled() -> None:
    promised = {"cifar-conv", "cifar-dense", "default", "mnist-mlp", "mnist-modulated", "neural-art", "quadratic"}
    assert promised <= set(available_weights())
    assert list(available_weights()) == sorted(available_weights())


def test_a_path_may_be_a_string_a_path_or_a_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = resolve_weights(path).fingerprint
    monkeypatch.chdir(path.parent)
    path.rename("no-suffix")
    Path("dir").mkdir()
    Path("dir/model.safetensors").write_bytes(Path("no-suffix").read_bytes())
    for weights in ("no-suffix", "./no-suffix", Path("no-suffix"), "dir", Path("dir"), "dir/model.safetensors"):
        loaded = resolve_weights(weights)
        assert (loaded.fingerprint, loaded.name, loaded.title) == (fingerprint, str(weights), "mine")


def test_a_bundled_name_wins_over_a_file_but_a_path_is_a_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    path.rename("default")
    assert resolve_weights("default").title == "default"
    assert resolve_weights(Path("default")).title == "mine"
    with pytest.raises(FileNotFoundError, match="no such file"):
        resolve_weights(Path("quadratic"))


def test_a_rule_and_weights_resolve_to_themselves() -> None:
    rule = small_rule()
    weights = Weights(rule, "mine")
    assert resolve_weights(weights) is weights
    resolved = resolve_weights(rule)
    assert resolved.fingerprint == weights.fingerprint
    nn.init.zeros_(rule.readout.weight)
    assert resolved.rule.readout.weight.abs().sum() > 0, "weights are a copy"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quadratics", "unknown weights 'quadratics'; did you mean 'quadratic'"),
        ("nothing like it", r"bundled are .*quadratic.*'owner/repo@revision' on the Hugging Face Hub, or the path of"),
        ("", "unknown weights ''"),
        ("owner/repo@", "unknown weights 'owner/repo@'"),
        ("a/b/c", "unknown weights 'a/b/c'"),
        ("./runs/mine", "unknown weights './runs/mine'"),
        ("/missing", "unknown weights '/missing'"),
        ("null\0byte", "unknown weights"),
        ("missing.safetensors", r"cannot read weights from missing\.safetensors: no such file"),
        ("owner/missing.safetensors", r"cannot read weights from owner/missing\.safetensors: no such file"),
    ],
)
def test_an_unknown_name_is_explained_and_not_looked_up(
    name: str, message: str, asked: list[tuple[str, str | None]]
) -> None:
    with pytest.raises(WeightsNotFoundError, match=message):
        LearnedOptimizer(make_params([(3,)]), weights=name)
    assert asked == []


def test_a_missing_pickle_is_not_looked_up_on_the_hub(asked: list[tuple[str, str | None]]) -> None:
    with pytest.raises(WeightsError, match="is a pickle"):
        resolve_weights("owner/weights.pt")
    assert asked == []


@pytest.mark.parametrize("weights", [None, 3, nn.Linear(1, 1), b"default"])
def test_another_type_is_refused(weights: object) -> None:
    with pytest.raises(TypeError, match="weights must be a name, a path, an UpdateRule or Weights, got"):
        resolve_weights(weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "revision", "wanted"),
    [
        ("me/rule", None, ("me/rule", None)),
        ("me/rule", "v1", ("me/rule", "v1")),
        ("me/rule@v1", None, ("me/rule", "v1")),
        ("me/rule@v1", "v1", ("me/rule", "v1")),
        ("me/my.rule-2_b@refs/pr/1", None, ("me/my.rule-2_b", "refs/pr/1")),
    ],
)
def test_hub_ids(
    name: str, revision: str | None, wanted: tuple[str, str | None], asked: list[tuple[str, str | None]]
) -> None:
    with pytest.raises(WeightsNotFoundError, match="not there"):
        resolve_weights(name, revision=revision)
    assert asked == [wanted]


def test_a_directory_hides_a_hub_id_only_if_it_holds_weights(
    path: Path, asked: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    Path("me/rule").mkdir(parents=True)
    with pytest.raises(WeightsNotFoundError, match="not there"):
        resolve_weights("me/rule")
    assert asked == [("me/rule", None)]
    path.rename("me/rule/model.safetensors")
    assert resolve_weights("me/rule").title == "mine"
    assert len(asked) == 1


def test_a_revision_belongs_to_the_hub(path: Path) -> None:
    for weights in ("default", path, small_rule(), Weights(small_rule())):
        with pytest.raises(WeightsError, match="revision='v1' is for weights on the Hub"):
            resolve_weights(weights, revision="v1")


def test_many_optimizers_share_one_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    from_bytes = file_format.from_bytes
    monkeypatch.setattr(weights_module, "from_bytes", lambda data, source: parsed.append(source) or from_bytes(data, source))
    made = [LearnedOptimizer([torch.ones(1, requires_grad=True)], weights=path) for _ in range(20)]
    networks = {id(weights.rule) for optimizer in made for weights in optimizer._weights.values()}
    assert len(networks) == 1
    assert parsed == [str(path)]
    assert resolve_weights("default") is resolve_weights("default")


def test_a_changed_file_is_read_again(path: Path) -> None:
    first = resolve_weights(path)
    Weights(small_rule(), "mine", "schema = 2\n").save(path)
    second = resolve_weights(path)
    assert (second.fingerprint, second.recipe) == (first.fingerprint, "schema = 2\n")
    Weights(small_rule(seed=1), "mine").save(path)
    assert resolve_weights(path).fingerprint != first.fingerprint


def test_threads_get_the_same_network(path: Path) -> None:
    start = threading.Barrier(8)
    loaded: list[Weights] = []
    rules: list[nn.Module] = []

    def load() -> None:
        start.wait()
        weights = resolve_weights(path)
        loaded.append(weights)
        rules.append(weights.rule_on(torch.device("cpu"), torch.float64))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 8
    assert len(set(map(id, loaded))) == 1
    assert len(set(map(id, rules))) == 1
