"""The weight file: safetensors with a header that explains itself. Never a pickle.

The tensors are the rule's ``state_dict``, in float32. The header (safetensors ``__metadata__``, strings only) holds

- ``learned_optim_format``: the version of this layout, :data:`FORMAT_VERSION`;
- ``rule``: JSON, the rule's family and every field of its configuration;
- ``name``: what its maker called it;
- ``recipe``: TOML, the recipe that made it; empty if unknown;
- ``fingerprint``: the sha256 of the numerics, so that a damaged tensor or setting is noticed;
- ``checksum``: the sha256 of all other strings of the header;
- anything else: provenance.

Files written before the last two existed have neither, and still load.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from learned_optim.rules import UpdateRule, build_rule
from learned_optim.weights.container import (
    MAX_BYTES,
    Container,
    assemble,
    check_size,
    parse,
    parse_json,
    refuse_pickle,
)
from learned_optim.weights.errors import WeightsError, WeightsNotFoundError
from learned_optim.weights.fingerprint import fingerprint
from learned_optim.weights.text import one_line

FORMAT_VERSION = 1
FILE = "model.safetensors"
"""The name of the weight file in a directory or a repository."""

SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
REQUIRED = ("learned_optim_format", "name", "recipe", "rule")
CHECKS = ("checksum", "fingerprint")
RESERVED = (*REQUIRED, *CHECKS)


class Described(Protocol):
    """A rule and what is known of it: a :class:`Record`, or ``Weights``."""

    @property
    def rule(self) -> UpdateRule:
        """The update rule."""

    @property
    def title(self) -> str:
        """Its maker's name for it."""

    @property
    def recipe(self) -> str:
        """The TOML text of the recipe that made it; empty if unknown."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Provenance."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of the numerics."""


class Record(NamedTuple):
    """The content of a weight file, parsed and checked."""

    rule: UpdateRule
    title: str
    recipe: str
    metadata: Mapping[str, str]
    fingerprint: str


def to_bytes(weights: Described) -> bytes:
    """Serialise weights; equal weights give equal bytes.

    Args:
        weights: What to serialise.

    Returns:
        The content of a weight file.

    Raises:
        WeightsError: If they could not be read back: a meta-parameter is NaN or Inf, the metadata does not fit a header, or
            it would be more than :data:`MAX_BYTES`.
    """
    for key, value in weights.metadata.items():
        if key in RESERVED or not isinstance(key, str) or not isinstance(value, str):
            raise WeightsError(
                f"metadata {key!r}: {value!r} cannot be written; keys and values are strings, and the format itself "
                f"uses {', '.join(RESERVED)}"
            )
    source = f"weights {weights.title!r}"
    tensors = dict(sorted(weights.rule.state_dict().items()))
    check_finite(tensors, source)
    header = {
        **weights.metadata,
        "learned_optim_format": str(FORMAT_VERSION),
        "rule": json.dumps({"family": weights.rule.family, **weights.rule.config.to_dict()}, sort_keys=True),
        "name": weights.title,
        "recipe": weights.recipe,
        "fingerprint": fingerprint(weights.rule),
    }
    data = assemble({**header, "checksum": _checksum(header)}, tensors, source)
    if len(data) > MAX_BYTES:
        raise WeightsError(
            f"{source} would be a file of {len(data):,} bytes, and {MAX_BYTES:,} are read at most; take fewer or smaller "
            "layers"
        )
    return data


def from_bytes(data: bytes, source: str = "the weight file") -> Record:
    """Parse the content of a weight file. Nothing in it is run, and no random numbers are drawn.

    Args:
        data: The content.
        source: What messages call it.

    Returns:
        The content, parsed.

    Raises:
        WeightsError: If the content is not a whole, undamaged, finite weight file of a format and family this version
            knows.
    """
    container = parse(data, source)
    header = _checked_header(container.strings, source)
    rule = _empty_rule(header["rule"], len(data), len(container.entries), source)
    _check_entries(container, rule, source)
    tensors = {name: container.tensor(name) for name in container.entries}
    check_finite(tensors, source)
    rule.load_state_dict(tensors, assign=True)
    found = fingerprint(rule)
    if header.get("fingerprint", found) != found:
        raise WeightsError(
            f"{source} is damaged: its numbers have the fingerprint {found[:12]}, and its header says "
            f"{one_line(header['fingerprint'], 12)}; get the file again"
        )
    metadata = {key: value for key, value in header.items() if key not in RESERVED}
    return Record(rule, header["name"], header["recipe"], metadata, found)


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Write a weight file; a failure leaves the old file, or none, but never half of one.

    Args:
        path: Where: a ``.safetensors`` file in a directory that exists.
        data: Its content.

    Raises:
        WeightsError: If it cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise WeightsError(f"cannot write weights to {path}: weight files end in {SUFFIX}; give it that suffix")
    # In the same directory, or the replacement would not be atomic; named so that writers never share one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:  # Exclusive: no symbolic link is followed.
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            if not isinstance(error, ValueError):
                temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        remedy = "" if os.path.isdir(path.parent) else f"; make the directory {path.parent} first"
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"cannot write weights to {path}: {reason}{remedy}") from error


def weight_file(path: str | PathLike[str]) -> Path:
    """Return the weight file that a path stands for: itself, or ``model.safetensors`` in a directory."""
    path = Path(path)
    return path / FILE if os.path.isdir(path) else path


def read_bytes(path: Path) -> bytes:
    """Read a file whole.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        WeightsNotFoundError: If there is no such file.
        WeightsError: If it cannot be read, is no regular file, is called like a pickle, or has more than
            :data:`MAX_BYTES`.
    """
    if path.suffix in PICKLES:
        raise WeightsError(refuse_pickle(str(path)))
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # A pipe would wait for a writer.
            raise WeightsError(f"cannot read weights from {path}: it is no regular file; copy its content to one")
        check_size(status.st_size, str(path))
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsNotFoundError(f"cannot read weights from {path}: no such file; check the path") from error
    except OSError as error:
        raise WeightsError(f"cannot read weights from {path}: {error.strerror or error}") from error
    except WeightsError:
        raise
    except ValueError as error:  # A NUL in the name.
        raise WeightsError(f"cannot read weights from {path}: {error}") from error


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse meta-parameters that are NaN or Inf.

    Args:
        tensors: Tensor by name.
        source: What messages call their file.

    Raises:
        WeightsError: If an entry is not finite.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{source}: tensor {name!r} holds NaN or Inf; meta-training diverged, use earlier weights")


def _checksum(header: Mapping[str, str]) -> str:
    covered = {key: value for key, value in header.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _checked_header(header: dict[str, str], source: str) -> dict[str, str]:
    """Return the header's strings if they belong to an undamaged weight file."""
    version = header.get("learned_optim_format")
    if version is None:
        raise WeightsError(
            f"{source} is a safetensors file, but not of learned-optim (its header has no 'learned_optim_format'); it may "
            "hold a model instead of an update rule"
        )
    if version != str(FORMAT_VERSION):
        raise WeightsError(
            f"{source} has format {one_line(version, 40)!r}, and this version of learned-optim reads "
            f"{str(FORMAT_VERSION)!r}; upgrade learned-optim (in its clone: git pull, then pip install .)"
        )
    if missing := sorted(set(REQUIRED) - set(header)):
        raise WeightsError(f"{source}: the header lacks {', '.join(missing)}; write the file again with Weights.save")
    checks = [name for name in CHECKS if name in header]
    if checks and (len(checks) < len(CHECKS) or header["checksum"] != _checksum(header)):
        raise WeightsError(f"{source} is damaged: the checksum of its header does not fit; get the file again")
    return header


def _empty_rule(text: str, size: int, num_tensors: int, source: str) -> UpdateRule:
    """Build the rule a header describes, without memory for its meta-parameters."""
    try:
        spec: dict[str, Any] = parse_json(text)
        family = spec.pop("family")
        # Units are made of numbers in the file, layers of four tensors; a header must not ask for more than that.
        for name, limit in (("hidden_size", size), ("num_layers", num_tensors // 4)):
            if spec.get(name, 0) > limit:
                raise ValueError(
                    f"{name} = {spec[name]} is more than a file of {size:,} bytes and {num_tensors} tensors can hold"
                )
        with torch.device("meta"):
            return build_rule(family, **spec)
    except KeyError as error:
        raise WeightsError(
            f"{source}: the rule in its header has no {error}; write the file again with Weights.save"
        ) from error
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise WeightsError(
            f"{source}: the header describes no rule of this version ({one_line(error, 300)}); if the file is newer, "
            "upgrade learned-optim"
        ) from error


def _check_entries(container: Container, rule: UpdateRule, source: str) -> None:
    """Compare the table of tensors with the rule; no tensor has been made yet."""
    expected = {name: tuple(tensor.shape) for name, tensor in rule.state_dict().items()}
    found = container.entries
    for name in sorted(set(expected) | set(found)):
        shown = repr(one_line(name, 60))
        if name not in found:
            raise WeightsError(f"{source}: tensor {shown} of shape {expected[name]} is missing; get the file again")
        if name not in expected:
            raise WeightsError(f"{source}: tensor {shown} does not belong to the rule in its header")
        if expected[name] != found[name].shape:
            raise WeightsError(
                f"{source}: tensor {shown} has shape {found[name].shape}, the rule in its header needs {expected[name]}"
            )
        if found[name].dtype != "F32":
            dtype = one_line(found[name].dtype, 20)
            raise WeightsError(f"{source}: tensor {shown} is {dtype}, weight files hold F32 (torch.float32)")
