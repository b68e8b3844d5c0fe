"""Random surgery between steps: whatever Adam survives, this optimizer survives; whatever is refused changes nothing.

Hypothesis draws an optimizer and a sequence of operations. The same sequence is done to :class:`torch.optim.Adam`, which is
the yardstick of what a user may expect to work. ``LEARNED_OPTIM_CASES`` sets another number of cases than the usual few.
"""

import copy
import io
import math
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from learned_optim import LearnedOptimizer
from tests.cases import copies, draw_gradients, small_rule

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

CASES = int(os.environ.get("LEARNED_OPTIM_CASES", "25"))
SHAPES = [(), (3,), (2, 3), (0, 2), (1, 2, 2, 2)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
REFUSALS = (ValueError, RuntimeError, TypeError, KeyError)


class Case:
    """The same parameters, twice: once for the optimizer under test, once for Adam."""

    def __init__(self, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], options: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.options = options
        self.seed = 0
        start = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        self.pairs = [([nn.Parameter(value.clone()) for value in start]) for _ in range(2)]
        self.optimizers: list[Optimizer] = [
            LearnedOptimizer(self.pairs[0], **options),
            Adam(self.pairs[1], lr=0.01, foreach=False),
        ]

    def both(self, operation: Callable[[Optimizer, list[nn.Parameter]], None]) -> None:
        """Do something to both. What Adam survives must be survived, or refused before anything has changed."""
        outcomes = []
        for optimizer, params in zip(self.optimizers, self.pairs, strict=True):
            learned = isinstance(optimizer, LearnedOptimizer)
            before = (copies(params), snapshot(optimizer)) if learned else None
            try:
                operation(optimizer, params)
                outcomes.append(None)
            except REFUSALS as error:
                outcomes.append(error)
                if learned:
                    assert before is not None
                    unchanged((copies(params), snapshot(optimizer)), before)
        mine, adams = outcomes
        if mine is not None and adams is None:
            raise AssertionError(f"Adam goes on, and LearnedOptimizer stops with {type(mine).__name__}: {mine}") from mine


def snapshot(optimizer: Optimizer) -> list[Any]:
    return [
        {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in memory.items()}
        for memory in optimizer.state.values()
    ]


def unchanged(now: Any, before: Any) -> None:
    torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


# Operations: each draws what it needs once, and is then done to both optimizers.


def step(case: Case, data: st.DataObject) -> None:
    present = [data.draw(st.booleans() if index else st.just(True)) for index in range(len(case.pairs[0]))]
    case.seed += 1
    kind = data.draw(st.sampled_from(["plain", "plain", "zero", "strided", "other view"]))

    def run(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        for param, gradient, there in zip(params, draw_gradients(params, case.seed), present, strict=True):
            gradient = gradient.clamp(-1e3, 1e3) if not gradient.is_complex() else gradient
            if kind == "zero":
                gradient = torch.zeros_like(gradient)
            elif kind == "strided" and gradient.dim() > 1:
                gradient = gradient.transpose(0, -1).contiguous().transpose(0, -1)
            elif kind == "other view" and gradient.dim() == 1:
                gradient = gradient.repeat_interleave(2)[::2]
            param.grad = gradient if there else None
        optimizer.step()

    case.both(run)


def change_options(case: Case, data: st.DataObject) -> None:
    lr = data.draw(st.sampled_from([0.0, 0.3, 1.0, torch.tensor(0.5)]))
    weight_decay = data.draw(st.sampled_from([0.0, 0.1]))
    maximize = data.draw(st.booleans())

    def run(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=weight_decay, maximize=maximize)

    if isinstance(lr, Tensor):
        lr = float(lr)  # Adam takes a tensor only where it was made with one.
    case.both(run)


def forget(case: Case, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(case.pairs[0]) - 1))
    whole = data.draw(st.booleans())

    def run(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        if whole:
            optimizer.state.clear()
        else:
            optimizer.state.pop(params[index], None)

    case.both(run)


def relayout(case: Case, data: st.DataObject) -> None:
    """Replace state tensors by equal ones that lie in memory otherwise."""
    how = data.draw(st.sampled_from(["clone", "expand", "transposed"]))

    def moved(value: Tensor) -> Tensor:
        if how == "transposed" and value.dim() > 1:
            return value.transpose(0, 1).contiguous().transpose(0, 1)
        if how == "expand":
            return value.unsqueeze(-1).repeat_interleave(2, -1)[..., 0]
        return value.clone()

    def run(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        for memory in optimizer.state.values():
            memory.update({name: moved(value) for name, value in memory.items() if isinstance(value, Tensor)})

    case.both(run)


def through_a_checkpoint(case: Case, data: st.DataObject) -> None:
    cast = data.draw(st.sampled_from([None, None, torch.bfloat16, torch.float64, torch.float16]))
    file, fresh = data.draw(st.booleans()), data.draw(st.booleans())

    def run(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        state = copy.deepcopy(optimizer.state_dict())
        if file:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        if cast is not None:
            for memory in state["state"].values():
                tensors = {name: value for name, value in memory.items() if isinstance(value, Tensor)}
                memory.update({name: value.to(cast) for name, value in tensors.items() if not value.is_complex()})
        if fresh:
            optimizer.state.clear()
        optimizer.load_state_dict(state)

    # A cast to float16 may lose a second moment: then Adam trains on zeros, and this optimizer refuses.
    if cast == torch.float16:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(case, "both", lambda operation: only_if_it_fits(case, operation))
            case.both(run)
    else:
        case.both(run)


def only_if_it_fits(case: Case, operation: Callable[[Optimizer, list[nn.Parameter]], None]) -> None:
    for optimizer, params in zip(case.optimizers, case.pairs, strict=True):
        try:
            operation(optimizer, params)
        except ValueError as error:
            assert "float16" in str(error)  # noqa: PT017


def spoil_a_checkpoint(case: Case, data: st.DataObject) -> None:
    """Damage a checkpoint in one place: the load is refused and changes nothing, or the next step works."""
    spoil = data.draw(
        st.sampled_from(
            [
                lambda memory: memory.update(step=-1.0),
                lambda memory: memory.update(step=math.nan),
                lambda memory: memory.update(step=10**400),
                lambda memory: memory.update(step=5),
                lambda memory: memory.pop("hidden"),
                lambda memory: memory.update(hidden=memory["hidden"].int()),
                lambda memory: memory.update(hidden=memory["hidden"].double()),
                lambda memory: memory.update(cell=memory["cell"][..., :1]),
                lambda memory: memory.update(cell=memory["cell"].to(torch.complex64)),
                lambda memory: memory.update(extra=torch.ones(2)),
                lambda memory: memory.update(hidden="x"),
            ]
        )
    )
    optimizer, params = case.optimizers[0], case.pairs[0]
    state = copy.deepcopy(optimizer.state_dict())
    if not state["state"]:
        return
    spoil(state["state"][data.draw(st.sampled_from(sorted(state["state"])))])
    before = copies(params), snapshot(optimizer)
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        unchanged((copies(params), snapshot(optimizer)), before)


def step_as_a_number(case: Case, data: st.DataObject) -> None:
    number, plain = data.draw(st.sampled_from([1, 2.0, 7])), data.draw(st.booleans())

    def run(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        for memory in optimizer.state.values():
            memory["step"] = number if plain and isinstance(optimizer, LearnedOptimizer) else torch.tensor(float(number))

    case.both(run)


def replace_by_a_copy(case: Case, data: st.DataObject) -> None:
    how = data.draw(st.sampled_from([copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]))
    for index in range(2):
        case.optimizers[index], case.pairs[index] = how((case.optimizers[index], case.pairs[index]))


def swap_data(case: Case, data: st.DataObject) -> None:
    how = data.draw(st.sampled_from(["data", "bits"]))

    def run(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        for param in params:
            if how == "data":
                param.data = param.data.clone()
            elif how == "bits" and param.dim() > 1:
                param.data = param.data.transpose(0, 1).contiguous().transpose(0, 1)

    case.both(run)


def add_a_group(case: Case, data: st.DataObject) -> None:
    shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES))
    for optimizer, params in zip(case.optimizers, case.pairs, strict=True):
        new = nn.Parameter(torch.ones(shape, dtype=dtype))
        group: dict[str, Any] = {"params": [new]}
        optimizer.add_param_group(group)
        assert optimizer.param_groups[-1] is group
        params.append(new)


def in_a_mode(case: Case, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from([torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), torch.enable_grad]))
    case.seed += 1

    def run(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        for param, gradient in zip(params, draw_gradients(params, case.seed), strict=True):
            param.grad = gradient
        if all(param in optimizer.state for param in params) or isinstance(optimizer, LearnedOptimizer):
            with mode():
                optimizer.step()

    case.both(run)


OPERATIONS = [
    *[step] * 3,
    *(change_options, forget, relayout, through_a_checkpoint, spoil_a_checkpoint, step_as_a_number),
    *(replace_by_a_copy, swap_data, add_a_group, in_a_mode),
]


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize="LEARNED_OPTIM_CASES" not in os.environ,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_whatever_adam_survives(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    shapes = [data.draw(st.sampled_from(SHAPES)) for _ in range(count)]
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in range(count)]
    options = {
        "weights": small_rule(data.draw(st.sampled_from(["paper-raw", "adam-modulation", "adam-modulation-matrix"]))),
        "state_dtype": data.draw(st.sampled_from([None, "bfloat16", "int8"])),
        "moment_dtype": data.draw(st.sampled_from([None, "bfloat16"])),
        "backend": data.draw(st.sampled_from(["auto", "reference"])),
        "matrix": data.draw(st.sampled_from(["auto", True, False])),
        "average": data.draw(st.booleans()),
    }
    case = Case(shapes, dtypes, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(data.draw(st.integers(2, 8))):
            data.draw(st.sampled_from(OPERATIONS))(case, data)
        step(case, data)
    optimizer = case.optimizers[0]
    assert isinstance(optimizer, LearnedOptimizer)
    optimizer.summary()
    for memory in optimizer.state.values():
        assert not any(value.is_inference() for value in memory.values() if isinstance(value, Tensor))
