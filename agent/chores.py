"""One named thread for blocking work, done in order; what came of it is told on the event loop.

A daemon thread: work that hangs must not hold up the agent's exit. Work that is late is the caller's to ignore.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from agent.contract.errors import EdgewardenError, Overloaded

T = TypeVar("T")
MAX_WAITING = 64


class Chores:
    """Owned by the event loop; `work` runs in the thread, `done` on the loop."""

    def __init__(self, name: str, *, on_fault: Callable[[Exception], None]) -> None:
        """`on_fault`: hears on the loop of an exception that is none of ours."""
        self._name = name
        self._on_fault = on_fault
        self._waiting: queue.Queue[Callable[[], None]] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], T], done: Callable[[T | EdgewardenError], None]) -> None:
        """Do `work` after what waits already; `done` gets its result, or the error it raised."""
        loop = asyncio.get_running_loop()

        def run() -> None:
            outcome = self._outcome(work, loop)
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
                loop.call_soon_threadsafe(done, outcome)

        try:
            self._waiting.put_nowait(run)
        except queue.Full:
            loop.call_soon(done, Overloaded(f"{self._name}: {MAX_WAITING} things to do wait already"))
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def _outcome(self, work: Callable[[], T], loop: asyncio.AbstractEventLoop) -> T | EdgewardenError:
        try:
            return work()
        except EdgewardenError as error:
            return error
        except Exception as error:  # noqa: BLE001 - carried to the process's loop, which counts and tells it
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._on_fault, error)
            return EdgewardenError(f"a fault of the agent in {self._name}: {type(error).__name__}: {error}")

    def _work(self) -> None:
        while True:
            self._waiting.get()()


def failed(outcome: Any) -> bool:
    """Whether `done` was given an error."""
    return isinstance(outcome, EdgewardenError)
