"""What a learned step costs on a GPU, beside fused Adam and AdamW and beside the time it takes to move the bytes.

    python -m benchmarks.gpu_step [--out DIR] [--quick]

First every kernel is compiled, side by side in processes of their own, and checked against the reference backend on the
GPU. Then each case is timed alone with CUDA events; the median counts. A case that fails leaves its error in the table and
does not stop the others. ``gpu_step.csv`` has a row for each case, with the machine in every row.
"""

import argparse
import csv
import gc
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from learned_optim import LearnedOptimizer
from learned_optim.backends.triton import step as triton_step
from learned_optim.backends.triton.step import TILED, UNROLLED, Form

MILLION = 1_000_000


@dataclass(frozen=True)
class Variant:
    """A rule with a way to run it.

    Args:
        weights: A bundled name.
        memory: ``state_dtype``.
        form: Of the kernel; None for the one that the backend chooses.
    """

    weights: str
    memory: str
    form: Form | None = None

    def make(self, params: Iterable[nn.Parameter], backend: str = "triton", **options: Any) -> LearnedOptimizer:
        """Build the optimizer."""
        optimizer = LearnedOptimizer(params, weights=self.weights, state_dtype=self.memory, backend=backend, **options)
        if self.form is not None:
            for weights in optimizer._weights.values():
                rule = weights.rule_on(torch.device("cuda", torch.cuda.current_device()), torch.float32)
                triton_step._programs[rule] = triton_step.Program(rule, self.form)
        return optimizer


VARIANTS: dict[str, Variant] = {
    "default float32": Variant("default", "float32"),
    "default bfloat16": Variant("default", "bfloat16"),
    "quadratic float32": Variant("quadratic", "float32"),
    "quadratic bfloat16": Variant("quadratic", "bfloat16"),
}
FORMS: dict[str, Variant] = {
    "default bfloat16, chunk 512": Variant("default", "bfloat16", replace(UNROLLED, chunk=512)),
    "default bfloat16, chunk 4096": Variant("default", "bfloat16", replace(UNROLLED, chunk=4096)),
    "default bfloat16, block 256 on 8 warps": Variant("default", "bfloat16", replace(UNROLLED, block=256, warps=8)),
    "default bfloat16, block 256 on 4 warps": Variant("default", "bfloat16", replace(UNROLLED, block=256)),
    "default bfloat16, block 64 on 2 warps": Variant("default", "bfloat16", replace(UNROLLED, block=64, warps=2)),
    "quadratic bfloat16, unrolled": Variant("quadratic", "bfloat16", UNROLLED),
    "quadratic bfloat16, unrolled, chunk 4096": Variant("quadratic", "bfloat16", replace(UNROLLED, chunk=4096)),
    "quadratic bfloat16, tiled 64 on 4 warps": Variant("quadratic", "bfloat16", replace(TILED, block=64, warps=4)),
    "quadratic bfloat16, tiled, chunk 2048": Variant("quadratic", "bfloat16", replace(TILED, chunk=2048)),
}
EVERY = VARIANTS | FORMS


def make_params(shapes: Iterable[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    """Draw parameters and gradients on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator, device="cuda")) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, device="cuda")
    return params


# ---- measuring ------------------------------------------------------------------------------------------------------


def device_ms(run: Callable[[], object], seconds: float = 0.4) -> float:
    """Return the median time of a call between CUDA events, in milliseconds."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = max(5, min(100, int(seconds / (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def host_us(run: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time that a call keeps the host, in microseconds."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture a call, after three outside."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_gb_per_s() -> float:
    """Return the bandwidth of a large copy on the device, bytes read and written counted."""
    source = torch.empty(256 * MILLION, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / device_ms(lambda: target.copy_(source)) / 1e6


def bytes_moved(optimizer: Optimizer, params: list[nn.Parameter]) -> int:
    """Return what a step must move: every state, the parameters read and written, the gradients read."""
    state = sum(
        value.numel() * value.element_size()
        for param in params
        for name, value in optimizer.state[param].items()
        if name != "step"
    )
    return 2 * state + sum(3 * param.numel() * param.element_size() for param in params)


# ---- cases ----------------------------------------------------------------------------------------------------------


def measure(make: Callable[..., Optimizer], shapes: list[tuple[int, ...]], bandwidth: float, graph: bool) -> dict[str, Any]:
    """Time the steps of one optimizer over one model."""
    params = make_params(shapes)
    optimizer = make(params)
    optimizer.step()
    row: dict[str, Any] = {"ms": device_ms(optimizer.step), "host_us": host_us(optimizer.step)}
    moved = bytes_moved(optimizer, params)
    row |= {"bytes_per_coordinate": moved / sum(p.numel() for p in params), "floor_ms": moved / bandwidth / 1e6}
    del optimizer
    if graph:
        replayed = graph_of(make(params, capturable=True).step)
        row["graph_ms"] = device_ms(replayed.replay)
    best = min(row["ms"], row.get("graph_ms", row["ms"]))
    return row | {"times_floor": best / row["floor_ms"]}


def check(variant: Variant) -> dict[str, Any]:
    """Compare twenty steps with the reference on the GPU; return the largest differences."""
    results = []
    for backend in ("reference", "triton"):
        params = make_params([(64, 33), (), (7,), (5000,), (3, 5, 7)], seed=1)
        optimizer = (variant if backend == "triton" else replace(variant, form=None)).make(params, backend)
        generator = torch.Generator("cuda").manual_seed(2)
        for step in range(20):
            for param in params:
                size = torch.randn(param.shape, generator=generator, device="cuda")
                param.grad = size * 10.0 ** (step % 5 - 3)
            params[0].grad[0, :3] = torch.tensor([0.0, float("nan"), float("inf")], device="cuda")  # type: ignore[index]
            optimizer.step()
        hidden = torch.cat([optimizer.state[param]["hidden"].flatten().float() for param in params])
        results.append((torch.cat([param.detach().flatten() for param in params]), hidden))
    (want, want_hidden), (got, got_hidden) = results
    moved = want.std()
    return {
        "largest_param_difference": float((got - want).abs().max() / moved),
        "largest_hidden_difference": float((got_hidden - want_hidden).abs().max()),
        "ms": "",
    }


def check_no_sync() -> dict[str, Any]:
    """Take steps with every wait of the host for the device made an error, and compare a graph with eager steps."""
    shapes = [(100, 10), (33,), ()]
    params = make_params(shapes)
    optimizer = VARIANTS["default bfloat16"].make(params)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    eager, captured = make_params(shapes), make_params(shapes)
    one, other = (VARIANTS["default bfloat16"].make(p, capturable=True) for p in (eager, captured))
    graph = graph_of(other.step)
    for _ in range(5):
        graph.replay()
    for _ in range(3 + 5):  # Capturing takes no step.
        one.step()
    difference = max(float((a - b).abs().max().detach()) for a, b in zip(eager, captured, strict=True))
    return {"largest_param_difference": difference, "ms": ""}


def adam(params: list[nn.Parameter], **options: Any) -> Optimizer:
    """Build PyTorch's fused Adam."""
    return Adam(params, fused=True, **options)


def adamw(params: list[nn.Parameter], **options: Any) -> Optimizer:
    """Build PyTorch's fused AdamW."""
    return AdamW(params, fused=True, **options)


def cases(bandwidth: float, quick: bool) -> Iterable[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Yield what to measure: the case, the model and a function that returns a row."""
    yield "no synchronisation; graph equals eager", "three tensors", check_no_sync
    for name, variant in EVERY.items():
        yield f"check {name}", "five tensors", lambda v=variant: check(v)
    optimizers: dict[str, Callable[..., Optimizer]] = {"fused Adam": adam, "fused AdamW": adamw}
    optimizers |= {name: variant.make for name, variant in VARIANTS.items()}
    forms = {name: variant.make for name, variant in FORMS.items()}
    reference = {name: lambda p, v=variant: v.make(p, "reference") for name, variant in VARIANTS.items()}
    sizes = [MILLION, 10 * MILLION] + ([] if quick else [100 * MILLION])
    for size in sizes:
        for name, make in optimizers.items():
            yield name, f"{size}", lambda m=make, s=size: measure(m, [(s,)], bandwidth, s <= 10 * MILLION)
    for name, make in reference.items():
        yield f"{name}, reference", f"{MILLION}", lambda m=make: measure(m, [(MILLION,)], bandwidth, False)
    small = {name: optimizers[name] for name in ("fused AdamW", "default bfloat16", "quadratic bfloat16")}
    for name, make in small.items():
        for shapes in ([(64,)] * 2000, [(128_000,)]):
            model = f"{len(shapes)} x {shapes[0][0]}"
            yield name, model, lambda m=make, s=shapes: measure(m, s, bandwidth, True)
    for name, make in forms.items():
        size = 10 * MILLION if name.startswith("quadratic") else sizes[-1]
        yield name, f"{size}", lambda m=make, s=size: measure(m, [(s,)], bandwidth, False)


def warm(names: Iterable[str], limit: float = 100) -> None:
    """Compile the kernels of variants, each in a process of its own; Triton keeps them on disk."""
    command = [sys.executable, "-m", "benchmarks.gpu_step", "--warm"]
    running = [subprocess.Popen([*command, name]) for name in names]
    end = time.perf_counter() + limit
    for process in running:
        try:
            process.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--quick", action="store_true", help="leave out 100 million parameters")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which no further case starts")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm:
        EVERY[options.warm].make(make_params([(256,)])).step()
        return
    begin = time.perf_counter()
    warm(EVERY)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    import triton

    bandwidth = copy_gb_per_s()
    where = {
        "copy_gb_per_s": round(bandwidth),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(*where.values(), flush=True)
    columns = [
        "case", "model", "ms", "graph_ms", "host_us", "times_fused_adamw", "floor_ms", "times_floor", "bytes_per_coordinate",
        "largest_param_difference", "largest_hidden_difference", "error", *where,
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    adamw_ms: dict[str, float] = {}
    with (options.out / "gpu_step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for case, model, run in cases(bandwidth, options.quick):
            row: dict[str, Any] = {"case": case, "model": model}
            if time.perf_counter() - begin > options.limit:
                row["error"] = "not measured: out of time"
            else:
                try:
                    row |= run()
                except Exception as error:
                    traceback.print_exc(limit=-3)
                    row["error"] = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
            gc.collect()
            torch.cuda.empty_cache()
            if row.get("ms"):
                best = min(row["ms"], row.get("graph_ms", row["ms"]))
                if case == "fused AdamW":
                    adamw_ms[model] = best
                if model in adamw_ms:
                    row["times_fused_adamw"] = best / adamw_ms[model]
            row = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**row, **where})
            file.flush()
            print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
    print(f"done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
