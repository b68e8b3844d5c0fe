"""``Recorder``: each figure is what its definition says, and recording changes nothing."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, Recorder, UpdateRule
from learned_optim.backends.native.sequence import native_available
from tests.cases import assert_identical, draw_gradients, make_params, memories, small_rule, take_steps

FIGURES = {"update_ratio", "cosine_descent", "cosine_adam", "saturation", "skipped", "at_rest"}
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native_available(), reason="not built"))]


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def cosine(one: Tensor, other: Tensor) -> Any:
    return pytest.approx(float(one @ other / (one.norm() * other.norm())), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maximize", [False, True])
def test_figures_by_hand(rule: UpdateRule, backend: str, maximize: bool) -> None:
    params = make_params()
    optimizer = LearnedOptimizer(
        params, weights=rule, backend=backend, maximize=maximize, lr=torch.tensor(0.5), weight_decay=3.0
    )
    recorder = Recorder(optimizer, every=1)
    take_steps(optimizer, params, 4)
    before = joined(params)
    gradients = draw_gradients(params, 4)
    gradients[2][0], gradients[3][1, 2] = math.nan, -math.inf
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    optimizer.step()

    change = joined(params) - before
    descent = joined(gradients).nan_to_num(0, 0, 0) * (1 if maximize else -1)
    row = recorder.rows[-1]
    assert set(row) == {"step", "group", *FIGURES}
    assert (row["step"], row["group"]) == (5, 0)
    assert row["update_ratio"] == pytest.approx(float(change.norm() / before.norm()), rel=1e-5)
    assert row["cosine_descent"] == cosine(change, descent)
    state = [optimizer.state[param] for param in params]
    if rule.moment_names:  # Equal step counts and decays: the bias corrections are common factors.
        adam = -joined([memory["exp_avg"] for memory in state]) / joined([memory["exp_avg_sq"] for memory in state]).sqrt()
        assert row["cosine_adam"] == cosine(change, adam)
        assert row["cosine_adam"] > 0.05
    else:
        assert math.isnan(row["cosine_adam"])
    cells = joined([memory["cell"] for memory in state])
    assert row["saturation"] == pytest.approx(float((cells.tanh().abs() > 0.95).double().mean()))
    assert row["skipped"] == 2 / change.numel()
    assert row["at_rest"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_saturation_counts_cells_of_coordinates_that_have_moved(rule: UpdateRule, dtype: torch.dtype) -> None:
    params = make_params([(6,)])
    optimizer = LearnedOptimizer(params, weights=rule, state_dtype=dtype)
    params[0].grad = torch.tensor([1.0, 0.0, -1.0, 0.0, 2.0, math.nan])
    optimizer.step()
    with torch.no_grad():  # Two of three moved coordinates, in one of their cells.
        state = optimizer.state[params[0]]
        state["cell"][[0, 2], -rule.config.hidden_size :] = 0
        state["cell"][[0, 2], -1] = torch.tensor([50, -50], dtype=dtype)
        if dtype == torch.int8:
            state["cell_scale"][[0, 2], -1] = 0.1
    recorder = Recorder(optimizer, every=1)
    params[0].grad = torch.zeros(6)
    params[0].grad[:3:2] = math.inf  # Their cells stay.
    optimizer.step()
    (row,) = recorder.rows
    assert row["saturation"] == pytest.approx(2 / (3 * rule.memory_width))
    assert row["at_rest"] == 0.5
    assert row["skipped"] == 2 / 6
    assert math.isnan(row["cosine_descent"])


def test_every_nth_step_from_the_first_of_each_group_that_moves() -> None:
    together = [make_params(), make_params(seed=1), make_params([(3,)])]
    groups = [{"params": params, "lr": lr} for params, lr in zip(together, (1.0, 0.0, 1.0), strict=True)]
    optimizer = LearnedOptimizer(groups, weights=small_rule())
    recorder = Recorder(optimizer, every=3)
    take_steps(optimizer, [*together[0], *together[1]], 7)
    assert [(row["step"], row["group"]) for row in recorder.rows] == [(n, group) for n in (1, 4, 7) for group in (0, 1)]
    assert recorder.rows[0]["update_ratio"] > 0
    assert recorder.rows[1]["update_ratio"] == 0
    assert math.isnan(recorder.rows[1]["cosine_adam"])
    recorder.remove()
    take_steps(optimizer, together[0], 3)
    assert len(recorder.rows) == 6


def test_recording_changes_nothing(rule: UpdateRule) -> None:
    runs = []
    for record in (True, False):
        params = make_params()
        optimizer = LearnedOptimizer(params, weights=rule)
        if record:
            Recorder(optimizer, every=2)
        take_steps(optimizer, params, 3)
        runs.append(([param.detach() for param in params], memories(optimizer, params)))
    assert_identical(runs[0], runs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_every_dtype_and_layout(rule: UpdateRule, dtype: torch.dtype) -> None:
    params = make_params([(3, 4), (2,)], dtype)
    params[0] = nn.Parameter(params[0].detach().t())
    optimizer = LearnedOptimizer(params, weights=rule, state_dtype=torch.bfloat16)
    recorder = Recorder(optimizer, every=1)
    take_steps(optimizer, params, 2)
    assert all(0 < row["update_ratio"] < math.inf and abs(row["cosine_descent"]) <= 1 for row in recorder.rows)


def test_with_a_closure_and_a_scheduler() -> None:
    params = make_params([(4,)])
    optimizer = LearnedOptimizer(params, weights=small_rule())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    recorder = Recorder(optimizer, every=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        scheduler.step()
    first, second = recorder.rows
    assert first["cosine_descent"] > 0
    assert (first["update_ratio"] > 0, second["update_ratio"]) == (True, 0.0)


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    params = make_params([(4,)])
    optimizer = LearnedOptimizer(params, weights=small_rule())
    recorder = Recorder(optimizer, every=2)
    params[0].grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    take_steps(optimizer, params, 2)
    assert [row["step"] for row in recorder.rows] == [1]


def test_steps_go_on_after_a_checkpoint_and_copies_have_no_recorder() -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=small_rule())
    recorder = Recorder(optimizer, every=1)
    take_steps(optimizer, params, 3)
    other, others = copy.deepcopy((optimizer, params))
    take_steps(other, others, 1)
    assert len(recorder.rows) == 3
    resumed = LearnedOptimizer(others, weights=small_rule())
    resumed.load_state_dict(optimizer.state_dict())
    recorder = Recorder(resumed, every=10)
    take_steps(resumed, others, 1)
    assert recorder.rows[0]["step"] == 4


def test_a_rule_that_fell_back_is_recorded_as_the_adam_that_it_is() -> None:
    rule = small_rule("paper-raw")
    nn.init.constant_(rule.readout.bias, math.nan)
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=rule, guard=True)
    recorder = Recorder(optimizer, every=1)
    with pytest.warns(UserWarning, match="fell back"):
        take_steps(optimizer, params, 1)
    take_steps(optimizer, params, 1)
    (row,) = recorder.rows  # The step that was undone has no memory left to look at.
    assert row["cosine_adam"] == pytest.approx(1.0, rel=1e-4)
    assert row["at_rest"] == 0


# Writers


def test_a_function_gets_each_row() -> None:
    params, seen = make_params(), []
    optimizer = LearnedOptimizer(params, weights=small_rule())
    recorder = Recorder(optimizer, every=1, writer=seen.append)
    take_steps(optimizer, params, 2)
    assert seen == recorder.rows
    assert len(seen) == 2


class Writer:
    def __init__(self) -> None:
        self.calls: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.calls.append((tag, scalar_value, global_step))


def test_a_summary_writer_gets_each_figure_under_a_tag_of_its_own() -> None:
    params, writer = make_params(), Writer()
    optimizer = LearnedOptimizer([{"params": params[:3]}, {"params": params[3:]}], weights=small_rule())
    recorder = Recorder(optimizer, every=5, writer=writer)
    take_steps(optimizer, params, 6)
    assert {tag for tag, _, _ in writer.calls} == {f"learned_optim/group{n}/{name}" for n in (0, 1) for name in FIGURES}
    assert {step for _, _, step in writer.calls} == {1, 6}
    assert ("learned_optim/group1/update_ratio", recorder.rows[3]["update_ratio"], 6) in writer.calls


def test_tensorboard_s_own_writer(tmp_path: Any) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    params = make_params()
    optimizer = LearnedOptimizer(params, weights=small_rule())
    with tensorboard.SummaryWriter(tmp_path) as writer:
        recorder = Recorder(optimizer, every=1, writer=writer)
        take_steps(optimizer, params, 2)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("learned_optim/group0/update_ratio")
    assert [event.step for event in events] == [1, 2]
    assert events[1].value == pytest.approx(recorder.rows[1]["update_ratio"])


# Errors


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "message"),
    [
        (torch.optim.SGD, {}, TypeError, "Recorder listens to a LearnedOptimizer, got SGD; if that wraps one"),
        (LearnedOptimizer, {"every": 0}, ValueError, "every must be at least 1, got 0"),
        (LearnedOptimizer, {"writer": "runs/mine"}, TypeError, "writer must have add_scalar.*'runs/mine'"),
    ],
)
def test_bad_arguments_are_refused(optimizer: type, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recorder(optimizer(make_params([(3,)])), **options)
