"""The compiled CPU backend: what it can run, and its step."""

from learned_optim.backends.native.step import apply_step, available, supports

__all__ = ["apply_step", "available", "supports"]
