"""Command line: verbs and paths, nothing else. Everything that decides a result stands in the recipe."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from learned_optim.weights import resolve_weights
from meta_train import evaluate, figures
from meta_train.publish import publish
from meta_train.recipe import read_recipe
from meta_train.run_dir import METRICS, RunDir

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: Command line without the program's name.

    Returns:
        Exit status: 0, 1 where ``verify`` disagrees, 2 for a mistake in the request.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.verb(options)
    except (ValueError, OSError) as error:
        print(f"meta_train: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m meta_train", description="Make, judge and publish update rules.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="meta-train a recipe; run again to resume")
    train.add_argument("recipe", type=Path)
    train.add_argument("--out", type=Path, required=True, help="run directory")
    train.add_argument("--seed", type=int, help="replace the recipe's seed")
    train.set_defaults(verb=_train)

    judge = verbs.add_parser("evaluate", help="compare weights with tuned baselines on fresh quadratics")
    judge.add_argument("weights", nargs="+", help="bundled names, files or Hub ids; the first is the one drawn")
    judge.add_argument("--out", type=Path, required=True, help="directory for the tables")
    judge.set_defaults(verb=_evaluate)

    draw = verbs.add_parser("figures", help="draw the figures of an evaluation from its tables")
    draw.add_argument("results", type=Path, help="directory written by evaluate")
    draw.add_argument("--runs", type=Path, nargs="*", default=[], help="run directories, for the training process")
    draw.set_defaults(verb=_figures)

    verify = verbs.add_parser("verify", help="evaluate again and compare with the committed tables")
    verify.add_argument("weights", help="a bundled name")
    verify.set_defaults(verb=_verify)

    to_package = verbs.add_parser("publish", help="put a run's best weights beside their recipe, or on the Hub")
    to_package.add_argument("run", type=Path)
    to_package.add_argument("--name", required=True)
    to_package.add_argument("--to", type=Path, help="directory; by default the package's bundled weights")
    to_package.add_argument("--hub", metavar="OWNER/REPO", help="upload there too")
    to_package.set_defaults(verb=_publish)
    return parser


def _train(options: argparse.Namespace) -> int:
    read_recipe(options.recipe)
    text = options.recipe.read_text()
    if options.seed is not None:
        text, count = re.subn(r"(?m)^seed = \d+", f"seed = {options.seed}", text)
        if count != 1:
            raise ValueError(f"{options.recipe} has no line 'seed = N' that --seed could replace")
    run = RunDir(options.out, text)
    total = run.run.recipe.outer.steps
    with tqdm(total=total, initial=run.run.step, unit="step", smoothing=0.05, dynamic_ncols=True) as bar:
        validation = "none yet"
        for record in run.train():
            if record.validation is not None:
                validation = f"{record.validation:.4g} (best {run.run.best_validation:.4g})"
            bar.set_postfix_str(f"meta-loss {record.meta_loss:.4g}, validation {validation}", refresh=False)
            bar.update()
    print(f"best weights: {run.path / 'best.safetensors'}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    weights = [resolve_weights(name) for name in options.weights]
    judgement = evaluate.judge(weights, progress=lambda settings: tqdm(list(settings), unit="setting"))
    evaluate.write_judgement(judgement, options.out)
    evaluate.write_rows(options.out / "probe.csv", evaluate.probe(weights[0], scale=0.01))
    _print_summary(judgement.summary)
    return 0


def _print_summary(rows: evaluate.Rows) -> None:
    for row in rows:
        tuned = f"  {row['setting']}" if row["setting"] else ""
        print(
            f"{row['horizon']:>4} steps  {row['criterion']:<6} {row['optimizer']:<24} {row['mean']:>9.4g} "
            f"+- {row['standard_error']:<9.2g} {row['ratio_to_best_baseline']:>6.3f} x best baseline{tuned}"
        )


def _figures(options: argparse.Namespace) -> int:
    rows = evaluate.read_rows(options.results / "curves.csv")
    first = next(row["optimizer"] for row in rows if row["optimizer"].startswith(evaluate.LEARNED))
    drawn = [row for row in rows if not row["optimizer"].startswith(evaluate.LEARNED) or row["optimizer"] == first]
    for ending in (".svg", ".png"):
        figures.learning_curves(drawn, options.results / f"curves{ending}", trained_to=100, title="Quadratics")
        figures.update_probe(evaluate.read_rows(options.results / "probe.csv"), options.results / f"probe{ending}")
    if options.runs:
        records = {path.name: figures.read_metrics(path / METRICS) for path in options.runs}
        kept = [{"run": n, **{k: r[k] for k in ("step", "meta_loss", "validation")}} for n, rs in records.items()
                for r in rs if "validation" in r]  # fmt: skip
        evaluate.write_rows(options.results / "training.csv", kept)
        figures.training_process(records, options.results / "training.svg", label="mean loss over 100 steps")
    return 0


def _verify(options: argparse.Namespace) -> int:
    committed = RESULTS / options.weights / "summary.csv"
    if not committed.exists():
        raise ValueError(f"there is no committed evidence for {options.weights!r} ({committed.name} is missing)")
    weights = resolve_weights(options.weights)
    name = f"{evaluate.LEARNED} ({weights.name})"
    expected = [row for row in evaluate.read_rows(committed) if row["optimizer"] == name]
    fresh = evaluate.curves(evaluate.Quadratic(), evaluate.learned_with(weights), max(evaluate.HORIZONS), "evaluation", 20)
    agrees = True
    for row in expected:
        values = evaluate.CRITERIA[row["criterion"]](fresh, int(row["horizon"]))
        difference = abs(float(values.mean()) - float(row["mean"]))
        within = difference <= 2 * float(row["standard_error"])
        agrees &= within
        print(
            f"{row['horizon']:>4} steps  {row['criterion']:<6} committed {float(row['mean']):.6g}, now "
            f"{float(values.mean()):.6g}: {'agrees' if within else 'DIFFERS by more than two standard errors'}"
        )
    return 0 if agrees else 1


def _publish(options: argparse.Namespace) -> int:
    path = publish(options.run, options.name, *([options.to] if options.to else []))
    print(f"wrote {path.name} and {path.with_suffix('.toml').name} to {path.parent}")
    if options.hub:
        print(resolve_weights(path).push_to_hub(options.hub))
    return 0


if __name__ == "__main__":
    sys.exit(main())
