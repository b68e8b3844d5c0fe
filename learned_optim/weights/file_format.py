"""The weight file: safetensors with a header that explains itself. Never a pickle.

The tensors are the rule's ``state_dict``, in float32. The header (safetensors ``__metadata__``, strings only) holds

- ``learned_optim_format``: the version of this layout, :data:`FORMAT_VERSION`;
- ``rule``: JSON, the rule's family and every field of its configuration;
- ``name``: what its maker called it;
- ``recipe``: TOML, the recipe that made it; empty if unknown;
- anything else: provenance.
"""

from __future__ import annotations

import json
import os
import threading
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import load as load_tensors
from torch import Tensor

from learned_optim.rules import UpdateRule, build_rule
from learned_optim.weights.errors import WeightsError, WeightsNotFoundError
from learned_optim.weights.weights import Weights, to_little_endian

FORMAT_VERSION = 1
FILE = "model.safetensors"
"""What the weight file is called where a directory or a repository stands for it."""

SUFFIX = ".safetensors"
MAX_BYTES = 16 * 2**20
"""What no file of an update rule exceeds, which has kilobytes; a larger one is not read, nor fetched, nor written."""

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
RESERVED = ("learned_optim_format", "name", "recipe", "rule")


def to_bytes(weights: Weights) -> bytes:
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
    tensors = dict(sorted(weights.rule.state_dict().items()))
    _check_finite(tensors, f"weights {weights.name!r}")
    header = {
        **weights.metadata,
        "learned_optim_format": str(FORMAT_VERSION),
        "rule": json.dumps({"family": weights.rule.family, **weights.rule.config.to_dict()}, sort_keys=True),
        "name": weights.title,
        "recipe": weights.recipe,
    }
    data = _assemble(header, tensors)
    if len(data) > MAX_BYTES:
        raise WeightsError(
            f"weights {weights.name!r} would be a file of {len(data):,} bytes, and {MAX_BYTES:,} are read at most; take "
            "fewer or smaller layers"
        )
    return data


def from_bytes(data: bytes, source: str = "the weight file") -> Weights:
    """Parse the content of a weight file. Runs none of it, and draws no random numbers.

    Args:
        data: The content.
        source: What messages call it.

    Returns:
        The weights.

    Raises:
        WeightsError: If the content is not a whole, finite weight file of a format and family this version knows.
    """
    try:
        num_tensors = len(deserialize(data))
    except SafetensorError as error:
        _explain_content(data, source, error)
    header = _header(data, source)
    rule = _empty_rule(header["rule"], len(data), num_tensors, source)
    tensors = load_tensors(data)
    _check_tensors(tensors, rule, source)
    rule.load_state_dict(tensors, assign=True)
    metadata = {key: value for key, value in header.items() if key not in RESERVED}
    return Weights(rule, header["name"], header["recipe"], metadata)


def read_weights(path: str | PathLike[str]) -> Weights:
    """Read a weight file.

    Args:
        path: A ``.safetensors`` file, or a directory that holds a ``model.safetensors``.

    Returns:
        The weights, called as in the file's header.

    Raises:
        WeightsNotFoundError: If there is no such file.
        WeightsError: If it cannot be read, or is not a weight file.
    """
    path = weight_file(path)
    return from_bytes(read_bytes(path), str(path))


def write_weights(path: str | PathLike[str], weights: Weights) -> None:
    """Write a weight file; a failure leaves the old file, or none, but never half of one.

    Args:
        path: Where: a ``.safetensors`` file in a directory that exists.
        weights: What to write.

    Raises:
        WeightsError: If it cannot be written, or could not be read back.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise WeightsError(f"cannot write weights to {path}: weight files end in {SUFFIX}; give it that suffix")
    data = to_bytes(weights)
    # In the same directory, or the replacement would not be atomic; named so that writers never share one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        remedy = "" if path.parent.is_dir() else f"; make the directory {path.parent} first"
        raise WeightsError(f"cannot write weights to {path}: {error.strerror or error}{remedy}") from error


def weight_file(path: str | PathLike[str]) -> Path:
    """Return the weight file that a path stands for: itself, or ``model.safetensors`` in a directory."""
    path = Path(path)
    return path / FILE if path.is_dir() else path


def read_bytes(path: Path) -> bytes:
    """Read a file whole.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        WeightsNotFoundError: If there is no such file.
        WeightsError: If it cannot be read, is called like a pickle, or has more than :data:`MAX_BYTES`.
    """
    if path.suffix in PICKLES:
        raise WeightsError(_pickle(str(path)))
    try:
        check_size(path.stat().st_size, str(path))
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsNotFoundError(f"cannot read weights from {path}: no such file; check the path") from error
    except OSError as error:
        raise WeightsError(f"cannot read weights from {path}: {error.strerror or error}") from error


def check_size(size: int, source: str) -> None:
    """Refuse a file that is too large to be an update rule.

    Args:
        size: Its bytes.
        source: What messages call it.

    Raises:
        WeightsError: If there are more than :data:`MAX_BYTES`.
    """
    if size > MAX_BYTES:
        raise WeightsError(
            f"{source} has {size:,} bytes, and an update rule has kilobytes; it may hold a model instead: check its name"
        )


def _assemble(header: dict[str, str], tensors: dict[str, Tensor]) -> bytes:
    """Lay out a safetensors file: its own writer orders the header differently from run to run, and may need NumPy."""
    table: dict[str, Any] = {"__metadata__": dict(sorted(header.items()))}
    content = b""
    for name, tensor in tensors.items():
        start, content = len(content), content + to_little_endian(tensor)
        table[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, len(content)]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content


def _explain_content(data: bytes, source: str, error: SafetensorError) -> NoReturn:
    """Say what content that is not safetensors most likely is."""
    if not data:
        raise WeightsError(f"{source} is empty; an interrupted copy? get it again") from error
    if data.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{source} is a Git LFS pointer, not the file it points to; run `git lfs pull`") from error
    # A zip (torch.save), or protocol 2 and later; a safetensors file begins with the length of its header, of which a third
    # byte would mean 64 kB.
    if data.startswith(b"PK\x03\x04") or (data[:1] == b"\x80" and data[2:3] > b"\0"):
        raise WeightsError(_pickle(source)) from error
    raise WeightsError(
        f"{source} is truncated, corrupt or not a safetensors file ({len(data):,} bytes: {error}); get it again, from "
        "the Hub with force_download=True"
    ) from error


def _pickle(source: str) -> str:
    return (
        f"{source} is a pickle, which can run code when it is read: weights are never read from one; load it yourself "
        f"if you trust it, and write Weights(rule).save('name{SUFFIX}')"
    )


def _header(data: bytes, source: str) -> dict[str, str]:
    """Return the header of content that ``safetensors`` has accepted, so it is JSON and maps strings to strings."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    version = header.get("learned_optim_format")
    if version is None:
        raise WeightsError(
            f"{source} is a safetensors file, but not of learned-optim (its header has no 'learned_optim_format'); it may "
            "hold a model instead of an update rule"
        )
    if version != str(FORMAT_VERSION):
        raise WeightsError(
            f"{source} has format {version!r}, and this version of learned-optim reads {str(FORMAT_VERSION)!r}; upgrade "
            "learned-optim (pip install -U learned-optim)"
        )
    if missing := sorted(set(RESERVED) - set(header)):
        raise WeightsError(f"{source}: the header lacks {', '.join(missing)}; write the file again with Weights.save")
    return header


def _empty_rule(text: str, size: int, num_tensors: int, source: str) -> UpdateRule:
    """Build the rule a header describes, without memory for its meta-parameters."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no setting")

    try:
        spec: dict[str, Any] = json.loads(text, parse_constant=refuse)
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
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsError(
            f"{source}: the header describes no rule of this version ({error}); if the file is newer, upgrade learned-optim"
        ) from error


def _check_tensors(tensors: dict[str, Tensor], rule: UpdateRule, source: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in rule.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(set(expected) | set(found)):
        if name not in found:
            raise WeightsError(f"{source}: tensor {name!r} of shape {expected[name]} is missing; get the file again")
        if name not in expected:
            raise WeightsError(f"{source}: tensor {name!r} does not belong to the rule in its header")
        if expected[name] != found[name]:
            raise WeightsError(
                f"{source}: tensor {name!r} has shape {found[name]}, the rule in its header needs {expected[name]}"
            )
        if tensors[name].dtype != torch.float32:
            raise WeightsError(f"{source}: tensor {name!r} is {tensors[name].dtype}, weight files hold torch.float32")
    _check_finite(tensors, source)


def _check_finite(tensors: dict[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{source}: tensor {name!r} holds NaN or Inf; meta-training diverged, use earlier weights")
