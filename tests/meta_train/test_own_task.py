"""A task of a user's own code: named in a recipe, imported only where the user named it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from learned_optim import Weights
from learned_optim.weights import available_weights, read_weights, resolve_weights
from meta_train.__main__ import main
from meta_train.judging.arena_choice import FirstProblem, choose_arena
from meta_train.judging.arenas import ARENAS
from meta_train.judging.contestants import learned
from meta_train.rows import read_rows
from meta_train.tasks import Quadratic, Quartic
from meta_train.training import recipe_text
from meta_train.training.outer_loop import MetaTraining
from meta_train.training.recipe import parse_recipe
from meta_train.training.recipe_text import pinned
from meta_train.training.run_dir import RunDir
from meta_train.workers import Workers
from tests.cases import small_rule
from tests.meta_train.test_recipe import FROM_DEFAULT, TINY

MODULE = """
import torch
from meta_train.tasks import Optimizee, seeded

class Bowl:
    def __init__(self, width=1.0, problems=2):
        self.width, self.problems = width, problems

    def sample(self, seed):
        generator = seeded(seed)
        target = torch.randn(self.problems, 3, generator=generator)
        return Optimizee(
            {"x": torch.zeros(self.problems, 3)}, lambda p: self.width * (p["x"] - target).square().sum(-1), generator
        )

class Nothing: pass
"""
OWN = TINY.replace('name = "quadratic"\ndimension = 3\nfunctions = 4', 'name = "bowls_{}:Bowl"\nwidth = 2.0')


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module that only ``tmp_path`` holds, under a name that no other test has imported."""
    name = f"bowls_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path] + [str(tmp_path)])
    return name


def own_recipe(module: str) -> str:
    return OWN.replace("bowls_{}", module)


def test_every_verb_works_for_an_own_task(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text(own_recipe(module))
    assert main(["train", "mine.toml", "--out", "run"]) == 0
    assert main(["train", "mine.toml", "--out", "run"]) == 0, "resuming"
    assert main(["publish", "run", "--name", "bowls", "--to", "published"]) == 0
    weights = "published/bowls.safetensors"
    task = f"{module}:Bowl"
    for asked in (task, "mine.toml"):
        assert main(["evaluate", weights, "--task", asked, "--out", "results", "--cache", "cache"]) == 0
    about = json.loads(Path("results/environment.json").read_text())
    assert (about["task"], about["trained_to"], about["last"]) == (task, 12, 1)
    assert {row["horizon"] for row in read_rows(Path("results/summary.csv"))} == {"8"}
    assert main(["figures", "results", "--runs", "run"]) == 0
    assert {path.name for path in Path("results").glob("*.svg")} == {"curves.svg", "probe.svg", "training.svg"}
    capsys.readouterr()
    assert main(["validate", weights, "--task", task]) == 0
    assert "equal" in capsys.readouterr().out
    assert len(Weights.from_pretrained(weights).metadata["task_code"]) == 16


def test_no_weight_file_makes_anything_be_imported(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = own_recipe(module)
    Weights(small_rule("paper-raw"), "theirs", text, {"validation": "1"}).save(tmp_path / "theirs.safetensors")
    for command in (["evaluate", "theirs.safetensors", "--out", "out"], ["validate", "theirs.safetensors"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert (
            f"nothing is imported because a weight file names it; if you have that code and trust it, say --task {module}:"
            in error
        )
        assert error.count("\n") == 1
    assert main(["validate", "theirs.safetensors", "--task", "json:JSONDecoder"]) == 2
    assert f"was not validated on json:JSONDecoder; its task is {module}:Bowl" in capsys.readouterr().err
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (":Bowl", ":Bowls", "has no class Bowls; its tasks are Bowl"),
        (":Bowl", ":Nothing", r"no task: it needs a method sample\(seed\)|does not take its options"),
        ("width", "widht", r"unexpected keyword argument 'widht'; it takes width, problems"),
        ('name = "bowls', 'name = "nowhere.bowls', "cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        (":Bowl", ":", "write it as package.module:Class"),
    ],
)
def test_mistakes_in_the_name_are_explained_before_anything_is_written(
    old: str, new: str, message: str, module: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        RunDir(tmp_path / "run", own_recipe(module).replace(old, new))
    assert not list((tmp_path / "run").iterdir())


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'cubic'.*cifar, mixture, mnist, neural-art, quadratic, quartic, or one of your own"
    ):
        parse_recipe(TINY.replace('"quadratic"', '"cubic"'))
    with pytest.raises(ValueError, match=r"'own'.*cifar"):
        parse_recipe(TINY.replace('"quadratic"', '"own"'))
    with pytest.raises(ValueError, match=r"validation.task.*held-out"):
        parse_recipe(TINY + 'task = {name = "held-in"}\n')


def test_workers_find_what_one_process_finds(module: str) -> None:
    recipe = parse_recipe(own_recipe(module))
    recipe = recipe.importing(recipe.own_tasks)
    with Workers(1) as workers:
        shared = list(MetaTraining(recipe, each=workers.map))
    assert shared == list(MetaTraining(recipe))


def test_changed_code_is_told_when_a_run_resumes(module: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", own_recipe(module))
    assert next(run.train(checkpoint_every=1))
    assert run.changes_since_start() == []
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    (tmp_path / "run" / "environment.json").write_text(json.dumps({**environment, "task_code": "0" * 16}))
    assert run.changes_since_start() == [f"task_code {'0' * 16} -> {environment['task_code']}"]


def test_weights_say_that_their_task_was_given_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / "run", TINY, task=Quadratic(dimension=2, functions=3))
    assert list(run.train())
    kept = read_weights(tmp_path / "run" / "best.safetensors")
    said = "meta_train.tasks.quadratic:Quadratic, given in Python and not by the recipe"
    assert kept.metadata["task"] == run.run.weights("mine").metadata["task"] == said
    for command in (["evaluate", "--out", str(tmp_path / "out")], ["validate"]):
        assert main([command[0], str(tmp_path / "run" / "best.safetensors"), *command[1:]]) == 2
        assert f"was {said}; name it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "arena"), [("quadratic", "quadratic"), ("mnist-mlp", "mnist"), ("neural-art", None), ("default", None)]
)
def test_weights_are_judged_on_the_task_of_their_recipe(weights: str, arena: str | None) -> None:
    name, found = choose_arena("", [learned(weights)])
    if arena:
        assert (name, found) == (arena, ARENAS[arena])
    else:
        recipe = parse_recipe(resolve_weights(weights).recipe)
        assert name == {"default": "mixture"}.get(weights, weights)
        assert found.horizons == (recipe.validation.horizon,)
    if weights == "neural-art":
        assert "split='test'" in repr(found.task), "never on what was meta-trained on"


def test_weights_without_a_recipe_need_a_task() -> None:
    with pytest.raises(ValueError, match="carries no recipe, so choose a task: --task quadratic"):
        choose_arena("", [learned(Weights(small_rule("paper-raw"), "bare"))])


def test_the_first_of_several_problems_is_judged() -> None:
    several, first = Quartic(3, 4).sample(1), FirstProblem(Quartic(3, 4)).sample(1)
    assert first.num_problems == 1
    point = {"x": several.params["x"][:1] + 0.5}
    moved = {"x": several.params["x"].clone()}
    moved["x"][0] += 0.5
    assert torch.equal(first.losses(point), several.losses(moved)[:1])


def test_a_run_pins_what_it_goes_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = resolve_weights("default").fingerprint
    rest = "[task]" + TINY.split("[task]")[1]
    for text in (FROM_DEFAULT, '[rule]\nbase = "default"  # mine\n' + rest):
        changed = pinned(text)
        assert changed == text.replace('"default"', f'"default@{fingerprint}"')
        assert parse_recipe(changed).start == f"default@{fingerprint}"
        assert pinned(changed) == changed
    based = '[rule]\nbase = "default"\n' + rest
    run = RunDir(tmp_path / "run", based)
    assert (tmp_path / "run" / "recipe.toml").read_text() == pinned(based)
    del run
    RunDir(tmp_path / "run", based)
    monkeypatch.setattr(recipe_text, "available_weights", lambda: ())
    with pytest.raises(ValueError, match="another recipe"):
        RunDir(tmp_path / "run", based.replace('"default"', '"default-v1"'))


def test_a_pin_finds_renamed_weights_and_refuses_others() -> None:
    first, other = (resolve_weights(name).fingerprint for name in ("default-v1", "default"))
    assert first != other
    base = '[rule]\nbase = "default@{}"\n[task]' + TINY.split("[task]")[1]
    renamed = parse_recipe(base.format(first))
    assert renamed.rule == parse_recipe(base.format(first).replace('"default@', '"default-v1@')).rule
    with pytest.raises(ValueError, match=f"goes on from 'default' with the fingerprint {'0' * 12}, and here"):
        parse_recipe(base.format("0" * 64))
    assert "default" in available_weights()
