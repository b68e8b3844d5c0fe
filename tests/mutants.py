"""Break learned_optim on purpose, one promise at a time, and see whether the tests notice.

python -m tests.mutants [WORD ...]

Each mutant is a small edit of the source and the tests that must fail because of it; the row it stands for is one of
docs/contract.md. Edits are made in a copy of the tree. First those tests are run unbroken, and they must pass. A mutant
survives if its tests pass; the exit status is then 1. WORDs choose the mutants that mention one of them.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch._dynamo  # noqa: F401
import torch.distributed.checkpoint.state_dict  # noqa: F401
import torch.distributed.tensor  # noqa: F401

ROOT = Path(__file__).parent.parent
COPIED = ("learned_optim", "meta_train", "tests", "pyproject.toml")
LIMIT = 600
"""Seconds for one run of tests."""


class Mutant(NamedTuple):
    """One breakage.

    ``row`` is the promise that it breaks, ``edits`` are (old, new) in ``file`` under learned_optim, each old text occurring
    once; of the test file ``tests`` those whose names contain one of ``chosen`` must fail.
    """

    row: str
    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: str
    chosen: tuple[str, ...]


OPTIMIZER, SHARDING, CHUNKS = "optimizer.py", "sharding.py", "backends/reference.py"
ADAM, PAPER, LSTM = "rules/adam_modulation.py", "rules/paper.py", "rules/lstm.py"
CONSTRUCTOR, STEP, CHECKPOINT = (f"tests/optimizer/test_{name}.py" for name in ("constructor", "step", "checkpoint"))
ONE_CORE, COMPANY, DISTRIBUTED = (f"tests/optimizer/test_{name}.py" for name in ("one_core", "company", "distributed"))
SCHEDULERS, RULES, NATIVE = (
    "tests/optimizer/test_schedulers.py",
    "tests/rules/test_rules.py",
    "tests/backends/test_native_lstm.py",
)
COMPILED, COMPILED_TESTS = "backends/compiled.py", "tests/backends/test_compiled.py"
STORAGE, STORED = "rules/storage.py", "tests/rules/test_storage.py"
GUARD, RECORDER, SUMMARY = (f"tests/optimizer/test_{name}.py" for name in ("guard", "recorder", "summary"))

UPDATE = "update, new_memory, encoded = rule(-grad if maximize else grad, memory, step, scale, advance)"
SUPER = "        super().__init__(params, {**defaults, **_dtype_names(defaults)})\n"
SHARED_NETWORK = '"_weights": self._weights}'


def _one(row: str, name: str, file: str, old: str, new: str, tests: str, *chosen: str) -> Mutant:
    return Mutant(row, name, file, ((old, new),), tests, chosen)


MUTANTS = (
    # Constructor and groups
    _one("constructor", "a NaN lr is accepted", OPTIMIZER, "if not lr >= 0:", "if lr < 0:", CONSTRUCTOR, "bad_arguments"),
    _one(
        "constructor",
        "a group's options are unchecked",
        OPTIMIZER,
        "            _check_options(options)\n",
        "",
        CONSTRUCTOR,
        "bad_options",
    ),
    _one(
        "constructor",
        "the caller's group is changed",
        OPTIMIZER,
        "param_group = dict(param_group)",
        "pass",
        CONSTRUCTOR,
        "not_modified",
    ),
    _one(
        "fused, differentiable",
        "fused=True is accepted",
        OPTIMIZER,
        "        if fused:\n",
        "        if False:\n",
        CONSTRUCTOR,
        "bad_arguments",
    ),
    _one(
        "fused, differentiable",
        "differentiable=True is accepted",
        OPTIMIZER,
        "        if differentiable:\n",
        "        if False:\n",
        CONSTRUCTOR,
        "bad_arguments",
    ),
    _one(
        "options are per group",
        "every group steps with the first one's weights",
        OPTIMIZER,
        "            weights = self._weights_of(group)\n            for (device",
        "            weights = self._weights_of(self.param_groups[0])\n            for (device",
        CONSTRUCTOR,
        "weights_of_their_own",
    ),
    _one(
        "options are per group",
        "every group steps with the first one's lr",
        OPTIMIZER,
        'lr = group["lr"]\n',
        'lr = self.param_groups[0]["lr"]\n',
        CONSTRUCTOR,
        "per_group",
        "added_late",
    ),
    _one(
        "late groups, swapped parameters",
        "the first step remembers the parameters",
        OPTIMIZER,
        '        for param in group["params"]:\n            if param.grad is None:',
        '        for param in self.__dict__.setdefault("_seen", {}).setdefault(id(group), list(group["params"])):\n'
        "            if param.grad is None:",
        CONSTRUCTOR,
        "replaced",
    ),
    _one(
        "named parameters",
        "names are dropped",
        OPTIMIZER,
        "super().__init__(params, {",
        "super().__init__([p[1] if isinstance(p, tuple) else p for p in params], {",
        CONSTRUCTOR,
        "named",
    ),
    # step
    _one(
        "closure",
        "runs without gradients",
        OPTIMIZER,
        "with torch.enable_grad():\n                loss",
        "if True:\n                loss",
        STEP,
        "closure",
    ),
    _one("closure", "runs twice", OPTIMIZER, "loss = closure()", "loss = closure() and closure()", STEP, "closure"),
    _one(
        "closure",
        "its loss is lost",
        OPTIMIZER,
        "self._plan_step()\n        return loss",
        "self._plan_step()\n        return None",
        STEP,
        "closure",
    ),
    _one(
        "no gradient",
        "counts as a zero gradient",
        OPTIMIZER,
        "if param.grad is None:\n                continue",
        "if param.grad is None:\n                param.grad = torch.zeros_like(param)",
        STEP,
        "without_gradients",
    ),
    _one(
        "zero gradient",
        "the LSTM's biases move the paper's rules",
        PAPER,
        "active = finite & ((grad != 0) | (bottom.abs().amax(-1) != 0))",
        "active = finite",
        STEP,
        "zero_gradients",
    ),
    _one(
        "zero gradient",
        "the LSTM's biases move the default rule",
        ADAM,
        'active = finite & (moments["exp_avg_sq"] > 0)',
        "active = finite",
        STEP,
        "zero_gradients",
    ),
    _one(
        "NaN and Inf",
        "memory is not held, reference",
        "rules/rule.py",
        "torch.where(moves, new_carry[0], carry[0])",
        "new_carry[0]",
        RULES,
        "bad_gradient",
    ),
    _one(
        "NaN and Inf",
        "moments are not held",
        ADAM,
        "torch.where(finite, torch.lerp(value, memory[name], decay), memory[name])",
        "torch.lerp(value, memory[name], decay)",
        STEP,
        "bad_gradient",
    ),
    _one(
        "NaN and Inf",
        "the update is not skipped",
        PAPER,
        "active.to(grad.dtype)",
        "torch.ones_like(grad)",
        STEP,
        "bad_gradient",
    ),
    _one(
        "NaN and Inf", "NaN reaches the LSTM", PAPER, "grad = torch.where(finite, grad, 0.0)", "pass", STEP, "bad_gradient"
    ),
    _one(
        "sparse gradients",
        "refused only when reached",
        OPTIMIZER,
        "        self._refuse_what_does_not_fit()\n        before",
        "        before",
        STEP,
        "sparse",
    ),
    _one("maximize", "is ignored", CHUNKS, "rule(-grad if maximize else grad,", "rule(grad,", STEP, "maximize"),
    _one(
        "maximize",
        "flips the update, not the gradient",
        CHUNKS,
        UPDATE,
        UPDATE.replace("-grad if maximize else grad", "grad") + "\n    update = -update if maximize else update",
        STEP,
        "maximize",
    ),
    _one(
        "gradients are read only",
        "maximize negates in place",
        CHUNKS,
        "rule(-grad if maximize else grad,",
        "rule(grad.neg_() if maximize else grad,",
        STEP,
        "read_only",
    ),
    _one(
        "graphs are not kept",
        "step builds a graph",
        OPTIMIZER,
        "    @torch.no_grad()\n    def step",
        "    def step",
        STEP,
        "graph_behind",
    ),
    _one(
        "lr",
        "is ignored",
        CHUNKS,
        "param * shrink + lr * update",
        "param * shrink + update",
        STEP,
        "lr_",
    ),
    _one(
        "lr",
        "a tensor keeps its shape",
        OPTIMIZER,
        "non_blocking=True).reshape(())",
        "non_blocking=True)",
        STEP,
        "tensor_lr",
    ),
    _one(
        "lr",
        "a tensor is read once and rebound",
        OPTIMIZER,
        'lr = group["lr"]\n',
        'lr = group["lr"] = float(group["lr"])\n',
        STEP,
        "tensor_lr",
    ),
    _one(
        "weight decay",
        "goes through the rule",
        CHUNKS,
        "grad = _join([piece.grad.to(dtype) for piece in chunk])",
        "grad = _join([piece.grad + weight_decay * piece.param for piece in chunk]).to(dtype)\n    weight_decay = 0",
        STEP,
        "weight_decay",
    ),
    _one(
        "weight decay",
        "lr does not scale it",
        CHUNKS,
        "1 - lr * 1e-3 * weight_decay",
        "1 - 1e-3 * weight_decay",
        STEP,
        "weight_decay",
        "lr_zero",
    ),
    _one(
        "weight decay", "10 % a step at 0.1", CHUNKS, "lr * 1e-3 * weight_decay", "lr * weight_decay", STEP, "weight_decay"
    ),
    _one(
        "profiler",
        "step is wrapped and not seen",
        OPTIMIZER,
        SUPER,
        SUPER + "        self.step = type(self).step.__wrapped__.__get__(self)\n",
        STEP,
        "profiler",
    ),
    _one(
        "capturable",
        "the step count is another tensor each step",
        OPTIMIZER,
        'steps.append(self.state[param]["step"])',
        'self.state[param]["step"] = self.state[param]["step"].clone()\n            steps.append(self.state[param]["step"])',
        STEP,
        "storage",
    ),
    _one(
        "determinism, DDP",
        "a step draws random numbers",
        CHUNKS,
        "param * shrink + lr * update",
        "param * shrink + lr * update * (1 + 1e-3 * torch.rand_like(update))",
        ONE_CORE,
        "last_bit",
    ),
    _one(
        "state_dict",
        "groups hold the network",
        OPTIMIZER,
        '            "weights": loaded.name,\n            "fingerprint"',
        '            "weights": loaded,\n            "fingerprint"',
        CHECKPOINT,
        "plain",
        "weights_only",
    ),
    # Shapes, layouts, dtypes
    _one(
        "complex parameters",
        "real and imaginary part change places",
        SHARDING,
        "return torch.view_as_real(tensor) if",
        "return torch.view_as_real(tensor).flip(-1) if",
        STEP,
        "complex",
    ),
    _one(
        "strided parameters",
        "their update is lost",
        CHUNKS,
        "            piece.write_back()\n",
        "            pass\n",
        STEP,
        "memory_layout",
    ),
    _one(
        "state layout",
        "the width stands in front",
        SHARDING,
        "torch.zeros((*shard.shape, *trailing),",
        "torch.zeros((*trailing, *shard.shape),",
        STEP,
        "documented_layout",
    ),
    _one(
        "dtypes",
        "low precision computes in low precision",
        OPTIMIZER,
        "(torch.float64, torch.complex128) else torch.float32",
        "(torch.float64, torch.complex128) else (torch.float32 if dtype.is_complex else dtype)",
        STEP,
        "low_precision",
        "dtypes_mix",
    ),
    _one(
        "dtypes",
        "state_dtype is ignored",
        OPTIMIZER,
        "return STATE_DTYPES[str(state_dtype)], moments",
        "return torch.float32, moments",
        STEP,
        "state_dtype",
    ),
    # One core
    _one(
        "numerics",
        "input and forget gate change places",
        LSTM,
        "write, forget, candidate, read = gates",
        "forget, write, candidate, read = gates",
        RULES,
        "stacked",
        "fused",
    ),
    _one(
        "numerics",
        "every tensor has the floor of a small one",
        ADAM,
        "min(config.small_min_scale, 0.5 * numel**-0.25)",
        "config.small_min_scale",
        RULES,
        "higher_floor",
    ),
    _one(
        "numerics",
        "an outlier counts in full",
        ADAM,
        "grad.clamp(-bound, bound)",
        "grad",
        RULES,
        "outlier",
        "formula",
    ),
    _one(
        "numerics",
        "a coordinate at rest never wakes up",
        ADAM,
        "torch.where(previous > 0, grad.clamp(-bound, bound), grad)",
        "grad.clamp(-bound, bound)",
        RULES,
        "at_rest",
    ),
    _one(
        "numerics",
        "bias correction is dropped",
        ADAM,
        'moments["exp_avg"] / (1 - config.fast_decay**step) * inverse_root',
        'moments["exp_avg"] * inverse_root',
        RULES,
        "untrained",
        "formula",
    ),
    _one(
        "numerics",
        "the update is not bounded",
        ADAM,
        "torch.exp(bound * torch.tanh(magnitude / bound))",
        "torch.exp(magnitude)",
        RULES,
        "bounded",
        "formula",
    ),
    _one(
        "numerics",
        "a roll-out keeps the wrong cells",
        PAPER,
        'memory["cell"][..., : self.config.hidden_size]}',
        'memory["cell"][..., -self.config.hidden_size :].mul(0)}',
        RULES,
        "part_of_a_memory",
    ),
    _one(
        "numerics",
        "log-and-sign's branches do not meet",
        PAPER,
        "threshold = math.exp(-p)\n",
        "threshold = math.exp(-p / 2)\n",
        RULES,
        "log_and_sign",
    ),
    _one(
        "chunks change nothing",
        "the scale is that of the chunk",
        CHUNKS,
        "scale = _spread(scales, sizes) if scales else None",
        "scale = rule.tensor_scale(_join([piece.param for piece in chunk])) if scales else None",
        ONE_CORE,
        "by_hand",
    ),
    _one(
        "no gradient",
        "the step count is that of the first parameter",
        CHUNKS,
        "step = _spread([piece.item.step.to(grad.device, dtype) for piece in chunk], sizes)",
        "step = chunk[0].item.step.to(grad.device, dtype)",
        ONE_CORE,
        "own_steps",
    ),
    _one(
        "the native kernel", "forgets a bias", "backends/native_lstm.py", "(bias_ih + bias_hh)", "bias_ih", NATIVE, "equal"
    ),
    # Checkpoints and copies
    _one(
        "exact resume",
        "memory is cast to the parameter's dtype",
        OPTIMIZER,
        "lambda _: self._restore_state(checked[0])",
        "lambda _: None",
        CHECKPOINT,
        "resume_is_exact",
    ),
    _one(
        "exact resume",
        "the step count is lost",
        OPTIMIZER,
        'step = torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu")',
        "step = torch.zeros(())",
        CHECKPOINT,
        "resume_is_exact",
    ),
    _one(
        "loading does not alias",
        "tensors are shared with the checkpoint",
        OPTIMIZER,
        "saved[name].detach().to(param.device, copy=True).contiguous()",
        "saved[name]",
        CHECKPOINT,
        "aliases",
    ),
    _one(
        "other weights are refused",
        "the fingerprint is unchecked",
        OPTIMIZER,
        'if saved["fingerprint"] != live["fingerprint"]:',
        "if False:",
        CHECKPOINT,
        "other_weights",
    ),
    _one(
        "other weights are refused",
        "the fingerprint ignores the configuration",
        "weights/weights.py",
        "json.dumps([rule.family, config]",
        "json.dumps([rule.family]",
        "tests/weights/test_files.py",
        "fingerprint",
    ),
    _one(
        "other weights are refused",
        "Adam's checkpoint fails without a reason",
        OPTIMIZER,
        'if "fingerprint" not in saved:',
        "if False:",
        CHECKPOINT,
        "of_adam",
    ),
    _one(
        "other shapes are refused",
        "shapes are unchecked",
        OPTIMIZER,
        "if tuple(saved[name].shape) != shape + entries[name].trailing:",
        "if False:",
        CHECKPOINT,
        "other_shapes",
    ),
    _one(
        "an empty state loads",
        "every parameter must have state",
        OPTIMIZER,
        'if state_dict["state"].get(saved_index):',
        "if True:",
        CHECKPOINT,
        "empty_state",
        "only_some",
    ),
    _one(
        "older checkpoints load",
        "options they lack stay missing",
        OPTIMIZER,
        "                group.setdefault(name, default)\n",
        "                pass\n",
        CHECKPOINT,
        "older",
    ),
    _one(
        "older checkpoints load",
        "a step that is a number stays one",
        OPTIMIZER,
        'step = torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu")',
        'step = saved["step"]',
        CHECKPOINT,
        "number",
    ),
    _one(
        "load hooks",
        "the caller's hooks run before the memory is restored",
        OPTIMIZER,
        "(checked[0]), prepend=True)",
        "(checked[0]))",
        CHECKPOINT,
        "hooks",
    ),
    Mutant(
        "load by keyword",
        "the argument has another name",
        OPTIMIZER,
        (
            ("def load_state_dict(self, state_dict:", "def load_state_dict(self, checkpoint:"),
            ("super().load_state_dict(state_dict)", "super().load_state_dict(checkpoint)"),
        ),
        CHECKPOINT,
        ("distributed",),
    ),
    _one(
        "copies and pickles",
        "the network is left behind",
        OPTIMIZER,
        ', "_weights": self._weights}',
        "}",
        CHECKPOINT,
        "copy_goes",
    ),
    _one(
        "copies and pickles",
        "everything travels, hooks and patches too",
        OPTIMIZER,
        '{**super().__getstate__(), "backend": self.backend, "_weights": self._weights}',
        "self.__dict__",
        CHECKPOINT,
        "copy_goes",
    ),
    _one(
        "copies and pickles",
        "the Hub token travels",
        OPTIMIZER,
        SHARED_NETWORK,
        '"_weights": self._weights, "_hub_options": self._hub_options}',
        CHECKPOINT,
        "token",
    ),
    _one(
        "distributed checkpoints",
        "state holds what is no tensor",
        OPTIMIZER,
        'return {"step": step, **{name',
        'return {"step": step, "rule": rule.family, **{name',
        CHECKPOINT,
        "distributed",
        "plain",
    ),
    # Memory
    _one(
        "8-bit memory",
        "rounds to nearest",
        STORAGE,
        "_draws(bits, 0, width).to(cells.dtype) * 2.0**-16",
        "0.5",
        STORED,
        "average",
        "small",
    ),
    _one(
        "8-bit memory",
        "one scale for all layers",
        STORAGE,
        "(rule.config.num_layers,)",
        "(1,)",
        STORED,
        "bytes",
        "round_trip",
    ),
    _one(
        "8-bit memory",
        "the skipped are written",
        STORAGE,
        "torch.where(active.unsqueeze(-1), ",
        "(lambda a, b: a)(",
        STORED,
        "active",
    ),
    _one(
        "8-bit memory",
        "a checkpoint without scales is loaded",
        OPTIMIZER,
        '(dtype == "int8") != (expected == "int8")',
        "False",
        CHECKPOINT,
        "without_its_scales",
    ),
    # Company
    _one(
        "GradScaler",
        "bad steps are not skipped",
        OPTIMIZER,
        "    def __init__(\n",
        "    _step_supports_amp_scaling = True\n\n    def __init__(\n",
        COMPANY,
        "scaler",
    ),
    _one(
        "schedulers",
        "a momentum is cycled without effect",
        OPTIMIZER,
        '            "maximize": maximize,\n',
        '            "maximize": maximize,\n            "momentum": 0.9,\n',
        SCHEDULERS,
        "cycling",
    ),
    _one(
        "schedulers",
        "lr is read once",
        OPTIMIZER,
        'lr = group["lr"]\n',
        'lr = group.setdefault("lr_at_first", group["lr"])\n',
        SCHEDULERS,
        "by_hand",
    ),
    _one(
        "torch.compile",
        "nn.LSTM breaks the graph",
        "rules/rule.py",
        "fused: bool = False) ->",
        "fused: bool = True) ->",
        COMPANY,
        "compiled",
    ),
    _one(
        "wrappers",
        "a subclass made at run time is refused",
        OPTIMIZER,
        "    def __init__(\n",
        "    def __init_subclass__(cls, weights: str) -> None:\n        cls.default = weights\n\n    def __init__(\n",
        COMPANY,
        "lightning",
        "subclass",
    ),
    _one(
        "one instance a parameter",
        "each loads a network of its own",
        "weights/registry.py",
        "        return loaded.shared()\n",
        "        return loaded\n",
        CHECKPOINT,
        "shares_the_network",
    ),
    _one(
        "another shape",
        "is not noticed",
        OPTIMIZER,
        'if state and state["hidden"].shape[:-1] != as_real(param).shape:',
        "if False:",
        STEP,
        "another_shape",
    ),
    _one(
        "same memory",
        "two are stepped at once",
        "backends/__init__.py",
        "if one_by_one else (items,)",
        "if False else (items,)",
        "tests/backends/test_native_plan.py",
        "take_turns",
    ),
    _one(
        "a load out of memory",
        "half a state stays",
        OPTIMIZER,
        "            self.state.clear()  # Half a memory would be taken for a whole one.\n",
        "",
        CHECKPOINT,
        "runs_out_of_memory",
    ),
    _one(
        "kernels of other sources",
        "are loaded",
        "backends/native_library.py",
        "if digest is None or",
        "if True or",
        "tests/backends/test_native_plan.py",
        "other_sources",
    ),
    # Two processes
    _one(
        "FSDP2", "state is whole on every rank", SHARDING, "    if shard is like:\n", "    if True:\n", DISTRIBUTED, "fsdp2"
    ),
    _one(
        "FSDP2",
        "the scale is that of the shard",
        OPTIMIZER,
        "rule.tensor_scales([as_real(param) for",
        "rule.tensor_scales([local(as_real(param)) for",
        DISTRIBUTED,
        "fsdp2",
    ),
    _one(
        "tensor parallelism",
        "gradients are not reduced",
        SHARDING,
        "    return grad.redistribute(placements=param.placements)",
        "    return grad",
        DISTRIBUTED,
        "tensor",
    ),
    # Diagnostics
    _one(
        "guard",
        "a bad step is not undone",
        "guard.py",
        "            param.copy_(old)\n",
        "            pass\n",
        GUARD,
        "undone",
    ),
    _one("guard", "says nothing", "guard.py", "    if tripped:\n", "    if False:\n", GUARD, "trip"),
    _one(
        "guard",
        "acts on the first long update",
        "guard.py",
        "group[name] >= PATIENCE",
        "group[name] >= 1",
        GUARD,
        "no_reason",
        "trip",
    ),
    _one(
        "guard",
        "forgets over a checkpoint",
        OPTIMIZER,
        'return nominal(weights) if group.get("guard_tripped") else weights',
        "return weights",
        GUARD,
        "resumes",
        "goes_on",
    ),
    _one(
        "recorder",
        "a sample comes a step late",
        "recorder.py",
        "if self._taken % self._every == 0:",
        "if self._taken % self._every == 1:",
        RECORDER,
        "nth_step",
    ),
    _one(
        "recorder",
        "ranks count their shards only",
        "recorder.py",
        '    if not hasattr(param, "placements"):\n',
        "    if True:\n",
        DISTRIBUTED,
        "recorder",
    ),
    _one(
        "summary",
        "bytes are those of float32",
        OPTIMIZER,
        "self._weights_of(group).rule, *_dtypes(param, group)) + 4",
        "self._weights_of(group).rule) + 4",
        SUMMARY,
        "allocated",
    ),
    # The compiled backend
    _one(
        "autocast",
        "a step inside autocast computes in half precision",
        "backends/__init__.py",
        "torch.is_autocast_enabled(device)",
        "False",
        COMPANY,
        "autocast",
    ),
    _one(
        "compiled",
        "what was made contiguous is not copied back",
        COMPILED,
        "if new is not values:",
        "if len(new) > len(values):",
        COMPILED_TESTS,
        "strided",
    ),
    _one("compiled", "a graph serves any threads", COMPILED, "torch.get_num_threads(), ", "", COMPILED_TESTS, "strided"),
    _one(
        "compiled",
        "meta-parameters are numbers of the graph",
        COMPILED,
        "self, dict(zip(names, tensors, strict=False)), tensors",
        "self, {}, tensors",
        COMPILED_TESTS,
        "fifty",
    ),
    _one("compiled", "a cell forgets half as much", COMPILED, "0.5 * f, g", "f, g", COMPILED_TESTS, "fractions"),
)


def main() -> int:
    """Run the mutants; print a table; return 1 if one survives or cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    mutants = [m for m in MUTANTS if not words or any(word in " ".join((m.row, m.name, m.file, m.tests)) for word in words)]
    # Sources change faster than the time stamps that compiled files are checked by.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, tree / name)
        for cache in tree.rglob("__pycache__"):
            shutil.rmtree(cache)
        broken = baseline(tree, mutants)
        if broken:
            print("fail without any mutant:", *broken, sep="\n  ")
            return 1
        outcomes = []
        print(f"{'row':<34}{'mutant':<56}{'tests':<40}outcome", flush=True)
        for mutant in mutants:
            start = time.perf_counter()
            outcome = try_mutant(tree, mutant)
            outcomes.append(outcome)
            seconds = time.perf_counter() - start
            print(f"{mutant.row:<34}{mutant.name:<56}{mutant.tests:<40}{outcome} ({seconds:.0f} s)", flush=True)
    caught = outcomes.count("caught")
    print(f"{len(outcomes)} mutants, {caught} caught, {len(outcomes) - caught} not")
    return int(caught < len(outcomes))


def baseline(tree: Path, mutants: Iterable[Mutant]) -> list[str]:
    """Run every test that a mutant relies on, unbroken; return the files with a failure."""
    chosen: dict[str, set[str]] = defaultdict(set)
    for mutant in mutants:
        chosen[mutant.tests].update(mutant.chosen)
    return [file for file, words in chosen.items() if run(tree, file, words)]


def try_mutant(tree: Path, mutant: Mutant) -> str:
    """Break the copy, run the tests, mend it."""
    path = tree / "learned_optim" / mutant.file
    source = text = path.read_text()
    for old, new in mutant.edits:
        if text.count(old) != 1:
            return f"STALE: {old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    path.write_text(text)
    try:
        status = run(tree, mutant.tests, mutant.chosen)
    finally:
        path.write_text(source)
    return {0: "SURVIVED", 1: "caught"}.get(status, f"ERROR: pytest left with {status}")


def run(tree: Path, file: str, words: Iterable[str]) -> int:
    """Run the tests of a file whose names contain a word, up to the first failure; return pytest's exit status.

    In a fork of this process, which has imported torch but nothing of ours: that saves most of the time.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(tree)
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # This very file came as part of a package of that name.
    sys.path[0] = str(tree)
    signal.alarm(LIMIT)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", file, "-k", " or ".join(sorted(words))]))


if __name__ == "__main__":
    sys.exit(main())
