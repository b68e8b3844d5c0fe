"""The tables of README and docs, made from committed CSVs.

``python -m meta_train.evidence.tables`` writes them, and a test compares.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from meta_train.evidence.cards import RESULTS, cell, comparison, where
from meta_train.files import write_atomically
from meta_train.judging.contestants import LEARNED
from meta_train.rows import read_rows

ROOT = Path(__file__).parents[2]


def _evaluation(results: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Read the summary of an evaluation, and where it was made."""
    return read_rows(results / "summary.csv"), json.loads((results / "environment.json").read_text())


def quadratic(results: Path = RESULTS / "quadratic") -> str:
    """Return the comparison on quadratics as Markdown.

    Args:
        results: Directory written by ``python -m meta_train evaluate``.

    Returns:
        A table and a line of where it comes from.
    """
    rows, about = _evaluation(results)
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
    """Set a rule's final loss at the first horizon against those of the default and of the best baseline, as a row."""
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
    rows, about = _evaluation(results)
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
    rows, about = _evaluation(results)
    lines = [*comparison(rows), "", CLASSES_HEAD, "|---" * 6 + "|"]
    places = []
    for folder, label in CLASSES.items():
        few, where_few = _evaluation(results / folder)
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
    rows, about = _evaluation(results)
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


OPPONENTS = ("Adam(0.001)", "Adam, tuned", "AdamW+cosine, tuned", "ScheduleFree(0.0025)", "Prodigy(1)")
"""Whom the default rule is set against in the README; the CSVs have all."""


def opponents(results: Path = RESULTS / "judge") -> str:
    """Return how the default rule does against each opponent as Markdown.

    Args:
        results: Directory written by ``python -m meta_train evaluate default --suite judge``.

    Returns:
        A table with a column for each horizon.
    """
    found = _of_default(results / "summary.csv")
    summary = {(row["against"], int(row["horizon"])): row for row in found}
    horizons = sorted({horizon for _, horizon in summary})
    lines = _head("final training loss against", horizons)
    for opponent in (name for name in OPPONENTS if (name, horizons[0]) in summary):
        cells = []
        for horizon in horizons:
            row = summary.get((opponent, horizon))
            better = f"better on {row['wins']} of {row['tasks']}" if row else ""
            cells.append(f"{_trained_and_held_out(row, '**')}, {better}" if row else "")
        lines.append(f"| {opponent} | {' | '.join(cells)} |")
    return "\n".join(lines)


def suite(results: Path = RESULTS / "judge") -> str:
    """Return the judgement of the default rule as Markdown.

    Args:
        results: As for :func:`opponents`.

    Returns:
        That table, one of each task against tuned Adam, and a line of where they come from.
    """
    tasks = _of_default(results / "ratios.csv")
    horizons = sorted({int(row["horizon"]) for row in tasks})
    lines = [opponents(results), "", *_head("task, against tuned Adam", horizons)]
    for task in dict.fromkeys(row["task"] for row in tasks):
        of_task = {int(r["horizon"]): r for r in tasks if (r["task"], r["against"]) == (task, "Adam, tuned")}
        cells = [_trained_and_held_out(of_task[horizon]) if horizon in of_task else "" for horizon in horizons]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    about = json.loads((results / "environment.json").read_text())
    baselines = about.get("baselines")
    taken = f"; baselines at commit {baselines['commit']}" if baselines else ""
    note = (
        "Geometric means over tasks of the ratio of two mean training losses, each over the last tenth of the steps and "
        f"n = {tasks[0]['n']} fresh seeds; below 1 is better than the opponent. In brackets the same of losses on held-out "
        "data after the last step. `default` is told neither rate nor horizon. "
        "Tuned opponents have the best rate of a half-decade grid for each task and each horizon, found on another seed; "
        "AdamW with a cosine decay knows the horizon. Every figure is in "
        f"[results.csv](docs/results/{results.name}/results.csv), every rate tried in "
        f"[sweep.csv](docs/results/{results.name}/sweep.csv). {where(about)}{taken}. Command: `{about['command']}`."
    )
    return "\n".join([*lines, "", note])


def _of_default(table: Path) -> list[dict[str, str]]:
    return [row for row in read_rows(table) if row["rule"] == "LSTM (default)"]


def _head(first: str, horizons: list[int]) -> list[str]:
    columns = " | ".join(f"{horizon:,} steps" for horizon in horizons)
    return [f"| {first} | {columns} |", "|---" * (len(horizons) + 1) + "|"]


def _trained_and_held_out(row: dict[str, str], mark: str = "") -> str:
    return f"{mark}{float(row['ratio']):.2f} x{mark} ({float(row['held_out_ratio']):.2f} x)"


def seeds(results: Path = RESULTS / "default") -> str:
    """Return how far apart rules are that differ in nothing but the seed of their meta-training, as Markdown.

    Args:
        results: Directory with ``training.csv`` of the runs ``default-SEED``, and in ``seeds`` what
            ``python -m meta_train evaluate default RUNS --suite judge`` says of them; the published one is seed 0.

    Returns:
        A row for each seed and a line of where they come from.
    """
    opponent = "Adam, tuned"
    summary, about = _evaluation(results / "seeds")
    rows = [row for row in summary if row["against"] == opponent]
    found = {(row["rule"], int(row["horizon"])): row for row in rows}
    horizons = sorted({horizon for _, horizon in found})
    validated: dict[str, list[float]] = defaultdict(list)
    for row in read_rows(results / "training.csv"):
        if row["validation"]:
            validated[row["run"]].append(float(row["validation"]))
    lines = [f"| seed | validation | {' | '.join(f'{horizon:,} steps' for horizon in horizons)} |"]
    lines.append("|---" * (len(horizons) + 2) + "|")
    for run, values in validated.items():
        rule = "LSTM (default)" if run == "default-0" else f"LSTM ({run})"
        cells = (f"{float(found[rule, h]['ratio']):.2f} x, better on {found[rule, h]['wins']}" for h in horizons)
        lines.append(f"| {run.removeprefix('default-')} | {min(values):.3f} | {' | '.join(cells)} |")
    note = (
        "Validation is the mean of log(loss / initial loss) on held-out kinds; beside it the final training loss against "
        f"{opponent}, on the {rows[0]['tasks']} real tasks, as a geometric mean. Seed 0 is published. "
        f"{where(about)}. Command: `{about['command']}`."
    )
    return "\n".join([*lines, "", note])


def stress(results: Path = RESULTS / "stress") -> str:
    """Return what became of the default rule under stress as Markdown.

    Args:
        results: Directory written by ``python -m meta_train evaluate default --suite stress``.

    Returns:
        A row for each task and a line of where they come from.
    """
    rows = [row for row in read_rows(results / "ratios.csv") if row["rule"] == "LSTM (default)"]
    ratios = {(row["task"], row["horizon"], row["against"]): float(row["ratio"]) for row in rows}
    lines = ["| task | steps | against Adam(0.001) | against Adam, tuned |", "|---|---|---|---|"]
    for task, horizon in dict.fromkeys(key[:2] for key in ratios):
        cells = (f"{ratios[task, horizon, opponent]:.2f} x" for opponent in ("Adam(0.001)", "Adam, tuned"))
        lines.append(f"| {task} | {int(horizon):,} | {' | '.join(cells)} |")
    about = json.loads((results / "environment.json").read_text())
    note = (
        f"Ratios of mean training losses over the last tenth of the steps and n = {rows[0]['n']} fresh seeds; a run that "
        f"diverges would be Inf. Every figure is in [results.csv](docs/results/{results.name}/results.csv). {where(about)}. "
        f"Command: `{about['command']}`."
    )
    return "\n".join([*lines, "", note])


def step_sizes(results: Path = RESULTS / "lr") -> str:
    """Return what other values of ``lr`` do to the default rule as Markdown.

    Args:
        results: Directory written by ``python -m meta_train evaluate default --suite judge --lr ...``.

    Returns:
        A row for each value, how near 1 is to the best of each task, and a line of where they come from.
    """
    opponent = "Adam, tuned"
    rows = [row for row in read_rows(results / "summary.csv") if row["against"] == opponent]
    horizons = sorted({int(row["horizon"]) for row in rows})
    cells: dict[float, dict[int, str]] = defaultdict(dict)
    for row in rows:
        worst = f"worst {float(row['worst']):.2f}, {row['worst_task']}"
        cells[_lr_of(row["rule"])][int(row["horizon"])] = f"**{float(row['ratio']):.2f} x**, {worst}"
    heads = " | ".join(f"{horizon:,} steps" for horizon in horizons)
    lines = [f"| `lr` | {heads} |", "|---" * (len(horizons) + 1) + "|"]
    lines += [f"| {lr:g} | {' | '.join(cells[lr].get(horizon, '') for horizon in horizons)} |" for lr in sorted(cells)]
    losses: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for row in read_rows(results / "ratios.csv"):
        if row["against"] == opponent:
            losses[row["task"], row["horizon"]][_lr_of(row["rule"])] = float(row["ratio"])
    excess = {case: of_lr[1.0] / min(of_lr.values()) for case, of_lr in losses.items()}
    near, mean = sum(value <= 1.05 for value in excess.values()), geometric_mean(excess.values())
    (task, horizon), most = max(excess.items(), key=lambda item: item[1])
    about = json.loads((results / "environment.json").read_text())
    note = (
        f"Final training loss against {opponent}, geometric mean over tasks, and the worst task. With `lr` 1 the loss is "
        f"within 5 % of that with the best `lr` of the sweep in {near} of {len(excess)} cases (a task and a horizon each), "
        f"{100 * (mean - 1):.1f} % above it in the geometric mean and {100 * (most - 1):.0f} % at most ({task}, {horizon} "
        "steps). "
        f"{where(about)}. Command: `{about['command']}`."
    )
    return "\n".join([*lines, "", note])


def _lr_of(rule: str) -> float:
    """Return the factor that the name of a contestant ends with; without one it is 1."""
    return float(rule.partition("lr=")[2] or 1)


def exploration(results: Path = RESULTS / "exploration") -> str:
    """Return what each choice of the default recipe is worth as Markdown.

    Args:
        results: Directory written by ``python -m experiments.exploration``.

    Returns:
        A row for each variation, best first, then one for each kind of problem left out.
    """
    rows = read_rows(results / "variations.csv")
    lines = ["| variation | n | 200 steps | 500 steps | worst kind of model at 500 |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["variation"].startswith("without ")):
        means = (row["ratio_200"] + _spread(row["spread_200"]), row["ratio_500"] + _spread(row["spread_500"]))
        worst = f"{row['worst_500']}, {row['worst_kind']}"
        lines.append(f"| {row['variation']} | {row['n']} | {' | '.join(means)} | {worst} |")
    unchanged: dict[str, list[float]] = defaultdict(list)
    for row in read_rows(results / "kinds.csv"):
        if (row["variation"], row["seed"]) == ("as in the recipe", "0"):
            unchanged[row["horizon"]].append(float(row["ratio"]))
    first = " and ".join(f"{geometric_mean(ratios):.3f}" for ratios in unchanged.values())
    steps, commits = rows[0]["outer_steps"], ", ".join(sorted({one for row in rows for one in row["commit"].split()}))
    note = (
        f"First phase of the recipe cut to {steps} outer steps, changed in one choice, then judged as meta-trained (without "
        "`[use]`) on the eleven held-out kinds: final loss relative to the unchanged recipe, geometric mean over kinds and "
        "n meta-training seeds, ± the standard deviation of its logarithm between seeds. Where n is 1 the seed is 0, with "
        f"which the unchanged recipe alone has {first}. Differences smaller than twice its spread say nothing. "
        f"Commits {commits}. Every kind is in "
        f"[kinds.csv](docs/results/{results.name}/kinds.csv). Command: `python -m experiments.exploration --steps {steps}`."
    )
    return "\n".join([*lines, "", note])


def _spread(value: str) -> str:
    return f" ± {value}" if value else ""


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
    "opponents": opponents,
    "judge": suite,
    "judge-long": functools.partial(suite, RESULTS / "judge-long"),
    "seeds": seeds,
    "stress": stress,
    "lr": step_sizes,
    "exploration": exploration,
    "demo": demo,
}


PAGES = {ROOT / "README.md": "docs/", ROOT / "docs" / "results.md": "", ROOT / "docs" / "judging.md": ""}
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
