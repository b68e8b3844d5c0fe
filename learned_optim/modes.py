"""Modes of torch that change what a tensor is: ``inference_mode``, ``FakeTensorMode``, ``torch.func`` transforms.

What the process keeps, such as a rule, must not depend on the mode in which it was first asked for. So it is made in a
thread of its own, because modes belong to threads. A fake parameter gets a fake rule, which no other mode ever sees.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def outside_modes(make: Callable[[], T]) -> T:
    """Call a function where no mode of this thread is active.

    Args:
        make: Takes a moment and reads no state of the thread.

    Returns:
        What it returns. What it raises is raised here.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(make())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="learned_optim outside modes")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def active_fake_mode() -> Any:
    """Return the ``FakeTensorMode`` of this thread, or None."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no storage, but only a shape, a dtype and a device."""
    return hasattr(tensor, "fake_mode")


def fake_twin(module: M, mode: Any, device: torch.device, dtype: torch.dtype) -> M:
    """Return a copy of a module whose tensors are fake.

    Args:
        module: Holds real tensors, in attributes too.
        mode: The ``FakeTensorMode`` of the copy, which is active.
        device: Where the copy pretends to lie; it need not exist.
        dtype: Of the copy.

    Returns:
        The copy.
    """
    twins: dict[int, Any] = {}
    for tensor in _tensors(module):
        twins[id(tensor)] = mode.from_tensor(tensor).to(device, dtype)
    return copy.deepcopy(module, twins)


def check_modes(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse a step in a mode that would leave something behind.

    Args:
        groups: The optimizer's.

    Raises:
        RuntimeError: Inside a ``torch.func`` transform, or where real and fake tensors meet.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "LearnedOptimizer.step writes parameters and memory in place, and a torch.func transform (grad, vmap ...) would "
            "capture them; call step outside the transform"
        )
    if active_fake_mode() is not None and not all(is_fake(p) for group in groups for p in group["params"]):
        raise RuntimeError(
            "inside FakeTensorMode only fake parameters are stepped; make the model inside the mode too, or ask "
            "learned_optim.state_bytes for the memory that the optimizer needs"
        )


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    seen: dict[int, Any] = {}
    found: list[Tensor] = []
    queue: list[Any] = [module]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple)):
            queue += value
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            queue += vars(value).values()
    return found
