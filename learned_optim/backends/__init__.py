"""How a step is executed. Every backend computes the same rule; all but the reference are tested against it."""

from learned_optim.backends.reference import StepItem, apply_reference

__all__ = ["StepItem", "apply_reference"]
