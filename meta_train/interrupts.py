"""Signals that ask a long run to stop, heeded where it can stop without loss."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ONE_REQUEST = 1.0
"""Seconds in which signals are one request: ``timeout`` sends one to the process and one to its group."""


class Interrupted(KeyboardInterrupt):
    """An interruption by a signal: what cleans up behind a KeyboardInterrupt cleans up behind this one too.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals, where Python lets us (in the main thread), and give them back to the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise :class:`Interrupted` at SIGINT and SIGTERM while the context is entered, once for each request."""
    last = -float("inf")

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > ONE_REQUEST:
            raise Interrupted(number)

    with _handled(interrupt):
        yield


class StopRequest:
    """Notes the first SIGINT or SIGTERM while the context is entered; a second request interrupts at once.

    Attributes:
        signal: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._last = 0.0
        self._context = _handled(self._note)

    def __enter__(self) -> StopRequest:
        """Handle the signals."""
        self._context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers that the signals had before."""
        self._context.__exit__(None, None, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        before, self._last = self._last, time.monotonic()
        if self.signal is not None and self._last - before > ONE_REQUEST:
            raise Interrupted(number)
        self.signal = self.signal or number
