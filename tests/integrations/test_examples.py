"""Every example runs as its docstring says, and learns."""

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.meta_train.pictures import DESCRIPTION, make_data

ROOT = Path(__file__).parent.parent.parent
NEEDS = {
    "accelerate_loop": ("accelerate",),
    "lightning_trainer": ("lightning",),
    "optimizer_factory": ("pytorch_optimizer",),
    "transformers_trainer": ("transformers", "accelerate"),
}
OPTIONS = {
    "compiled_step": ("--backend", "aot_eager"),  # The default, inductor, needs a C++ compiler and a minute.
    "own_task": ("10",),  # Outer steps of sixty.
}
SPAWN = {"data_parallel", "sharded", "zero_redundancy"}
NOT_ON_TORCH_2_6 = {
    "sharded": "its FSDP2 knows no CPU",
    "zero_redundancy": "its process groups sometimes wait for themselves when they are freed",
}
ELSEWHERE = {"digits", "neural_art"}  # `make demo`, and below
EXAMPLES = sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - ELSEWHERE)


def assert_it_learned(example: str, output: str) -> None:
    if example == "digits":  # It prints a table.
        assert "LearnedOptimizer, no rate" in output
        return
    if example == "neural_art":
        finals = re.findall(r"(\w+).* loss ([\d.]+) at the start, ([\d.]+) at the end", output)
        assert [name for name, *_ in finals] == ["LearnedOptimizer", "Adam", "L"]
        assert len({start for _, start, _ in finals}) == 1, "all start from the same noise"
        assert all(float(end) < 0.75 * float(start) for _, start, end in finals), finals
        return
    losses = re.search(r"loss ([\d.]+) at the start.* ([\d.]+) at (?:the end|step 200)", output)
    assert losses, output
    share = 1 if example == "own_task" else 0.75  # It starts from what `default` reaches.
    assert float(losses[2]) < share * float(losses[1]), output


def something_to_paint(folder: Path) -> list[str]:
    """Make pictures and a network; return the painter's arguments."""
    art = make_data(folder) / "neural_art"
    (art / "net.toml").write_text(DESCRIPTION)
    pictures = ["--content", f"{art}/photos/00.jpg", "--style", f"{art}/styles/other.jpg", "--out", f"{folder}/out.png"]
    network = ["--network", f"{art}/net.safetensors", "--description", f"{art}/net.toml"]
    return [*pictures, *network, "--size", "16", "--steps", "20", "--weights", "default"]


# Deprecations inside the frameworks and inside the compiler.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", sorted(set(EXAMPLES) - SPAWN))
def test_every_example_runs(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if missing := [name for name in NEEDS.get(example, ()) if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example, *OPTIONS.get(example, ())])
    names = runpy.run_module(f"examples.{example}", run_name="__main__")
    assert f"python -m examples.{example}" in names["__doc__"]
    assert_it_learned(example, capsys.readouterr().out)


@pytest.mark.parametrize("example", sorted(SPAWN))
def test_every_example_of_several_processes_runs(example: str) -> None:
    if torch.__version__ < (2, 7) and example in NOT_ON_TORCH_2_6:
        pytest.skip(NOT_ON_TORCH_2_6[example])
    command = [sys.executable, "-m", f"examples.{example}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_it_learned(example, done.stdout)


def test_the_painter_paints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["neural_art", *something_to_paint(tmp_path)])
    runpy.run_module("examples.neural_art", run_name="__main__")
    captured = capsys.readouterr()
    assert_it_learned("neural_art", captured.out)
    art = tmp_path / "neural_art"
    assert "20/20" in captured.err
    with Image.open(tmp_path / "out.png") as written, Image.open(art / "photos" / "00.jpg") as photo:
        assert written.size == (5 * 16, 16)
        centre = photo.crop((2, 0, 22, 20)).resize((16, 16), Image.Resampling.LANCZOS)
        shown = written.crop((0, 0, 16, 16))
        assert max(abs(a - b) for a, b in zip(shown.tobytes(), centre.tobytes(), strict=True)) <= 3


def test_without_a_photo_the_painter_paints_a_texture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    style_only, starts = something_to_paint(tmp_path)[2:], []
    for options in (style_only, ["--content", style_only[1], *style_only]):
        monkeypatch.setattr(sys, "argv", ["neural_art", *options])
        runpy.run_module("examples.neural_art", run_name="__main__")
        output = capsys.readouterr().out
        assert_it_learned("neural_art", output)
        starts.append(float(re.findall(r"loss ([\d.]+) at the start", output)[0]))
        with Image.open(tmp_path / "out.png") as written:
            assert written.size == ((3 + len(starts)) * 16, 16)
    assert starts[0] < starts[1], "no content weighs in"
