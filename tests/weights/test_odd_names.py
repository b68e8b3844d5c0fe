"""Pipes, devices and odd names instead of weight files, and outputs that are closed or full."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from learned_optim import Weights, WeightsError
from learned_optim.__main__ import main
from learned_optim.weights import read_sonnet, read_weights
from tests.cases import small_rule

Output = pytest.CaptureFixture[str]
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")

ODD_NAMES = ("a\0b", "x" * 300, "x/" * 3000, "\ud800", "line\nbreak", "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("read", [Weights.from_pretrained, read_weights, read_sonnet])
@pytest.mark.parametrize("inside", [False, True])
def test_a_pipe_is_refused_at_once(read: object, inside: bool, tmp_path: Path) -> None:
    pipe = tmp_path / ("model.safetensors" if inside else "pipe.safetensors")
    os.mkfifo(pipe)
    with pytest.raises(WeightsError, match=r"no regular file|cannot read"):
        read(tmp_path if inside and read is not read_sonnet else pipe)  # type: ignore[operator]


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no devices here")
@pytest.mark.parametrize("read", [read_weights, read_sonnet])
def test_a_device_is_refused_at_once(read: object) -> None:
    with pytest.raises(WeightsError, match="no regular file"):
        read("/dev/zero")  # type: ignore[operator]


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: ascii(name)[:12])
def test_odd_names_are_refused_as_weights_are(name: str, tmp_path: Path) -> None:
    for ending, call in (
        ("", Weights.from_pretrained),
        (".safetensors", Weights.from_pretrained),
        (".safetensors", read_weights),
        (".l2l", read_sonnet),
    ):
        with pytest.raises(WeightsError):
            call(f"{name}{ending}")
    with pytest.raises(WeightsError, match="cannot write weights"):
        Weights(small_rule()).save(f"{tmp_path}/none/{name}.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_unicode_is_read_written_and_shown_escaped(tmp_path: Path, capsys: Output) -> None:
    weights, path = Weights(small_rule()), tmp_path / os.fsdecode(b"r\xff.safetensors")
    weights.save(path)
    assert read_weights(path).fingerprint == weights.fingerprint
    assert main(["info", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(r"r\udcff.safetensors")


@pytest.mark.parametrize("revision", ["..", ".", "../x", "a/../b", "/", "a//b", "\0", "a b\n"])
def test_what_is_no_revision_reaches_no_address_and_no_path(revision: str) -> None:
    with pytest.raises(WeightsError, match="is no revision"):
        Weights.from_pretrained("owner/repo", revision=revision)


def test_dots_behind_an_at_are_no_revision(capsys: Output) -> None:
    for verb in ("info", "download"):
        assert main([verb, "owner/repo@.."]) == 2
        assert "'..' is no revision" in capsys.readouterr().err


@needs_full
@pytest.mark.parametrize("arguments", [["list"], ["info", "default"], ["bytes", "7B"]])
def test_an_output_that_is_full_is_one_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(arguments) == 2
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    assert capsys.readouterr().err == "python -m learned_optim: [Errno 28] No space left on device\n"


def test_without_a_stdout_or_stderr_the_status_tells(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info", "nothing"]) == 2
    with pytest.raises(SystemExit) as exit:
        main(["bytes", "many"])
    assert exit.value.code == 2
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["list"]) == 0
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")
