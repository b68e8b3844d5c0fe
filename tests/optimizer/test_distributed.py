"""Two and four gloo processes on CPU: every way of splitting the work gives the numbers of one process.

The processes start once and run every check; each test reads the outcome of its own.
"""

import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from learned_optim import LearnedOptimizer, Recorder
from tests.cases import RULE_CASES, assert_identical, copies, draw_gradients, memories, small_rule

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2
STEPS = 3
ALL_CASES = list(RULE_CASES)
FEW_CASES = ["paper-raw", "adam-modulation-time", "adam-modulation-matrix"]


def make_model(rows: int = 8, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Draw the same model on every rank; ``rows = 7`` shards as 4 + 3, and the last layer's single row as 1 + 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, rows), nn.Tanh(), nn.Linear(rows, 1)).to(dtype)


def inputs_of(step: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, inputs: Tensor) -> None:
    model.zero_grad()
    inputs = inputs.to(next(model.parameters()).dtype)
    (model(inputs) - inputs.sum(-1, keepdim=True)).square().mean().backward()


def full(value: Any) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def full_memories(optimizer: LearnedOptimizer, params: list[nn.Parameter]) -> list[dict[str, Tensor]]:
    return [{name: full(value) for name, value in optimizer.state[param].items()} for param in params]


def train(model: nn.Module, optimizer: LearnedOptimizer, steps: range) -> None:
    for step in steps:
        backward(model, inputs_of(step))
        optimizer.step()


def train_alone(
    case: str, steps: int, rows: int = 8, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, LearnedOptimizer]:
    model = make_model(rows, dtype)
    optimizer = LearnedOptimizer(model.parameters(), weights=small_rule(case), **options)
    train(model, optimizer, range(steps))
    return model, optimizer


def sharded(case: str, rows: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, LearnedOptimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model(rows, dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, LearnedOptimizer(model.parameters(), weights=small_rule(case), **options)


# The checks; each runs on both ranks


def check_ddp(case: str) -> None:
    model = nn.parallel.DistributedDataParallel(make_model())
    optimizer = LearnedOptimizer(model.parameters(), weights=small_rule(case))
    for step in range(STEPS):
        backward(model, inputs_of(step).chunk(WORLD)[dist.get_rank()])
        optimizer.step()
    alone, _ = train_alone(case, STEPS)
    torch.testing.assert_close(list(model.module.parameters()), list(alone.parameters()), rtol=1e-4, atol=1e-5)
    for param in model.parameters():
        both = [torch.empty_like(param) for _ in range(WORLD)]
        dist.all_gather(both, param.detach())
        assert_identical(both[0], both[1])


def check_fsdp2(case: str, rows: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    model, optimizer = sharded(case, rows, dtype, **options)
    params = list(model.parameters())
    train(model, optimizer, range(STEPS))
    alone, reference = train_alone(case, STEPS, rows, dtype, **options)
    assert_identical([full(param) for param in params], copies(alone.parameters()))
    assert_identical(full_memories(optimizer, params), memories(reference, alone.parameters()))
    for param in params:
        hidden = optimizer.state[param]["hidden"]
        assert hidden.placements == param.placements
        for name, value in optimizer.state[param].items():
            assert name == "step" or value.to_local().shape[: param.dim()] == param.to_local().shape


def check_averages(case: str) -> None:
    model, optimizer = sharded(case, 7, average=True)
    alone, reference = train_alone(case, 0, 7, average=True)
    for net, opt in ((model, optimizer), (alone, reference)):
        train(net, opt, range(STEPS))
    weights = copies(alone.parameters())
    with optimizer.averaged(), reference.averaged():
        expected = copies(alone.parameters())
        assert_identical([full(param) for param in model.parameters()], expected)
    assert not torch.equal(expected[0], weights[0])
    assert_identical([full(param) for param in model.parameters()], weights)
    saved = optimizer.averaged_state_dict(model)
    assert_identical([full(value) for value in saved.values()], expected)


def check_full_checkpoint(case: str) -> None:
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = sharded(case, rows=7, weight_decay=0.5, average=True)
    for step in range(2):
        backward(model, inputs_of(step))
        optimizer.step()
    state = get_optimizer_state_dict(model, optimizer, options=options)

    # Full state into an unsharded model.
    alone = make_model(7)
    with torch.no_grad():
        for param, shard in zip(alone.parameters(), model.parameters(), strict=True):
            param.copy_(full(shard))
    resumed = LearnedOptimizer(alone.parameters(), weights=small_rule(case))
    set_optimizer_state_dict(alone, resumed, state)
    # Full state into a model sharded afresh.
    again, resharded = sharded(case, rows=7, average=True)
    with torch.no_grad():
        for param, shard in zip(again.parameters(), model.parameters(), strict=True):
            param.copy_(shard)
    set_optimizer_state_dict(again, resharded, state, options=options)

    for net, opt in ((model, optimizer), (alone, resumed), (again, resharded)):
        backward(net, inputs_of(2))
        opt.step()
    expected = copies(alone.parameters())
    assert_identical([full(param) for param in model.parameters()], expected)
    assert_identical([full(param) for param in again.parameters()], expected)
    assert_identical(full_memories(resharded, list(again.parameters())), memories(resumed, list(alone.parameters())))


def check_sharded_checkpoint(case: str, flatten: bool, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    model, optimizer = sharded(case, rows=7, average=True)
    for step in range(2):
        backward(model, inputs_of(step))
        optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    path = os.path.join(folder, f"{case}-{flatten}")
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=path)
    again, resumed = sharded(case, rows=7, average=True)
    state = {"optimizer": get_optimizer_state_dict(again, resumed, options=options)}
    dcp.load(state, checkpoint_id=path)
    set_optimizer_state_dict(again, resumed, state["optimizer"], options=options)
    assert_identical(full_memories(resumed, list(again.parameters())), full_memories(optimizer, list(model.parameters())))


def check_resharding(case: str, dtype: torch.dtype, folder: str, **options: Any) -> None:
    """Two steps on two ranks, one step alone and one more on two ranks are four steps alone, to the last bit."""
    import torch.distributed.checkpoint as dcp

    def save(name: str, model: nn.Module, optimizer: LearnedOptimizer, alone: bool) -> None:
        weights, memory = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": memory}, checkpoint_id=os.path.join(path, name), no_dist=alone)

    def load(name: str, model: nn.Module, optimizer: LearnedOptimizer, alone: bool) -> None:
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        weights, memory = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": memory}
        dcp.load(state, checkpoint_id=os.path.join(path, name), no_dist=alone)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    path = os.path.join(folder, f"reshard-{case}-{dtype}-{options}")
    model, optimizer = sharded(case, 7, dtype, **options)
    train(model, optimizer, range(2))
    save("two", model, optimizer, alone=False)
    model, optimizer = train_alone(case, 0, 7, dtype, **options)
    load("two", model, optimizer, alone=True)
    train(model, optimizer, range(2, 3))
    if dist.get_rank() == 0:
        save("one", model, optimizer, alone=True)
    dist.barrier()
    model, optimizer = sharded(case, 7, dtype, **options)
    load("one", model, optimizer, alone=False)
    train(model, optimizer, range(3, 4))
    params = list(model.parameters())
    alone, reference = train_alone(case, 4, 7, dtype, **options)
    assert_identical([full(param) for param in params], copies(alone.parameters()))
    assert_identical(full_memories(optimizer, params), memories(reference, alone.parameters()))


def check_fsdp1_is_refused(use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"does not support.*FSDP1.*use torch\.distributed\.fsdp\.fully_shard"):
        LearnedOptimizer(model.parameters(), weights=small_rule())
    optimizer = LearnedOptimizer(make_model().parameters(), weights=small_rule())
    with pytest.raises(RuntimeError, match="FSDP1"):
        optimizer.add_param_group({"params": model.parameters()})
    assert len(optimizer.param_groups) == 1


def check_tensor_parallel_placements(case: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    start = torch.linspace(-1, 1, 12).view(3, 4)
    plain = nn.Parameter(start.clone())
    columns = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(1)]))
    replicated = nn.Parameter(distribute_tensor(start.clone(), mesh, [Replicate()]))
    params = [plain, columns, replicated]
    optimizers = [LearnedOptimizer([param], weights=small_rule(case)) for param in params]
    for step in range(STEPS):
        (gradient,) = draw_gradients([plain], step)
        plain.grad = gradient
        columns.grad = distribute_tensor(gradient, mesh, [Shard(1)])
        # As sequence parallelism leaves it: each rank holds a summand.
        replicated.grad = DTensor.from_local(gradient / WORLD, mesh, [Partial()], run_check=False)
        for optimizer in optimizers:
            optimizer.step()
    for optimizer, param in zip(optimizers[1:], params[1:], strict=True):
        # A column shard is packed in another order, which may change the rounding of a matmul.
        torch.testing.assert_close(full(param), plain.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(full_memories(optimizer, [param]), memories(optimizers[0], [plain]), rtol=1e-5, atol=1e-6)


def check_zero_redundancy(case: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(make_model())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=LearnedOptimizer, weights=small_rule(case), lr=1.0
    )
    for step in range(STEPS):
        backward(model, inputs_of(step))
        optimizer.step()
    alone, reference = train_alone(case, STEPS)
    assert_identical(copies(model.module.parameters()), copies(alone.parameters()))
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        assert_identical(dict(optimizer.state_dict()["state"]), dict(reference.state_dict()["state"]))


def check_recorder(case: str) -> None:
    model, optimizer = sharded(case, rows=7)
    alone = make_model(7)
    reference = LearnedOptimizer(alone.parameters(), weights=small_rule(case))
    recorders = [Recorder(opt, every=2) for opt in (optimizer, reference)]
    for step in range(STEPS):
        for net, opt in ((model, optimizer), (alone, reference)):
            backward(net, inputs_of(step))
            opt.step()
    assert len(recorders[0].rows) == 2
    for row, expected in zip(*(recorder.rows for recorder in recorders), strict=True):
        assert row == pytest.approx(expected, rel=1e-6, nan_ok=True)


def take_step_on_some_ranks(
    optimizer: LearnedOptimizer, params: list[nn.Parameter], gradients: list[Tensor], holders: list[set[int]]
) -> list[Tensor | None]:
    """Step with each gradient on the ranks that hold it; return what one process would have."""
    from torch.distributed.tensor import distribute_tensor

    expected: list[Tensor | None] = []
    for param, gradient, ranks in zip(params, gradients, holders, strict=True):
        whole = distribute_tensor(gradient, param.device_mesh, param.placements)
        mine = whole if dist.get_rank() in ranks else whole * 0
        expected.append(full(mine) if ranks else None)
        param.grad = whole if dist.get_rank() in ranks else None
    optimizer.step()
    return expected


def check_gradients_on_some_ranks(case: str, shape: tuple[int, ...]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", shape)
    placements = [Shard(dim) for dim in range(len(shape))]
    start = torch.linspace(-1, 1, 28).view(7, 4)
    params = [nn.Parameter(distribute_tensor(start * scale, mesh, placements)) for scale in (1.0, 10.0, 0.1)]
    alone = [nn.Parameter(start * scale) for scale in (1.0, 10.0, 0.1)]
    optimizer, reference = (LearnedOptimizer(held, weights=small_rule(case)) for held in (params, alone))
    recorders = [Recorder(opt, every=1) for opt in (optimizer, reference)]
    last, everyone = dist.get_world_size() - 1, set(range(dist.get_world_size()))
    for step, holders in enumerate(([{0}, {last}, everyone], [{last}, set(), {0}], [everyone, {0}, set()])):
        expected = take_step_on_some_ranks(optimizer, params, draw_gradients(alone, step), holders)
        for param, gradient in zip(alone, expected, strict=True):
            param.grad = gradient
        reference.step()
    torch.testing.assert_close([full(param) for param in params], copies(alone), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full_memories(optimizer, params), memories(reference, alone), rtol=1e-5, atol=1e-6)
    for row, wanted in zip(*(recorder.rows for recorder in recorders), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, nan_ok=True)


def check_summands_on_some_ranks(case: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    start = torch.linspace(-1, 1, 28).view(7, 4)
    (gradient,) = draw_gradients([start], 0)
    for placement in (Replicate(), Shard(0)):
        param, plain = nn.Parameter(distribute_tensor(start, mesh, [placement])), nn.Parameter(start.clone())
        if dist.get_rank() == 1:
            param.grad = DTensor.from_local(gradient, mesh, [Partial()], run_check=False)
        plain.grad = gradient
        for held in (param, plain):
            LearnedOptimizer([held], weights=small_rule(case)).step()
        torch.testing.assert_close(full(param), plain.detach(), rtol=1e-5, atol=1e-6)


def check_unlike_gradients_are_refused_on_every_rank(first: str, second: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = {"replicated": Replicate(), "sharded": Shard(0), "summed": Partial()}
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])) for _ in range(2)]
    optimizer = LearnedOptimizer(params, weights=small_rule())
    for kind in [first if dist.get_rank() == 0 else second]:
        if kind in made:
            rows = 4 // dist.get_world_size() if kind == "sharded" else 4
            params[1].grad = DTensor.from_local(torch.ones(rows, 3), mesh, [made[kind]], run_check=False)
    with pytest.raises(RuntimeError, match=r"parameter 1 has placements .* give every rank the same kind of gradient"):
        optimizer.step()
    assert_identical([full(param) for param in params], [torch.ones(4, 3)] * 2)
    assert not optimizer.state
    params[1].grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    optimizer.step()
    assert set(optimizer.state) == {params[1]}


class Experts(nn.Module):
    """Two experts, of which a step uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(3, 7), nn.ModuleList(nn.Linear(7, 1) for _ in range(2))

    def forward(self, inputs: Tensor, expert: int) -> Tensor:
        return self.experts[expert](torch.tanh(self.first(inputs)))


def check_unused_experts(case: str, how: str) -> None:
    from torch.distributed.fsdp import fully_shard

    def build() -> Experts:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return Experts()

    alone = build()
    model: nn.Module = build()
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        for part in (*model.experts, model.first, model):
            fully_shard(part)
    optimizer, reference = (LearnedOptimizer(net.parameters(), weights=small_rule(case)) for net in (model, alone))
    for step, expert in enumerate((0, 0, 1)):
        inputs = inputs_of(step)
        for net, opt in ((model, optimizer), (alone, reference)):
            opt.zero_grad()
            net(inputs, expert).square().mean().backward()
            opt.step()
        waiting = list(alone.experts[1].parameters())
        assert all((param in reference.state) == (step == 2) for param in waiting)
    assert len(optimizer.state) == len(reference.state)
    torch.testing.assert_close(
        [full(param) for param in model.parameters()], copies(alone.parameters()), rtol=1e-5, atol=1e-6
    )


class Mixture(nn.Module):
    """Two experts behind a gate; an expert that gets no row is called with none, as FSDP2 demands of every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(3, 7), nn.ModuleList(nn.Linear(7, 1) for _ in range(2))

    def forward(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        rows = torch.tanh(self.first(inputs))
        outputs = [torch.zeros(len(rows), 1).index_add(0, at, self.experts[number](rows[at]))
                   for number in range(2) for at in [(chosen == number).nonzero()[:, 0]]]  # fmt: skip
        return outputs[0] + outputs[1]


def check_experts_on_some_ranks(case: str) -> None:
    from torch.distributed.fsdp import fully_shard

    def build() -> Mixture:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return Mixture()

    alone, model, world = build(), build(), dist.get_world_size()
    for part in (*model.experts, model.first, model):
        fully_shard(part)
    optimizer, reference = (LearnedOptimizer(net.parameters(), weights=small_rule(case)) for net in (model, alone))
    for step, user in enumerate((0, world - 1, 0)):
        inputs, chosen = inputs_of(step), torch.zeros(8, dtype=torch.int64)
        chosen.chunk(world)[user].fill_(1)  # One rank alone has rows for the second expert, and none for the first.
        for net, opt, rows, to in (
            (alone, reference, inputs, chosen),
            (model, optimizer, inputs.chunk(world)[dist.get_rank()], chosen.chunk(world)[dist.get_rank()]),
        ):
            opt.zero_grad()
            net(rows, to).square().mean().backward()
            opt.step()
    torch.testing.assert_close(
        [full(param) for param in model.parameters()], copies(alone.parameters()), rtol=1e-4, atol=1e-5
    )


def checks_of_absence() -> dict[str, Callable[[], None]]:
    """Return checks that any number of ranks can run: gradients that some of them lack."""
    named: dict[str, Callable[[], None]] = {}
    for case in FEW_CASES:
        shape = (dist.get_world_size(),) if dist.is_initialized() else (WORLD,)
        named[f"gradients on some ranks {case}"] = lambda case=case, shape=shape: check_gradients_on_some_ranks(case, shape)
        named[f"summands on some ranks {case}"] = lambda case=case: check_summands_on_some_ranks(case)
        named[f"experts on some ranks fsdp2 {case}"] = lambda case=case: check_experts_on_some_ranks(case)
        for how in ("ddp", "fsdp2"):
            named[f"unused experts {how} {case}"] = lambda case=case, how=how: check_unused_experts(case, how)
    for pair in (("replicated", "none"), ("replicated", "sharded"), ("summed", "replicated")):
        named[f"refused {pair}"] = lambda pair=pair: check_unlike_gradients_are_refused_on_every_rank(*pair)
    return named


def checks_of_four(folder: str) -> dict[str, Callable[[], None]]:
    named = checks_of_absence()
    for case in FEW_CASES:
        named[f"gradients on some ranks of a square {case}"] = lambda case=case: check_gradients_on_some_ranks(case, (2, 2))
        for rows in (7, 8):
            named[f"fsdp2 {rows} {case}"] = lambda case=case, rows=rows: check_fsdp2(case, rows, average=True)
    return named


def checks(folder: str) -> dict[str, Callable[[], None]]:
    named: dict[str, Callable[[], None]] = {}
    for case in ALL_CASES:
        named[f"ddp {case}"] = lambda case=case: check_ddp(case)
        for kind, rows in (("even", 8), ("uneven", 7)):
            named[f"fsdp2 {kind} {case}"] = lambda case=case, rows=rows: check_fsdp2(case, rows)
        named[f"fsdp2 uneven bf16 {case}"] = lambda case=case: check_fsdp2(case, 7, torch.bfloat16)
        named[f"fsdp2 uneven int8 {case}"] = lambda case=case: check_fsdp2(case, 7, state_dtype="int8")
        named[f"tensor parallel {case}"] = lambda case=case: check_tensor_parallel_placements(case)
        named[f"zero redundancy {case}"] = lambda case=case: check_zero_redundancy(case)
    for case in FEW_CASES:
        named[f"fsdp2 uneven averaged {case}"] = lambda case=case: check_fsdp2(case, 7, average=True)
        named[f"averages {case}"] = lambda case=case: check_averages(case)
        named[f"recorder {case}"] = lambda case=case: check_recorder(case)
        named[f"full checkpoint {case}"] = lambda case=case: check_full_checkpoint(case)
        for flatten in (False, True):
            name = f"sharded checkpoint {'flat' if flatten else 'nested'} {case}"
            named[name] = lambda case=case, flatten=flatten: check_sharded_checkpoint(case, flatten, folder)
        for dtype in (torch.float32, torch.bfloat16):
            named[f"resharding {dtype} {case}"] = lambda case=case, dtype=dtype: check_resharding(case, dtype, folder)
        named[f"resharding int8 {case}"] = lambda case=case: check_resharding(
            case, torch.float32, folder, state_dtype="int8"
        )
    for original in (False, True):
        named[f"fsdp1 refused use_orig_params={original}"] = lambda original=original: check_fsdp1_is_refused(original)
    return named | checks_of_absence()


CHECKS = {WORLD: checks, 4: checks_of_four}


def run_checks(rank: int, folder: str, world: int) -> None:
    """Run every check on this rank and leave the tracebacks of those that fail."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=20))
    named = CHECKS[world](folder)
    outcome = dict.fromkeys(named, "not run: the ranks fell out of step in an earlier check")
    for name, check in named.items():
        try:
            check()
            outcome[name] = ""
        except BaseException:  # Neither pytest's failures nor those of checkpoints are Exceptions.
            outcome[name] = f"rank {rank}: {traceback.format_exc()}"
        try:
            dist.barrier()
        except RuntimeError:
            break
    torch.save(outcome, os.path.join(folder, f"outcome-{rank}.pt"))
    dist.destroy_process_group()


def spawn(folder: Path, world: int) -> list[dict[str, str]]:
    mp.spawn(run_checks, (str(folder), world), nprocs=world)
    return [torch.load(folder / f"outcome-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return spawn(tmp_path_factory.mktemp("two"), WORLD)


@pytest.fixture(scope="module")
def outcomes_of_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return spawn(tmp_path_factory.mktemp("four"), 4)


def judge(outcomes: list[dict[str, str]], name: str) -> None:
    failures = [outcome[name] for outcome in outcomes if outcome[name]]
    if failures and torch.__version__ < "2.7" and all("no attribute 'record_event'" in failure for failure in failures):
        pytest.skip("FSDP2 of this torch knows no CPU")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", checks(""))
def test_two_processes_equal_one(name: str, outcomes: list[dict[str, str]]) -> None:
    judge(outcomes, name)


@pytest.mark.parametrize("name", checks_of_four(""))
def test_four_processes_equal_one(name: str, outcomes_of_four: list[dict[str, str]]) -> None:
    judge(outcomes_of_four, name)
