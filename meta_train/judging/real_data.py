"""Real data sets for judging, decoded once from a directory or the Hub into one file of tensors.

The directory holds ``ylecun/mnist`` and ``uoft-cs/cifar10`` in the layout of the Hub data sets of those names,
``text/tinyshakespeare.txt``, and ``tabular/`` with ``kin40k.csv.gz``, ``california_housing.csv``, ``adult-train.csv`` and
``adult-test.csv``. A second text, for fine-tuning, comes with Python: ``pydoc_data.topics``.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from meta_train.files import write_atomically
from meta_train.tasks.images import CIFAR10, MNIST, read_images

Tensors = dict[str, Tensor]

IMAGE_SETS = {"mnist": (MNIST, 60_000), "cifar": (CIFAR10, 16_000)}
"""Image sets, and how many of the training images are used."""
OTHER_TEXT = (60_000, 20_000)
"""Characters of a second text, for fine-tuning: to train on, and held out."""
HELD_OUT = 2_000
"""Held-out examples of each set."""


def prepared(cache: Path, data: Path | None) -> tuple[Tensors, str]:
    """Return the real data, decoding them at the first call.

    Args:
        cache: Where the decoded file is kept.
        data: The directory described above; needed only where nothing is cached yet.

    Returns:
        Tensors by name (``mnist_x`` uint8, ``mnist_y``, ``mnist_x_held_out`` and so on), and their fingerprint.

    Raises:
        ValueError: If nothing is cached and ``data`` is None, or a file is missing.
    """
    kept = cache / "real-data-2.safetensors"
    if not kept.exists():
        if data is None:
            raise ValueError("judging on real data needs --data DIR; docs/judging.md says what it must hold")
        cache.mkdir(parents=True, exist_ok=True)
        try:
            tensors = {**_images(data), **_text(data / "text"), **_tables(data / "tabular")}
        except FileNotFoundError as error:
            raise ValueError(f"--data {data} lacks {error.filename}; docs/judging.md says what it must hold") from error
        write_atomically(kept, save(tensors))
    with kept.open("rb") as file:
        return load_file(kept), hashlib.sha256(file.read()).hexdigest()[:16]


def _images(data: Path) -> Tensors:
    tensors = {}
    for name, (images, count) in IMAGE_SETS.items():
        tensors[f"{name}_x"], tensors[f"{name}_y"] = read_images(images, data, "train", range(count))
        held_out = read_images(images, data, "test", range(HELD_OUT))
        tensors[f"{name}_x_held_out"], tensors[f"{name}_y_held_out"] = held_out
    return tensors


def _text(folder: Path) -> Tensors:
    text = (folder / "tinyshakespeare.txt").read_text()
    symbols = {symbol: index for index, symbol in enumerate(sorted(set(text)))}
    encoded = torch.tensor([symbols[symbol] for symbol in text], dtype=torch.uint8)
    cut = len(encoded) * 9 // 10
    # A second text in the symbols of the first: Python's own description of its language.
    words = " ".join("".join(s if s in symbols else " " for s in text) for _, text in sorted(topics.items())).split()
    other = torch.tensor([symbols[symbol] for symbol in " ".join(words)[: sum(OTHER_TEXT)]], dtype=torch.uint8)
    return {
        "text": encoded[:cut].clone(),
        "text_held_out": encoded[cut:].clone(),
        "other_text": other[: OTHER_TEXT[0]].clone(),
        "other_text_held_out": other[OTHER_TEXT[0] :].clone(),
    }


def _tables(folder: Path) -> Tensors:
    with gzip.open(folder / "kin40k.csv.gz", "rt") as file:
        kin = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    with (folder / "california_housing.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    california = torch.tensor([[float(value) for value in row[:9]] for row in rows if all(row[:9])])
    return {**_split("kin", kin), **_split("california", california), **_adult(folder)}


def _split(name: str, table: Tensor) -> Tensors:
    """Shuffle, standardise by the training rows, and split; the last column is the target."""
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    train, test = table[:-HELD_OUT], table[-HELD_OUT:]
    mean, std = train.mean(0), train.std(0)
    tensors = {}
    for part, suffix in ((train, ""), (test, "_held_out")):
        part = (part - mean) / std
        tensors[f"{name}_x{suffix}"], tensors[f"{name}_y{suffix}"] = part[:, :-1].clone(), part[:, -1:].clone()
    return tensors


_ADULT_NUMBERS = (0, 2, 4, 10, 11, 12)


def _adult(folder: Path) -> Tensors:
    """Standardised numbers and one-hot words; the target is an income above 50,000."""
    rows = {}
    for split, suffix in (("train", ""), ("test", "_held_out")):
        with (folder / f"adult-{split}.csv").open(newline="") as file:
            rows[suffix] = [row for row in csv.reader(file, skipinitialspace=True) if len(row) == 15]
    rows["_held_out"] = rows["_held_out"][:HELD_OUT]
    words = [index for index in range(14) if index not in _ADULT_NUMBERS]
    levels = {column: sorted({row[column] for row in rows[""]}) for column in words}
    numbers = {s: torch.tensor([[float(row[i]) for i in _ADULT_NUMBERS] for row in part]) for s, part in rows.items()}
    mean, std = numbers[""].mean(0), numbers[""].std(0)
    tensors = {}
    for suffix, part in rows.items():
        hot = [torch.tensor([[float(row[column] == level) for level in levels[column]] for row in part]) for column in words]
        tensors[f"adult_x{suffix}"] = torch.cat([(numbers[suffix] - mean) / std, *hot], 1)
        tensors[f"adult_y{suffix}"] = torch.tensor([int(row[14].startswith(">")) for row in part])
    return tensors
