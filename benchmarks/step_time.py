"""What a learned step costs beside Adam's, beside stepping with ``nn.LSTM``, and beside what the machine could do at best.

    python -m benchmarks.step_time [--largest N] [--threads N]

Two floors are measured in the same run. The multiply-add floor is the rule's matrix products at the rate of a large matmul;
the bandwidth floor is every byte of parameter, gradient and state moved at the rate of a large copy. Writes a table and its
figure.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from benchmarks.timing import HERE, side_by_side, write_table
from learned_optim import LearnedOptimizer, UpdateRule, build_rule
from learned_optim.backends import BACKENDS, check_backend
from learned_optim.rules.lstm import Carry
from learned_optim.weights import resolve_weights
from meta_train.evidence.figures import STYLE
from meta_train.rows import Row, Rows

RULES = {
    "2x20": build_rule("paper", inputs="log_and_sign", output_scale=0.1),
    "default": resolve_weights("default").rule,
}
SIZES = (1_000, 10_000, 200_000, 1_000_000, 10_000_000)
LARGEST = dict.fromkeys(("reference", "compiled", "nn.LSTM step", "nn.LSTM alone"), 1_000_000)
"""Sizes at which the slow contestants drop out, in coordinates."""


def stepper(make: Callable[[list[nn.Parameter]], Optimizer], shapes: list[int]) -> Callable[[], object]:
    """Return a function that steps parameters of the given sizes."""
    params = [nn.Parameter(torch.randn(size)) for size in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return make(params).step


def lstm_steppers(rule: UpdateRule, count: int) -> dict[str, Callable[[], object]]:
    """Return functions that run a whole step of the rule on ``nn.LSTM``, and its ``nn.LSTM`` alone."""
    param, grad = torch.randn(count), torch.randn(count)
    state = {"memory": rule.initial_memory(count, param)}
    inputs = torch.randn(1, count, rule.lstm.input_size)
    carry = torch.zeros(rule.lstm.num_layers, count, rule.lstm.hidden_size)

    def advance(features: Tensor, held: Carry, active: Tensor) -> tuple[Tensor, Carry]:
        hiddens, new = rule.recur(features.unsqueeze(0), held, fused=True)
        return hiddens[0], new

    @torch.no_grad()
    def whole() -> None:
        scale = rule.tensor_scale(param, state["memory"], torch.tensor(0.0))
        update, state["memory"], _ = rule(grad, state["memory"], torch.tensor(1.0), scale, advance)
        param.add_(update)

    @torch.no_grad()
    def alone() -> None:
        rule.lstm(inputs, (carry, carry))

    return {"nn.LSTM step": whole, "nn.LSTM alone": alone}


def contestants(count: int, many: int = 1) -> Iterator[tuple[tuple[str, str], Callable[[], object]]]:
    """Yield everyone who competes at a number of coordinates, under the name of a rule and of a way to run it.

    Args:
        count: Coordinates in all.
        many: Tensors that they are spread over.
    """
    shapes = [count // many] * many
    yield ("Adam", "single"), stepper(lambda params: Adam(params, foreach=False), shapes)
    yield ("Adam", "foreach"), stepper(lambda params: Adam(params, foreach=True), shapes)
    yield ("Adam", "fused"), stepper(lambda params: Adam(params, fused=True), shapes)
    for name, rule in RULES.items():
        for backend in usable_backends():
            if count <= LARGEST.get(backend, count):
                make = lambda params, r=rule, b=backend: LearnedOptimizer(params, weights=r, backend=b)  # noqa: E731
                yield (name, backend), stepper(make, shapes)
        if many == 1 and count <= LARGEST["nn.LSTM step"]:
            yield from (((name, way), run) for way, run in lstm_steppers(rule, count).items())


def usable_backends() -> list[str]:
    """Return the backends that work on this machine's CPU."""
    usable = []
    for name in BACKENDS:
        try:
            check_backend(name)
        except RuntimeError:
            continue
        if name not in ("auto", "triton"):
            usable.append(name)
    return usable


def machine() -> tuple[float, float]:
    """Return the rate of a large matmul in multiply-adds a nanosecond and of a large copy in bytes a nanosecond."""
    size = 768
    a, b = torch.randn(size, size), torch.randn(size, size)
    source, target = torch.randn(2**24), torch.empty(2**24)
    seconds = side_by_side({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, repeats=12)
    return size**3 / seconds["matmul"] / 1e9, 2 * source.nbytes / seconds["copy"] / 1e9


def work(rule: UpdateRule) -> tuple[int, int]:
    """Return multiply-adds and bytes moved for one coordinate in one step."""
    multiply_adds = sum(weight.numel() for weight in rule.parameters() if weight.dim() == 2)
    state = 4 * (len(rule.moment_names) + 2 * rule.memory_width)
    return multiply_adds, 2 * state + 3 * 4  # Read and write the state and the parameter, read the gradient.


def measure(count: int, many: int, repeats: int, rates: tuple[float, float]) -> Rows:
    """Time everyone at one size and return rows."""
    torch.manual_seed(0)
    times = {name: run for name, run in contestants(count, many)}
    seconds = side_by_side({" / ".join(name): run for name, run in times.items()}, repeats)
    fused = seconds["Adam / fused"]
    rows: Rows = []
    for (rule, way), value in zip(times, seconds.values(), strict=True):
        row: Row = {
            "coordinates": count,
            "tensors": many,
            "rule": rule,
            "way": way,
            "ns_per_coordinate": f"{value / count * 1e9:.4g}",
            "times_fused_adam": f"{value / fused:.3g}",
            "times_multiply_add_floor": "",
            "times_bandwidth_floor": "",
            "state_bytes_per_coordinate": 8,
            "multiply_adds_per_ns": f"{rates[0]:.3g}",
            "copy_gb_per_s": f"{rates[1]:.3g}",
        }
        if rule in RULES:
            multiply_adds, moved = work(RULES[rule])
            row["times_multiply_add_floor"] = f"{value / count * 1e9 * rates[0] / multiply_adds:.3g}"
            row["times_bandwidth_floor"] = f"{value / count * 1e9 * rates[1] / moved:.3g}"
            row["state_bytes_per_coordinate"] = (moved - 12) // 2
        rows.append(row)
    return rows


def draw(rows: Rows, path: Path) -> None:
    """Draw nanoseconds a coordinate against coordinates, a panel a rule."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, rule in zip(figure.subplots(1, 2, sharey=True), RULES, strict=True):
            shown = [row for row in rows if row["tensors"] == 1 and row["rule"] in (rule, "Adam")]
            for name in dict.fromkeys((row["rule"], row["way"]) for row in shown):
                of_name = [row for row in shown if (row["rule"], row["way"]) == name]
                axes.plot(
                    [int(row["coordinates"]) for row in of_name],
                    [float(row["ns_per_coordinate"]) for row in of_name],
                    label=name[1] if name[0] == rule else f"Adam, {name[1]}",
                    ls="-" if name[0] == rule else ":",
                    marker="o",
                    ms=3,
                )
            axes.set(xscale="log", yscale="log", xlabel="coordinates", title=f"{rule} rule")
            axes.legend(fontsize=8)
        figure.axes[0].set_ylabel("ns per coordinate and step")
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Time every contestant side by side at every size, print ratios, write the table and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="coordinates; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = machine()
    print(f"matmul {rates[0]:.0f} multiply-adds/ns, copy {rates[1]:.1f} GB/s, {options.threads} threads")
    rows: Rows = []
    for count, many in [*((size, 1) for size in SIZES if size <= options.largest), (128_000, 2_000), (128_000, 1)]:
        rows += measure(count, many, repeats=12 if count <= 200_000 else 3, rates=rates)
        for row in rows:
            if (row["coordinates"], row["tensors"]) == (count, many):
                print(
                    f"{count:>11,} in {many:<5,} {row['rule']:<8} {row['way']:<14}{row['times_fused_adam']:>8} x fused Adam"
                    f"{row['times_multiply_add_floor']:>8} x multiply-add floor"
                )
    write_table("step_time", rows)
    draw(rows, HERE / "step_time.svg")


if __name__ == "__main__":
    main()
