"""The ``compiled`` backend: the reference's chunks through ``torch.compile``.

Every chunk has the same number of coordinates, the last one filled up with coordinates at rest, and whatever changes between
steps is a tensor: one graph serves every step of every model. Another one is compiled only for another form of rule, way to
store memory, ``maximize``, or where a chunk holds several tensors instead of part of one. Where compiling fails the
reference takes over.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from learned_optim.backends import chunks
from learned_optim.backends.chunks import StepItem
from learned_optim.rules import Memory, UpdateRule

CHUNK = 16_384
"""Coordinates of a chunk: enough to be worth a call, few enough for scratch memory to stay within the caches."""

COMPILERS = ("g++", "clang++", "c++", "cl")

_failures: list[str] = []
"""Why compiling failed, if it ever did in this process."""


def available() -> bool:
    """Return whether there is a C++ compiler, which ``torch.compile`` calls, and compiling has not failed before."""
    return not _failures and any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)


def supports(rule: UpdateRule) -> bool:
    """Return whether a rule can be compiled here; a caller who compiles the whole step is left to do so."""
    return rule.readout.weight.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def apply_step(
    rule: UpdateRule, items: Sequence[StepItem], *, lr: Tensor | float, weight_decay: float, maximize: bool
) -> None:
    """Apply one inner step in place, like :func:`learned_optim.backends.chunks.apply_step`.

    Args:
        rule: Frozen.
        items: Parameters that share the rule and its device.
        lr: Factor on the update.
        weight_decay: Decoupled; parameters shrink by ``1e-3 * lr * weight_decay``.
        maximize: Ascend instead of descend.
    """
    lr = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")
    options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
    chunks.apply_step(rule, items, run=_step_chunk, size=CHUNK, **options)  # type: ignore[arg-type]


def _step_chunk(
    rule: UpdateRule, param: Tensor, grad: Tensor, stored: Memory, step: Tensor, scale: Tensor | None, *options: object
) -> None:
    written = [param, *stored.values()]
    new = [_filled(values) for values in written]
    memory = dict(zip(stored, new[1:], strict=True))
    step = step if step.dim() == 0 else _filled(step, 1.0)
    scale = scale if scale is None or scale.dim() == 0 else _filled(scale)
    try:
        _compiled_unless_it_failed()(rule, new[0], _filled(grad), memory, step, scale, *options)
    except RuntimeError as error:  # What compilers raise is one, whatever the stage; nothing has run then.
        _failures.append(str(error))
        logging.getLogger("learned_optim").warning(
            "torch.compile failed, steps go on in plain PyTorch; choose another backend or repair the C++ compiler: %s",
            str(error).strip().splitlines()[0],
        )
        chunks.step_chunk(rule, new[0], _filled(grad), memory, step, scale, *options)  # type: ignore[arg-type]
    if len(param) < CHUNK:
        for values, filled in zip(written, new, strict=True):
            values.copy_(filled[: len(values)])


def _compiled_unless_it_failed() -> Callable[..., None]:
    return chunks.step_chunk if _failures else compiled()


@functools.cache
def compiled() -> Callable[..., None]:
    """Return the compiled :func:`learned_optim.backends.chunks.step_chunk`.

    Where this torch can, tanh(x) is computed as 2 sigmoid(2x) - 1, to 1e-7: on a CPU a vector of its tanh takes as long as
    sixteen of its exponentials.
    """
    from torch._inductor import config

    options: dict[str, Any] = {"cpp.use_decompose_tanh": True} if hasattr(config.cpp, "use_decompose_tanh") else {}
    return torch.compile(chunks.step_chunk, dynamic=False, fullgraph=True, options=options)


def _filled(values: Tensor, value: float = 0.0) -> Tensor:
    """Return exactly ``CHUNK`` rows."""
    missing = CHUNK - len(values)
    return F.pad(values, (*[0, 0] * (values.dim() - 1), 0, missing), value=value) if missing else values
