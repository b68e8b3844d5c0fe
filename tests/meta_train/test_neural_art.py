import json
import pickle
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from meta_train.__main__ import main
from meta_train.judging import arena_report as evaluate
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import LBFGS_STEPS, Setting, settings
from meta_train.judging.trial import curves
from meta_train.rows import read_rows
from meta_train.tasks import NeuralArt, features
from meta_train.tasks.features import Conv, Network, feature_extractor, read_network
from meta_train.tasks.neural_art import Split, gram
from meta_train.training.roll_out import loss_and_grad
from tests.meta_train.judged_runs import losses_of
from tests.meta_train.pictures import DESCRIPTION, NETWORK, make_data
from tests.meta_train.test_recipe import TINY

TASK = NeuralArt(size=8, problems=2, network=NETWORK, network_file="net.safetensors")
RECIPE = re.sub(
    r'name = "quadratic"\ndimension = 3\nfunctions = 4',
    'name = "neural-art"\nsize = 8\nnetwork_file = "net.safetensors"\n[task.network]' + DESCRIPTION,
    TINY,
).replace("coordinates = 7", "coordinates = 50")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def by_hand(picture: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    x = (2 * picture[:, [2, 1, 0]] - torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)) / torch.tensor([1, 2, 0.5]).view(3, 1, 1)
    a = F.conv2d(x, tensors["a.weight"], tensors["a.bias"], padding=1).relu()
    squeezed = F.conv2d(F.max_pool2d(a, 2), tensors["b.s.weight"], tensors["b.s.bias"]).relu()
    one = F.conv2d(squeezed, tensors["b.e1.weight"], tensors["b.e1.bias"]).relu()
    three = F.conv2d(squeezed, tensors["b.e3.weight"], tensors["b.e3.bias"], padding=1).relu()
    return {"a": a, "b": torch.cat((one, three), 1)}


def test_the_loss_is_the_one_that_is_written_down(data: Path) -> None:
    path = data / "neural_art" / "net.safetensors"
    picture, content, style = torch.rand(3, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    task = msgspec.structs.replace(TASK, content_weight=2.0, style_weight=3.0, smooth=5.0)
    loss = task.loss(feature_extractor(NETWORK, path), content, style)({"picture": picture})
    x, c, s = (by_hand(one, load_file(path)) for one in (picture, content, style))
    expected = 2 * (x["b"] - c["b"]).square().sum() / c["b"].square().sum()
    for layer in ("a", "b"):
        grams = [torch.einsum("ihw,jhw->ij", one[layer][0], one[layer][0]) / one[layer][0, 0].numel() for one in (x, s)]
        torch.testing.assert_close(gram(x[layer])[0], grams[0])
        expected += 3 / 2 * (grams[0] - grams[1]).square().sum() / grams[1].square().sum()
    expected += 5 * (picture[..., 1:, :] - picture[..., :-1, :]).square().mean()
    expected += 5 * (picture[..., 1:] - picture[..., :-1]).square().mean()
    torch.testing.assert_close(loss, expected.view(1) * 8 * 8 / 64**2)


def test_the_gradient_of_a_pixel_is_the_same_at_every_resolution(tmp_path: Path) -> None:
    pointwise = Network((Conv("a"),), content="a", style=("a",))
    generator = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.rand(4, 3, 1, 1, generator=generator), "a.bias": torch.rand(4, generator=generator)}
    save_file(tensors, tmp_path / "net.safetensors")
    task = msgspec.structs.replace(TASK, network=pointwise, smooth=0.0)
    extract = feature_extractor(pointwise, tmp_path / "net.safetensors")
    pictures = torch.rand(3, 1, 3, 8, 8, generator=generator)
    grads = []
    for scale in (1, 2):
        picture, content, style = (one.repeat_interleave(scale, 2).repeat_interleave(scale, 3) for one in pictures)
        picture.requires_grad_()
        task.loss(extract, content, style)({"picture": picture}).sum().backward()
        assert picture.grad is not None
        grads.append(picture.grad[..., ::scale, ::scale])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_task_with_its_pictures_travels_to_another_process(data: Path) -> None:
    task = TASK.on(data)
    there = pickle.loads(pickle.dumps(task))
    losses = [one.losses(one.params) for one in (task.sample(3), there.sample(3))]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_the_seed_decides_contents_and_noise_and_nothing_else_is_random(data: Path) -> None:
    task = TASK.on(data)
    optimizee, twin, other = task.sample(1), task.sample(1), task.sample(2)
    params = optimizee.flat_params()
    assert torch.equal(params, twin.flat_params())
    assert not torch.equal(params, other.flat_params())
    losses, grad = loss_and_grad(optimizee, params)
    for again in (optimizee, twin):
        assert torch.equal(losses, loss_and_grad(again, params)[0])
    assert losses.shape == (2,)
    assert losses[0] != losses[1]
    assert not torch.equal(losses, loss_and_grad(other, params)[0]), "other contents"
    params = params.requires_grad_()
    (alone,) = torch.autograd.grad(optimizee.losses(optimizee.unflatten(params))[0], params)
    torch.testing.assert_close(alone[0], grad[0])
    assert not alone[1].any()


def test_each_content_is_as_stiff_as_its_draw_and_the_same_otherwise(data: Path) -> None:
    plain, stiff = (
        msgspec.structs.replace(TASK, stiffness=range_).on(data).sample(3) for range_ in ((1.0, 1.0), (2.0, 8.0))
    )
    params = plain.flat_params()
    assert torch.equal(params, stiff.flat_params())
    factors = stiff.losses(stiff.unflatten(params)) / plain.losses(plain.unflatten(params))
    assert ((factors > 2) & (factors < 8)).all()
    assert factors[0] != factors[1]
    with pytest.raises(ValueError, match=r"stiffness must be \[smallest, largest\], got \[2.0, 1.0\]"):
        NeuralArt(stiffness=(2.0, 1.0))


def test_an_opened_task_is_known_by_all_that_decides_it(data: Path) -> None:
    names = {repr(task.on(data)) for task in (TASK, msgspec.structs.replace(TASK, style="other"))}
    assert len(names) == 2
    assert repr(TASK.on(data)) in names


def test_no_photo_is_in_two_splits(data: Path) -> None:
    splits: tuple[Split, ...] = ("train", "validation", "tuning", "test")
    photos = [msgspec.structs.replace(TASK, split=split).on(data).photos for split in splits]  # type: ignore[attr-defined]
    assert [len(part) for part in photos] == [7, 1, 2, 2]
    assert len({path for part in photos for path in part}) == 12


def test_what_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    folder = data / "neural_art"
    with pytest.raises(ValueError, match="give --data DIR"):
        TASK.sample(0)
    with pytest.raises(ValueError, match=r"holds 2 photos .* none for validation"):
        msgspec.structs.replace(TASK, split="validation").on(make_data(tmp_path / "few", photos=2))
    with pytest.raises(ValueError, match=r"no painting monet\.jpg"):
        msgspec.structs.replace(TASK, style="monet").on(data)
    with pytest.raises(ValueError, match=r"cannot read a network from .*none\.safetensors"):
        feature_extractor(NETWORK, folder / "none.safetensors")
    with pytest.raises(ValueError, match=r"net\.safetensors lacks conv1\.weight, conv1\.bias, fire2\.conv1x1_1\.weight"):
        feature_extractor(features.SQUEEZENET, folder / "net.safetensors")
    with pytest.raises(ValueError, match="that the description lacks: c, d"):
        feature_extractor(msgspec.structs.replace(NETWORK, style=("d", "c")), folder / "net.safetensors")
    (tmp_path / "net.toml").write_text(DESCRIPTION.replace("pool", "pol"))
    with pytest.raises(ValueError, match=r"net\.toml describes no network: .*pol.*layers\[1\]"):
        read_network(tmp_path / "net.toml")


def test_descriptions_are_read(tmp_path: Path) -> None:
    (tmp_path / "net.toml").write_text(DESCRIPTION)
    assert read_network(tmp_path / "net.toml") == NETWORK
    example = textwrap.dedent((features.__doc__ or "").split("::\n", 1)[1].split("\n\nLayers")[0])
    (tmp_path / "vgg.toml").write_text(example)
    assert read_network(tmp_path / "vgg.toml").content == "features.2"


def test_lbfgs_takes_one_iteration_a_step(data: Path) -> None:
    task = msgspec.structs.replace(TASK, problems=1).on(data)
    (setting,) = LBFGS_STEPS
    losses = losses_of(task.sample(1), setting.make, 4)
    optimizee = task.sample(1)
    picture = optimizee.params["picture"].clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([picture], max_iter=4, max_eval=1000, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = optimizee.losses({"picture": picture}).sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    assert losses[-1] == pytest.approx(closure().item(), rel=1e-4)
    assert losses[4] < losses[3] < losses[2] < losses[1] < losses[0]


@pytest.fixture(scope="module")
def place(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its weights and their tables, all from the command line."""
    place = tmp_path_factory.mktemp("place")
    (place / "tiny.toml").write_text(RECIPE)
    run, to_data = str(place / "run"), ("--data", str(data))
    assert main(["train", str(place / "tiny.toml"), "--out", run, *to_data]) == 0
    assert main(["publish", run, "--name", "tiny", "--to", str(place)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARENAS, "neural-art", arena())
        command = ["evaluate", str(place / "tiny.safetensors"), "default", "--task", "neural-art", *to_data]
        assert main([*command, "--out", str(place / "results")]) == 0
    return place


def arena() -> Arena:
    test, tuning = (msgspec.structs.replace(TASK, problems=1, split=split) for split in ("test", "tuning"))
    sweep = settings("Adam", [1e-6, 0.01, 1e6])
    return Arena(test, sweep, LBFGS_STEPS, tuning=2, fresh=3, horizons=(5,), tuning_task=tuning)


def test_no_file_says_where_the_data_are(place: Path, data: Path) -> None:
    for path in (*(place / "run").iterdir(), *(place / "results").iterdir(), place / "tiny.safetensors"):
        assert str(data).encode() not in path.read_bytes(), path.name


def test_tables_have_the_arena_s_horizon_and_lbfgs_only_for_show(place: Path) -> None:
    summary, fixed, curves = (read_rows(place / "results" / f"{n}.csv") for n in ("summary", "fixed", "curves"))
    assert {row["horizon"] for row in summary} == {"5"}
    assert {row["optimizer"] for row in summary} == {"Adam", "LSTM (tiny)", "LSTM (default)"}
    assert {row["optimizer"] for row in fixed} == {"L-BFGS"}
    names = ["LSTM (tiny)", "LSTM (default)", "Adam", "L-BFGS"]
    assert list(dict.fromkeys(row["optimizer"] for row in curves)) == names
    assert len(curves) == 4 * 6
    assert json.loads((place / "results" / "environment.json").read_text())["task"] == "neural-art"


def test_baselines_are_tuned_on_the_photos_for_tuning(data: Path) -> None:
    opened = arena().on(data)
    judgement = evaluate.judge([], replace(opened, untuned=(), tuning=2, fresh=1))
    tuned = curves(opened.tuning_task, Setting("Adam", 0.01).make, 5, "tuning", 2)[:, -1].mean()
    (row,) = [row for row in judgement.sweep if row["lr"] == 0.01]
    assert row["final_5"] == pytest.approx(float(tuned), rel=1e-5)


def test_the_figure_shows_the_default_rule_too(place: Path) -> None:
    assert main(["figures", str(place / "results"), "--runs", str(place / "run")]) == 0
    svg = (place / "results" / "curves.svg").read_text()
    for label in ("LSTM (learned)", "default, not trained on this task", "L-BFGS", "Adam (lr=0.01)"):
        assert label in svg


def test_verify_and_train_need_the_data(
    place: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ARENAS, "neural-art", arena())
    verify = ["verify", str(place / "tiny.safetensors"), "--results", str(place / "results")]
    train = ["train", str(place / "tiny.toml"), "--out", str(tmp_path)]
    for command in (verify, train, ["evaluate", "default", "--task", "neural-art", "--out", str(tmp_path)]):
        assert main(command) == 2
        assert "give --data DIR" in capsys.readouterr().err
    assert main([*verify, "--data", str(data)]) == 0
    assert capsys.readouterr().out.count(": equal") == 2
