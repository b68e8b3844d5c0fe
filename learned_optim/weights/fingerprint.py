"""The identity of a rule: a sha256 of everything that decides its numerics."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from array import array

import torch
from torch import Tensor

from learned_optim.rules import UpdateRule


def fingerprint(rule: UpdateRule) -> str:
    """Return the sha256 of everything that decides a rule's numerics: family, configuration and meta-parameters.

    Checkpoints hold the fingerprint, so it must not change from one version to the next. A field at its default is left
    out: a later version may then add a field, with a default that changes nothing, and every fingerprint stays.

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
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    content = ctypes.string_at(values.data_ptr(), 4 * values.numel()) if values.numel() else b""
    return content if sys.byteorder == "little" else _swapped(content).tobytes()


def from_little_endian(content: bytes, shape: tuple[int, ...]) -> Tensor:
    """Return a float32 tensor of a shape, from four bytes for each entry."""
    if not content:
        return torch.empty(shape)
    values = array("f", content) if sys.byteorder == "little" else _swapped(content)
    return torch.frombuffer(values, dtype=torch.float32).clone().reshape(shape)


def _swapped(content: bytes) -> array[float]:
    values = array("f", content)
    values.byteswap()
    return values
