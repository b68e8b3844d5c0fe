"""Samples of what a learned optimizer does: as a list of rows, in TensorBoard, or passed to any function."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from learned_optim.backends.reference import CHUNK
from learned_optim.group_options import compute_dtype
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import CELL_SCALE, decode
from learned_optim.sharding import as_real, gradient_of, local

Row = dict[str, float]

SATURATED = math.atanh(0.95)
"""A cell beyond this, 1.83, has ``|tanh(cell)| > 0.95``: it hardly reacts to its inputs."""


@runtime_checkable
class ScalarWriter(Protocol):
    """The one method of a ``torch.utils.tensorboard.SummaryWriter`` that a recorder calls."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


class Recorder:
    r"""Sample what an optimizer's steps do. Between samples its hooks on ``step`` only count.

    Every ``every``-th step, beginning with the next, gives one row for each parameter group. :math:`\Delta` is the change of
    the group's parameters in that step, ``lr`` and weight decay included. A row has

    - ``step``: Steps taken so far by the group's parameters, this one included; it goes on after a checkpoint is loaded.
    - ``group``: Index of the parameter group.
    - ``update_ratio``: :math:`rms(\Delta) / rms(\theta)`, :math:`\theta` before the step.
    - ``cosine_descent``: Cosine of :math:`\Delta` with the negative gradient (the gradient if ``maximize``).
    - ``cosine_adam``: Cosine of :math:`\Delta` with Adam's step, :math:`-\hat m / \sqrt{\hat v}` from the moments in the
      state; nan for the paper's rules, which keep none.
    - ``saturation``: Share of LSTM cells with ``|tanh(cell)| > 0.95`` among the coordinates not at rest.
    - ``skipped``: Share of coordinates skipped because their gradient was not finite. A ``GradScaler`` skips such a
      step entirely, and then nothing is recorded.
    - ``at_rest``: Share of coordinates that never had a non-zero gradient.

    Only parameters with a gradient count; a group with none has no row. A ratio with nothing to divide by is nan. Sharded
    parameters are counted whole, so every rank has the same rows: make a recorder on each rank, with the writer on one.
    A sample reads numbers on the host, so inside ``torch.compile`` it breaks the graph (and ``fullgraph=True`` refuses it).

    Args:
        optimizer: The optimizer to listen to. Its copies, pickled or deep, have no recorder.
        every: Steps from one sample to the next. A sample costs about as much as a few steps and, for its duration, a copy
            of the parameters.
        writer: A TensorBoard ``SummaryWriter`` (tags are ``learned_optim/group0/update_ratio`` ...), or a function that is
            called with each row.

    Attributes:
        rows: The rows so far.

    Raises:
        TypeError: If ``optimizer`` is no ``LearnedOptimizer``, or ``writer`` is neither a writer nor a function.
        ValueError: If ``every`` is below 1.

    Examples:
        >>> param = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = LearnedOptimizer([param])
        >>> recorder = Recorder(optimizer, every=1)
        >>> param.grad = torch.ones(3)
        >>> optimizer.step()
        >>> int(recorder.rows[0]["step"])
        1
    """

    def __init__(
        self, optimizer: LearnedOptimizer, every: int = 100, writer: ScalarWriter | Callable[[Row], Any] | None = None
    ) -> None:
        if not isinstance(optimizer, LearnedOptimizer):
            raise TypeError(
                f"Recorder listens to a LearnedOptimizer, got {type(optimizer).__name__}; if that wraps one, give the "
                "optimizer inside it"
            )
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not (writer is None or isinstance(writer, ScalarWriter) or callable(writer)):
            raise TypeError(f"writer must have add_scalar, as a SummaryWriter has, or be a function; got {writer!r}")
        self.rows: list[Row] = []
        self._every = every
        self._writer = writer
        self._taken = 0
        self._before: dict[Tensor, Tensor] = {}
        self._hooks = optimizer.register_step_pre_hook(self._look), optimizer.register_step_post_hook(self._compare)

    def remove(self) -> None:
        """Stop recording; the rows stay."""
        for hook in self._hooks:
            hook.remove()

    def _look(self, optimizer: Any, *_: Any) -> None:
        if self._taken % self._every == 0:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            self._before = {param: _flat(param).clone() for param in params}

    @torch.no_grad()
    def _compare(self, optimizer: Any, *_: Any) -> None:
        self._taken += 1
        before, self._before = self._before, {}
        for number, group in enumerate(optimizer.param_groups if before else ()):
            moved = [param for param in group["params"] if param.grad is not None and optimizer.state.get(param)]
            if moved:
                batches = _batches(moved, optimizer.state)
                sums = torch.stack([_sums(optimizer, group, batch, before) for batch in batches]).sum(0)
                step = max(int(optimizer.state[param]["step"]) for param in moved)
                self._write({"step": step, "group": number, **_figures(*sums.tolist())})

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        if isinstance(self._writer, ScalarWriter):
            for name, value in row.items():
                if name not in ("step", "group"):
                    self._writer.add_scalar(f"learned_optim/group{row['group']}/{name}", value, int(row["step"]))
        elif self._writer is not None:
            self._writer(row)


def _figures(
    count: float, change2: float, param2: float, descent: float, grad2: float, adam: float, adam2: float, *shares: float
) -> Row:
    """Return the figures of a row from sums over a group."""
    skipped, at_rest, saturated, cells = shares
    return {
        "update_ratio": math.sqrt(_share(change2, param2)),
        "cosine_descent": _share(descent, math.sqrt(change2 * grad2)),
        "cosine_adam": _share(adam, math.sqrt(change2 * adam2)),
        "saturation": _share(saturated, cells),
        "skipped": _share(skipped, count),
        "at_rest": _share(at_rest, count),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _batches(params: Iterable[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> Iterator[list[Tensor]]:
    """Gather small parameters that can be joined: a sample then pays for each batch, not for each parameter."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    sizes: dict[Any, int] = defaultdict(int)
    for param in params:
        placement = getattr(param, "device_mesh", None), getattr(param, "placements", None)
        kind = param.device, compute_dtype(param.dtype), float(state[param]["step"]), placement
        alike[kind].append(param)
        sizes[kind] += param.numel()
        if sizes[kind] >= CHUNK:
            yield alike.pop(kind)
            sizes[kind] = 0
    yield from alike.values()


PIECE = 16_384
"""Coordinates that are processed at once: few enough that every intermediate result stays in the caches."""


def _sums(
    optimizer: LearnedOptimizer, group: dict[str, Any], params: Sequence[Tensor], originals: Mapping[Tensor, Tensor]
) -> Tensor:
    """Return the arguments of :func:`_figures`, summed over a batch's coordinates, on the CPU in float64."""
    states, rule = [optimizer.state[param] for param in params], optimizer._rule_of(params[0], group)
    grads = [gradient_of(param) for param in params]
    before, after = _joined([originals[param] for param in params]), _joined(map(_flat, params))
    grad = _joined(map(_flat, grads))
    stored = {
        name: _joined(_flat(state[name], state[name].shape[-1]) for state in states)
        for name in ("hidden", "cell", CELL_SCALE)
        if name in states[0]
    }
    moments = [_joined(_flat(state[name]) for state in states) for name in rule.moment_names]
    sums = after.new_zeros(11, dtype=torch.float64)
    for start in range(0, max(len(after), 1), PIECE):
        piece = slice(start, start + PIECE)
        cell = decode(rule, {name: x[piece] for name, x in stored.items()}, rule.readout.weight.dtype)["cell"]
        adam = [moment[piece] for moment in moments]
        sums += _sums_of_piece(rule, group, before[piece], after[piece], grad[piece], cell, adam, float(states[0]["step"]))
    return _over_ranks(sums, params[0]).cpu()


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    first, *others = tensors
    return torch.cat([first, *others]) if others else first


def _sums_of_piece(
    rule: UpdateRule,
    group: dict[str, Any],
    before: Tensor,
    after: Tensor,
    grad: Tensor,
    cell: Tensor,
    moments: Sequence[Tensor],
    step: float,
) -> Tensor:
    change = after.double() - before.double()
    grad = grad.to(rule.readout.weight.dtype)
    finite = (grad * grad if moments else grad).isfinite()
    descent = torch.where(finite, grad if group["maximize"] else -grad, 0).double()
    if moments:
        seen, adam = _adam_step(rule, moments, step)
    else:
        seen, adam = cell[:, : rule.config.hidden_size].any(-1), torch.zeros_like(change)
    saturated = (cell.abs() > SATURATED).sum(1)
    vectors = torch.stack((change, before.double(), descent, adam))
    products = vectors @ vectors.T
    pairs = ((0, 0), (1, 1), (0, 2), (2, 2), (0, 3), (3, 3))
    counts = (~finite).sum(), (~seen).sum(), (saturated * seen).sum(), seen.sum() * cell.shape[1]
    return torch.stack([change.new_tensor(len(change)), *(products[pair] for pair in pairs), *(c.double() for c in counts)])


def _adam_step(rule: UpdateRule, moments: Sequence[Tensor], step: float) -> tuple[Tensor, Tensor]:
    """Return a mask where the second moment is positive, and ``-m / sqrt(v)``, corrected for bias, under that mask."""
    config: Any = rule.config
    momentum = moments[rule.moment_names.index("exp_avg")].double() / (1 - config.fast_decay**step)
    second_moment = moments[rule.moment_names.index("exp_avg_sq")].double() / (1 - config.second_moment_decay**step)
    seen = second_moment > 0
    return seen, torch.where(seen, -momentum * second_moment.rsqrt(), 0)


def _over_ranks(sums: Tensor, param: Tensor) -> Tensor:
    """Add up the sums of the ranks of a sharded parameter; each rank already has the whole of a replicated one."""
    if not hasattr(param, "placements"):
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in param.placements]
    return DTensor.from_local(sums, param.device_mesh, placements, run_check=False).full_tensor()  # type: ignore


def _flat(tensor: Tensor, *trailing: int) -> Tensor:
    """Return this rank's coordinates in logical order, complex ones as pairs of reals."""
    return local(as_real(tensor.detach())).reshape(-1, *trailing)
