"""What the documents say is run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import learned_optim
from meta_train.evidence import recipe_page, tables

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- needs: \w+ -->\n)?```python\n(.*?)```", re.DOTALL)
BLOCKS = [(page, needs, code) for page in PAGES for needs, code in BLOCK.findall(page.read_text())]


@pytest.mark.parametrize(
    ("page", "needs", "code"), BLOCKS, ids=[f"{page.stem}-{i}" for i, (page, _, _) in enumerate(BLOCKS)]
)
def test_every_python_block_runs(page: Path, needs: str, code: str) -> None:
    if needs:  # A network: the same calls are made against a stand-in in tests/weights/test_hub.py.
        compile(code, str(page), "exec")
        return
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["contract", "integrations"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    source, named = None, 0
    for path, test in re.findall(
        r"`([\w/]*test_\w+\.py)?(?:::((?:test|check)_\w+))?`", (ROOT / "docs" / f"{page}.md").read_text()
    ):
        if path:
            file = ROOT / path if path.startswith("tests/") else ROOT / "tests/optimizer" / path
            source = file.read_text()
        if path or test:
            named += 1
            assert source is not None, test
            assert not test or f"\ndef {test}(" in source, f"{path}::{test}"
    assert named > 20


def test_the_integrations_page_shows_every_example_of_one() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    shown = set(re.findall(r"\(\.\./examples/(\w+)\.py\)", page))
    assert shown == {path.stem for path in (ROOT / "examples").glob("*.py")} - {
        "digits",
        "fine_tuning",
        "neural_art",
        "own_task",
    }


def test_the_integrations_page_names_the_pinned_versions() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package in ("torch", "lightning", "transformers", "accelerate", "pytorch-optimizer"):
        assert f"{package.replace('-', '_')} {pins[package]}" in page


def test_names_of_bundled_weights_in_the_readme_are_right() -> None:
    assert f"# {learned_optim.available_weights()}" in (ROOT / "README.md").read_text()


def test_version_and_licence_are_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert f"version: {learned_optim.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {learned_optim.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


@pytest.mark.parametrize(("page", "docs"), tables.PAGES.items(), ids=lambda value: getattr(value, "stem", None))
def test_tables_are_those_of_the_committed_results(page: Path, docs: str) -> None:
    text = page.read_text()
    assert tables.updated(text, docs) == text
    assert re.search(r"<!-- results:(\S+) -->\n\|.+<!-- /results:\1 -->", text, re.DOTALL), "no table was compared"


def test_the_recipe_reference_is_that_of_the_code() -> None:
    assert recipe_page.PAGE.read_text() == recipe_page.page(), "run python -m meta_train.evidence.recipe_page"


def test_every_table_stands_on_a_page_and_every_mark_has_a_table() -> None:
    """A misspelt mark would keep its old table for ever, and one on another page would never be made."""
    marks = {path: re.findall(r"<!-- (/?)results:(\S+) -->", path.read_text()) for path in PAGES}
    for path, found in marks.items():
        opened, closed = ([name for slash, name in found if slash == mark] for mark in ("", "/"))
        assert opened == closed, path
        assert not opened or path in tables.PAGES, path
    assert {name for found in marks.values() for _, name in found} == set(tables.TABLES)
