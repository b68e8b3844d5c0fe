"""Labelled images of the Hub, or of a directory that holds them in the same layout; read once for each process."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class ImageSet(NamedTuple):
    """The place of a data set of labelled images.

    Args:
        hub_id: Its Hub id, which is also its path in a directory of data.
        column: The column that holds the images; the labels are in ``label``.
    """

    hub_id: str
    column: str


MNIST = ImageSet("ylecun/mnist", "image")
CIFAR10 = ImageSet("uoft-cs/cifar10", "img")


@functools.cache
def read_images(
    images: ImageSet, data: Path | None, split: Literal["train", "test"], part: range | None = None
) -> tuple[Tensor, Tensor]:
    """Decode a part of a data set.

    Args:
        images: The data set.
        data: Directory that may hold it under its Hub id; the Hub provides what it lacks.
        split: Training or test images.
        part: Rows to read; rows beyond the end are left out, and None reads all.

    Returns:
        Images ``(N, height, width)``, or ``(N, 3, height, width)`` in colour, uint8; and labels ``(N,)``, int64.

    Raises:
        ValueError: If the packages that read them are missing.
    """
    try:
        import numpy as np
        from datasets import Image as Encoded
        from datasets import load_dataset
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"reading {images.hub_id} needs {error.name}: pip install -e '.[judge]' in the clone") from error

    local = data / images.hub_id if data else None
    rows: Any = load_dataset(str(local) if local and local.exists() else images.hub_id, split=split)
    if part is not None:
        rows = rows.select(range(part.start, min(part.stop, len(rows))))
    columns = rows.cast_column(images.column, Encoded(decode=False))[:]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in columns[images.column]])
    if pixels.ndim == 4:
        pixels = pixels.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(columns["label"])
