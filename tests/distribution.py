"""Build the source distribution and the wheel, install them where nothing else is, and see that they keep what we promise.

    python -m tests.distribution

Needs a git checkout and a package index. Not part of the test suite: it makes an environment of its own, in minutes.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.integrations.test_examples import NEEDS, OPTIONS, assert_it_learned, something_to_paint

ROOT = Path(__file__).parent.parent
RUNTIME = {"learned_optim", "torch"}
"""What an example may import without needing an extra."""

NEED_NUMPY = {"sharded", "zero_redundancy"}
"""PyTorch gathers objects from other processes through NumPy, which it does not bring along."""

NOT_SHIPPED = {".ci/run", ".gitignore"}
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|learned_optim\.egg-info/.*")
IN_WHEEL = (".py", ".safetensors", ".toml")

SMOKE = """
import sys
from pathlib import Path
import torch
import learned_optim
from learned_optim import LearnedOptimizer, available_weights
from learned_optim.backends.native.library import AVAILABLE

assert "site-packages" in learned_optim.__file__, learned_optim.__file__
assert (Path(learned_optim.__file__).parent / "py.typed").exists()
bundled = {"cifar-conv", "cifar-dense", "default", "mnist-mlp", "mnist-modulated", "neural-art", "quadratic"}
assert bundled <= set(available_weights()), available_weights()
torch.manual_seed(0)
for weights in available_weights():
    model = torch.nn.Linear(10, 1)
    inputs = torch.randn(64, 10)
    optimizer = LearnedOptimizer(model.parameters(), weights=weights)
    losses = []
    for _ in range(20):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (weights, losses)
assert not {"numpy", "huggingface_hub"} & set(sys.modules)
assert AVAILABLE == (sys.argv[1] == "native"), AVAILABLE
assert sys.argv[1] in optimizer.summary(), optimizer.summary()
if not AVAILABLE:
    try:
        LearnedOptimizer(model.parameters(), backend="native")
    except RuntimeError as error:
        assert "install a C compiler and reinstall" in str(error), error
    else:
        raise AssertionError("backend='native' was accepted without kernels")
"""

TYPED = """
import torch
from learned_optim import LearnedOptimizer, Recorder, Weights, available_weights

model = torch.nn.Linear(2, 1)
weights: Weights = Weights.from_pretrained("default")
names: tuple[str, ...] = available_weights()
optimizer: torch.optim.Optimizer = LearnedOptimizer(model.parameters(), weights=weights, state_dtype=torch.int8)
loss: float = LearnedOptimizer(model.parameters()).step(lambda: 1.0)
Recorder(LearnedOptimizer(model.parameters()), every=10)
"""

MISTYPED = """
import torch
from learned_optim import LearnedOptimizer, available_weights

model = torch.nn.Linear(2, 1)
LearnedOptimizer(model.parameters(), weights=3)
LearnedOptimizer(model.parameters(), learning_rate=1.0)
names: list[int] = available_weights()
"""


def main() -> int:
    """Run every check in order; stop at the first that fails."""
    start = time.perf_counter()

    def done(what: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {what}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, wheel = build(work / "dist")
        done(f"built {sdist.name} and, from it, {wheel.name} ({wheel.stat().st_size / 1024:,.0f} KiB)")
        check_sdist(sdist)
        check_wheel(wheel)
        done("they hold what they should, and nothing else")

        python = make_environment(work / "environment")
        install(python, str(wheel))
        installed = call([python, "-m", "pip", "list", "--format=freeze"], work).split()
        done(f"installed with the runtime dependencies alone, {len(installed)} packages in all")
        assert quiet_smoke(python, work, "native") == ""
        done("trains from an empty directory; the compiled kernels are there")
        check_command_line(python, work)
        check_types(python, work)
        done("the command line answers; mypy sees the types")
        examples = work / "examples"
        shutil.copytree(ROOT / "examples", examples, ignore=shutil.ignore_patterns("__pycache__"))
        light = sorted({path.stem for path in examples.glob("*.py") if imports(path) <= RUNTIME} - NEED_NUMPY)
        run_examples(python, work, light, done)

        install(python, "--no-deps", "--force-reinstall", "--no-cache-dir", str(sdist), CC="/bin/false", CXX="/bin/false")
        said = quiet_smoke(python, work, "reference")
        assert said.count("the compiled CPU kernels were not built") == 1, said
        assert len(said.splitlines()) == 1, said
        done("installed from source without a C compiler: it trains in PyTorch, and says so once")

        install(python, "--force-reinstall", "--no-deps", str(wheel))
        install(python, f"{wheel}[art,integrations]")
        shutil.copytree(ROOT / "meta_train", work / "meta_train", ignore=shutil.ignore_patterns("__pycache__"))
        heavy = sorted({path.stem for path in examples.glob("*.py")} - set(light))
        run_examples(python, work, heavy, done)
    return 0


def build(dist: Path) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it."""
    call([sys.executable, "-m", "build", "--outdir", dist, ROOT], ROOT)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def check_sdist(sdist: Path) -> None:
    """See that it holds every committed file but results and those for development, no other, and less than a megabyte."""
    committed = set(call(["git", "ls-files"], ROOT).split()) - NOT_SHIPPED
    committed = {name for name in committed if not name.startswith("docs/results/")}
    assert sdist.stat().st_size < 1_000_000, sdist.stat().st_size
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    held = {name for name in held if not GENERATED.fullmatch(name)}
    assert held == committed, f"missing {sorted(committed - held)}, surplus {sorted(held - committed)}"


def check_wheel(wheel: Path) -> None:
    """See that it holds the package, its weights, recipes, marker of types, kernels and licence, and nothing else."""
    package = ROOT / "learned_optim"
    expected = {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.suffix in IN_WHEEL}
    expected.add("learned_optim/py.typed")
    held = set(zipfile.ZipFile(wheel).namelist())
    about = {name.split("/", 1)[1] for name in held if ".dist-info/" in name}
    kernels = {name for name in held if re.fullmatch(r"learned_optim/backends/native/_native\.[\w.-]+\.so", name)}
    code = {name for name in held if ".dist-info/" not in name} - kernels
    assert code == expected, f"missing {sorted(expected - code)}, surplus {sorted(code - expected)}"
    assert len(kernels) == 1, kernels
    assert about == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}, about


def make_environment(folder: Path) -> Path:
    """Make an empty virtual environment; return its Python."""
    call([sys.executable, "-m", "venv", folder], ROOT)
    return folder / "bin" / "python"


def install(python: Path, *what: str, **environment: str) -> None:
    """Install with pip, with the versions that CI uses."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    call([*command, *what], ROOT, **environment)


def quiet_smoke(python: Path, work: Path, backend: str) -> str:
    """Train in an empty directory, warnings being errors; return what was said on stderr."""
    with tempfile.TemporaryDirectory(dir=work) as empty:
        # PyTorch warns of the missing NumPy; that is its business.
        command = [python, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", SMOKE, backend]
        done = subprocess.run(command, cwd=empty, env=clean(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not any(Path(empty).iterdir())
        return done.stderr


def check_command_line(python: Path, work: Path) -> None:
    """See that it lists, informs and counts."""
    with tempfile.TemporaryDirectory(dir=work) as empty:
        names = [line.split()[0] for line in call([python, "-m", "learned_optim", "list"], empty).splitlines()]
        bundled = {"cifar-conv", "cifar-dense", "default", "mnist-mlp", "mnist-modulated", "neural-art", "quadratic"}
        assert bundled <= set(names), names
        for name in names:
            assert "fingerprint" in call([python, "-m", "learned_optim", "info", name], empty)
        assert "Adam" in call([python, "-m", "learned_optim", "bytes", "7B"], empty)


def check_types(python: Path, work: Path) -> None:
    """See that mypy takes right code, and finds each mistake in wrong code."""
    with tempfile.TemporaryDirectory(dir=work) as empty:
        (Path(empty) / "typed.py").write_text(TYPED)
        (Path(empty) / "mistyped.py").write_text(MISTYPED)
        mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python]
        call([*mypy, "typed.py"], empty)
        found = subprocess.run([*mypy, "mistyped.py"], cwd=empty, env=clean(), capture_output=True, text=True, check=False)
        assert re.findall(r"error: .*\[([\w-]+)\]", found.stdout) == ["arg-type", "arg-type", "assignment"], found.stdout


def imports(path: Path) -> set[str]:
    """Return what a file imports that is not of the standard library."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def run_examples(python: Path, work: Path, names: Iterable[str], done: Callable[[str], None]) -> None:
    """Run examples from a directory that has no ``learned_optim``."""
    for name in names:
        options = something_to_paint(work) if name == "neural_art" else OPTIONS.get(name, ())
        assert_it_learned(name, call([python, "-m", f"examples.{name}", *options], work))
        done(f"examples.{name}" + (f" with {', '.join(NEEDS[name])}" if name in NEEDS else ""))


def call(command: Iterable[str | Path], where: str | Path, **environment: str) -> str:
    """Run a command; return what it printed, or fail with all that it said."""
    done = subprocess.run(
        [str(word) for word in command], cwd=where, env=clean(**environment), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, done.args))}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


def clean(**more: str) -> dict[str, str]:
    """Return this environment without what would let Python find this tree."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {**kept, **more}


if __name__ == "__main__":
    sys.exit(main())
