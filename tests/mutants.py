"""Break learned_optim on purpose, one promise at a time, and see whether the tests notice.

python -m tests.mutants [WORD ...]

``tests/mutant_table.py`` lists the mutants. Each one is applied to a copy of the tree, and its tests must then fail. The
same tests run unbroken first and must pass. A mutant survives if its tests pass; the exit status is then 1. WORDs choose
the mutants that mention one of them.
"""

import argparse
import ast
import functools
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mutant_table import MUTANTS

ROOT = Path(__file__).parent.parent
COPIED = ("learned_optim", "meta_train", "tests", "pyproject.toml")
LIMIT = 600
"""Seconds for one run of tests."""

Definition = ast.FunctionDef | ast.ClassDef


class MutantError(Exception):
    """A mutant no longer fits the source; the message names the mutant and says what it misses."""


class Mutant(NamedTuple):
    """One breakage.

    ``row`` is the promise in docs/contract.md that it breaks. ``place`` is the end of the dotted name of a function or class
    of learned_optim, long enough to be unique. ``old`` is an expression or a simple statement that occurs there once, in any
    layout; ``new`` takes its place. If ``old`` is empty, ``new`` begins the function or ends the class. ``tests`` names
    test functions as ``place`` does, with commas between them; ``[word]`` picks the cases whose ids contain the word.
    """

    row: str
    name: str
    place: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"mutant {self.name!r} of {self.row!r}"


ALL = [Mutant(row, *columns) for row, listed in MUTANTS.items() for columns in listed]


class Place(NamedTuple):
    """Where a definition stands: its file, and its name inside the file, such as ``LearnedOptimizer.step``."""

    path: Path
    name: str


def definitions(folder: Path, pattern: str = "*.py") -> dict[str, Place]:
    """Return every function and class below a folder by its dotted name."""
    places = {}
    for path in sorted(folder.rglob(pattern)):
        module = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for name, _ in _defined(ast.parse(path.read_text())):
            places[f"{module}.{name}"] = Place(path, name)
    return places


def _defined(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition) and not any(ast.unparse(each) == "overload" for each in node.decorator_list):
            yield prefix + node.name, node
            yield from _defined(node, f"{prefix}{node.name}.")


def found(name: str, among: Iterable[str], mutant: Mutant) -> str:
    """Return the one dotted name that ends in ``name``."""
    fitting = [each for each in among if f".{each}".endswith(f".{name}")]
    if len(fitting) != 1:
        number = f"{len(fitting)} definitions are" if fitting else "nothing is"
        raise MutantError(f"{mutant}: {number} called {name}: {', '.join(fitting) or 'was it renamed?'}")
    return fitting[0]


def broken(place: Place, mutant: Mutant) -> str:
    """Return the source of a file with a mutant in it. Comments are lost; no test reads them."""
    tree = ast.parse(place.path.read_text())
    node = dict(_defined(tree))[place.name]
    if not mutant.old:
        start = 1 if ast.get_docstring(node) else 0
        at = len(node.body) if isinstance(node, ast.ClassDef) else start
        node.body[at:at] = ast.parse(mutant.new).body
        return ast.unparse(tree)
    wanted = ast.unparse(ast.parse(mutant.old))
    matches = [
        (parent, field, index)
        for parent in ast.walk(node)
        for field, value in ast.iter_fields(parent)
        for index, child in enumerate(value if isinstance(value, list) else [value])
        if isinstance(child, (ast.expr, ast.stmt)) and not isinstance(child, ast.Expr) and ast.unparse(child) == wanted
    ]
    if len(matches) != 1:
        raise MutantError(f"{mutant}: {wanted!r} occurs {len(matches)} times in {place.name}, not once")
    ((parent, field, index),) = matches
    value, (new,) = getattr(parent, field), ast.parse(mutant.new).body
    replacement = new.value if isinstance(new, ast.Expr) and not _is_statement(parent, field, index) else new
    if isinstance(value, list):
        value[index] = replacement
    else:
        setattr(parent, field, replacement)
    return ast.unparse(tree)


def _is_statement(parent: ast.AST, field: str, index: int) -> bool:
    value = getattr(parent, field)
    return isinstance(value[index] if isinstance(value, list) else value, ast.stmt)


class Edit(NamedTuple):
    """A mutant that has found its place: the file to write, what to write, and the tests to run, as pytest takes them."""

    path: Path
    source: str
    tests: list[str]
    word: str


def prepared(mutant: Mutant, tree: Path = ROOT) -> Edit:
    """Find a mutant's place and tests.

    Args:
        mutant: Any.
        tree: The root of the project or of a copy.

    Returns:
        The edit, which is not yet written.

    Raises:
        MutantError: If the place, the piece of code or a test is not there exactly once.
    """
    places, tests = _places(tree), _tests(tree)
    place = places[found(mutant.place, places, mutant)]
    names, word = mutant.tests.removesuffix("]").partition("[")[::2]
    chosen = [found(name.strip(), tests, mutant) for name in names.split(",")]
    ids = [f"{tests[name].path.relative_to(tree)}::{tests[name].name}" for name in chosen]
    return Edit(place.path, broken(place, mutant), ids, word)


@functools.cache
def _places(tree: Path) -> dict[str, Place]:
    return definitions(tree / "learned_optim")


@functools.cache
def _tests(tree: Path) -> dict[str, Place]:
    return definitions(tree / "tests", "test_*.py")


def main() -> int:
    """Run the mutants; print a table; return 1 if one survives or cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    mutants = [mutant for mutant in ALL if not words or any(word in " ".join(mutant) for word in words)]
    # Sources change faster than the time stamps that compiled files are checked by.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, tree / name)
        for cache in tree.rglob("__pycache__"):
            shutil.rmtree(cache)
        try:
            edits = {mutant: prepared(mutant, tree) for mutant in mutants}
        except MutantError as error:
            print(error)
            return 1
        import_torch()
        if failing := [file for file, tests in by_file(edits.values()).items() if run(tree, tests)]:
            print("fail without any mutant:", *failing, sep="\n  ")
            return 1
        outcomes = []
        print(f"{'row':<34}{'mutant':<56}outcome", flush=True)
        for mutant, edit in edits.items():
            start = time.perf_counter()
            outcomes.append(outcome := outcome_of(tree, edit))
            print(f"{mutant.row:<34}{mutant.name:<56}{outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
    caught = outcomes.count("caught")
    print(f"{len(outcomes)} mutants, {caught} caught, {len(outcomes) - caught} not")
    return int(caught < len(outcomes))


def import_torch() -> None:
    """Import what most runs of tests need, so that their forks have it."""
    for name in ("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.tensor"):
        importlib.import_module(name)


def by_file(edits: Iterable[Edit]) -> dict[str, list[str]]:
    """Return the tests of all edits, by the file that holds them."""
    tests: dict[str, list[str]] = {}
    for test in sorted({test for edit in edits for test in edit.tests}):
        tests.setdefault(test.partition("::")[0], []).append(test)
    return tests


def outcome_of(tree: Path, edit: Edit) -> str:
    """Break the copy, run the tests, mend it."""
    source = edit.path.read_text()
    edit.path.write_text(edit.source)
    try:
        status = run(tree, edit.tests, edit.word)
    finally:
        edit.path.write_text(source)
    return {0: "SURVIVED", 1: "caught"}.get(status, f"ERROR: pytest left with {status}")


def run(tree: Path, tests: list[str], word: str = "") -> int:
    """Run tests up to the first failure; return pytest's exit status.

    They run in a fork of this process, which has imported torch but nothing of ours. The fork saves most of the time.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(tree)
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # This very file came as part of a package of that name.
    sys.path[0] = str(tree)
    signal.alarm(LIMIT)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests, *(["-k", word] if word else [])]))


if __name__ == "__main__":
    sys.exit(main())
