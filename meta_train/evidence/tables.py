"""The tables of README and docs, made from committed CSVs.

``python -m meta_train.evidence.tables`` writes them, and a test compares.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from meta_train.evidence.cards import RESULTS, cell, comparison, read_evaluation, where
from meta_train.evidence.default_tables import exploration, seeds, shipped, shipped_tasks, step_sizes, stress, suite
from meta_train.files import write_atomically
from meta_train.rows import LEARNED, read_rows

ROOT = Path(__file__).parents[2]


def quadratic(results: Path = RESULTS / "quadratic") -> str:
    """Return the comparison on quadratics as Markdown.

    Args:
        results: Directory written by ``python -m meta_train evaluate``.

    Returns:
        A table and a line of where it comes from.
    """
    rows, about = read_evaluation(results)
    count = rows[0]["n"]
    note = (
        f"Mean ± standard error over n = {count} fresh batches of 128 functions, meta-trained to 100 steps; in brackets the "
        "ratio to the best baseline of the column. One row for each of three meta-training seeds; the one with the best "
        "validation is bundled. Baselines are tuned on other batches, and one that diverges on a fresh batch gives way to "
        "its next best setting; every one tried is in [sweep.csv](docs/results/quadratic/sweep.csv). "
        f"{where(about)}. Command: `make reproduce`."
    )
    return "\n".join([*comparison(rows), "", note])


def _against_best(results: Path, label: str, ours: str) -> str:
    """Return a row with the final loss of a rule, of the default and of the best baseline at the first horizon."""
    rows = [row for row in read_rows(results / "summary.csv") if row["criterion"] == "final"]
    finals = {row["optimizer"]: row for row in rows if row["horizon"] == rows[0]["horizon"]}
    learned = [
        f"{float(row['mean']):.3g} ({float(row['ratio_to_best_baseline']):.2f} x)"
        for row in (finals[f"LSTM ({ours})"], finals["LSTM (default)"])
    ]
    return f"| {label} | {' | '.join(learned)} | {_best_baseline(finals)} |"


MNIST = {"40x1": "40 units", "20x2": "two layers of 20", "relu": "ReLU"}
"""Nets that the digits' rule was not meta-trained on, by folder."""


def mnist(results: Path = RESULTS / "mnist-mlp") -> str:
    """Return the comparison on digits as Markdown.

    Args:
        results: Directory of the net that was meta-trained on, named after the rule, with one for each other net in it.

    Returns:
        A table of that net, one of the others, and a line of where they come from.
    """
    rows, about = read_evaluation(results)
    ours = results.name
    lines = [*comparison(rows), "", f"| loss at step 100 | {ours} | default | the best baseline |", "|---|---|---|---|"]
    lines += [_against_best(results / folder, label, ours) for folder, label in MNIST.items()]
    note = (
        f"Mean ± standard error over n = {rows[0]['n']} fresh nets of 784-20-10 sigmoid units on the half of MNIST that was "
        "not meta-trained on; the loss at a step is the mean of the ten minibatches up to it. In brackets the ratio to the "
        "best baseline of the column. One row for each meta-training seed; the one with the best validation is bundled. "
        "Baselines are tuned over half-decades on other nets, anew for every net of the second "
        f"table; every setting is in [sweep.csv](docs/results/{ours}/sweep.csv). "
        f"{where(about)}. Command: `make reproduce-mnist`."
    )
    return "\n".join([*lines, "", note])


def cifar(results: Path = RESULTS / "cifar") -> str:
    """Return the comparison on photos as Markdown.

    Args:
        results: Directory written by ``python -m meta_train evaluate``.

    Returns:
        A table and a line of where it comes from.
    """
    rows, about = read_evaluation(results)
    lines = [*comparison(rows), "", CLASSES_HEAD, "|---" * 6 + "|"]
    places = []
    for folder, label in CLASSES.items():
        few, where_few = read_evaluation(results / folder)
        lines.extend(_of_classes(few, label, horizon) for horizon in ("100", "1000"))
        places.append(f"n = {few[0]['n']} for {label} ({where(where_few)})")
    note = (
        f"Mean ± standard error over n = {rows[0]['n']} fresh nets on the half of CIFAR-10 that was not meta-trained on; "
        "the loss at a step is the mean of the twenty minibatches up to it. In brackets the ratio to the best baseline of "
        "the column. One row for each meta-training seed, of which the one with the best validation is bundled, and one for "
        "rules that were meta-trained on five of the ten classes (`cifar-sub`). Baselines are tuned over half-decades on "
        f"another net; every setting is in [sweep.csv](docs/results/{results.name}/sweep.csv). {where(about)}. "
        f"Below, baselines are tuned anew, and in brackets is the ratio to the best of them; {', '.join(places)}. "
        "Command: `make reproduce-cifar`."
    )
    return "\n".join([*lines, "", note])


CLASSES = {"5-classes": "CIFAR-5", "2-classes": "CIFAR-2"}
"""What rules for photos are judged on besides, by folder: some of the classes, none of which ``cifar-sub`` saw."""

CLASSES_HEAD = "| loss at step | | cifar | cifar-sub, which saw the other classes | default | the best baseline |"


def _of_classes(rows: list[dict[str, str]], label: str, horizon: str) -> str:
    """Set three rules against the best baseline on nets with fewer outputs, as a row."""
    finals = {row["optimizer"]: row for row in rows if row["horizon"] == horizon}
    learned = [cell(finals[f"{LEARNED} ({rule})"]) for rule in ("cifar", "cifar-sub", "default")]
    return f"| {horizon} | {label} | {' | '.join(learned)} | {_best_baseline(finals)} |"


def _best_baseline(finals: dict[str, dict[str, str]]) -> str:
    """Return the loss of the best of those that were tuned, and who it is."""
    best = min((row for name, row in finals.items() if not name.startswith(LEARNED)), key=lambda row: float(row["mean"]))
    return f"{float(best['mean']):.3g} ({best['optimizer']}, {best['setting']})"


ART = {"": "new contents, 64 x 64", "style": "and a new style", "double": "double resolution, 128 x 128"}
"""What the pictures' rule is judged on, by folder."""


def neural_art(results: Path = RESULTS / "neural-art") -> str:
    """Return the comparison on pictures as Markdown.

    Args:
        results: Directory of new contents, with a directory for a new style and one for double resolution in it.

    Returns:
        A table of new contents, one of the others, and a line of where they come from.
    """
    rows, about = read_evaluation(results)
    ours = "neural-art"
    heads = f"| loss at step 128 | {ours} | default | the best baseline | L-BFGS, as many steps | L-BFGS, 64 steps |"
    lines = [*comparison(rows), "", heads, "|---" * 6 + "|"]
    for folder, label in ART.items():
        place = results / folder
        curve = {(r["optimizer"], r["inner_step"]): float(r["mean"]) for r in read_rows(place / "curves.csv")}
        lbfgs = " | ".join(f"{curve['L-BFGS', step]:.3g}" for step in ("128", "64"))
        lines.append(f"{_against_best(place, label, ours)} {lbfgs} |")
    note = (
        f"Mean ± standard error over n = {rows[0]['n']} contents and starts never seen; in brackets the ratio to the best "
        "baseline of the column. Contents differ far more than optimizers do, so the errors, which are between contents, "
        "say little of the ratios, which are on the same ones. One row for each of three meta-training seeds; the one with "
        "the best validation is bundled. Baselines are tuned on other contents, anew for every line of the second table; "
        f"every setting is in [sweep.csv](docs/results/{results.name}/sweep.csv). L-BFGS is not tuned, as its line search "
        "chooses the step; it evaluates the loss at least twice in a step, so 64 steps of it cost at least 128 of others. "
        f"{where(about)}. Command: `make reproduce-neural-art DATA=DIR`."
    )
    return "\n".join([*lines, "", note])


def own_task(results: Path = RESULTS / "own-task") -> str:
    """Return the comparison on the example of an own task as Markdown.

    Args:
        results: Directory written by ``python -m meta_train evaluate``.

    Returns:
        A table and a line of where it comes from.
    """
    rows, about = read_evaluation(results)
    note = (
        f"Mean ± standard error over n = {rows[0]['n']} fresh nets and sines; the loss at a step is the mean of the ten "
        "minibatches up to it. In brackets the ratio to the best baseline of the column. `sines`, `sines-1` and `sines-2` "
        "are three seeds of the recipe. Baselines are tuned on other nets, in half-decades. "
        f"{where(about)}. Commands: those below, for seeds 0, 1 and 2."
    )
    return "\n".join([*comparison(rows, about["last"]), "", note])


def demo(results: Path = RESULTS / "demo") -> str:
    """Return what the demo prints, as a block.

    Args:
        results: Directory with ``demo.txt`` and ``demo.png``.

    Returns:
        Markdown.
    """
    text = (results / "demo.txt").read_text().strip()
    return f"```text\n{text}\n```\n\n![Training loss of the demo](docs/results/demo/demo.png)"


TABLES: dict[str, Callable[[], str]] = {
    "quadratic": quadratic,
    "mnist": mnist,
    "mnist-modulated": functools.partial(mnist, RESULTS / "mnist-modulated"),
    "cifar": cifar,
    "neural-art": neural_art,
    "shipped": shipped,
    "shipped-tasks": shipped_tasks,
    "judge": suite,
    "judge-long": functools.partial(suite, RESULTS / "judge-long"),
    "seeds": seeds,
    "stress": stress,
    "lr": step_sizes,
    "exploration": exploration,
    "own-task": own_task,
    "demo": demo,
}


PAGES = {
    ROOT / "README.md": "docs/",
    **{ROOT / "docs" / f"{page}.md": "" for page in ("results", "judging", "own-task")},
}
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
        pattern = re.compile(rf"(?<=<!-- results:{name} -->\n).*?(?=<!-- /results:{name} -->)", re.DOTALL)
        if pattern.search(text):
            table = make().replace("](docs/", f"]({docs}")
            # Backslashes in a replacement would be read as references.
            text = pattern.sub(table.replace("\\", r"\\") + r"\n", text)
    return text


if __name__ == "__main__":
    for page, docs in PAGES.items():
        write_atomically(page, updated(page.read_text(), docs).encode())
