"""Several rules that share a model: in meta-training, in files, in an optimizer, in a judgement."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, Weights
from learned_optim.backends.native import step as native_backend
from meta_train.__main__ import main
from meta_train.evidence.cards import evidence
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import Learned
from meta_train.rows import read_rows
from meta_train.tasks import Optimizee, derive_seed, seeded
from meta_train.training import meta_gradient
from meta_train.training.meta_gradient import backpropagate, unroll
from meta_train.training.parts import Parts, part_of
from meta_train.training.publish import publish
from meta_train.training.roll_out import Sample, roll_out, start_episode
from meta_train.training.run_dir import RunDir
from tests.cases import RULE_CASES, small_rule
from tests.meta_train.test_meta_gradient import gradients, objective, relative_error
from tests.meta_train.test_recipe import TINY


def two_layers(seed: int, problems: int = 2) -> Optimizee:
    """Return nets whose parts take turns: the second part's bias comes before the first part's gain."""
    generator = seeded(seed)
    shapes = {"conv.weight": (3, 4), "dense.bias": (2,), "conv.gain": (4,), "dense.weight": (4, 2)}
    params = {name: 0.5 * torch.randn(problems, *shape, generator=generator) for name, shape in shapes.items()}

    def losses(params: dict[str, Tensor]) -> Tensor:
        x = torch.randn(problems, 6, 3, generator=generator).to(params["conv.gain"])
        hidden = (x @ params["conv.weight"]).tanh() * params["conv.gain"].unsqueeze(1)
        return (hidden @ params["dense.weight"] + params["dense.bias"].unsqueeze(1) - 1).square().mean((1, 2))

    return Optimizee(params, losses, generator)


def parts(case: str) -> Parts:
    return Parts({"conv": small_rule(case, 0), "dense": small_rule(case, 1)})


@pytest.mark.parametrize("case", RULE_CASES)
@pytest.mark.parametrize("native", [True, False])
def test_one_pass_equals_the_unroll(case: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(meta_gradient, "native_supports", lambda lstm: False)
        monkeypatch.setattr(native_backend, "supports", lambda rule: False)
    rule, once, again = parts(case), two_layers(1), two_layers(1)
    carry, twin = start_episode(rule, once), start_episode(rule, again)
    for _ in range(2):
        rule.zero_grad()
        record, carry = roll_out(rule, once, carry, 7)
        backpropagate(rule, record, objective(record.losses, carry.initial_loss))
        one_pass = gradients(rule)
        rule.zero_grad()
        losses, twin = unroll(rule, again, twin, 7, objective)
        torch.testing.assert_close(record.losses, losses, rtol=1e-4, atol=1e-5)
        assert len(one_pass) == len(list(rule.parameters()))
        assert relative_error(one_pass, gradients(rule)) < 1e-5


@pytest.mark.parametrize("case", RULE_CASES)
def test_equal_rules_for_all_parts_are_one_rule(case: str) -> None:
    rule = small_rule(case)
    shared = Parts({part: copy.deepcopy(rule) for part in ("conv", "dense")})
    some = Sample(torch.tensor([1, 13, 20, 30, 44]), torch.full((5,), 5 / 52))
    records = []
    for one in (Parts.whole(rule), shared):
        optimizee = two_layers(3)
        record, _ = roll_out(one, optimizee, start_episode(one, optimizee), 6, some)
        backpropagate(one, record, objective(record.losses, record.losses))
        records.append(record)
    torch.testing.assert_close(records[0].losses, records[1].losses)
    conv, dense = (gradients(one) for one in shared)
    for whole, first, second in zip(gradients(rule), conv, dense, strict=True):
        torch.testing.assert_close(first + second, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("case", RULE_CASES)
def test_a_roll_out_is_what_an_optimizer_with_groups_does(case: str) -> None:
    rule, optimizee, twin = parts(case), two_layers(2, 1), two_layers(2, 1)
    _, carry = roll_out(rule, optimizee, start_episode(rule, optimizee), 9)
    params = {name: nn.Parameter(value[0].clone()) for name, value in twin.params.items()}
    optimizer = Learned("both", "any", weights={part: Weights(one) for part, one in rule.items()}).make(params.items())
    for _ in range(9):
        optimizer.zero_grad()
        twin.losses({name: param.unsqueeze(0) for name, param in params.items()}).sum().backward()
        optimizer.step()
    flat = torch.cat([param.detach().flatten() for param in params.values()])
    torch.testing.assert_close(flat, carry.params[0], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_one_rule_without_parts_is_that_of_the_whole_model() -> None:
    rule, fresh = small_rule("paper-raw", 1), Parts.whole(small_rule("paper-raw"))
    fresh.load_state_dict(rule.state_dict())
    assert fresh.names == ("",)
    for name, value in rule.state_dict().items():
        assert torch.equal(fresh.shared.state_dict()[name], value), name


def test_every_parameter_belongs_to_one_part() -> None:
    assert [part_of(("conv", "dense"), name) for name in ("dense0.bias", "conv1.weight")] == [1, 0]
    with pytest.raises(ValueError, match=r"'head\.bias' must belong to one of the parts conv, dense; it begins as none"):
        part_of(("conv", "dense"), "head.bias")
    with pytest.raises(ValueError, match="it begins as 'a' and 'ab'"):
        part_of(("a", "ab"), "abc")


RECIPE = TINY.replace("seed = 0", 'seed = 0\nparts = ["first", "second"]')


class Two:
    """Quadratics in two tensors."""

    def sample(self, seed: int) -> Optimizee:
        generator = seeded(seed)
        params = {name: torch.randn(1, 3, generator=generator) for name in ("first", "second")}
        return Optimizee(params, lambda p: (p["first"] - 1).square().sum(1) + p["second"].square().sum(1), generator)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("meta_train.training.outer_loop.with_data", lambda task, data: Two())
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 0
    return tmp_path


def test_a_run_of_parts_resumes_and_publishes_a_file_for_each(place: Path) -> None:
    stopped = RunDir(place / "again", RECIPE)
    for record in stopped.train(checkpoint_every=4):
        if record.step == 9:
            break
    assert list(RunDir(place / "again", RECIPE).train())
    paths = publish(place / "run", "both", place)
    assert [path.name for path in paths] == ["both-first.safetensors", "both-second.safetensors"]
    assert (place / "both.toml").read_text() == RECIPE
    loaded = [Weights.from_pretrained(path) for path in paths]
    assert [weights.metadata["part"] for weights in loaded] == ["first", "second"]
    assert {weights.recipe for weights in loaded} == {RECIPE}
    assert loaded[0].fingerprint != loaded[1].fingerprint
    for path, again in zip(paths, publish(place / "again", "both", place), strict=True):
        assert Weights.from_pretrained(path).fingerprint == Weights.from_pretrained(again).fingerprint


def test_parts_are_validated_together(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = map(str, publish(place / "run", "both", place))
    capsys.readouterr()
    for together in (f"{first}+{second}", f"{second}+{first}"):
        assert main(["validate", together]) == 0
        assert capsys.readouterr().out.endswith(": equal\n")
    assert main(["validate", first]) == 2
    assert "both-first was validated together with second" in capsys.readouterr().err


def test_parts_are_judged_together(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = [Setting("Adam", lr) for lr in (1e-6, 0.1, 1e6)]
    monkeypatch.setitem(ARENAS, "digits", Arena(Two(), sweep, tuning=1, fresh=2, horizons=(6, 3)))
    paths = publish(place / "run", "both", place)
    together = "+".join(map(str, paths))
    command = ["evaluate", together, "--task", "digits", "--out", str(place / "out"), "--cache", str(place / "cache")]
    assert main(command) == 0
    about = json.loads((place / "out" / "environment.json").read_text())
    assert about["command"] == "python -m meta_train evaluate both-first+both-second --task digits --out runs/results"
    assert about["fingerprints"] == {"both": "+".join(Weights.from_pretrained(path).fingerprint for path in paths)}
    assert all("both" in evidence(Weights.from_pretrained(path), place / "out") for path in paths)
    (row,) = [
        row
        for row in read_rows(place / "out" / "summary.csv")
        if (row["optimizer"], row["criterion"], row["horizon"]) == ("LSTM (both)", "final", "6")
    ]
    finals = []
    for index in range(2):
        optimizee = Two().sample(derive_seed(0, "evaluation", index))
        params = {name: nn.Parameter(value[0]) for name, value in optimizee.params.items()}
        groups = [{"params": [params[part]], "weights": path} for part, path in zip(params, paths, strict=True)]
        optimizer = LearnedOptimizer(groups)
        for _ in range(6):
            optimizer.zero_grad()
            optimizee.losses({name: param.unsqueeze(0) for name, param in params.items()}).sum().backward()
            optimizer.step()
        finals.append(optimizee.losses({name: param.unsqueeze(0) for name, param in params.items()}).item())
    assert float(row["mean"]) == pytest.approx(sum(finals) / 2, rel=1e-5)
    assert main(["verify", together, "--results", str(place / "out")]) == 0
    assert capsys.readouterr().out.count(": equal") == 4
    whole = place / "whole.safetensors"
    Weights(small_rule(), "whole").save(whole)
    assert main(["evaluate", f"{paths[0]}+{whole}", "--task", "digits", "--out", str(place / "no")]) == 2
    assert "whole moves a whole model" in capsys.readouterr().err
