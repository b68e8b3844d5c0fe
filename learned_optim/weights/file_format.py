"""The weight file: safetensors with a header that explains itself. Never a pickle.

The tensors are the rule's ``state_dict``. The header (safetensors ``__metadata__``, strings only) holds
``learned_optim_format``, ``rule`` (JSON: family and configuration), ``name``, ``recipe`` (TOML) and provenance.
"""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open  # noqa: F401
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from learned_optim.rules import build_rule
from learned_optim.weights.weights import Weights

FORMAT_VERSION = 1
RESERVED = ("learned_optim_format", "rule", "name", "recipe")


def to_bytes(weights: Weights) -> bytes:
    """Serialise weights; equal weights give equal bytes."""
    header = {
        **weights.metadata,
        "learned_optim_format": str(FORMAT_VERSION),
        "rule": json.dumps({"family": weights.rule.family, **weights.rule.config.to_dict()}, sort_keys=True),
        "name": weights.name,
        "recipe": weights.recipe,
    }
    tensors = {name: tensor.contiguous() for name, tensor in weights.rule.state_dict().items()}
    return save_tensors(tensors, metadata=header)


def from_bytes(data: bytes, name: str | None = None) -> Weights:
    """Parse a weight file's bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    spec = json.loads(header["rule"])
    with torch.device("meta"):  # Neither torch's generator nor its default dtype and device may matter here.
        rule = build_rule(spec.pop("family"), **spec)
    rule.load_state_dict(load_tensors(data), assign=True)
    metadata = {key: value for key, value in header.items() if key not in RESERVED}
    return Weights(rule, name or header["name"], header["recipe"], metadata)


def read_weights(path: str | PathLike[str], name: str | None = None) -> Weights:
    """Read a weight file."""
    return from_bytes(Path(path).read_bytes(), name)


def write_weights(path: str | PathLike[str], weights: Weights) -> None:
    """Write a weight file atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(to_bytes(weights))
    temporary.replace(path)
