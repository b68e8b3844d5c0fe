"""What a command says beside its output; a terminal that has gone ends no run."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import Any, NoReturn

from learned_optim.weights.text import one_line


class _Screen:
    """Stderr as it is now, if it is there and takes what is written."""

    def write(self, text: str) -> int:
        """Write as far as that is possible."""
        if sys.stderr is not None:
            with suppress(OSError, ValueError):
                return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as far as that is possible."""
        if sys.stderr is not None:
            with suppress(OSError, ValueError):
                sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        """Look up all else, such as the width of a terminal."""
        return getattr(sys.stderr, name)


SCREEN = _Screen()
"""Takes progress bars; stderr itself raises where a disk is full or a terminal is closed."""


def say(text: object) -> None:
    """Say something in one line of its own."""
    SCREEN.write(f"meta_train: {one_line(text)}\n")
    SCREEN.flush()


class Parser(argparse.ArgumentParser):
    """A parser of arguments that says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Say it, and end with status 2."""
        say(f"{message}; see {self.prog} --help")
        sys.exit(2)
