"""Digits: read once, split in halves, nets by hand; and what the figures of other architectures are drawn from."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor

from meta_train.__main__ import main
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import settings
from meta_train.rows import read_rows
from meta_train.tasks import Mnist, mnist
from meta_train.tasks.images import MNIST, read_images
from meta_train.training.roll_out import loss_and_grad
from tests.meta_train.digits import make_digits
from tests.meta_train.test_recipe import TINY

RECIPE = re.sub(r'name = "quadratic"\ndimension = 3\nfunctions = 4', 'name = "mnist"\nhidden = [3]\nbatch = 8', TINY)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Images whose top row tells the label: a net can learn them."""
    labels = torch.randint(10, (60_000,), generator=torch.Generator().manual_seed(3))
    pixels = torch.randint(40, (60_000, 4, 10), generator=torch.Generator().manual_seed(4))
    pixels[:, 0] += 200 * F.one_hot(labels, 10)
    return pixels.byte(), labels


@pytest.fixture
def asked(digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Put the digits in the place of the real ones; tells where they were looked for."""
    places: list[Path | None] = []

    def read(_: object, data: Path | None, split: str, part: range) -> tuple[Tensor, Tensor]:
        assert split == "train"
        places.append(data)
        return digits[0][part.start : part.stop], digits[1][part.start : part.stop]

    monkeypatch.setattr(mnist, "read_images", read)
    return places


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
@pytest.mark.parametrize("hidden", [(), (3,), (4, 2)])
def test_the_net_is_the_one_that_is_written_down(digits: tuple[Tensor, Tensor], hidden: tuple[int, ...], activation) -> None:
    task = Mnist(hidden, activation, batch=6, problems=2, initial_std=0.5)
    pixels, labels = digits[0][:50], digits[1][:50]
    optimizee = task.sample_from(pixels, labels, 7)
    twin = torch.Generator()
    twin.set_state(optimizee.generator.get_state())
    losses, _ = loss_and_grad(optimizee, optimizee.flat_params())
    index = torch.randint(50, (2, 6), generator=twin)
    for problem in range(2):
        x = pixels[index[problem]].flatten(1) / 255
        for layer in range(len(hidden) + 1):
            weight, bias = (optimizee.params[f"{name}{layer}"][problem] for name in ("weight", "bias"))
            x = x @ weight + bias
            x = getattr(torch, activation)(x) if layer < len(hidden) else x
        torch.testing.assert_close(losses[problem], F.cross_entropy(x, labels[index[problem]]))


def test_nets_start_small_each_its_own_and_see_their_own_minibatches(digits: tuple[Tensor, Tensor]) -> None:
    optimizee = Mnist(problems=2).sample_from(*digits, seed=0)
    first, second = optimizee.flat_params()
    assert first.std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(first, second)
    losses, _ = loss_and_grad(optimizee, first.expand(2, -1))
    assert losses[0] != losses[1]


def test_a_user_s_conditions_are_drawn(digits: tuple[Tensor, Tensor]) -> None:
    task = Mnist(
        (20, 20), batch=(64, 256), pixels=("unit", "standard", "centred"), start=("gaussian", "pytorch"), units=(10, 80)
    )
    drawn = [task.sample_from(digits[0][:99], digits[1][:99], seed) for seed in range(40)]
    units = {optimizee.params["weight0"].shape[-1] for optimizee in drawn}
    assert min(units) >= 10
    assert max(units) <= 80
    assert len(units) > 20
    assert all(one.params["weight1"].shape[1:] == one.params["weight0"].shape[-1:] * 2 for one in drawn)
    sizes = {round(float(one.params["weight0"].std()), 2) for one in drawn}
    assert sizes == {0.01, round((3 * 40) ** -0.5, 2)}, "nn.Linear draws evenly within one over the root of its inputs"
    assert all(one.losses(one.params).isfinite() for one in drawn)


@pytest.mark.parametrize(
    ("pixels", "mean", "deviation"), [("unit", 0.5, 0.1), ("standard", 1.2, 0.32), ("centred", 0.0, 0.1)]
)
def test_pixels_are_normalised_as_they_say(pixels: mnist.Pixels, mean: float, deviation: float) -> None:
    generator = torch.Generator().manual_seed(1)
    images = (127.5 + 25.5 * torch.randn(4000, 3, 1, generator=generator)).clamp(0, 255).byte()
    shift, factor = mnist._normalisation(pixels, images)
    x = (images.flatten(1) / 255 - shift) * factor
    assert float(x.mean()) == pytest.approx(mean, abs=0.01)
    assert float(x.std()) == pytest.approx(deviation, rel=0.03)


def test_without_a_choice_nothing_is_drawn(digits: tuple[Tensor, Tensor]) -> None:
    plain, named = (Mnist(batch=8, **options).sample_from(*digits, 5) for options in ({}, {"pixels": ("unit",)}))
    assert torch.equal(plain.flat_params(), named.flat_params())
    assert torch.equal(plain.generator.get_state(), named.generator.get_state())


def test_the_halves_share_no_digit(asked: list[Path | None], digits: tuple[Tensor, Tensor]) -> None:
    used = {half: set(part) for half, part in mnist.HALVES.items()}
    assert used["first"].isdisjoint(used["second"])
    assert used["first"] | used["second"] == set(range(60_000))
    drawn = [loss_and_grad(o := Mnist(half=half).sample(5), o.flat_params())[0] for half in ("first", "second", "first")]
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_hub_is_asked_where_no_directory_is_given(asked: list[Path | None]) -> None:
    task = Mnist()
    assert task.sample(1).params["weight0"].shape == (1, 40, 20)
    task.on(Path("here")).sample(1)
    assert asked == [None, Path("here")]


def test_a_recipe_names_the_task_and_no_place(asked: list[Path | None], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"), "--data", str(tmp_path)]) == 0
    assert set(asked) == {tmp_path}
    assert not any(str(tmp_path) in path.read_text(errors="ignore") for path in (tmp_path / "run").iterdir())


def test_other_architectures_lie_in_subdirectories(
    asked: list[Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Arena(
        Mnist((3,), batch=64, initial_std=0.5), settings("Adam", [1e-5, 0.1, 1e4]), tuning=2, fresh=2, horizons=(30,)
    )
    names = {"": "mnist", "sizes/deep": "mnist-20x2", "kinked": "mnist-relu", "wide": "mnist-40x1"}
    tasks = [replace(tiny.task, **new) for new in ({}, {"hidden": (4, 4)}, {"activation": "relu"}, {"hidden": (7,)})]
    results = tmp_path / "results"
    for (place, name), task in zip(names.items(), tasks, strict=True):
        monkeypatch.setitem(ARENAS, name, dataclasses.replace(tiny, task=task))
        rules = ["quadratic", "default"] if place else ["quadratic", "default", "neural-art"]
        assert main(["evaluate", *rules, "--task", name, "--out", str(results / place)]) == 0
    assert main(["figures", str(results)]) == 0
    rows = read_rows(results / "grid.csv")
    assert {(row["units"], row["layers"]) for row in rows} == {("3", "1"), ("4", "2"), ("7", "1")}
    assert {row["optimizer"] for row in rows} == {"Adam", "LSTM (quadratic)", "LSTM (default)", "LSTM (neural-art)"}
    deep = read_rows(results / "sizes" / "deep" / "summary.csv")
    final = {row["optimizer"]: row["mean"] for row in deep if row["criterion"] == "final"}
    assert {row["optimizer"]: row["mean"] for row in rows if row["units"] == "4"} == final
    variants = (results / "variants.svg").read_text()
    assert all(name in variants for name in ("wide", "kinked", "not trained on this task"))
    assert "deep" not in variants
    grid = (results / "grid.svg").read_text()
    assert "2 hidden layers" in grid
    assert "LSTM (neural-art)" not in grid, "it was judged on one size alone"


def test_images_are_read_once_from_a_directory_in_the_layout_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = make_digits(tmp_path / "data")
    pixels, labels = read_images(MNIST, data, "train", range(10, 1000))
    assert (pixels.shape, pixels.dtype, labels.shape) == ((30, 5, 5), torch.uint8, (30,))
    assert torch.equal((pixels.amin((1, 2)) // 22).long(), labels)
    assert read_images(MNIST, data, "train", range(10, 1000))[0] is pixels
    assert len(read_images(MNIST, data, "test")[1]) == 40


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"reading ylecun/mnist needs datasets: pip install -e '.\[judge\]' in the clone"):
        read_images(MNIST, Path("nowhere"), "train")
