"""The notebook is that of its cells, which run, and whose figures go the right way."""

import json
import re
from typing import Any

import pytest

from tests.tour import CELLS, NOTEBOOK, run_cells


def text_of(cell: dict[str, Any]) -> str:
    return "".join("".join(output.get("text", [])) for output in cell.get("outputs", []))


def test_the_notebook_has_the_cells_and_their_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == list(CELLS), "run python -m tests.tour"
    assert all(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.filterwarnings("ignore")
def test_every_cell_runs_and_its_figures_go_the_right_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent.parent)
    said = [text_of({"outputs": outputs}) for outputs in run_cells()]
    numbers = [[float(number) for number in re.findall(r"\d+\.\d+", text)] for text in said]
    adam, ours = numbers[2][:2]
    assert ours < adam
    last, averaged = numbers[7]
    assert averaged < last
    before, _, after = numbers[9][:3]
    assert after < before
