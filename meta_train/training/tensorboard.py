"""What a run does, for TensorBoard: the records of ``metrics.jsonl`` as curves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from meta_train.training.outer_loop import OuterStep

FOLDER = "tensorboard"
"""Where below the run directory the events lie."""

TAGS = {
    "meta_loss": "meta-training/meta-loss",
    "grad_norm": "meta-training/gradient norm",
    "lr": "meta-training/lr",
    "validation": "validation/validation",
    "final": "validation/final",
}
"""Names of the curves, by the field of an outer step."""

TIME = "time/seconds per outer step"


class TensorBoardLog:
    """Writes outer steps as TensorBoard's scalars, beside ``metrics.jsonl`` and not in its place.

    Args:
        run: The run directory.
        step: Outer steps already taken; a run that resumes hides what was written after them.

    Raises:
        ValueError: If the package ``tensorboard`` is not installed.
    """

    def __init__(self, run: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError('--log tensorboard needs a package: pip install -e ".[tensorboard]" in the clone') from error
        self._writer: Any = SummaryWriter(str(run / FOLDER), purge_step=step + 1)
        self._clock = time.perf_counter()

    def add(self, record: OuterStep) -> None:
        """Write one outer step.

        Args:
            record: What it did.
        """
        for name, tag in TAGS.items():
            if (value := getattr(record, name)) is not None:
                self._writer.add_scalar(tag, value, record.step)
        now = time.perf_counter()
        self._writer.add_scalar(TIME, now - self._clock, record.step)
        self._clock = now

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()
