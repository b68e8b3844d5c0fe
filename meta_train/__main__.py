"""Command line: verbs and paths, nothing else. Everything that decides a result stands in the recipe."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from learned_optim import __version__
from learned_optim.rules import AdamModulationConfig
from learned_optim.weights import resolve_weights
from learned_optim.weights.text import visible
from meta_train.evidence import figures
from meta_train.evidence.cards import RESULTS, evidence, evidence_figures
from meta_train.evidence.drawing import draw
from meta_train.evidence.responses import probe, responses
from meta_train.files import read_text
from meta_train.interrupts import Interrupted, StopRequest, signals_interrupt
from meta_train.judging import arena_report, report
from meta_train.judging.arenas import ARENAS
from meta_train.judging.contestants import load_contestants
from meta_train.judging.repeat import repeat_validation, verify
from meta_train.judging.request import Request
from meta_train.judging.suites import SUITES
from meta_train.rows import read_rows, write_rows
from meta_train.screen import SCREEN, Parser, say
from meta_train.training.outer_loop import OuterStep
from meta_train.training.publish import publish, with_licence_and_title
from meta_train.training.recipe import read_recipe
from meta_train.training.recipe_text import with_seed
from meta_train.training.run_dir import RunDir
from meta_train.training.tensorboard import TensorBoardLog
from meta_train.workers import Each, Workers

WORKERS = "processes of one thread each; default: 0, this one alone"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: Command line without the program's name.

    Returns:
        Exit status: 0, 1 where ``verify`` or ``validate`` disagrees, 2 for a mistake in the request, 130 if interrupted, 143
        by SIGTERM, 141 if whatever read the output has left.
    """
    parser, threads = _parser(), torch.get_num_threads()
    options = parser.parse_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):  # What an encoding lacks is escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check_data(getattr(options, "data", None))
        _settle_workers(options)
        with signals_interrupt(), _memory_errors():
            status = options.verb(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # As a shell shows the signal that ends others then: `verify | head` must not look like success.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
        return 2
    except ValueError as error:
        say(error)
        return 2
    except BrokenProcessPool:
        say("a worker was killed, perhaps for want of memory; start it again, with fewer")
        return 2
    except MemoryError:
        say("there is not enough memory; smaller sizes in the recipe, or fewer --workers, need less")
        return 2
    except KeyboardInterrupt as error:
        say(f"interrupted{_remains(options)}")
        return 128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise a MemoryError where torch raises a RuntimeError for want of memory."""
    try:
        yield
    except RuntimeError as error:
        if re.search("can't allocate memory|not enough memory|Storage size calculation overflowed", str(error)):
            raise MemoryError from error
        raise


def _remains(options: argparse.Namespace) -> str:
    """Say what an interruption has left to go on with."""
    if options.verb is _train:
        return "; a training run resumes when it is started again"
    if options.verb is _evaluate:
        place = options.cache / (options.suite or arena_report.CACHE)
        count = sum(1 for _ in place.glob("*.safetensors"))
        runs = "finished run is" if count == 1 else "finished runs are"
        return f"; {count} {runs} kept in {place}, and the same command goes on with what is missing"
    return "; nothing of it is kept, and the same command begins again" if options.verb in (_validate, _verify) else ""


def _parser() -> argparse.ArgumentParser:
    program = "meta-train" if Path(sys.argv[0]).stem == "meta-train" else "python -m meta_train"
    parser = Parser(prog=program, description="Make, judge and publish update rules.")
    parser.add_argument("--version", action="version", version=f"learned-optim {__version__}")
    parser.set_defaults(verb=None)
    verbs = parser.add_subparsers(metavar="VERB", parser_class=Parser)

    train = verbs.add_parser("train", help="meta-train a recipe; run again to resume")
    train.add_argument("recipe", type=Path)
    train.add_argument("--out", type=_directory, required=True, help="run directory")
    train.add_argument("--data", type=Path, help="directory of the real data, for tasks that need it")
    train.add_argument("--seed", type=int, help="replace the recipe's seed")
    train.add_argument("--workers", type=int, default=0, help=f"{WORKERS}; no more than outer.episodes have work")
    train.add_argument("--log", choices=("tensorboard",), help="write events to OUT/tensorboard too")
    train.set_defaults(verb=_train)

    judge = verbs.add_parser("evaluate", help="compare weights with tuned baselines on fresh optimizees")
    judge.add_argument(
        "weights",
        nargs="+",
        help="bundled names, files or Hub ids, parts of a model joined by +; the first is the one drawn",
    )
    judge.add_argument("--out", type=_directory, required=True, help="directory for the tables")
    what = judge.add_mutually_exclusive_group()
    what.add_argument(
        "--task",
        default="",
        help=f"{', '.join(ARENAS)}; or your own as package.module:Class, or a recipe's file: naming one imports its code. "
        "Default: the task in the recipe of the first weights",
    )
    what.add_argument("--suite", choices=SUITES, help="judge on whole models instead: synthetic kinds, or real data")
    judge.add_argument("--data", type=Path, help="directory of the real data, for what needs it (docs/judging.md)")
    judge.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/judging"),
        help="finished runs, not made again: remove it after changing code; default: %(default)s",
    )
    judge.add_argument(
        "--workers", type=int, help="processes of one thread each; default: 1 for a suite, and 0, this one, for a task"
    )
    judge.add_argument("--baselines", type=Path, metavar="DIR", help="take theirs from the tables of an earlier judgement")
    judge.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks to judge on; default: all")
    judge.add_argument("--only", dest="tasks", nargs="+", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    judge.add_argument("--horizon", type=int, help="leave out longer horizons")
    judge.add_argument("--lr", type=float, nargs="+", default=[1.0], help="factors on the learned update; default: 1")
    judge.set_defaults(verb=_evaluate)

    draw = verbs.add_parser("figures", help="draw the figures of an evaluation from its tables")
    draw.add_argument("results", type=Path, help="directory written by evaluate")
    draw.add_argument("--runs", type=Path, nargs="*", default=[], help="run directories: writes and draws training.csv")
    draw.set_defaults(verb=_figures)

    explain = verbs.add_parser("explain", help="measure and draw what a rule of the default family learned")
    explain.add_argument("weights", help="bundled name, file or Hub id")
    explain.add_argument("--out", type=_directory, required=True, help="directory for responses.csv and its figure")
    explain.set_defaults(verb=_explain)

    verify = verbs.add_parser("verify", help="evaluate again and compare with the committed tables")
    verify.add_argument("weights", help="a bundled name, or a file whose stem has committed tables")
    verify.add_argument("--results", type=Path, help="the tables; default: docs/results/NAME")
    verify.add_argument("--data", type=Path, help="directory of the real data, for tasks that need it")
    verify.set_defaults(verb=_verify)

    validate = verbs.add_parser("validate", help="repeat the validation that chose weights, by the recipe inside them")
    validate.add_argument("weights", help="bundled name, file or Hub id; all parts of a model joined by +")
    validate.add_argument(
        "--task",
        default="",
        help="the recipe's own task, as package.module:Class or a recipe's file: naming one imports its code",
    )
    validate.add_argument("--data", type=Path, help="directory of the real data, for tasks that need it")
    validate.add_argument("--workers", type=int, default=0, help=WORKERS)
    validate.set_defaults(verb=_validate)

    to_package = verbs.add_parser("publish", help="put a run's best weights beside their recipe, or on the Hub")
    to_package.add_argument("run", type=Path)
    to_package.add_argument("--name", required=True)
    to_package.add_argument("--to", type=Path, help="directory; by default the package's bundled weights")
    _add_licence_and_title(to_package)
    to_package.add_argument("--to-hub", "--hub", dest="hub", metavar="OWNER/REPO", help="upload there too, as `upload` does")
    to_package.add_argument("--results", type=Path, default=RESULTS, help="tables for the model card; default: docs/results")
    to_package.set_defaults(verb=_publish)

    to_hub = verbs.add_parser("upload", help="put weights on the Hub, with a card that shows what was measured of them")
    to_hub.add_argument("weights", help="a bundled name or a file")
    to_hub.add_argument("hub", metavar="OWNER/REPO")
    _add_licence_and_title(to_hub)
    to_hub.add_argument("--results", type=Path, default=RESULTS, help="tables for the model card; default: docs/results")
    to_hub.set_defaults(verb=_upload)
    return parser


def _add_licence_and_title(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--license", type=_licence, help="of the weights, an SPDX identifier such as mit or cc-by-4.0")
    parser.add_argument("--title", help="how the weights are called on their card; default: their name")


def _licence(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no SPDX identifier; write one such as mit, apache-2.0 or cc-by-4.0")
    return text.lower()


def _directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a directory")
    return Path(text)


def _check_data(data: Path | None) -> None:
    """Refuse a directory that is none: what a real one lacks may come from the Hub, and so would all that this one lacks."""
    if data is not None and not data.is_dir():
        raise ValueError(f"--data {data} is no directory; leave it out to ask the Hub, which has the image sets")


def _settle_workers(options: argparse.Namespace) -> None:
    """Settle how many processes work; where any do, this one has one thread as they have, for the same bits everywhere."""
    workers = getattr(options, "workers", 0)
    if workers is None:
        workers = options.workers = 1 if options.suite else 0
    if workers < 0:
        raise ValueError(f"--workers must not be negative, got {workers}")
    if workers:
        torch.set_num_threads(1)


def _train(options: argparse.Namespace) -> int:
    read_recipe(options.recipe)
    text = read_text(options.recipe)
    if options.seed is not None:
        text = with_seed(text, options.seed)
    with StopRequest() as stop, _each(options.workers) as each:
        run = RunDir(options.out, text, options.data, each)
        if run.run.step and (changes := run.changes_since_start()):
            say(f"resuming elsewhere than it started, so not bit for bit: {', '.join(changes)}")
        total = run.run.recipe.steps
        with (
            _log(options, run) as log,
            tqdm(total=total, initial=run.run.step, unit="step", smoothing=0.05, dynamic_ncols=True, file=SCREEN) as bar,
        ):
            validation = "none yet"
            for record in run.train():
                log(record)
                if record.validation is not None:
                    validation = f"{record.validation:.4g} (best {run.run.best.validation:.4g})"
                bar.set_postfix_str(f"meta-loss {record.meta_loss:.4g}, validation {validation}", refresh=False)
                bar.update()
                if stop.signal is not None and record.step < total:
                    run.checkpoint()
                    bar.close()
                    say(f"stopped after outer step {record.step} of {total}; run it again to go on from there")
                    return 128 + stop.signal
    if not all(path.exists() for path in run.best_files):
        raise ValueError(f"no validation of {run.path} was finite: there are no weights worth keeping; lower outer.lr")
    print(f"best weights: {', '.join(map(str, run.best_files))} (validation {run.run.best.validation:.4g})")
    return 0


@contextmanager
def _log(options: argparse.Namespace, run: RunDir) -> Iterator[Callable[[OuterStep], object]]:
    """Give what takes every outer step beside the run's own files."""
    if options.log is None:
        yield lambda record: None
        return
    log = TensorBoardLog(run.path, run.run.step)
    try:
        yield log.add
    finally:
        log.close()


@contextmanager
def _each(workers: int) -> Iterator[Each]:
    """Yield the function that goes over independent pieces of work: ``map``, or the one of the workers."""
    if workers == 0:
        yield map
        return
    with Workers(workers) as processes:
        yield processes.map


def _evaluate(options: argparse.Namespace) -> int:
    def progress(runs: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(runs, total=total, unit="run", dynamic_ncols=True, disable=not total, file=SCREEN)

    kind, evaluate = ("suite", report.evaluate) if options.suite else ("task", arena_report.evaluate)
    rules = load_contestants(options.weights, options.lr)
    with _each(options.workers) as each:
        request = Request(
            kind,
            options.suite or options.task,
            rules,
            options.cache,
            options.data,
            options.baselines,
            options.horizon,
            options.tasks,
            each,
            progress,
        )
        for line in evaluate(request, options.out):
            print(visible(line))
    if kind == "task":
        write_rows(options.out / "probe.csv", probe(rules[0].first, scale=0.01))
    return 0


def _figures(options: argparse.Namespace) -> int:
    for path in draw(options.results, options.runs):
        print(f"wrote {visible(str(path))}", flush=True)
    return 0


def _explain(options: argparse.Namespace) -> int:
    (weights,) = load_contestants([options.weights])
    config = weights.first.rule.config
    if len(weights.weights) > 1 or not isinstance(config, AdamModulationConfig):
        raise ValueError(f"{weights.name}: only a rule that modulates an Adam step can be compared with one")
    rows = responses(weights.first, config.step_size)
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / "responses.csv", rows)
    figures.rule_responses(read_rows(options.out / "responses.csv"), options.out / "responses.svg")
    print(f"wrote responses.csv and responses.svg to {visible(str(options.out))}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    (weights,) = load_contestants([options.weights])
    agrees = True
    for line, within in verify(options.weights, weights, options.results or RESULTS / weights.name, options.data):
        print(visible(line))
        agrees &= within
    return 0 if agrees else 1


def _validate(options: argparse.Namespace) -> int:
    (weights,) = load_contestants([options.weights])
    agrees = True
    with _each(options.workers) as each:
        for figure in repeat_validation(weights, options.data, each, options.task):
            agrees &= figure.agrees
            name = figure.name.replace("_", " ")
            print(f"{name:<16}  kept {figure.kept}, now {figure.now:.6g}: {figure.verdict}", flush=True)
    return 0 if agrees else 1


def _publish(options: argparse.Namespace) -> int:
    to = [options.to] if options.to else []
    paths = publish(options.run, options.name, *to, license=options.license, title=options.title)
    print(f"wrote {', '.join(path.name for path in paths)} and {options.name}.toml to {paths[0].parent}")
    if options.hub and len(paths) > 1:
        raise ValueError("the parts of a model go to repositories of their own: use `upload` for each")
    if options.hub:
        _push(paths[0], options.hub, options.results)
    return 0


def _upload(options: argparse.Namespace) -> int:
    _push(options.weights, options.hub, options.results, options.license, options.title)
    return 0


def _push(name: str | Path, repo_id: str, tables: Path, license: str | None = None, title: str | None = None) -> None:
    weights = with_licence_and_title(resolve_weights(name), license, title)
    results, pictures = evidence(weights, tables), evidence_figures(weights, tables)
    if not results:
        say(f"no tables in {tables} are of these weights: their card will show no results")
    print(weights.push_to_hub(repo_id, results=results, pictures=pictures))


if __name__ == "__main__":
    sys.exit(main())
