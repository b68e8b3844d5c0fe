"""``python -m learned_optim``: what it prints, and that a mistake is one line and exit status 2."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import learned_optim
from learned_optim import Weights, available_weights
from learned_optim.__main__ import main, meta_train
from learned_optim.weights import read_sonnet, read_weights
from learned_optim.weights.facts import bytes_per_parameter
from learned_optim.weights.file_format import to_bytes
from learned_optim.weights.registry import PURPOSES
from tests.cases import small_rule
from tests.hub_stand_in import OLD, REPO, Hub, close_session, redirect, serve
from tests.sonnet_files import as_safetensors, by_dill, changed, sonnet_variables, zeros

Output = pytest.CaptureFixture[str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as running:
        redirect(monkeypatch, running.url, tmp_path / "home")
        running.files["model.safetensors"] = to_bytes(Weights(small_rule(), "mine", "schema = 1\n", {"commit": "abc"}))
        yield running
        close_session()


def refused(capsys: Output, *arguments: str) -> str:
    """Run what must fail; return the one line it says."""
    try:
        status: object = main(arguments)
    except SystemExit as exit:  # From argparse.
        status = exit.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n"), err[-1:]) == (2, "", 1, "\n"), err
    assert err.startswith("python -m learned_optim")
    return err


def printed(capsys: Output, *arguments: str) -> str:
    """Run what must succeed; return what it prints."""
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_list_has_a_line_for_each_bundled_file(capsys: Output) -> None:
    lines = printed(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == list(available_weights())
    for line in lines:
        name, size, unit, purpose = line.split(maxsplit=3)
        assert (int(size), unit) == (bytes_per_parameter(Weights.from_pretrained(name).rule), "bytes/parameter")
        assert purpose == PURPOSES[name]


def test_a_bare_call_shows_help_and_a_version_is_said(capsys: Output) -> None:
    assert "list" in printed(capsys)
    assert "usage: python -m learned_optim" in printed(capsys)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"learned-optim {learned_optim.__version__}\n"


def test_the_script_of_meta_train_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(sys, "argv", ["meta-train"])
    assert meta_train() == 0
    assert "usage: meta-train" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "meta_train.__main__", None)
    assert meta_train() == 2
    assert 'work in a clone of learned-optim, after pip install -e ".[meta]"' in capsys.readouterr().err


def test_info_says_everything_the_file_does(capsys: Output) -> None:
    out, weights = printed(capsys, "info", "default"), Weights.from_pretrained("default")
    facts = dict(re.findall(r"(?m)^  (\S+(?: \S+)*)  +(\S.*)$", out))
    assert facts["fingerprint"] == weights.fingerprint
    assert facts["meta-parameters"] == f"{sum(parameter.numel() for parameter in weights.rule.parameters()):,}"
    assert facts["licence"] == "mit"
    assert facts["memory"].startswith(f"{bytes_per_parameter(weights.rule)} bytes/parameter (")
    for name, value in {"family": weights.rule.family, **weights.rule.config.to_dict(), **weights.metadata}.items():
        assert facts[name] == str(value), name
    if sys.version_info >= (3, 11):
        assert facts["task distribution"].startswith("mixture")
        assert facts["horizon"] == "100 to 4,000 inner steps"
        assert facts["truncation"] == "64, then 256, then 512"
    for line in weights.recipe.strip().splitlines():
        assert f"  {line}\n" in out


def test_info_of_a_file_that_says_little(capsys: Output, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Weights(small_rule("paper-raw"), "mine").save(path)
    out = printed(capsys, "info", str(path))
    assert out.startswith(f"{path}\n")
    assert re.search(r"(?m)^  title +mine$", out)
    assert re.search(r"(?m)^  licence +unknown$", out)
    assert out.count("  not recorded\n") == 2
    path.write_bytes(to_bytes(Weights(small_rule(), recipe="= no TOML", metadata={"license": "apache-2.0"})))
    out = printed(capsys, "info", str(path))
    assert re.search(r"(?m)^  licence +apache-2.0$", out)
    assert "  = no TOML\n" in out


def test_download_checks_copies_and_names_the_commit(hub: Hub, capsys: Output, tmp_path: Path) -> None:
    out = printed(capsys, "download", REPO, "--to", str(tmp_path / "new" / "dir"))
    copy = tmp_path / "new" / "dir" / "model.safetensors"
    assert out.startswith(f"{copy}: mine, adam-modulation, fingerprint ")
    assert f'weights="{REPO}@{OLD}"' in out
    assert copy.read_bytes() == hub.files["model.safetensors"]
    assert Weights.from_pretrained(tmp_path / "new" / "dir").title == "mine"
    cached = Path(printed(capsys, "download", f"{REPO}@{OLD}").partition(":")[0])
    assert cached.is_relative_to(tmp_path / "home")


def test_a_failed_download_is_one_line(hub: Hub, capsys: Output, tmp_path: Path) -> None:
    to = tmp_path / "to"
    assert "no repository me/nothing" in refused(capsys, "download", "me/nothing", "--to", str(to))
    assert "no revision 'v9'" in refused(capsys, "download", f"{REPO}@v9")
    assert "'default' is not a Hub id; give OWNER/REPO" in refused(capsys, "download", "default")
    hub.files["model.safetensors"] = b"not weights"
    assert "truncated, corrupt" in refused(capsys, "download", REPO, "--to", str(to))
    assert not to.exists()


@pytest.mark.parametrize("as_pickle", [True, False])
def test_convert_writes_what_read_sonnet_reads(capsys: Output, tmp_path: Path, as_pickle: bool) -> None:
    source, dest = tmp_path / "cw.l2l-0", tmp_path / "mine.safetensors"
    if as_pickle:
        source.write_bytes(by_dill(sonnet_variables()))
    else:
        source = as_safetensors(sonnet_variables(), tmp_path / "cw.safetensors")
    options = ["--preprocess-p", "10", "--output-scale", "0.1", "--license", "mit"]
    out = printed(capsys, "convert", str(source), str(dest), *options)
    made, expected = read_weights(dest), read_sonnet(source, preprocess_p=10, output_scale=0.1, license="mit")
    assert (made.fingerprint, made.title, made.metadata) == (expected.fingerprint, "mine", expected.metadata)
    assert out.splitlines()[1].startswith("as the original, except that the first input is")
    assert "exists; remove it" in refused(capsys, "convert", str(source), str(dest))


def test_a_failed_convert_is_one_line_and_leaves_nothing(capsys: Output, tmp_path: Path) -> None:
    source, dest = tmp_path / "cw.l2l-0", tmp_path / "mine.safetensors"
    assert "no such file" in refused(capsys, "convert", str(source), str(dest))
    source.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "asks for os.system, which could run code" in refused(capsys, "convert", str(source), str(dest))
    source.write_bytes(by_dill(changed(input_projection__w=zeros(2, 20))))
    assert "it is RNNprop" in refused(capsys, "convert", str(source), str(dest))
    source.write_bytes(by_dill(changed(linear__b=zeros(1) + float("nan"))))
    assert "holds NaN or Inf" in refused(capsys, "convert", str(source), str(dest))
    source.write_bytes(by_dill(sonnet_variables()))
    assert "weight files end in .safetensors" in refused(capsys, "convert", str(source), str(tmp_path / "mine.pt"))
    assert "preprocess_p must be positive" in refused(capsys, "convert", str(source), str(dest), "--preprocess-p", "0")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("size", "count", "total"),
    [
        ("7B", 7_000_000_000, "52.15 GiB"),
        ("125M", 125_000_000, "953.7 MiB"),
        ("1e6", 1_000_000, "7.629 MiB"),
        ("1.3b", 1_300_000_000, "9.686 GiB"),
        ("1,000", 1000, "7.812 KiB"),
        ("2T", 2_000_000_000_000, "14.55 TiB"),
        ("1", 1, "8 B"),
    ],
)
def test_bytes_reads_sizes_as_people_write_them(size: str, count: int, total: str, capsys: Output) -> None:
    lines = printed(capsys, "bytes", size).splitlines()
    assert lines[0].endswith(f"bytes/parameter  {count:,} parameters")
    assert lines[-1].split(maxsplit=3)[:3] == ["Adam,", "float32", "8"]
    assert lines[-1].endswith(f"  {total}")
    assert len(lines) == 2 + 3 * len(available_weights())


def test_bytes_of_one_rule_are_those_the_optimizer_holds(capsys: Output) -> None:
    lines = [line.split() for line in printed(capsys, "bytes", "1000", "--weights", "quadratic").splitlines()[1:]]
    assert [(line[0], line[1], int(line[2])) for line in lines] == [
        ("quadratic,", "float32", 320),
        ("quadratic,", "bfloat16", 160),
        ("quadratic,", "int8", 84),
        ("Adam,", "float32", 8),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["burn"], "invalid choice: 'burn'"),
        (["info"], "required: weights; see python -m learned_optim info --help"),
        (["info", "quadratics"], "did you mean 'quadratic'"),
        (["info", "missing.safetensors"], "no such file"),
        (["info", "weights.pt"], "is a pickle, which can run code"),
        (["bytes", "many"], "'many' is no model size; write it as 7B, 125M or 1e6"),
        (["bytes", "-1"], "see python -m learned_optim bytes --help"),
        (["bytes", "0"], "'0' is no model size"),
        (["bytes", "1e999"], "'1e999' is no model size"),
        (["bytes", "7B", "--weights", "nothing like it"], "unknown weights 'nothing like it'"),
        (["list", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: Output) -> None:
    assert message in refused(capsys, *arguments)


def test_an_interruption_is_said(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learned_optim.__main__, "_list", interrupt)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "python -m learned_optim: interrupted\n"


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "learned_optim"]
    code = """
import runpy, sys
sys.argv = ["learned_optim", "list"]
try:
    runpy.run_module("learned_optim", run_name="__main__")
except SystemExit as exit:
    assert exit.code == 0
assert not {"huggingface_hub", "numpy.testing", "meta_train"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(available_weights())
    failed = subprocess.run([*command, "info", "nothing"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    with subprocess.Popen([*command, "info", "default"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as cut:
        assert cut.stdout is not None
        assert cut.stderr is not None
        cut.stdout.close()
        assert cut.stderr.read() == b""
    assert cut.returncode == 0


HOSTILE = "red \x1b[31m, back \u202e, line\nbreak"


def test_what_a_stranger_wrote_is_printed_inert(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "hostile.safetensors"
    about = {"note": HOSTILE, "license": HOSTILE}
    path.write_bytes(to_bytes(Weights(small_rule(), HOSTILE, f"x = 1 # {HOSTILE}", about)))
    assert main(["info", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in printed)
    assert "\\x1b[31m" in printed
    assert main(["info", str(tmp_path / f"{HOSTILE}.safetensors")]) == 2
    assert all(character.isprintable() for character in capsys.readouterr().err.rstrip("\n"))


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "umlaut.safetensors"
    path.write_bytes(to_bytes(Weights(small_rule(), "Grüße")))
    command = [sys.executable, "-m", "learned_optim", "info", str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "Gr\\xfc\\xdfe" in done.stdout


@pytest.mark.parametrize("size", ["9" * 400, "1e99", "0", "-1"])
def test_a_size_without_meaning_is_one_line(size: str, capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["bytes", "--", size])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is no model size" in error
    assert len(error) < 300
