"""A step like the last one, for the price of looking whether everything still lies where it lay.

Collecting a model's tensors, checking them and computing their statistics one by one costs some ten microseconds each, as
much as a compiled step of hundreds of coordinates. A :class:`Plan` remembers where every parameter and its state lie. Before
each step it compares every address, and takes the new gradients; if anything has changed it refuses, and the step is taken,
and planned, anew. It keeps no gradient alive.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from learned_optim.backends.chunks import StepItem
from learned_optim.backends.native import PLAIN_TENSORS, VALUE_TYPES, Table, describe, packed, struct, supports, takes
from learned_optim.backends.native_library import AVAILABLE, LIBRARY, call, pointer
from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import names

_FUNCTIONS = ("get_layout", "get_device_type", "get_dtype", "get_numel", "is_contiguous", "get_data_ptr")
_grad, _handle = attrgetter("grad"), attrgetter("_cdata")

Group = dict[str, Any]


class _Look:
    """The functions of ``unchanged.c``, which hold the interpreter's lock, and those of torch and Python that they call."""

    def __init__(self) -> None:
        torch_functions = ctypes.CDLL(torch._C.__file__)
        functions = [getattr(torch_functions, f"aoti_torch_{name}") for name in _FUNCTIONS]
        functions.append(ctypes.pythonapi.PyDict_Next)
        self._functions = (pointer * len(functions))(*(ctypes.cast(function, pointer) for function in functions))
        self._library = ctypes.PyDLL(LIBRARY._name)  # type: ignore[union-attr]
        self.dtypes = {
            dtype: getattr(torch_functions, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")()
            for dtype in VALUE_TYPES
        }

    def __call__(self, function: str, *arguments: array[int] | int) -> bool:
        places = (x.buffer_info()[0] if isinstance(x, array) else x for x in arguments)
        return bool(getattr(self._library, function)(self._functions, *map(pointer, places)))


@functools.cache
def _look() -> _Look | None:
    """Return None where torch does not have the functions; no plan is made then."""
    try:
        return _Look() if AVAILABLE else None
    except (OSError, AttributeError):
        return None


class Plan:
    """The next step of an optimizer, if nothing but gradients and options changes until then.

    Args:
        look: How to look at tensors.
        groups: The parameter groups.
        rules: The rule of each group; frozen.
        state: The optimizer's state: for each parameter a dict of tensors.
    """

    def __init__(self, look: _Look, groups: Sequence[Group], rules: Sequence[UpdateRule], state: dict[Tensor, Any]) -> None:
        self._look = look
        self._objects = [value for memory in state.values() for value in memory.values()]
        self._ids = array("Q", map(id, self._objects))
        self._groups = [_PlannedGroup(look, *each, state) for each in zip(groups, rules, strict=True)]

    def renew(self, groups: Sequence[Group], rules: Sequence[UpdateRule], state: dict[Tensor, Any]) -> bool:
        """Look whether everything still lies where it lay, and where the gradients of the next step lie.

        Args:
            groups: The parameter groups as they are now.
            rules: The rule of each group as it is now.
            state: The optimizer's state as it is now.

        Returns:
            Whether :meth:`run` may take the step.
        """
        return (
            len(groups) == len(self._groups)
            and self._look("learned_optim_holds", id(state), len(self._ids), self._ids)
            and all(planned.renew(group, rule) for planned, group, rule in zip(self._groups, groups, rules, strict=True))
        )

    def run(self, groups: Sequence[Group]) -> None:
        """Take and count the step.

        Args:
            groups: The parameter groups, for their options.
        """
        for planned, group in zip(self._groups, groups, strict=True):
            planned.run(group["lr"], group["weight_decay"], group["maximize"])


class _PlannedGroup:
    def __init__(self, look: _Look, group: Group, rule: UpdateRule, state: dict[Tensor, Any]) -> None:
        params = list(_with_gradient(group["params"])[0])
        states, count = [state[param] for param in params], len(params)
        memory = [state[name] for name in (names(rule, states[0]) if states else ()) for state in states]
        steps = [state["step"] for state in states]
        self._look, self._rule, self._params = look, rule, params
        self._means = torch.empty(count, dtype=torch.float64, device="cpu")
        self._scales = torch.empty(count, dtype=torch.float32, device="cpu")
        self._table = Table(params, memory, steps, self._scales.unbind() if rule.uses_scale else ())
        self._handles = array("Q", map(_handle, self._table.tensors))
        self._dtypes = array("i", [look.dtypes[param.dtype] for param in params])
        self._grad_addresses, self._param_addresses = (array("Q", bytes(8 * count)) for _ in range(2))
        self._table.columns.grads = self._grad_addresses.buffer_info()[0]
        self._table.columns.grad_types = self._table.columns.param_types

    def renew(self, group: Group, rule: UpdateRule) -> bool:
        params, grads = _with_gradient(group["params"])
        if not (
            rule is self._rule
            and len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and set(map(type, grads)) <= PLAIN_TENSORS
            and not any(map(Tensor.is_neg, grads))
        ):
            return False
        look, handles, like = self._look, array("Q", map(_handle, grads)), (self._table.sizes, self._dtypes)
        return (
            look("learned_optim_in_place", len(self._handles), self._handles, self._table.addresses)
            and look("learned_optim_locate", len(params), self._handles, *like, self._param_addresses)
            and look("learned_optim_locate", len(params), handles, *like, self._grad_addresses)
        )

    def run(self, lr: Tensor | float, weight_decay: float, maximize: bool) -> None:
        if not self._params:
            return
        rule, columns, means = self._rule, self._table.columns, self._means
        if rule.uses_scale:
            where = columns.params, columns.param_types, columns.sizes, means.data_ptr()
            call("learned_optim_mean_squares", len(self._params), *where, torch.get_num_threads())
            self._scales.copy_(rule.scale_of(means))
        self._table.call(struct(describe(rule)), packed(rule), lr, weight_decay, maximize, count_step=True)
        increment_version(self._params)


def make_plan(groups: Sequence[Group], rules: Sequence[UpdateRule], state: dict[Tensor, Any]) -> Plan | None:
    """Plan the next step, where the compiled kernel can take all of it without copies.

    Args:
        groups: The parameter groups.
        rules: The rule of each group in float32 on the CPU; frozen.
        state: The optimizer's state.

    Returns:
        None where it cannot.
    """
    look = _look()
    if look is None or not all(map(supports, rules)) or not all(isinstance(memory, dict) for memory in state.values()):
        return None
    for group, rule in zip(groups, rules, strict=True):
        params, grads = _with_gradient(group["params"])
        if not all(_fits(rule, *each, state.get(each[0])) for each in zip(params, grads, strict=True)):
            return None
        if len({names(rule, state[param]) for param in params}) > 1:
            return None
    return Plan(look, groups, rules, state)


def _fits(rule: UpdateRule, param: Tensor, grad: Tensor, state: Any) -> bool:
    if not state:
        return False
    memory = {name: value for name, value in state.items() if name != "step"}
    return (
        takes(rule, StepItem(param, grad, memory, state["step"], None))
        and param.is_contiguous()
        and not param.is_neg()
        and grad.dtype == param.dtype
    )


def _with_gradient(params: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    grads = list(map(_grad, params))
    if type(None) in set(map(type, grads)):
        return [param for param in params if param.grad is not None], [grad for grad in grads if grad is not None]
    return params, grads
