"""A handful of small images, in the layout of the Hub's data sets."""

import io
from pathlib import Path

import pytest
import torch


def make_digits(folder: Path, count: int = 40, side: int = 5) -> Path:
    """Write ``ylecun/mnist`` with images whose brightness is their label; return ``folder``."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    place = folder / "ylecun" / "mnist" / "mnist"
    place.mkdir(parents=True)
    for split in ("train", "test"):
        labels = torch.randint(10, (count,), generator=generator)
        rows = []
        for label in labels:
            pixels = torch.randint(20, (side, side), generator=generator) + 22 * label
            file = io.BytesIO()
            image.fromarray(pixels.byte().numpy()).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        table = pyarrow.table({"image": rows, "label": labels.tolist()})
        features = '{"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}'
        table = table.replace_schema_metadata({"huggingface": f'{{"info": {{"features": {features}}}}}'})
        parquet.write_table(table, place / f"{split}-00000-of-00001.parquet")
    return folder
