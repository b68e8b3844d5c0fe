"""The tool of ``make mutants`` finds its places; the mutants themselves do not run here."""

import ast
from pathlib import Path

import pytest

from tests.mutants import ALL, Mutant, MutantError, prepared


@pytest.mark.parametrize("mutant", ALL, ids=str)
def test_a_mutant_finds_its_place_and_its_tests(mutant: Mutant) -> None:
    edit = prepared(mutant)
    assert ast.dump(ast.parse(edit.source)) != ast.dump(ast.parse(edit.path.read_text()))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of one function, whose code is laid out unlike the mutant's."""
    files = {
        "learned_optim/rates.py": "def halved(lr):\n    '''Halve.'''\n    return (lr\n            / 2)\n\n\nhalf = 1 / 2\n",
        "tests/test_rates.py": "def test_halved():\n    pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return tmp_path


MUTANT = Mutant("lr", "it is doubled", "halved", "lr/2", "lr * 2", "test_halved")


def test_code_is_found_in_any_layout_and_any_file(tree: Path) -> None:
    (tree / "learned_optim" / "deeper").mkdir()
    (tree / "learned_optim" / "rates.py").rename(tree / "learned_optim" / "deeper" / "factors.py")
    edit = prepared(MUTANT, tree)
    assert edit.path == tree / "learned_optim" / "deeper" / "factors.py"
    assert edit.source == 'def halved(lr):\n    """Halve."""\n    return lr * 2\nhalf = 1 / 2'
    assert edit.tests == ["tests/test_rates.py::test_halved"]


def test_new_code_begins_a_function_behind_its_docstring(tree: Path) -> None:
    source = prepared(MUTANT._replace(old="", new="lr = 0"), tree).source
    assert source.splitlines()[:4] == ["def halved(lr):", '    """Halve."""', "    lr = 0", "    return lr / 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"place": "quartered"}, r"mutant 'it is doubled' of 'lr': nothing is called quartered: was it renamed\?"),
        ({"old": "lr / 3"}, r"'lr / 3' occurs 0 times in halved, not once"),
        ({"tests": "test_quartered"}, "nothing is called test_quartered"),
    ],
)
def test_what_is_gone_is_named(tree: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(MutantError, match=message):
        prepared(MUTANT._replace(**change), tree)


def test_a_name_that_fits_two_functions_is_refused(tree: Path) -> None:
    (tree / "learned_optim" / "other.py").write_text("def halved(lr):\n    return lr / 2\n")
    with pytest.raises(MutantError, match=r"2 definitions are called halved: learned_optim\.other\.halved, learned"):
        prepared(MUTANT, tree)
    assert prepared(MUTANT._replace(place="rates.halved"), tree).path.name == "rates.py"
