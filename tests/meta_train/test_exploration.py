"""The table of the exploration is not lost to a shorter or longer one."""

from pathlib import Path

import pytest

from experiments import exploration
from meta_train.rows import read_rows


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["exploration", *arguments])
    monkeypatch.setattr(exploration, "meta_train", lambda *_: pytest.fail("a run was made"))
    exploration.main()


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the committed tables."""
    for name in ("kinds.csv", "variations.csv"):
        (tmp_path / name).write_bytes((exploration.TABLES / name).read_bytes())
    monkeypatch.setattr(exploration, "TABLES", tmp_path)
    monkeypatch.setattr(exploration, "RUNS", tmp_path / "runs")
    return tmp_path


def test_the_documented_command_makes_the_committed_table(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (tables / name).read_bytes() for name in ("kinds.csv", "variations.csv")}
    assert {row["outer_steps"] for row in read_rows(tables / "kinds.csv")} == {"150"}
    run(monkeypatch, "LSTM 1x4" if "LSTM 1x4" in (tables / "kinds.csv").read_text() else exploration.BASE)
    assert {name: (tables / name).read_bytes() for name in before} == before


def test_runs_of_other_steps_do_not_replace_it(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tables / "kinds.csv").read_bytes()
    with pytest.raises(SystemExit):
        run(monkeypatch, "--steps", "300", exploration.BASE)
    error = capsys.readouterr().err
    assert "holds runs of 150 outer steps, which --steps 300 would replace; give those, or move the tables away" in error
    assert (tables / "kinds.csv").read_bytes() == before
