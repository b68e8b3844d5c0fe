"""``Weights``: a trained rule and what is known of it, identified by a fingerprint of its numerics."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import weakref
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from learned_optim.rules import UpdateRule

_shared: weakref.WeakValueDictionary[str, Weights] = weakref.WeakValueDictionary()


class Weights:
    """A frozen rule with its name, recipe and provenance. Immutable, and shared by every optimizer that uses it.

    Args:
        rule: Copied, cast to float32 and frozen.
        name: What messages and parameter groups call it.
        recipe: The TOML text of the recipe that made it; empty if unknown.
        metadata: Provenance as strings (commit, torch version ...).
    """

    def __init__(
        self, rule: UpdateRule, name: str = "custom", recipe: str = "", metadata: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.recipe = recipe
        self.metadata = dict(metadata or {})
        self.rule = _freeze(rule, torch.device("cpu"), torch.float32)
        self.fingerprint = fingerprint(self.rule)
        self._casts: dict[tuple[torch.device, torch.dtype], UpdateRule] = {}

    @classmethod
    def shared(cls, weights: Weights) -> Weights:
        """Return the process's one object for these weights, so that a thousand optimizers hold one network."""
        return _shared.setdefault(f"{weights.fingerprint}:{weights.name}", weights)

    @classmethod
    def from_pretrained(cls, weights: str | PathLike[str], **options: Any) -> Weights:
        """Load weights by bundled name, file, or Hub id.

        Args:
            weights: As in :func:`~learned_optim.weights.resolve_weights`.
            **options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` for the Hub.

        Returns:
            The weights.
        """
        from learned_optim.weights.registry import resolve_weights

        return resolve_weights(weights, **options)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a self-describing ``.safetensors`` file, whole or not at all.

        Args:
            path: Where.
        """
        from learned_optim.weights.file_format import write_weights

        write_weights(path, self)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish on the Hugging Face Hub with a model card.

        Args:
            repo_id: ``"owner/repo"``; created if missing.
            **options: ``private``, ``token``, ``revision``, ``commit_message``.

        Returns:
            The commit's hash, to pin as ``"owner/repo@hash"``.
        """
        from learned_optim.weights.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def rule_on(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Return the rule on a device and in a dtype; cast once and kept."""
        key = (device, dtype)
        if key not in self._casts:
            self._casts[key] = _freeze(self.rule, device, dtype)
        return self._casts[key]

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


def _from_pickle(data: bytes, name: str) -> Weights:
    from learned_optim.weights.file_format import from_bytes

    return Weights.shared(from_bytes(data, name))


def fingerprint(rule: UpdateRule) -> str:
    """Return the sha256 of everything that decides a rule's numerics: family, configuration and meta-parameters."""
    digest = hashlib.sha256(json.dumps([rule.family, rule.config.to_dict()], sort_keys=True).encode())
    for name, tensor in sorted(rule.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_freeze_lock = threading.Lock()


def _freeze(rule: UpdateRule, device: torch.device, dtype: torch.dtype) -> UpdateRule:
    with _freeze_lock:
        frozen = copy.deepcopy(rule).to(device=device, dtype=dtype)
    frozen.freeze()
    return frozen
