"""Photos: the net by hand, side by side; classes that are left out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.tasks import Cifar, cifar
from meta_train.tasks.cifar import _photos
from meta_train.training.roll_out import loss_and_grad

TASK = Cifar(labels=(7, 2, 4), side=8, channels=(3, 4), kernel=3, dense=(5,), batch=6, problems=2, initial_std=0.5)


@pytest.fixture
def photos(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randint(256, (60, 3, 8, 8), generator=generator).byte(), torch.arange(60) % 10
    monkeypatch.setattr(cifar, "read_images", lambda *_: (images, labels))
    _photos.cache_clear()
    return images, labels


def test_only_the_classes_that_are_named_are_kept(photos: tuple[Tensor, Tensor]) -> None:
    images, positions = _photos("second", (7, 2, 4), 8, Path("somewhere"))
    assert len(images) == 9
    for position, label in enumerate((7, 2, 4)):
        assert torch.equal(images[positions == position], photos[0][30:][photos[1][30:] == label])


def test_halves_are_disjoint_and_all_there_is(photos: tuple[Tensor, Tensor]) -> None:
    halves = [_photos(half, tuple(range(10)), 8, Path("somewhere"))[0] for half in ("first", "second")]
    assert torch.equal(torch.cat(halves), photos[0])


def test_smaller_photos_are_means_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = torch.arange(64).view(8, 8)
    fine = coarse.repeat_interleave(2, 0).repeat_interleave(2, 1) + torch.tensor([0, 2]).repeat(8)
    monkeypatch.setattr(cifar, "read_images", lambda *_: (fine.byte().expand(2, 3, 16, 16), torch.tensor([0, 1])))
    _photos.cache_clear()
    photos, _ = _photos("first", (0, 1), 8, Path("somewhere"))
    assert torch.equal(photos, (coarse + 1).byte().expand(1, 3, 8, 8))


def test_the_net_is_the_one_that_is_written_down(photos: tuple[Tensor, Tensor]) -> None:
    optimizee = TASK.on(Path("somewhere")).sample(3)
    generator = torch.Generator()
    generator.set_state(optimizee.generator.get_state())
    scattered = optimizee.flat_params() + 0.1 * torch.randn(2, 1, generator=torch.Generator().manual_seed(1))
    losses, grad = loss_and_grad(optimizee, scattered)
    params = optimizee.unflatten(scattered)
    images, positions = _photos("first", TASK.labels, 8, Path("somewhere"))
    index = torch.randint(len(images), (2, 6), generator=generator)
    for problem in range(2):
        own = {name: value[problem] for name, value in params.items()}
        x = images[index[problem]] / 255
        for name in ("conv0", "conv1"):
            x = F.conv2d(x, own[f"{name}.weight"], padding=1)
            x = F.batch_norm(x, None, None, own[f"{name}.gain"], own[f"{name}.bias"], training=True)
            x = F.max_pool2d(x.relu(), 2)
        x = x.flatten(1) @ own["dense0.weight"]
        x = F.batch_norm(x, None, None, own["dense0.gain"], own["dense0.bias"], training=True).relu()
        x = x @ own["dense1.weight"] + own["dense1.bias"]
        torch.testing.assert_close(losses[problem], F.cross_entropy(x, positions[index[problem]]))
    for name, reached in optimizee.unflatten(grad).items():
        assert reached.flatten(1).any(1).all(), name


def test_the_paper_s_net_has_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10
    params = Cifar().sample_from(images, labels, 0).params
    assert {name: tuple(value.shape[1:]) for name, value in params.items() if name.endswith("weight")} == {
        "conv0.weight": (16, 3, 5, 5),
        "conv1.weight": (16, 16, 5, 5),
        "conv2.weight": (16, 16, 5, 5),
        "dense0.weight": (256, 32),
        "dense1.weight": (32, 10),
    }
    assert "dense1.gain" not in params


@pytest.mark.parametrize(
    ("change", "message"),
    [({"labels": (3, 3)}, "two different classes, got"), ({"labels": (1,)}, "two different"), ({"kernel": 4}, "odd, got 4")],
)
def test_what_makes_no_net_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cifar(**change)  # type: ignore[arg-type]
