"""Trained meta-parameters: what they are, where they come from, how they are kept."""

from learned_optim.weights.errors import WeightsError, WeightsNotFoundError
from learned_optim.weights.registry import available_weights
from learned_optim.weights.sonnet import read_sonnet
from learned_optim.weights.weights import Weights, read_weights, resolve_weights, write_weights

__all__ = [
    "Weights",
    "WeightsError",
    "WeightsNotFoundError",
    "available_weights",
    "read_sonnet",
    "read_weights",
    "resolve_weights",
    "write_weights",
]
