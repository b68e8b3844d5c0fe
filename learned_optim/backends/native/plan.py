"""A step like the last one, for the price of looking whether everything still lies where it lay.

Collecting a model's tensors, checking them and computing their statistics one by one costs some ten microseconds each, as
much as a compiled step of hundreds of coordinates. A :class:`Plan` remembers where every parameter and its state lie. Before
each step it compares every address, and takes the new gradients; if anything has changed it refuses, and the step is taken,
and planned, anew. It keeps no gradient alive.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from learned_optim.backends.items import PLAIN_TENSORS, StepItem, overlap
from learned_optim.backends.native.library import AVAILABLE, LIBRARY, pointer
from learned_optim.backends.native.step import VALUE_TYPES, Table, describe, packed, struct, supports, takes
from learned_optim.rules import UpdateRule
from learned_optim.rules.storage import names

_PLAIN = ("get_layout", "get_device_type", "get_dtype", "get_numel", "get_dim", "get_sizes", "is_contiguous", "get_data_ptr")
_MANGLED = (
    "_ZNK3c1010TensorImpl4gradEv",
    "_ZN2at25compositeimplicitautograd6is_negERKNS_6TensorE",
    "_ZN2at25compositeimplicitautograd12is_inferenceERKNS_6TensorE",
    "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",
)
_PYTHON = ("PyDict_Next", "PyList_GetItem")
_TENSOR_BYTES = 192
"""How far to look into a tensor of torch; its size, or less."""

LARGE = 4_096
"""Coordinates from which a gradient is held during a step. Holding one costs as much as stepping ten coordinates."""

_grad, _handle = attrgetter("grad"), attrgetter("_cdata")

Group = dict[str, Any]


class _Words(ctypes.Structure):
    """``struct words`` of unchanged.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tensor_of_object", "type_of_object", "object_of_tensor")),
        ("plain", pointer * 2),
        ("absent", pointer),
    )


class _Found(ctypes.Structure):
    """``struct found`` of unchanged.c."""

    _fields_ = (
        ("params", ctypes.c_int64),
        *((name, pointer) for name in ("objects", "tensors", "rows", "sizes", "dtypes", "shapes", "ends")),
        *((name, pointer) for name in ("param_addresses", "grad_addresses")),
        ("kept", ctypes.c_int64),
        *((name, pointer) for name in ("kept_objects", "kept_tensors", "kept_addresses", "kept_storages")),
    )


class _Held(ctypes.Structure):
    """``struct held`` of unchanged.c."""

    _fields_ = (("count", ctypes.c_int64), *((name, pointer) for name in ("params", "ends", "entries")))


class _Look:
    """The functions of ``unchanged.c``, which hold the interpreter's lock, and what they must know of torch and Python.

    Raises:
        AttributeError: If this torch or Python does not have it.
    """

    def __init__(self) -> None:
        torch_functions = ctypes.CDLL(torch._C.__file__)
        functions = [getattr(torch_functions, f"aoti_torch_{name}") for name in _PLAIN]
        functions += [getattr(torch_functions, name) for name in _MANGLED]
        functions += [getattr(ctypes.pythonapi, name) for name in _PYTHON]
        self._functions = (pointer * len(functions))(*(ctypes.cast(function, pointer) for function in functions))
        self._library = ctypes.PyDLL(LIBRARY._name)  # type: ignore[union-attr]
        self.dtypes = {
            dtype: getattr(torch_functions, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")()
            for dtype in VALUE_TYPES
        }
        sample = torch.empty(0, device="cpu")
        grad_of = ctypes.CFUNCTYPE(pointer, pointer)((_MANGLED[0], torch_functions))
        absent = pointer.from_address(grad_of(sample._cdata))
        in_object = _words_at(id(sample), torch._C.TensorBase.__basicsize__)
        in_tensor = [word & ~7 for word in _words_at(sample._cdata, _TENSOR_BYTES)]  # The lowest bits may be flags.
        wanted = ((sample._cdata, in_object), (id(Tensor), in_object), (id(sample), in_tensor))
        if any(words.count(word) != 1 for word, words in wanted):
            raise AttributeError("tensors and their objects do not point to one another where they are known to")
        places = (words.index(word) for word, words in wanted)
        self._words = _Words(*places, (pointer * 2)(*map(id, PLAIN_TENSORS)), absent)

    def holds(self, state: dict[Tensor, Any], held: _Held) -> bool:
        """Return whether the state holds the dicts and entries that it held, in this order."""
        where, threads = ctypes.byref(held), torch.get_num_threads()
        return bool(self._library.learned_optim_holds(self._functions, where, pointer(id(state)), threads))

    def find(self, found: _Found, params: list[Tensor]) -> bool:
        """Return whether all is where it was found, and write where parameters and gradients lie."""
        words, where, threads = ctypes.byref(self._words), ctypes.byref(found), torch.get_num_threads()
        return bool(self._library.learned_optim_find(self._functions, words, where, pointer(id(params)), threads))

    def touch(self, found: _Found) -> None:
        """Tell autograd that the parameters that were found are about to be written."""
        self._library.learned_optim_touch(self._functions, ctypes.byref(found), torch.get_num_threads())


def _words_at(address: int, size: int) -> list[int]:
    return list((ctypes.c_size_t * (size // ctypes.sizeof(ctypes.c_size_t))).from_address(address))


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
        entries = [item for memory in state.values() for pair in memory.items() for item in pair]
        self._entries = entries  # Kept, lest an address return.
        ends = array("q", itertools.accumulate(map(len, state.values())))
        params = array("Q", (id(item) for pair in state.items() for item in pair))
        self._arrays = params, ends, array("Q", map(id, entries))
        self._held = _Held(len(ends), *(values.buffer_info()[0] for values in self._arrays))
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
            and self._look.holds(state, self._held)
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
        everyone, (params, _) = list(group["params"]), _with_gradient(group["params"])
        states, count = [state[param] for param in params], len(params)
        memory = [state[name] for name in (names(rule, states[0]) if states else ()) for state in states]
        steps = [state["step"] for state in states]
        self._look, self._rule, self._everyone, self._count = look, rule, everyone, count
        self._large = [(row, param) for row, param in enumerate(params) if param.numel() >= LARGE]
        self._held: list[Tensor | None] = []
        scales = torch.empty(count, dtype=torch.float32, device="cpu").unbind() if rule.uses_scale else ()
        self._table = table = Table(params, memory, steps, scales)
        row = iter(range(count))
        kept = [*memory, *steps]
        self._arrays = (
            array("Q", map(id, everyone)),
            array("Q", map(_handle, everyone)),
            array("q", [-1 if param.grad is None else next(row) for param in everyone]),
            array("i", [look.dtypes[param.dtype] for param in params]),
            array("q", [size for param in params for size in param.shape]),
            array("q", itertools.accumulate(param.dim() for param in params)),
            array("Q", bytes(8 * count)),
            array("Q", map(id, kept)),
            array("Q", map(_handle, kept)),
            array("Q", [tensor.untyped_storage()._cdata for tensor in kept]),
        )
        self._grad_addresses = array("Q", bytes(8 * count))
        table.columns.grads = self._grad_addresses.buffer_info()[0]
        objects, tensors, rows, dtypes, shapes, ends, table.columns.params, kept_objects, kept_tensors, storages = (
            values.buffer_info()[0] for values in self._arrays
        )
        table.columns.grad_types = table.columns.param_types
        kept_addresses = table.addresses.buffer_info()[0] + 8 * count
        where = (table.columns.sizes, dtypes, shapes, ends, table.columns.params, table.columns.grads)
        kept_where = (len(kept), kept_objects, kept_tensors, kept_addresses, storages)
        self._found = _Found(len(everyone), objects, tensors, rows, *where, *kept_where)

    def renew(self, group: Group, rule: UpdateRule) -> bool:
        params = group["params"]
        # The kernel lets go of the interpreter's lock: another thread may then replace a gradient, and free the memory.
        self._held = [param.grad for _, param in self._large]
        return (
            rule is self._rule
            and type(params) is list
            and len(params) == len(self._everyone)
            and self._look.find(self._found, params)
            and all(map(self._lies, self._held, self._large))
        )

    def _lies(self, grad: Tensor | None, large: tuple[int, Tensor]) -> bool:
        """Return whether a gradient that is held is the one that was found."""
        return grad is not None and grad.data_ptr() == self._grad_addresses[large[0]]

    def run(self, lr: Tensor | float, weight_decay: float, maximize: bool) -> None:
        if not self._count:
            return
        self._look.touch(self._found)
        rule, rate = self._rule, lr.to(torch.float32) if isinstance(lr, Tensor) else lr  # As of steps that are not planned.
        self._table.call(struct(describe(rule)), packed(rule), rate, weight_decay, maximize, anew=True)
        self._held = []


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
        if len({names(rule, state[param]) for param in params}) > 1 or overlap(params):
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
