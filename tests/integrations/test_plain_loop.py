"""What a loop of one's own combines: mixed precision, scaling, accumulation and clipping; a compiled step on a schedule."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import ExponentialLR

from learned_optim import LearnedOptimizer
from tests.cases import assert_identical, draw_gradients, make_params, needs_dynamo, small_rule
from tests.integrations.training import Run, end_of, loss_of, make_batches, make_model, make_optimizer


def mixed_precision_run(scaler: torch.amp.GradScaler, batches: list, start: dict | None = None) -> tuple[Run, dict]:
    model = make_model()
    optimizer = make_optimizer(model)
    if start is not None:
        model.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
        scaler.load_state_dict(start["scaler"])
    for pair in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        for batch in pair:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    return end_of(model, optimizer), state


def test_scaling_mixed_precision_accumulated_clipped_gradients_changes_nothing() -> None:
    batches = make_batches(8)
    scaled, _ = mixed_precision_run(torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2), batches)
    plain, _ = mixed_precision_run(torch.amp.GradScaler("cpu", enabled=False), batches)
    assert_identical(scaled, plain)
    assert scaled.memory[0]["step"] == 4


def test_mixed_precision_resumes_to_the_last_bit() -> None:
    batches = make_batches(8)
    whole, _ = mixed_precision_run(torch.amp.GradScaler("cpu"), batches)
    _, half = mixed_precision_run(torch.amp.GradScaler("cpu"), batches[:4])
    resumed, _ = mixed_precision_run(torch.amp.GradScaler("cpu"), batches[4:], half)
    assert_identical(resumed, whole)


@needs_dynamo
# torch's own import compiles functional optimizers with the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_step_follows_a_schedule_without_recompiling() -> None:
    params, expected = make_params([(5,), (3, 4)]), make_params([(5,), (3, 4)])
    rule = small_rule(seed=98)  # Weights that no other test has cast before.
    optimizer, other = (LearnedOptimizer(tensors, lr=torch.tensor(1.0), weights=rule) for tensors in (params, expected))
    schedules = [ExponentialLR(opt, 0.5) for opt in (optimizer, other)]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter)
    for number in range(5):
        for tensors in (params, expected):
            for param, gradient in zip(tensors, draw_gradients(tensors, number), strict=True):
                param.grad = gradient
        step()
        other.step()
        for schedule in schedules:
            schedule.step()
    assert counter.frame_count == 2
    assert optimizer.param_groups[0]["lr"] == 0.5**5
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
