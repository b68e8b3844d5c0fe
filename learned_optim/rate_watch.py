"""A warning where Adam's learning rate was left in place: here ``lr`` is a factor, and 1 is the usual one.

A factor of 1e-3 makes the rule a thousand times slower, silently. So a rate in (0, :data:`SMALL`) warns once: when an
optimizer or a group is made with it, or when it has lasted for the first :data:`STEPS` steps. A warm-up that passes
:data:`SMALL` within these steps does not warn, nor does a schedule that decays later.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 0.05
"""A rate below this is taken for a mistake."""

STEPS = 50
"""Steps that a warm-up has to reach :data:`SMALL`."""

_START = "LearnedOptimizer runs with a small lr"
_INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class RateWatch:
    """What is known of the rates since an optimizer was made. It is dropped once there is nothing left to see."""

    def __init__(self) -> None:
        self.steps = 0
        self.passed: set[int] = set()

    def look_at_new(self, group: dict[str, Any]) -> bool:
        """Look at a group that was just made.

        Args:
            group: The group.

        Returns:
            Whether to look on.
        """
        rate = small_rate(group)
        if rate:
            _warn(f"it was made with lr={rate:g}")
        return not rate

    def look(self, groups: Iterable[dict[str, Any]]) -> bool:
        """Look at the rates of the step that is about to be taken.

        Args:
            groups: The optimizer's.

        Returns:
            Whether to look on.
        """
        self.steps += 1
        rates = [small_rate(group) for group in groups]
        self.passed.update(number for number, rate in enumerate(rates) if rate is None)
        if len(self.passed) == len(rates):
            return False
        if self.steps < STEPS:
            return True
        for number, rate in enumerate(rates):
            if rate and number not in self.passed:
                _warn(f"its first {STEPS} steps had an lr below {SMALL:g}, the last one lr={rate:g} in group {number}")
                break
        return False


def small_rate(group: dict[str, Any]) -> float | None:
    """Return a group's rate if it is below :data:`SMALL`, else None.

    Args:
        group: Of an optimizer. A tensor that is not on the CPU counts as large: reading it would wait for the device.

    Returns:
        The rate, perhaps 0, or None.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and (type(lr) not in (Tensor, nn.Parameter) or lr.device.type != "cpu"):
        return None
    rate = float(lr.detach() if isinstance(lr, Tensor) else lr)
    return rate if rate < SMALL else None


def _warn(what: str) -> None:
    warnings.warn(
        f"{_START}: {what}. Here lr multiplies the learned update and 1 is the usual factor: leave lr out, or let a "
        "schedule start from 1. If the small factor is meant, silence this: "
        f"warnings.filterwarnings('ignore', message='{_START}')",
        stacklevel=_level_of_the_caller(),
    )


def _level_of_the_caller() -> int:
    """Return the ``stacklevel`` that, one call up from here, points at the first frame outside torch and this package."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level + 1
