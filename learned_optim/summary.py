"""The table of an optimizer: weights, rule, memory and backend of each group."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from learned_optim.backends import backend_in_use
from learned_optim.rate_watch import small_rate
from learned_optim.rules import UpdateRule

Group = dict[str, Any]

HEADER = ("group", "weights", "fingerprint", "rule", "lr", "parameters", "state bytes", "bytes/parameter", "backend")
NUMBERS = ("lr", "parameters", "state bytes", "bytes/parameter")


def summarize(
    groups: Sequence[Group],
    backend: str,
    rule_of: Callable[[Tensor, Group], UpdateRule],
    state_bytes: Callable[[Tensor, Group], int],
) -> str:
    """Describe the groups, one line each, and in total.

    Bytes of state are those that are kept now, and for parameters without state those that a step will allocate, over all
    ranks together. Nothing is allocated to count them.

    Args:
        groups: The optimizer's groups.
        backend: The backend that the user asked for.
        rule_of: Returns the rule that steps a parameter, in the dtype and on the device of the computation.
        state_bytes: Returns the bytes of a parameter's state.

    Returns:
        Lines of aligned columns.
    """
    rows = [HEADER]
    notes: list[str] = []
    count = size = 0
    for number, group in enumerate(groups):
        params = [param for param in group["params"] if not is_lazy(param)]
        rules = [rule_of(param, group) for param in params]
        numel = sum(param.numel() for param in params)
        nbytes = sum(state_bytes(param, group) for param in params)
        rows.append(
            (
                str(number),
                group["weights"],
                str(group["fingerprint"])[:12],
                _listed(f"{rule.family} {rule.config.num_layers}x{rule.config.hidden_size}" for rule in rules),
                f"{float(group['lr']):g}",
                *_sizes(numel, nbytes),
                _listed(backend_in_use(backend, rule) for rule in rules),
            )
        )
        count, size = count + numel, size + nbytes
        notes += _notes(number, group)
    rows.append(("total", "", "", "", "", *_sizes(count, size), ""))
    return "\n".join([*_aligned(rows), *notes])


def _notes(number: int, group: Group) -> Iterator[str]:
    if lazy := sum(map(is_lazy, group["params"])):
        yield f"group {number} has {lazy} parameters of lazy modules, which have no shape yet: run one forward pass first"
    if rate := small_rate(group):
        yield f"group {number} multiplies the learned update by lr={rate:g}; 1 is the usual factor"
    if group.get("guard_tripped"):
        yield f"group {number} fell back to its nominal Adam step: {group['guard_tripped']}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _sizes(numel: int, nbytes: int) -> tuple[str, str, str]:
    return f"{numel:,}", f"{nbytes:,}", f"{nbytes / max(numel, 1):.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    columns = []
    for name, column in zip(HEADER, zip(*rows, strict=True), strict=True):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if name in NUMBERS else cell.ljust(width) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
