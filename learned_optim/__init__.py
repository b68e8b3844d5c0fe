"""A PyTorch optimizer whose update rule was itself learned."""

from learned_optim.memory import state_bytes
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.recorder import Recorder
from learned_optim.rules import UpdateRule, build_rule
from learned_optim.weights import Weights, WeightsError, WeightsNotFoundError, available_weights

__version__ = "0.1.0"

__all__ = [
    "LearnedOptimizer",
    "Recorder",
    "UpdateRule",
    "Weights",
    "WeightsError",
    "WeightsNotFoundError",
    "__version__",
    "available_weights",
    "build_rule",
    "state_bytes",
]
