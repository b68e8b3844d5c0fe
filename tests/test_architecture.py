"""The direction of dependencies down to single files, their size, and what an import may cost."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import learned_optim

ROOT = Path(__file__).parent.parent
Graph = Mapping[str, set[str]]
"""From each module to the modules of ours that it imports, inside functions too."""

FORBIDDEN = {
    "learned_optim": ("meta_train",),
    "learned_optim.rules": ("learned_optim.",),
    "learned_optim.backends": ("learned_optim.weights", "learned_optim.optimizer"),
    "learned_optim.weights": ("learned_optim.backends", "learned_optim.optimizer"),
    "learned_optim.optimizer": ("learned_optim.backends.",),
    "meta_train.tasks": ("meta_train.training", "meta_train.judging", "meta_train.evidence"),
    "meta_train.training": ("meta_train.judging", "meta_train.evidence"),
    "meta_train.judging": ("meta_train.evidence",),
    **dict.fromkeys(
        (f"meta_train.{name}" for name in ("files", "rows", "provenance", "screen", "workers")),
        tuple(f"meta_train.{room}" for room in ("tasks", "training", "judging", "evidence")),
    ),
}
"""What a module or package must not import, by the beginning of names. A package may always import its own modules."""

LONG_FILES = {"learned_optim.backends.triton.kernels", "learned_optim.backends.triton.step"}
LONG_FUNCTIONS = {
    "model_card": "one template, read from top to bottom",
    "step_kernel": "one program, which Triton compiles whole",
    "_parser": "one list of verbs and options",
    "real_tasks": "one list of tasks",
    "roll_out": "one loop",
}


def sources() -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    paths = [path for package in ("learned_optim", "meta_train") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules that a file imports, wherever in the file; ``from package import name`` may name a module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in modules else node.module for name in named}
    return found & modules


def circles(graph: Graph) -> Iterator[list[str]]:
    """Each circle that a walk along imports meets."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> Iterator[list[str]]:
        if module in path:
            yield [*path[path.index(module) :], module]
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                yield from walk(other, [*path, module])
            done.add(module)

    for module in sorted(graph):
        yield from walk(module, [])


def breaches(graph: Graph) -> list[str]:
    """What is wrong with a graph of imports, a line each."""
    lines = [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]
    for module, imported in graph.items():
        for place, forbidden in FORBIDDEN.items():
            if module == place or module.startswith(f"{place}."):
                lines += [
                    f"{module} imports {other}"
                    for other in sorted(imported)
                    if other.startswith(forbidden) and not (other == place or other.startswith(f"{place}."))
                ]
    return lines


MODULES = sources()
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
GRAPH = {module: imports(tree, set(MODULES)) for module, tree in TREES.items()}


def test_dependencies_point_one_way() -> None:
    assert breaches(GRAPH) == []


@pytest.mark.parametrize(
    ("module", "line", "breach"),
    [
        ("meta_train.training.recipe", "from meta_train.judging import report", "meta_train.training.recipe imports"),
        ("meta_train.tasks.mnist", "import meta_train.judging.report", "meta_train.tasks.mnist imports"),
        (
            "learned_optim.weights.errors",
            "def late():\n    from learned_optim.weights.weights import Weights",
            "circle: learned_optim.weights.errors -> ",
        ),
    ],
    ids=["training imports judging", "tasks import judging", "a circle inside a function"],
)
def test_a_breach_is_noticed(module: str, line: str, breach: str) -> None:
    changed = {**GRAPH, module: GRAPH[module] | imports(ast.parse(line), set(MODULES))}
    assert any(found.startswith(breach.split(" -> ")[0]) for found in breaches(changed)), breaches(changed)


def test_files_and_functions_are_short() -> None:
    long = {module for module, path in MODULES.items() if len(path.read_text().splitlines()) > 400}
    assert long <= LONG_FILES
    functions = {
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    }
    assert functions <= set(LONG_FUNCTIONS), functions - set(LONG_FUNCTIONS)


def test_no_file_is_named_after_nothing() -> None:
    assert not {path.stem for path in MODULES.values()} & {"utils", "util", "common", "helpers", "helper", "misc"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module: str) -> None:
    calls = [n.func.id for n in ast.walk(TREES[module]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls or module.endswith("__main__")


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
