"""The weight file: safetensors with a header that explains itself. Never a pickle.

The tensors are the rule's ``state_dict``. The header (safetensors ``__metadata__``, strings only) holds
``learned_optim_format``, ``rule`` (JSON: family and configuration), ``name``, ``recipe`` (TOML) and provenance.
"""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from learned_optim.rules import UpdateRule, build_rule
from learned_optim.weights.errors import WeightsError
from learned_optim.weights.weights import Weights

FORMAT_VERSION = 1
RESERVED = ("learned_optim_format", "rule", "name", "recipe")
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def to_bytes(weights: Weights) -> bytes:
    """Serialise weights; equal weights give equal bytes.

    Args:
        weights: What to serialise.

    Returns:
        The content of a weight file.
    """
    header = {
        **weights.metadata,
        "learned_optim_format": str(FORMAT_VERSION),
        "rule": json.dumps({"family": weights.rule.family, **weights.rule.config.to_dict()}, sort_keys=True),
        "name": weights.name,
        "recipe": weights.recipe,
    }
    tensors = {name: tensor.contiguous() for name, tensor in sorted(weights.rule.state_dict().items())}
    return _sorted_header(save_tensors(tensors, metadata=header))


def from_bytes(data: bytes, name: str | None = None) -> Weights:
    """Parse a weight file's content.

    Args:
        data: The content.
        name: What to call the weights, instead of the name in the header.

    Returns:
        The weights.

    Raises:
        WeightsError: If the content is not a whole, finite weight file of a format this version reads.
    """
    source = f"weights {name!r}" if name else "the weight file"
    header = _header(data, source)
    rule = _empty_rule(header, source)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{source}: truncated or corrupt ({error}); download or write it again") from error
    _check_tensors(tensors, rule, source)
    rule.load_state_dict(tensors, assign=True)
    metadata = {key: value for key, value in header.items() if key not in RESERVED}
    return Weights(rule, name or header["name"], header["recipe"], metadata)


def read_weights(path: str | PathLike[str], name: str | None = None) -> Weights:
    """Read a weight file.

    Args:
        path: A ``.safetensors`` file.
        name: What to call the weights; by default the name in its header.

    Returns:
        The weights.

    Raises:
        WeightsError: If the file is missing or unreadable, or its content is not a weight file.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise WeightsError(
            f"{path} looks like a pickle, which can run code when loaded and is never read here; "
            "load it where you trust it and write it again with Weights(rule).save('name.safetensors')"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read weights from {path}: {error.strerror}; check the path") from error
    try:
        return from_bytes(data, name)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def write_weights(path: str | PathLike[str], weights: Weights) -> None:
    """Write a weight file; a failure leaves the old file, or none, but never half of one.

    Args:
        path: Where; its directory must exist.
        weights: What to write.

    Raises:
        WeightsError: If it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(to_bytes(weights))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WeightsError(f"cannot write weights to {path}: {error.strerror or error}") from error


def _sorted_header(data: bytes) -> bytes:
    """Order the header's keys: safetensors writes metadata in an order that changes from run to run."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _header(data: bytes, source: str) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < 8 + length:
        raise WeightsError(f"{source}: truncated or not a safetensors file ({len(data)} bytes); download it again")
    try:
        header = json.loads(data[8 : 8 + length])["__metadata__"]
    except KeyError:
        header = {}
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{source}: corrupt or not a safetensors file; download it again") from error
    version = header.get("learned_optim_format")
    if version is None:
        raise WeightsError(
            f"{source}: a safetensors file, but not of learned-optim: its header has no 'learned_optim_format'"
        )
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise WeightsError(
            f"{source}: format {version!r} is newer than this version reads ({FORMAT_VERSION}); upgrade learned-optim"
        )
    missing = sorted(set(RESERVED) - set(header))
    if missing:
        raise WeightsError(f"{source}: the header lacks {', '.join(missing)}; write the file again with Weights.save")
    return header


def _empty_rule(header: dict[str, str], source: str) -> UpdateRule:
    """Build the rule on the meta device: reading a file draws no random numbers."""
    try:
        spec: dict[str, Any] = json.loads(header["rule"])
        family = spec.pop("family")
        with torch.device("meta"):
            return build_rule(family, **spec)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{source}: the header describes no rule of this version ({error})") from error


def _check_tensors(tensors: dict[str, torch.Tensor], rule: UpdateRule, source: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in rule.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise WeightsError(
                f"{source}: tensor {name!r} has shape {found.get(name, 'missing')}, "
                f"the rule in its header needs {expected.get(name, 'none of that name')}"
            )
        if tensors[name].dtype != torch.float32:
            raise WeightsError(f"{source}: tensor {name!r} is {tensors[name].dtype}, weight files hold float32")
        if not tensors[name].isfinite().all():
            raise WeightsError(f"{source}: tensor {name!r} holds NaN or Inf; these meta-parameters are unusable")
