"""The tables that concern the default rule, made from committed CSVs; ``tables.py`` writes them into the documents."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean

from meta_train.evidence.cards import RESULTS, read_evaluation, where
from meta_train.rows import read_rows

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


STRONGEST = ("Adam, tuned", "AdamW+cosine, tuned", "Muon, tuned", "Muon+cosine, tuned", "ScheduleFree(0.0025)")
"""Whom the weights that a run ships are set against in the README."""


def shipped(results: tuple[Path, ...] = (RESULTS / "judge-200", RESULTS / "judge-1000")) -> str:
    """Return how the weights that ``default`` ships do against the strongest opponents, as Markdown.

    Args:
        results: Directories written by ``python -m meta_train evaluate default --suite judge``, one for each horizon.

    Returns:
        A table, and a line for each horizon that says where it comes from.
    """
    opponents = [(name, "last") for name in STRONGEST] + [("Adam, tuned", "averaged"), ("Muon, tuned", "averaged")]
    names = [f"{name}{' and averaged' if weights == 'averaged' else ''}" for name, weights in opponents]
    columns, notes = [names], []
    for directory in results:
        about = json.loads((directory / "environment.json").read_text())
        rows = [row for row in read_rows(directory / "shipped_summary.csv") if row["rule"] == "LSTM (default)"]
        horizon = max(int(row["horizon"]) for row in rows)
        found = {
            (row["weights"], row["against"], row["against_weights"]): row for row in rows if int(row["horizon"]) == horizon
        }
        for ours in ("last", "averaged"):
            columns.append([_against(found[ours, name, theirs]) for name, theirs in opponents])
        row = found["last", "Adam, tuned", "last"]
        notes.append(
            f"{horizon:,} steps: {row['tasks']} tasks, n = {row['n']} seeds. Worst: {row['worst_task']}, "
            f"{float(row['worst']):.2f} x tuned Adam. The highest loss of the second half is {float(row['spike']):.1f} x "
            f"its median, tuned Adam's {float(row['against_spike']):.1f} x. {where(about)}."
        )
    heads = [f"{directory.name.rpartition('-')[2]} steps{kind}" for directory in results for kind in ("", ", averaged")]
    lines = ["| training loss against | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True)]
    measure = "Geometric means of ratios at the final weights, on 64 fresh minibatches; in brackets held-out loss."
    return "\n".join([*lines, "", measure, "", *(f"- {note}" for note in notes)])


def shipped_tasks(results: tuple[Path, ...] = (RESULTS / "judge-200", RESULTS / "judge-1000")) -> str:
    """Return the averaged weights of ``default`` against those that opponents ship, task by task, as Markdown.

    Args:
        results: As for :func:`shipped`.

    Returns:
        A table, and the commands.
    """
    opponents = ("Adam, tuned", "AdamW+cosine, tuned", "Muon, tuned", "Muon+cosine, tuned")
    tables, commands = [], []
    for directory in results:
        rows = read_rows(directory / "shipped.csv")
        horizon = max(int(row["horizon"]) for row in rows)
        of_horizon = [row for row in rows if int(row["horizon"]) == horizon]
        tables.append({(row["task"], row["optimizer"], row["weights"]): float(row["loss"]) for row in of_horizon})
        command = json.loads((directory / "environment.json").read_text())["command"]
        commands.append(f"- [{horizon:,} steps](docs/results/{directory.name}/shipped.csv): `{command}`")
    heads = [f"{directory.name.rpartition('-')[2]}: {name}" for directory in results for name in opponents]
    lines = ["| task, `default` averaged against | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for task in dict.fromkeys(task for table in tables for task, _, _ in table):
        cells = []
        for table in tables:
            ours = table.get((task, "LSTM (default)", "averaged"))
            cells += ["" if ours is None else f"{ours / table[task, name, 'last']:.2f} x" for name in opponents]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *commands])


def _against(row: dict[str, str]) -> str:
    bold = "**" if float(row["ratio"]) < 1 else ""
    return f"{bold}{float(row['ratio']):.2f} x{bold} ({float(row['held_out_ratio']):.2f}), better on {row['wins']}"


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
    summary, about = read_evaluation(results / "seeds")
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
