"""The compiled CPU backend: what it can run, its step, its matrix stage, and the plan that repeats a step."""

from learned_optim.backends.native import matrix
from learned_optim.backends.native.plan import make_plan
from learned_optim.backends.native.step import apply_step, available, supports

__all__ = ["apply_step", "available", "make_plan", "matrix", "supports"]
