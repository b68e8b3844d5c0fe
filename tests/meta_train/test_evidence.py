"""What a model card shows of the evaluations: the right weights' rows, as they stand in the tables."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from learned_optim import Weights
from meta_train.__main__ import main
from meta_train.evidence.cards import RESULTS, evidence, evidence_figures
from meta_train.rows import write_rows
from meta_train.training.run_dir import RunDir
from tests.cases import small_rule
from tests.hub_stand_in import NEW, REPO, Hub, close_session, redirect, serve
from tests.meta_train.test_recipe import TINY


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as running:
        redirect(monkeypatch, running.url, tmp_path / "home")
        running.token = "secret"
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "token").write_text("secret")  # As `hf auth login` leaves it.
        yield running
        close_session()


def section(card: bytes, title: str) -> str:
    return card.decode().split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


def test_bundled_weights_go_up_with_their_results(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upload", "quadratic", REPO]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{REPO}@{NEW}\n", "")
    shown = section(hub.files["README.md"], "Results")
    assert shown == evidence(Weights.from_pretrained("quadratic"))
    # The cells are those of the committed tables.
    page = (RESULTS.parent / "results.md").read_text()
    for name in ("**LSTM (quadratic)**", "Adam", "NAG", "RMSprop", "SGD"):
        (row,) = [line for line in shown.splitlines() if line.startswith(f"| {name}, ")]
        assert row in page
    assert "quadratic-1)" not in shown
    assert "![Loss over inner steps, learned and tuned by hand](quadratic.svg)" in shown
    assert hub.files["quadratic.svg"] == (RESULTS / "quadratic" / "curves.svg").read_bytes()
    assert "Meta-trained to 100 steps" in shown
    assert "Command: `python -m meta_train evaluate quadratic" in shown
    assert section(hub.files["README.md"], "Licence") == "MIT."
    assert Weights.from_pretrained(REPO, token="secret").fingerprint == Weights.from_pretrained("quadratic").fingerprint


def test_weights_are_known_by_their_fingerprint_and_not_by_their_name(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Weights(small_rule(), "quadratic").save(tmp_path / "quadratic.safetensors")
    assert main(["upload", str(tmp_path / "quadratic.safetensors"), REPO]) == 0
    assert section(hub.files["README.md"], "Results") == "None were published with these weights."
    assert "no tables in" in capsys.readouterr().err


def test_a_licence_and_a_title_reach_file_and_card(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(RunDir(tmp_path / "run", TINY).train())
    about = ["--license", "CC-BY-4.0", "--title", "My rule"]
    place = str(tmp_path / "new" / "folder")
    assert main(["publish", str(tmp_path / "run"), "--name", "mine", "--to", place, *about]) == 0
    mine = Weights.from_pretrained(tmp_path / "new" / "folder" / "mine.safetensors")
    assert (mine.title, mine.metadata["license"]) == ("My rule", "cc-by-4.0")
    about = ["--license", "apache-2.0", "--title", "Another"]
    assert main(["upload", str(tmp_path / "new" / "folder" / "mine.safetensors"), REPO, *about]) == 0
    card = hub.files["README.md"].decode()
    assert "\nlicense: apache-2.0\n" in card
    assert "# Another: a learned update rule" in card
    assert Weights.from_pretrained(REPO, token="secret").fingerprint == mine.fingerprint
    with pytest.raises(SystemExit, match="2"):
        main(["upload", "quadratic", REPO, "--license", "see below"])
    assert "'see below' is no SPDX identifier; write one such as mit" in capsys.readouterr().err


def test_a_run_is_published_with_its_recipe(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(RunDir(tmp_path / "run", TINY).train())
    request = ["publish", str(tmp_path / "run"), "--name", "mine", "--to", str(tmp_path), "--to-hub", REPO]
    assert main(request) == 0
    assert capsys.readouterr().out == f"wrote mine.safetensors and mine.toml to {tmp_path}\n{REPO}@{NEW}\n"
    assert hub.files["model.safetensors"] == (tmp_path / "mine.safetensors").read_bytes()
    assert TINY.strip() in section(hub.files["README.md"], "Recipe")


def test_a_directory_of_one_evaluation_or_of_many(tmp_path: Path) -> None:
    quadratic = Weights.from_pretrained("quadratic")
    one = evidence(quadratic, RESULTS / "quadratic")
    assert one.startswith("### quadratic\n\n| | sum of 100 losses |")
    for name in ("a", "b"):
        shutil.copytree(RESULTS / "quadratic", tmp_path / name)
    both = (one.replace("(quadratic.svg)", f"({name}.svg)") for name in ("a", "b"))
    assert evidence(quadratic, tmp_path) == "\n\n".join(both)
    picture = (RESULTS / "quadratic" / "curves.svg").read_bytes()
    assert evidence_figures(quadratic, tmp_path) == {"a.svg": picture, "b.svg": picture}
    assert evidence(quadratic, tmp_path / "none") == ""


def test_results_on_a_suite(tmp_path: Path) -> None:
    weights = Weights(small_rule(), "mine")
    about = {"processor": "P", "torch": "T", "commit": "C", "command": "X", "suite": "judge"}
    about["fingerprints"] = {"mine": weights.fingerprint, "other": "0"}  # type: ignore[assignment]
    (tmp_path / "environment.json").write_text(json.dumps(about))
    row = {"against": "Adam, tuned", "horizon": 200, "ratio": 0.912, "wins": 3, "tasks": 4, "worst": 1.3, "worst_task": "t"}
    write_rows(tmp_path / "summary.csv", [{"rule": f"LSTM ({name})", **row} for name in ("mine", "other")])
    assert evidence(weights, tmp_path).splitlines() == [
        "### suite judge",
        "",
        "| steps | against | final loss, ratio | wins | worst ratio |",
        "|---|---|---|---|---|",
        "| 200 | Adam, tuned | 0.91 x | 3 of 4 | 1.3 (t) |",
        "",
        "Geometric means over the tasks of the suite, the rule as it is; below 1 it is better than the baseline. "
        "P, torch T, commit C. Command: `X`.",
    ]
