"""The tables of README and docs, made from committed CSVs: ``python -m meta_train.tables`` writes them, a test compares.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from meta_train.evaluate import read_rows
from meta_train.evidence import RESULTS, comparison, where
from meta_train.run_dir import write_atomically

ROOT = Path(__file__).parent.parent


def quadratic(results: Path = RESULTS / "quadratic") -> str:
    """Return the comparison on quadratics as Markdown.

    Args:
        results: Directory written by ``python -m meta_train evaluate``.

    Returns:
        A table and a line of where it comes from.
    """
    rows = read_rows(results / "summary.csv")
    about = json.loads((results / "environment.json").read_text())
    count = rows[0]["n"]
    note = (
        f"Mean ± standard error over n = {count} fresh batches of 128 functions, meta-trained to 100 steps; in brackets the "
        "ratio to the best baseline of the column. One row for each of three meta-training seeds; the one with the best "
        "validation is bundled. Baselines are tuned on other batches, and one that diverges on a fresh batch gives way to "
        "its next best setting; every one tried is in [sweep.csv](docs/results/quadratic/sweep.csv). "
        f"{where(about)}. Command: `make reproduce`."
    )
    return "\n".join([*comparison(rows), "", note])


def demo(results: Path = RESULTS / "demo") -> str:
    """Return what the demo prints, as a block.

    Args:
        results: Directory with ``demo.txt`` and ``demo.png``.

    Returns:
        Markdown.
    """
    text = (results / "demo.txt").read_text().strip()
    return f"```text\n{text}\n```\n\n![Training loss of the demo](docs/results/demo/demo.png)"


TABLES = {"quadratic": quadratic, "demo": demo}


PAGES = {ROOT / "README.md": "docs/", ROOT / "docs" / "results.md": ""}
"""Documents with tables, and the way from each to docs/."""


def updated(text: str, docs: str = "docs/") -> str:
    """Return a document with every table made again.

    Args:
        text: The document.
        docs: The way from it to docs/.

    Returns:
        The same with what stands between the marks replaced.
    """
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- /results:{name} -->)", re.DOTALL)
        # Backslashes in a replacement would be read as references.
        table = make().replace("](docs/", f"]({docs}").replace("\\", r"\\")
        text = pattern.sub(r"\1" + table + r"\n\2", text)
    return text


if __name__ == "__main__":
    for page, docs in PAGES.items():
        write_atomically(page, updated(page.read_text(), docs).encode())
