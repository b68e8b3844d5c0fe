"""The identity of a rule: a digest of all that decides its numerics."""

from __future__ import annotations

import hashlib
import json
import struct

import torch
from torch import Tensor

from learned_optim.rules import UpdateRule


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
