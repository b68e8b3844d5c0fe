"""The direction of dependencies, and what an import may cost."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import learned_optim

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "learned_optim"
ALLOWED = {
    "rules": {"rules"},
    "backends": {"backends", "modes", "rules"},
    "weights": {"modes", "rules", "weights"},
    "modes": set(),
    "guard": {"modes", "rate_watch", "rules", "weights"},
    "rate_watch": set(),
    "summary": {"backends", "rate_watch", "rules"},
    "sharding": set(),
    "group_options": {"guard", "rules"},
    "checkpoint": {"group_options", "modes", "rules", "sharding"},
    "optimizer": {
        "backends",
        "checkpoint",
        "fit",
        "group_options",
        "guard",
        "modes",
        "rate_watch",
        "rules",
        "sharding",
        "state",
        "summary",
        "weights",
    },
    "fit": {"group_options", "rules", "sharding"},
    "state": {"group_options", "rules", "sharding", "weights"},
    "memory": {"optimizer"},
    "recorder": {"backends", "group_options", "optimizer", "rules", "sharding"},
    "__init__": {"memory", "optimizer", "recorder", "rules", "weights"},
    "__main__": {"rules", "weights"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path):
        assert not module.startswith("meta_train"), module
        if module.startswith("learned_optim."):
            assert module.split(".")[1] in ALLOWED[part], module


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "meta_train").rglob("*.py")]), ids=lambda path: path.stem
)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [
        n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    assert "print" not in calls or path.name == "__main__.py"


def test_importing_brings_nothing_heavy_and_opens_no_socket() -> None:
    code = """
import sys, socket, torch, safetensors
before = set(sys.modules)
def refuse(*arguments, **options):
    raise AssertionError("a socket was opened")
socket.socket = refuse
import learned_optim
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert extra <= {"learned_optim", "safetensors"}, extra


def test_nothing_needs_numpy(tmp_path: Path) -> None:
    """PyTorch does not bring it along, so an environment with only the runtime dependencies has none."""
    code = """
import pickle, sys
sys.modules["numpy"] = None
import torch
from learned_optim import LearnedOptimizer, Weights
param = torch.nn.Parameter(torch.ones(3))
optimizer = LearnedOptimizer([param])
param.grad = torch.ones(3)
optimizer.step()
assert (param < 1).all()
pickle.loads(pickle.dumps(optimizer)).load_state_dict(optimizer.state_dict())
weights = Weights.from_pretrained("default")
weights.save("copy.safetensors")
assert Weights.from_pretrained("copy.safetensors").fingerprint == weights.fingerprint
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_documented() -> None:
    for name in learned_optim.__all__:
        value = getattr(learned_optim, name)
        assert name == "__version__" or (value.__doc__ and value.__doc__.strip()), name
