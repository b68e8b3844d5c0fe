"""Worker processes, for work in independent pieces: episodes, optimizees, judged runs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)

Result = TypeVar("Result")


class Each(Protocol):
    """Calls a function with each of several arguments, in any order, and gives its results in theirs: ``map`` does."""

    def __call__(self, function: Callable[[Any], Result], arguments: Iterable[Any], /) -> Iterable[Result]:
        """Return the results."""
        ...


class Workers:
    """Processes of one thread each, until this context is left.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_start)

    def __enter__(self) -> Workers:
        """Return the workers themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let them finish what they are at, and end them; an interruption while they do ends them at once."""
        try:
            self._pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():  # Python would wait for them for ever.
                process.kill()
            raise

    def map(self, function: Callable[[Any], Result], arguments: Iterable[Any], /) -> Iterator[Result]:
        """Call a function in the processes.

        Args:
            function: Can be pickled, as its arguments and results can.
            arguments: One for each call.

        Returns:
            Its results, in the order of the arguments.
        """
        # As bytes, through pipes: torch would put tensors into shared memory, of which a container may have next to none.
        calls = [pickle.dumps((function, argument)) for argument in arguments]
        with _signals_wait():
            answers = self._pool.map(_answer, calls)
        return map(pickle.loads, answers)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let signals wait, here and in processes that start now: those are still in this one's group."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_signals() -> None:
    """Heed signals from now on; of those that waited only what the parent sent."""
    if hasattr(signal, "sigtimedwait"):
        waited = signal.sigtimedwait([signal.SIGTERM], 0)
        if waited is not None and waited.si_pid == os.getppid():
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _start() -> None:
    torch.set_num_threads(1)
    # Whoever interrupts means the process that has these; it ends them. Terminals and `timeout` signal a whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
        _heed_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave no process behind when the one that has these is killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _answer(call: bytes) -> bytes:
    function, argument = pickle.loads(call)
    return pickle.dumps(function(argument))
