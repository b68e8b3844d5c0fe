"""Run the native backend's tests on kernels that are built with the address sanitizer and the undefined-behaviour sanitizer.

python -m tests.sanitize [FOLDER]

The kernels, the package and the tests go to a folder of their own, ``build/sanitize``; the kernels of every day stay as they
are. A read past the end of a tensor comes first: the sanitizer must stop it, or it is not at work. It needs gcc or clang on
Linux; ``CC`` names another compiler. The exit status is 1 if a test fails or the sanitizer stops one.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from learned_optim.backends.native.library import source_digest
from tests.mutants import COPIED

ROOT = Path(__file__).parent.parent
NATIVE = Path("learned_optim/backends/native")
CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
FLAGS = ("-std=gnu11", "-O1", "-g", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
PLANS = "plan or replaced or threads or neighbours or strides or storage"
TESTS = ("test_native_bounds.py", "test_native_matrix.py", "test_native_plan.py", f"test_native_step.py -k '{PLANS}'")
OUTSIDE = """
import torch
from learned_optim.backends.native.library import LIBRARY
values = torch.zeros(20)
LIBRARY.learned_optim_evaluate(0, 20, values.data_ptr(), values.data_ptr())
print("inside", flush=True)
LIBRARY.learned_optim_evaluate(0, 21, values.data_ptr(), values.data_ptr())
print("outside")
"""


def main(folder: Path) -> int:
    """Build, see that the sanitizer is at work, and run the tests; return the exit status."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    build(compiler, folder / NATIVE)
    environment = {
        **os.environ,
        # Python and torch load C++ later, and the sanitizer must know at once how it throws.
        "LD_PRELOAD": f"{library(compiler)} {found(compiler, 'libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep much until the end.
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }
    proof = subprocess.run(
        [sys.executable, "-c", OUTSIDE], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if proof.stdout != "inside\n" or "heap-buffer-overflow" not in proof.stderr:
        print("the sanitizer did not stop a read past the end of a tensor", proof.stdout, proof.stderr, sep="\n")
        return 1
    print("a read past the end of a tensor was stopped, as it must be", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider"]
    commands = [[*pytest, *shlex.split(f"tests/backends/{tests}")] for tests in TESTS]
    statuses = [subprocess.call(command, cwd=folder, env=environment) for command in commands]
    return int(any(statuses))


def build(compiler: list[str], folder: Path) -> None:
    """Compile the kernels in place, with the checks."""
    sources = [str(path) for path in sorted(folder.glob("*.c"))]
    digest = f'-DSOURCE_DIGEST="{source_digest(folder)}"'
    command = [*compiler, *CHECKS, *FLAGS, digest, *sources, "-o", str(folder / "_native_sanitized.so"), "-lm"]
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def library(compiler: list[str]) -> str:
    """Return the path of the sanitizer's library, which Python must load before all else."""
    for name in ("libasan.so", f"libclang_rt.asan-{os.uname().machine}.so"):
        if path := found(compiler, name):
            return path
    raise SystemExit(f"{shlex.join(compiler)} has no address sanitizer; install its library or set CC")


def found(compiler: list[str], name: str) -> str:
    """Return the path at which a compiler has a library; empty if it has none."""
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return os.path.realpath(path) if os.path.isabs(path) else ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/sanitize").resolve()))
