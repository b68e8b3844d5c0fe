"""``Weights``: a trained rule and what is known of it, identified by a fingerprint of its numerics."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import threading
import weakref
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from learned_optim.modes import active_fake_mode, fake_twin, is_fake, outside_modes
from learned_optim.rules import UpdateRule
from learned_optim.weights import hub
from learned_optim.weights.errors import WeightsError
from learned_optim.weights.file_format import (
    FILE,
    FORMAT_VERSION,
    Record,
    from_bytes,
    read_bytes,
    to_bytes,
    weight_file,
    write_bytes,
)
from learned_optim.weights.fingerprint import fingerprint
from learned_optim.weights.model_card import model_card
from learned_optim.weights.registry import LocalFile, available_weights, bundled_file, locate, refuse_revision
from learned_optim.weights.text import one_line

_shared: weakref.WeakValueDictionary[tuple[Any, ...], Weights] = weakref.WeakValueDictionary()
_parsed: weakref.WeakValueDictionary[tuple[bytes, str], Weights] = weakref.WeakValueDictionary()
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
    def from_record(cls, record: Record) -> Weights:
        """Make weights from the parsed content of a file.

        Args:
            record: The content.

        Returns:
            The weights; name and title are the one in the file.
        """
        return cls(record.rule, record.title, record.recipe, record.metadata)

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
        pictures: Mapping[str, bytes] | None = None,
    ) -> str:
        """Publish on the Hugging Face Hub, with a model card, in one commit.

        A README.md that is there already is replaced; the repository's history keeps it. The card states the licence in
        ``metadata["license"]``, or that it is unknown.

        Args:
            repo_id: ``"owner/repo"``; created if missing.
            private: Create it private.
            token: Hub token with write access; by default the one ``hf auth login`` saved.
            revision: Branch to commit to.
            commit_message: By default names the weights.
            results: Markdown for the card, the measured results.
            pictures: Files that it shows, by the names that it has for them.

        Returns:
            ``"owner/repo@commit"``, which is what ``weights=`` takes: these very weights, whatever is pushed later.

        Raises:
            WeightsError: If they could not be read back, the upload is refused or there is no network. The repository may
                have been created, but then has no new commit.
        """
        data = to_bytes(self)
        repo_id = hub.create_repository(repo_id, private=private, token=token, revision=revision)
        config = {"format_version": FORMAT_VERSION, "family": self.rule.family, **self.rule.config.to_dict()}
        files = {
            **(pictures or {}),
            FILE: data,
            "config.json": (json.dumps(config, indent=2) + "\n").encode(),
            "README.md": model_card(self, repo_id, license_of(self), results).encode(),
        }
        message = commit_message or f"Publish update rule {one_line(self.title)}"
        return hub.commit(repo_id, files, message, token=token, revision=revision)

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


def resolve_weights(
    weights: str | PathLike[str] | UpdateRule | Weights,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Weights:
    """Load weights from whatever names them.

    A string is taken for the first of these that it is: a bundled name, a file or a directory with a
    ``model.safetensors``, a Hub id. Weights from the Hub are named by their commit, ``"owner/repo@commit"``, so that a
    checkpoint tells exactly what it needs even if a branch has moved on.

    Args:
        weights: A bundled name; a file, or a directory that holds a ``model.safetensors``; ``"owner/repo"`` or
            ``"owner/repo@revision"`` on the Hub; a rule; or weights.
        revision: Hub revision (branch, tag or commit), if not given in ``weights``. A full commit hash needs no network
            once cached.
        token: Hub token; True demands the one that ``hf auth login`` saved, False sends none.
        cache_dir: Hub cache.
        local_files_only: Never use the network.
        force_download: Fetch again even if cached.

    Returns:
        The weights; the same object for the same weights, however often they are loaded.

    Raises:
        WeightsNotFoundError: If nothing has that name, or it is on the Hub and cannot be reached.
        WeightsError: If what has that name is not usable, or ``revision`` makes no sense with it.
        TypeError: If ``weights`` is something else.
    """
    if isinstance(weights, (Weights, UpdateRule)):
        loaded = weights if isinstance(weights, Weights) else Weights(weights)
        refuse_revision(revision, loaded.name)
        return loaded.shared()
    if not isinstance(weights, (str, PathLike)):
        raise TypeError(
            f"weights must be a name, a path, an UpdateRule or Weights, got {type(weights).__name__}: {weights!r}"
        )
    place = locate(weights, revision)
    if isinstance(place, LocalFile):
        return _bundled(place.name) if place == bundled_file(place.name) else _load(*place)
    path, pinned = hub.download(
        place.repo,
        place.revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    return _load(path, pinned, f"{FILE} of {pinned}")


def read_weights(path: str | PathLike[str]) -> Weights:
    """Read a weight file.

    Args:
        path: A ``.safetensors`` file, or a directory that holds a ``model.safetensors``.

    Returns:
        The weights, with the name in the file's header.

    Raises:
        WeightsNotFoundError: If there is no such file.
        WeightsError: If it cannot be read, or is not a weight file.
    """
    path = weight_file(path)
    return Weights.from_record(from_bytes(read_bytes(path), str(path)))


def write_weights(path: str | PathLike[str], weights: Weights) -> None:
    """Write a weight file; a failure leaves the old file, or none, but never half of one.

    Args:
        path: Where: a ``.safetensors`` file in a directory that exists.
        weights: What to write.

    Raises:
        WeightsError: If the file cannot be written, or could not be read back.
    """
    write_bytes(path, to_bytes(weights))


def license_of(weights: Weights) -> str:
    """Return the licence that the metadata states; ``"mit"`` for bundled weights, else ``"unknown"``."""
    return weights.metadata.get("license") or ("mit" if weights.fingerprint in _bundled_fingerprints() else "unknown")


@functools.cache
def _bundled_fingerprints() -> frozenset[str]:
    return frozenset(_bundled(name).fingerprint for name in available_weights())


@functools.cache
def _bundled(name: str) -> Weights:
    return _load(*bundled_file(name))


def _load(path: Path, name: str, source: str) -> Weights:
    """Read a file, but parse only content that no living weights were made of: a changed file is never missed."""
    data = read_bytes(path)
    key = hashlib.sha256(data).digest(), name
    weights = _parsed.get(key)
    if weights is None:
        weights = outside_modes(lambda: Weights.from_record(from_bytes(data, source))).called(name).shared()
        _parsed[key] = weights
    return weights


def _from_pickle(data: bytes, name: str) -> Weights:
    return Weights.from_record(from_bytes(data, f"pickled weights {name!r}")).called(name).shared()


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
