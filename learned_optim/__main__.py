"""Command line for weights: what there is, what a file says, fetching, converting, and what they cost in memory."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from learned_optim import __version__
from learned_optim.weights import Weights, WeightsError, available_weights, read_sonnet, resolve_weights, write_weights
from learned_optim.weights.facts import ADAM_BYTES, bytes_per_parameter, training_facts
from learned_optim.weights.file_format import FILE, from_bytes, read_bytes
from learned_optim.weights.hub import download
from learned_optim.weights.registry import HUB_ID, PURPOSES
from learned_optim.weights.text import one_line, visible
from learned_optim.weights.weights import license_of

PROGRAM = "learned-optim" if Path(sys.argv[0]).stem == "learned-optim" else "python -m learned_optim"
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
LARGEST_MODEL = 1e18
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line."""
        _complain(self.prog, f"{one_line(message)}; see {self.prog} --help")
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: Command line without the program's name.

    Returns:
        Exit status: 0, 2 for a mistake in the request or weights that cannot be had, 130 if interrupted.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0
    # Its own warnings and progress would hide the one line that matters; read when it is imported, which is later.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # What an encoding lacks is escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        lines = options.verb(options)
        for line in lines:
            print(visible(line))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (WeightsError, OSError) as error:
        _complain(PROGRAM, one_line(error))
        return 2
    except KeyboardInterrupt:
        _complain(PROGRAM, "interrupted")
        return 130
    return 0


def meta_train() -> int:
    """Run the script ``meta-train``, which works where this package lies in a clone of the repository.

    Returns:
        Exit status, as ``python -m meta_train`` gives it; 2 where ``meta_train`` or a package that it needs is missing.
    """
    try:
        found = importlib.import_module("meta_train.__main__")
    except ModuleNotFoundError as error:
        _complain("meta-train", f'{error.name} is missing; work in a clone of learned-optim, after pip install -e ".[meta]"')
        return 2
    return int(found.main())


def _complain(program: str, message: str) -> None:
    """Say what is wrong, if there is a stderr that takes it."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"{program}: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Look at, fetch and convert the weights of learned update rules.")
    parser.add_argument("--version", action="version", version=f"learned-optim {__version__}")
    parser.set_defaults(verb=None)
    verbs = parser.add_subparsers(metavar="VERB", parser_class=_Parser)

    show = verbs.add_parser("list", help="the weights that come with the package, and what each is for")
    show.set_defaults(verb=_list)

    info = verbs.add_parser("info", help="everything that weights say of themselves")
    info.add_argument("weights", help="a bundled name, a file, or OWNER/REPO[@REVISION] on the Hub")
    info.set_defaults(verb=_info)

    fetch = verbs.add_parser("download", help="fetch weights from the Hugging Face Hub and check them")
    fetch.add_argument("repo", metavar="OWNER/REPO[@REVISION]")
    fetch.add_argument("--to", type=Path, metavar="DIR", help="also put a copy there, as DIR/model.safetensors")
    fetch.set_defaults(verb=_download)

    convert = verbs.add_parser(
        "convert",
        help="make a weight file of an .l2l file of the original code",
        description="Make a weight file of an .l2l file of the original code (google-deepmind/learning-to-learn), or of its "
        "arrays kept as safetensors. Nothing in the file is run.",
    )
    convert.add_argument("source", type=Path)
    convert.add_argument("dest", type=Path, help="a new .safetensors file")
    convert.add_argument("--preprocess-p", type=float, default=5.0, metavar="K", help="k of LogAndSign (%(default)s)")
    convert.add_argument("--output-scale", type=float, metavar="SCALE", help="0.01 with LogAndSign, 1 without")
    convert.add_argument("--license", default="unknown", help="of the weights, such as mit or apache-2.0")
    convert.set_defaults(verb=_convert)

    size = verbs.add_parser("bytes", help="memory of the optimizer state for a model of some size, beside Adam's")
    size.add_argument("size", nargs="?", type=_count, default=1, help="parameters of the model: 7B, 125M, 1e6 (1)")
    size.add_argument("--weights", metavar="NAME", help="a bundled name, a file or a Hub id (all that are bundled)")
    size.set_defaults(verb=_bytes)
    return parser


def _list(_: argparse.Namespace) -> list[str]:
    loaded = [resolve_weights(name) for name in available_weights()]
    rows = [(one.name, f"{bytes_per_parameter(one.rule)} bytes/parameter", PURPOSES.get(one.name, "")) for one in loaded]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _info(options: argparse.Namespace) -> list[str]:
    weights = resolve_weights(options.weights)
    rule = weights.rule
    facts = {
        "title": weights.title,
        "fingerprint": weights.fingerprint,
        "licence": license_of(weights),
        "meta-parameters": f"{sum(parameter.numel() for parameter in rule.parameters()):,}",
        "memory": _costs(weights),
        **training_facts(weights.recipe, weights.metadata.get("task", "")),
    }
    return [
        weights.name,
        *_aligned(facts),
        "",
        "rule",
        *_aligned({"family": rule.family, **rule.config.to_dict()}),
        "",
        "provenance",
        *(_aligned(weights.metadata) or ["  not recorded"]),
        "",
        "recipe",
        *([f"  {line}" for line in weights.recipe.strip().splitlines()] or ["  not recorded"]),
    ]


def _download(options: argparse.Namespace) -> list[str]:
    parts = HUB_ID.fullmatch(options.repo)
    if parts is None:
        raise WeightsError(f"{options.repo!r} is not a Hub id; give OWNER/REPO or OWNER/REPO@REVISION")
    path, pinned = download(parts["repo"], parts["revision"])
    weights = Weights.from_record(from_bytes(read_bytes(path), f"{FILE} of {pinned}"))
    if options.to is not None:
        options.to.mkdir(parents=True, exist_ok=True)
        path = options.to / FILE
        write_weights(path, weights)
    return [f'{path}: {weights.title}, {weights.rule.family}, fingerprint {weights.fingerprint[:12]}; weights="{pinned}"']


def _convert(options: argparse.Namespace) -> list[str]:
    if options.dest.exists():
        raise WeightsError(f"{options.dest} exists; remove it, or convert to another name")
    read = read_sonnet(
        options.source,
        preprocess_p=options.preprocess_p,
        output_scale=options.output_scale,
        license=options.license,
    )
    write_weights(options.dest, Weights(read.rule, options.dest.stem, metadata=read.metadata))
    return [
        f"{options.dest}: {read.rule.family}, {_costs(read)}, fingerprint {read.fingerprint[:12]}",
        f"as the original, except that {read.metadata['differences']}",
    ]


def _bytes(options: argparse.Namespace) -> list[str]:
    names = [options.weights] if options.weights else available_weights()
    rows = [("", "bytes/parameter", f"{options.size:,} parameters")]
    for weights in map(resolve_weights, names):
        for dtype in STATE_DTYPES:
            each = bytes_per_parameter(weights.rule, dtype)
            name = f"{weights.name}, {str(dtype).removeprefix('torch.')}"
            rows.append((name, str(each), _bytes_text(each * options.size)))
    rows.append(("Adam, float32", str(ADAM_BYTES), _bytes_text(ADAM_BYTES * options.size)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"{name:<{widths[0]}}  {each:>{widths[1]}}  {total:>{widths[2]}}" for name, each, total in rows]


def _costs(weights: Weights) -> str:
    full, half, eighth = (bytes_per_parameter(weights.rule, dtype) for dtype in STATE_DTYPES)
    return f"{full} bytes/parameter ({half} with state_dtype=bfloat16, {eighth} with int8; Adam {ADAM_BYTES})"


def _aligned(facts: Mapping[str, object]) -> list[str]:
    width = max(map(len, facts), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in facts.items()]


def _count(text: str) -> int:
    """Read a number of parameters such as 7B, 1.3B, 125M, 1e6 or 1,000."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([KMBT]?)", text.replace(",", "").replace("_", ""), re.IGNORECASE)
    count = float(parts[1]) * SUFFIXES[parts[2].upper()] if parts else 0
    if not 1 <= count <= LARGEST_MODEL:
        raise argparse.ArgumentTypeError(f"{one_line(repr(text), 40)} is no model size; write it as 7B, 125M or 1e6")
    return round(count)


def _bytes_text(count: int) -> str:
    """Write bytes in binary units, four digits."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.4g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
