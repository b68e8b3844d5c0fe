"""Small pictures and a small random network, in the layout that neural art reads."""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from meta_train.tasks.features import Conv, Fire, Network, Pool

NETWORK = Network(
    (Conv("a", padding=1), Pool(), Fire("b", ("s", "e1", "e3")), Conv("unused")),
    content="b",
    style=("a", "b"),
    channels="BGR",
    scale=2.0,
    mean=(0.5, 0.6, 0.7),
    std=(1.0, 2.0, 0.5),
)
DESCRIPTION = """
channels = "BGR"
scale = 2.0
mean = [0.5, 0.6, 0.7]
std = [1.0, 2.0, 0.5]
content = "b"
style = ["a", "b"]
layers = [
  {kind = "conv", name = "a", padding = 1},
  {kind = "pool"},
  {kind = "fire", name = "b", parts = ["s", "e1", "e3"]},
  {kind = "conv", name = "unused"},
]
"""
SHAPES = {"a": (4, 3, 3, 3), "b.s": (2, 4, 1, 1), "b.e1": (3, 2, 1, 1), "b.e3": (3, 2, 3, 3)}


def make_data(folder: Path, photos: int = 12) -> Path:
    """Write photos, two paintings and the network ``net.safetensors``; return ``folder``."""
    generator, art = torch.Generator().manual_seed(0), folder / "neural_art"
    (art / "photos").mkdir(parents=True)
    (art / "styles").mkdir()
    for name in (*(f"photos/{index:02}" for index in range(photos)), "styles/starry_night", "styles/other"):
        coarse = torch.rand(1, 3, 4, 5, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (20, 24), mode="bilinear")[0]
        Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy()).save(art / f"{name}.jpg")
    tensors = {f"{name}.weight": 0.5 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors |= {f"{name}.bias": 0.1 * torch.randn(shape[0], generator=generator) for name, shape in SHAPES.items()}
    save_file(tensors, art / "net.safetensors")
    return folder
