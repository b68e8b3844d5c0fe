"""``Weights``: a trained rule and what is known of it, identified by a fingerprint of its numerics."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import threading
import weakref
from collections.abc import Mapping
from os import PathLike
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from learned_optim.modes import active_fake_mode, fake_twin, is_fake, outside_modes
from learned_optim.rules import UpdateRule
from learned_optim.weights.errors import WeightsError

_shared: weakref.WeakValueDictionary[tuple[Any, ...], Weights] = weakref.WeakValueDictionary()
_lock = threading.RLock()


class Weights:
    """A frozen rule with its name, recipe and provenance. Immutable, and shared by every optimizer that uses it.

    Attributes:
        name: What messages and parameter groups call it: what was asked for, so a file's path or a Hub id.
        title: What its maker called it; files and model cards say this.
        rule: The update rule, in float32 on the CPU.
        recipe: The TOML text of the recipe that made it; empty if unknown.
        metadata: Provenance.
        fingerprint: Equal for equal numerics, whatever the name.

    Args:
        rule: Copied, cast to float32 and frozen.
        name: Both name and title.
        recipe: The TOML text of the recipe that made it.
        metadata: Provenance as strings (commit, torch version ...).
    """

    def __init__(
        self, rule: UpdateRule, name: str = "custom", recipe: str = "", metadata: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.title = name
        self.recipe = recipe
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.rule, self.fingerprint = outside_modes(lambda: _frozen_with_fingerprint(rule))
        self._casts: dict[tuple[torch.device, torch.dtype], UpdateRule] = {}
        self._fakes: weakref.WeakKeyDictionary[Any, dict[Any, UpdateRule]] = weakref.WeakKeyDictionary()

    @classmethod
    def from_pretrained(
        cls,
        weights: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Weights:
        """Load weights by bundled name, file, or Hub id: :func:`~learned_optim.weights.resolve_weights`.

        Args:
            weights: ``"default"``, ``"owner/repo"``, ``"owner/repo@revision"``, ``"rule.safetensors"`` ...
            revision: Hub revision, if not given in ``weights``.
            token: Hub token.
            cache_dir: Hub cache.
            local_files_only: Never use the network.
            force_download: Fetch again even if cached.

        Returns:
            The weights.

        Raises:
            WeightsError: If nothing has that name or what has it cannot be read.
        """
        from learned_optim.weights.registry import resolve_weights

        return resolve_weights(
            weights,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a self-describing ``.safetensors`` file, whole or not at all.

        Args:
            path: Where: a file that ends in ``.safetensors``, in a directory that exists.

        Raises:
            WeightsError: If it cannot be written, or could not be read back: a meta-parameter is NaN or Inf, or the metadata
                does not fit a header.
        """
        from learned_optim.weights.file_format import write_weights

        write_weights(path, self)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        results: str = "",
    ) -> str:
        """Publish on the Hugging Face Hub, with a model card, in one commit.

        The card states the licence in ``metadata["license"]``, or that it is unknown.

        Args:
            repo_id: ``"owner/repo"``; created if missing.
            private: Create it private.
            token: Hub token with write access; by default the one ``hf auth login`` saved.
            revision: Branch to commit to.
            commit_message: By default names the weights.
            results: Markdown for the card, the measured results.

        Returns:
            ``"owner/repo@commit"``, which is what ``weights=`` takes: these very weights, whatever is pushed later.

        Raises:
            WeightsError: If they could not be read back, the upload is refused or there is no network. The repository may
                have been created, but then has no new commit.
        """
        from learned_optim.weights.hub import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            results=results,
        )

    def called(self, name: str) -> Weights:
        """Return the same weights, sharing the one network, under another name; the title stays.

        Args:
            name: The name.

        Returns:
            The weights.
        """
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, name=name)
        return twin

    def shared(self) -> Weights:
        """Return the process's one object for these weights, so that a thousand optimizers hold one network."""
        key = (self.fingerprint, self.name, self.title, self.recipe, tuple(sorted(self.metadata.items())))
        with _lock:
            return _shared.setdefault(key, self)

    def rule_on(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Return the rule on a device and in a dtype; cast once and kept."""
        key = (device, dtype)
        if not torch.compiler.is_compiling() and (mode := active_fake_mode()) is not None:
            return self._fake_rule_on(mode, device, dtype)
        if key not in self._casts:  # The lock only then: torch.compile traces through here.
            with _lock:
                if key not in self._casts:
                    self._casts[key] = outside_modes(lambda: _freeze(self.rule, device, dtype))
        return self._casts[key]

    def _fake_rule_on(self, mode: Any, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        fakes = self._fakes.setdefault(mode, {})
        if (device, dtype) not in fakes:
            fakes[device, dtype] = fake_twin(self.rule, mode, device, dtype)
        return fakes[device, dtype]

    def __repr__(self) -> str:
        """Name, family, size and short fingerprint."""
        size = sum(parameter.numel() for parameter in self.rule.parameters())
        return f"Weights({self.name!r}, {self.rule.family}, {size:,} meta-parameters, {self.fingerprint[:12]})"

    def __copy__(self) -> Weights:
        """Return itself: weights are immutable."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Weights:
        """Return itself: weights are immutable."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the bytes of a weight file: a few kB, and no name has to be found again on arrival."""
        from learned_optim.weights.file_format import to_bytes

        return _from_pickle, (to_bytes(self), self.name)


def living_weights(fingerprint: str, name: str) -> Weights | None:
    """Return weights that some optimizer of this process still uses, or None.

    Args:
        fingerprint: Of the weights.
        name: Of the weights.

    Returns:
        The weights with both.
    """
    return next((living for key, living in list(_shared.items()) if key[:2] == (fingerprint, name)), None)


def fingerprint(rule: UpdateRule) -> str:
    """Return the sha256 of everything that decides a rule's numerics: family, configuration and meta-parameters.

    Checkpoints hold it, so it must not change from one version to the next. A field at its default is left out: a field
    that a later version adds, with a default that changes nothing, then leaves every fingerprint as it was.

    Args:
        rule: The rule.

    Returns:
        64 hexadecimal digits.
    """
    defaults = type(rule.config)().to_dict()
    config = {name: value for name, value in rule.config.to_dict().items() if value != defaults[name]}
    for name in ("anneal_start", "anneal_steps"):  # All others are floats; these two were integers in the first checkpoints.
        if name in config and config[name] == int(config[name]):
            config[name] = int(config[name])
    digest = hashlib.sha256(json.dumps([rule.family, config], sort_keys=True).encode())
    for name, tensor in sorted(rule.state_dict().items()):
        digest.update(name.encode())
        digest.update(to_little_endian(tensor))
    return digest.hexdigest()


def to_little_endian(tensor: Tensor) -> bytes:
    """Return a tensor's values as little-endian float32, without NumPy: PyTorch does not bring it along."""
    values = tensor.detach().to("cpu", torch.float32).flatten().tolist()
    return struct.pack(f"<{len(values)}f", *values)


def _from_pickle(data: bytes, name: str) -> Weights:
    from learned_optim.weights.file_format import from_bytes

    return from_bytes(data, f"pickled weights {name!r}").called(name).shared()


def _frozen_with_fingerprint(rule: UpdateRule) -> tuple[UpdateRule, str]:
    if any(is_fake(value) or value.is_meta for value in rule.state_dict().values()):
        raise WeightsError("the rule's meta-parameters hold no numbers: build it outside FakeTensorMode and 'meta'")
    frozen = _freeze(rule, torch.device("cpu"), torch.float32)
    return frozen, fingerprint(frozen)


def _freeze(rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> UpdateRule:
    frozen = copy.deepcopy(rule).to(device=device, dtype=dtype)
    frozen.freeze()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # The caller's stream may be another.
    return frozen
