"""``LearnedOptimizer``: a ``torch.optim.Optimizer`` around a learned update rule.

This file holds the constructor, the groups and the order of a step. ``rules`` holds the numerics, ``backends`` runs them,
``weights`` finds the meta-parameters. Options are checked in ``group_options``, state is made in ``state`` and loaded in
``checkpoint``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, NamedTuple, NoReturn, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from learned_optim.average import Averaging, update_averages
from learned_optim.backends import Plan, PlannedGroup, StepItem, StepOptions, apply_step, check_backend, make_plan
from learned_optim.checkpoint import loading
from learned_optim.fit import check_fit, check_group_options
from learned_optim.group_options import (
    check_options,
    compute_dtype,
    dtype_names,
    params_with_groups,
    refuse_unknown,
)
from learned_optim.guard import judge, nominal, snapshot
from learned_optim.modes import active_fake_mode, check_modes
from learned_optim.rate_watch import RateWatch
from learned_optim.rules import UpdateRule
from learned_optim.sharding import FSDP1, share_gradients
from learned_optim.state import initial_state, make_contiguous, state_bytes, step_tensor
from learned_optim.summary import summarize
from learned_optim.weights import Weights, resolve_weights
from learned_optim.weights.weights import living_weights
from learned_optim.work import options_of, step_items

WeightsLike = str | PathLike[str] | UpdateRule | Weights
"""A bundled name, ``owner/repo@revision`` on the Hub, a file, a rule, or loaded weights."""

Kind = tuple[torch.device, torch.dtype, bool]
"""Parameters of one kind are stepped together: device, dtype to compute in, and whether ``torch.compile`` traces complex
numbers as real views. Tracing fails on a custom operator that writes such a view, but follows plain PyTorch."""


class _Work(NamedTuple):
    """The work of one backend call: the arguments of :func:`~learned_optim.backends.apply_step`."""

    backend: str
    rule: UpdateRule
    items: list[StepItem]
    options: StepOptions


class LearnedOptimizer(Averaging, Optimizer):
    r"""Update every coordinate with a pretrained LSTM whose memory is optimizer state.

    For each coordinate, with gradient :math:`g_t`, memory :math:`h_t` and meta-parameters :math:`\phi`::

        u_t, h_{t+1} = m_phi(g_t, h_t)
        theta_{t+1}  = (1 - 1e-3 * lr * weight_decay) * theta_t + lr * u_t

    There is no rate to tune: ``lr`` is a factor on the learned update, 1 by default. The memory advances once per
    ``step`` for every parameter that has a gradient. Coordinates that never had a non-zero gradient are not updated;
    coordinates whose gradient is NaN or Inf get no update in that step and keep their memory. Weight decay applies to
    both.

    Args:
        params: Parameters, named parameters, or dicts defining groups. A group may have its own ``weights``.
        lr: Factor on the update; a float or a one-element tensor. 1 is the usual factor, 0 moves nothing. Adam's 1e-3 makes
            a rule a thousand times slower, so an lr below 0.05 warns once.
        weights: A bundled name (:func:`~learned_optim.available_weights`), ``"owner/repo"`` or
            ``"owner/repo@revision"`` on the Hugging Face Hub, a ``.safetensors`` file or a directory that holds a
            ``model.safetensors``, an :class:`~learned_optim.rules.UpdateRule`, or loaded
            :class:`~learned_optim.Weights`.
        weight_decay: Decoupled weight decay. Each step multiplies parameters by ``1 - 1e-3 * lr * weight_decay``, so a value
            has the same effect as in AdamW at its usual rate of 1e-3.
        maximize: Ascend instead of descend.
        matrix: Whether updates of matrices, and of convolutions as ``(out, rest)``, are moved towards orthogonal ones.
            ``"auto"`` follows the weights. True moves them also with weights that have no such stage. False never does.
        average: Keep an average of the weights, for :meth:`averaged`. Its half-life is a share of the steps taken so far: a
            twentieth for True, or a number in (0, 1]. It costs the same memory as the parameters.
        state_dtype: Dtype of the LSTM memory: ``torch.float32`` (default), ``torch.bfloat16`` or ``torch.int8``; see
            :mod:`learned_optim.rules.storage`. float64 parameters have float64 memory.
        moment_dtype: ``torch.float32`` or ``torch.bfloat16`` for the moments, except the mean square, which stays float32.
            The default is bfloat16 beside int8 memory, otherwise float32.
        backend: ``"auto"`` (the fastest of the others that fits and costs nothing to start), ``"reference"`` (PyTorch),
            ``"native"`` (compiled, on the CPU), ``"triton"`` (fused, on CUDA) or ``"compiled"`` (TorchInductor, which
            takes up to a minute at the first step).
        guard: Watch the updates and, where ``step`` gets a closure, the loss, and fall back to plain Adam where they
            misbehave: :mod:`learned_optim.guard`. Costs a copy of the parameters during each step.
        capturable: Keep step counts on the parameters' device, as CUDA graph capture needs.
        foreach: Accepted for compatibility; small tensors are always processed together.
        fused: Accepted for compatibility; True is refused, choose a ``backend`` instead.
        differentiable: Refused if True: ``step`` builds no graph.
        revision: Hub revision of ``weights``, if its name has none. A group writes ``"owner/repo@revision"``.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Never use the network.
        force_download: Fetch ``weights`` from the Hub again even if cached.

    Raises:
        ValueError: If a value is out of range or ``weights`` is unknown or unreadable; the message says what to do.
        RuntimeError: If ``fused`` or ``differentiable`` is True, or if FSDP1 flattened the parameters.

    Examples:
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = LearnedOptimizer(model.parameters())
        >>> model(torch.ones(2, 3)).square().mean().backward()
        >>> opt.step()

    References:
        Andrychowicz et al. 2016, arXiv:1606.04474, equation 3 (there :math:`g_t` is the update).
    """

    _plan: Plan | None = None
    _planned_by = ""
    _rate_watch: RateWatch | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weights: WeightsLike = "default",
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        matrix: bool | str = "auto",
        average: bool | float = False,
        state_dtype: torch.dtype | str | None = None,
        moment_dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        guard: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **unknown: NoReturn,
    ) -> None:
        refuse_unknown(unknown)
        if fused:
            raise RuntimeError("`fused=True` is not an option of LearnedOptimizer; choose a kernel with `backend=`")
        if differentiable:
            raise RuntimeError("LearnedOptimizer is not differentiable; to meta-train a rule see `meta_train`")
        check_backend(backend)
        defaults: dict[str, Any] = {
            "lr": lr,
            "weights": "",
            "fingerprint": "",
            "weight_decay": weight_decay,
            "maximize": maximize,
            "matrix": matrix,
            "average": average,
            "state_dtype": state_dtype,
            "moment_dtype": moment_dtype,
            "guard": guard,
            "capturable": capturable,
            "foreach": foreach,
            "fused": None,
            "differentiable": False,
        }
        defaults |= dtype_names(defaults)
        check_options(defaults)
        self.backend = backend
        self._rate_watch = RateWatch()
        self._hub_options: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        loaded = resolve_weights(weights, revision=revision, force_download=force_download, **self._hub_options)
        self._weights: dict[str, Weights] = {loaded.fingerprint: loaded}
        defaults |= {"weights": loaded.name, "fingerprint": loaded.fingerprint}
        super().__init__(params, defaults)

    @classmethod
    def from_pretrained(cls, weights: WeightsLike, params: ParamsT, **options: Any) -> LearnedOptimizer:
        """Make an optimizer with the weights as the first argument, like the models of Hugging Face.

        Args:
            weights: As in the constructor.
            params: As in the constructor.
            **options: All other arguments of the constructor.

        Returns:
            The optimizer.
        """
        return cls(params, weights=weights, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which start with fresh memory.

        Args:
            param_group: ``{"params": ...}`` and any of ``lr``, ``weights``, ``weight_decay``, ``maximize``, ``guard``,
                ``matrix``, ``average``, ``state_dtype`` and ``moment_dtype``. This very dict becomes the group.

        Raises:
            ValueError: If an option is out of range or its weights cannot be loaded.
            RuntimeError: If FSDP1 flattened the parameters.
        """
        if isinstance(param_group, dict):  # The base class refuses anything else.
            options = {**self.defaults, **param_group}
            options |= dtype_names(options)
            check_options(options)
            if "weights" in param_group:
                loaded = self._named_weights(param_group)
                self._weights[loaded.fingerprint] = loaded
                options |= {"weights": loaded.name, "fingerprint": loaded.fingerprint}
        super().add_param_group(param_group)
        # As in every torch optimizer, the caller's own dict is the group: the caller may keep it and change its options.
        param_group.update({name: options[name] for name in ("weights", "fingerprint", "state_dtype", "moment_dtype")})
        group = self.param_groups[-1]
        if any(getattr(param, "_fsdp_flattened", False) for param in group["params"]):
            self.param_groups.pop()
            raise RuntimeError(FSDP1)
        for param in group["params"]:  # Cast the rule now: torch.compile could not trace it.
            self._rule_of(param, group)
        if self._rate_watch is not None and not self._rate_watch.look_at_new(group):
            self._rate_watch = None

    def _named_weights(self, group: dict[str, Any]) -> Weights:
        """Return the weights that a group names. A dict that was a group before also has a fingerprint."""
        name, fingerprint = group["weights"], group.get("fingerprint")
        if isinstance(name, str) and isinstance(fingerprint, str) and (living := living_weights(fingerprint, name)):
            return living
        return resolve_weights(name, **self._hub_options)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one inner step.

        Args:
            closure: Re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            RuntimeError: If a gradient is sparse, a gradient or state does not fit its parameter, or the parameters hold
                their averages.
            ValueError: If an option of a group was set out of range. After either error nothing has changed.
        """
        if self._holds_averages:
            raise RuntimeError("the parameters hold their averages inside averaged(); leave it before the next step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            check_modes(self.param_groups)
            check_group_options(self.param_groups)
            if self._rate_watch and not self._rate_watch.look(self.param_groups):
                self._rate_watch = None
        if self._repeat_step():
            update_averages(self.param_groups, self.state)
            return loss
        sharded = share_gradients(self.param_groups)
        work, counts = self._prepare()
        before = snapshot(self.param_groups)
        if counts:
            torch._foreach_add_(counts, 1)  # A few launches on a GPU, even for thousands of counts.
        for each in work:
            apply_step(*each)
        judge(self.param_groups, self.state, before, loss)
        update_averages(self.param_groups, self.state)
        if not sharded:  # A planned step talks to no other rank.
            self._plan_step()
        return loss

    def _repeat_step(self) -> bool:
        """Repeat the last step's plan and return True, if nothing but gradients and options has changed."""
        if self._plan is None or not self._may_repeat() or self._planned_by != self.backend:
            return False
        return self._plan.repeat(self._planned_groups(), self.state)

    def _plan_step(self) -> None:
        if self._may_repeat():
            self._plan, self._planned_by = make_plan(self.backend, self._planned_groups(), self.state), self.backend

    def _may_repeat(self) -> bool:
        """Return whether a plan may repeat steps: not while tracing, with fake tensors, or under a guard."""
        if torch.compiler.is_compiling() or active_fake_mode() is not None:
            return False
        return not any(group["guard"] for group in self.param_groups)

    def _planned_groups(self) -> list[PlannedGroup]:
        """Return the groups with the rules of their first parameters; a plan refuses groups of several devices or dtypes."""
        planned = []
        for group in self.param_groups:
            params = group["params"]
            rule = self._rule_of(params[0], group) if params else self._weights_of(group).rule
            weight = rule.readout.weight
            planned.append(PlannedGroup(params, rule, options_of(group, rule, weight.device, weight.dtype)))
        return planned

    def summary(self) -> str:
        """Return a table of the groups: weights, rule, parameters, memory and the backend that runs them."""
        return summarize(self.param_groups, self.backend, self._rule_of, self._state_bytes)

    def _weights_of(self, group: dict[str, Any]) -> Weights:
        """Return the weights that step a group: its own, or the nominal step once the guard has fallen back."""
        weights = self._weights[group["fingerprint"]]
        return nominal(weights) if group.get("guard_tripped") else weights

    def _rule_of(self, param: Tensor, group: dict[str, Any]) -> UpdateRule:
        """Return the rule that steps a parameter, on the device of the parameter and in the dtype to compute in."""
        return self._weights_of(group).rule_on(param.device, compute_dtype(param.dtype))

    def _prepare(self) -> tuple[list[_Work], list[Tensor]]:
        """Check a step, and collect what it reads and writes; no parameter, memory or count of steps changes."""
        check_fit(self.param_groups, self.state, lambda group: self._weights_of(group).rule)
        fresh = {
            param: initial_state(param, group, self._weights_of(group).rule)
            for param, group in params_with_groups(self.param_groups)
            if param.grad is not None and not self.state.get(param)
        }
        for param, memory in fresh.items():
            self.state[param].update(memory)
        work, counts = [], []
        for group in self.param_groups:
            stepped: dict[Kind, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                counts.append(step_tensor(param, group, self.state[param]))
                make_contiguous(self.state[param])
                if param.numel() > 0:
                    traced_as_real = torch.compiler.is_compiling() and param.is_complex()
                    stepped[param.device, compute_dtype(param.dtype), traced_as_real].append(param)
            for (device, dtype, traced_as_real), params in stepped.items():
                rule = self._weights_of(group).rule_on(device, dtype)
                backend = "reference" if traced_as_real else self.backend
                options = options_of(group, rule, device, dtype)
                work.append(_Work(backend, rule, step_items(rule, params, self.state, options.matrix), options))
        return work, counts

    def _state_bytes(self, param: Tensor, group: dict[str, Any]) -> int:
        return state_bytes(param, group, self._weights_of(group).rule, self.state.get(param))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint: options from its groups, and memory in the layout that these options name.

        Memory that already has that layout is copied bit by bit. Memory in another floating dtype, or in 8 bits with its
        scales, is converted. So ``state_dict["param_groups"][0]["state_dtype"] = "bfloat16"`` changes the dtype of memory.

        Args:
            state_dict: From :meth:`state_dict`. It is neither modified nor aliased.

        Raises:
            TypeError: If ``state_dict`` is no dict.
            ValueError: If the checkpoint was made by another optimizer or with other weights, does not fit the parameters,
                or holds numbers that cannot be memory. Nothing has changed then.
            RuntimeError: If memory runs out on the way. Old and new state never lie side by side, so no state is left then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict takes what state_dict() returned, a dict; got {type(state_dict).__name__}")
        self._plan = None  # A plan would keep the old state alive beside the new.
        with loading(self, lambda group: self._weights_of(group).rule):
            super().load_state_dict(state_dict)
        if self.state:  # A resumed run may be at the end of a schedule.
            self._rate_watch = None

    def __getstate__(self) -> dict[str, Any]:
        """Return only what a copy needs: schedulers and hooks patch attributes that must not travel."""
        return {**super().__getstate__(), "backend": self.backend, "_weights": self._weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, and fill in options that an older copy lacks."""
        super().__setstate__(state)
        self.__dict__.setdefault("_hub_options", {})
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
