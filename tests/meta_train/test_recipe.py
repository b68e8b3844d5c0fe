from pathlib import Path

import msgspec
import pytest

from learned_optim.rules import AdamModulationRule
from learned_optim.weights import resolve_weights
from meta_train.training.recipe import Phase, parse_recipe, read_recipe

WEIGHTS = Path(__file__).parent.parent.parent / "learned_optim" / "weights"
TINY = """
seed = 0
[rule]
family = "paper"
hidden_size = 3
num_layers = 1
output_scale = 0.1
[task]
name = "quadratic"
dimension = 3
functions = 4
[inner]
horizon = [6, 12]
truncation = 5
[outer]
steps = 12
lr = 0.01
episodes = 2
coordinates = 7
averaging = 0.5
[validation]
every = 4
optimizees = 2
horizon = 8
"""

FROM_DEFAULT = (
    'start = "default"\nparts = ["theta"]\n[rule]\nfamily = "adam-modulation"\ntime_scales = [1, 2, 3]\n[task]'
    + TINY.split("[task]")[1]
)


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_recipe_parses(path: Path) -> None:
    read_recipe(path).build_rule()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 0.01", "lrr = 0.01", r"`lrr`.*\$\.outer"),
        ("lr = 0.01", "lr = -1.0", r"> 0.*\$\.outer\.lr"),
        ("steps = 12", 'steps = "many"', r"Expected `int`.*\$\.outer\.steps"),
        ('name = "quadratic"', 'name = "cubic"', r"Invalid value 'cubic'.*\$\.task"),
        ("seed = 0", "seed = 0\nimitation = {teacher = 'dafault', steps = 1, lr = 1}", "dafault.*default"),
        ("seed = 0", "seed = 0\nimitation = {teacher = -0.1, steps = 1, lr = 1}", r"> 0.*\$\.imitation\.teacher"),
        ("seed = 0", "seed = 0\nstart = 'dafault'", "dafault.*default"),
        ("seed = 0", "seed = 0\nstart = 'quadratic'", r"same family and shape.*'quadratic' is paper.*hidden_size=3"),
        ("lr = 0.01", "lr = 0.01\nevolution = {noise = 0.1, only = 'readin'}", "'readin'.*readout.bias"),
        ("functions = 4", "functionz = 4", r"`functionz`.*\$\.task"),
        ('family = "paper"', 'family = "papers"', "unknown rule family 'papers'"),
        ('family = "paper"', "", "names no family"),
        ("hidden_size = 3", "hidden = 3", "has no option hidden"),
        ('family = "paper"', 'base = "dafault"', r"one of .*default.*'dafault'"),
        ('family = "paper"', 'base = ["default"]', r"one of .*default"),
        ('family = "paper"', 'base = "default"', "has no option output_scale"),
        ("horizon = [6, 12]", "horizon = [12, 6]", "shortest, longest"),
        ("horizon = 8", "horizon = 8\n[[stages]]\nsteps = 1\nlr = 0.1\nhorizon = [9, 3]", "shortest, longest"),
        ("[outer]", "[outer", "not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_its_place(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in TINY
    (tmp_path / "recipe.toml").write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(tmp_path / "recipe.toml")
    assert "recipe.toml" in str(error.value)


def test_a_rule_in_use_may_do_other_things_with_the_same_meta_parameters() -> None:
    recipe = parse_recipe(TINY + "[use]\noutput_scale = 7\n")
    assert recipe.build_rule(**recipe.use).shared.config.output_scale == 7
    assert recipe.build_rule().shared.config.output_scale != 7


@pytest.mark.parametrize("table", ["use", "validation.use"])
def test_options_that_change_the_shape_of_the_meta_parameters_are_refused(table: str) -> None:
    with pytest.raises(ValueError, match=r"shape of the meta-parameters.*hidden_size"):
        parse_recipe(TINY + f"[{table}]\nhidden_size = 4\n")


def test_imitation_comes_first() -> None:
    evolving = TINY.replace("lr = 0.01", "lr = 0.01\nevolution = {noise = 0.1}")
    plain, taught = (parse_recipe(evolving + more) for more in ("", "[imitation]\nteacher = 0.1\nsteps = 5\nlr = 0.2\n"))
    first, second = taught.phases
    outer = msgspec.structs.replace(plain.outer, steps=5, lr=0.2, sampling="tensors", evolution=None)
    assert first == Phase(plain.inner, outer, imitates=True)
    assert (second,) == plain.phases
    assert taught.steps == plain.steps + 5
    assert isinstance(taught.imitation.build_teacher(), AdamModulationRule)


def test_options_reach_the_rule() -> None:
    rule = parse_recipe(TINY).build_rule().shared
    assert (rule.config.hidden_size, rule.config.num_layers) == (3, 1)


def test_a_stage_changes_what_it_names_for_itself_and_all_that_follow() -> None:
    named = (
        "truncation = 3\nclip = 0.25\nsampling = 'tensors'\naveraging = 0.75\nsecond_derivatives = true\nhorizon = [8, 9]\n"
    )
    stages = f"[[stages]]\nsteps = 5\nlr = 0.2\n{named}[[stages]]\nsteps = 6\nlr = 0.3\n"
    first, second, third = parse_recipe(TINY + stages).phases
    assert first == parse_recipe(TINY).phases[0]
    inner, outer, _ = second
    assert (inner.horizon, inner.truncation) == ((8, 9), 3)
    assert (outer.steps, outer.lr, outer.clip, outer.sampling, outer.averaging) == (5, 0.2, 0.25, "tensors", 0.75)
    assert outer.second_derivatives
    assert (outer.episodes, outer.coordinates) == (2, 7)
    assert third == Phase(inner, msgspec.structs.replace(outer, steps=6, lr=0.3))


def test_long_episodes_had_a_say_in_which_weights_are_the_default() -> None:
    weights = resolve_weights("default")
    validation = parse_recipe(weights.recipe).validation
    assert validation.final_horizon == (600, 4000)
    assert float(weights.metadata["final_validation"]) < float(weights.metadata["validation"]), "longer is lower"


def test_a_base_gives_rule_use_and_start_and_the_recipe_has_the_last_word() -> None:
    rest = "[task]" + TINY.split("[task]")[1]
    source = read_recipe(WEIGHTS / "default.toml")
    recipe = parse_recipe('[rule]\nbase = "default"\n' + rest)
    assert (recipe.rule, recipe.use, recipe.start) == (source.rule, source.use, "default")
    own = parse_recipe('start = "default-v1"\n[rule]\nbase = "default"\nstep_size = 0.5\n[use]\nmin_scale = 0.25\n' + rest)
    assert own.rule == source.rule | {"step_size": 0.5}
    assert own.use == source.use | {"min_scale": 0.25}
    assert own.start == "default-v1"
