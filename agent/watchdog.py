"""Ends runs that take too long: one thread that looks at what other threads are running.

A run past its limit is told to end; one that ignores the order for too long needs a new process, and that is said.
What a limit is, and who answers instead, is the business of `serving`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from agent import clock
from agent.contract.tensors import Array
from agent.engine import Engine, RunControl

TICK_S = 0.01  # the watchdog's resolution
IDLE_TICKS = 100
UNSTOPPABLE_S = 1.0  # how long a run may outlive its end order beyond `stuck_after_s`


class Watch:
    """The current run of one thread, for the watchdog to see."""

    def __init__(self, dog: Watchdog, control: RunControl | None = None) -> None:
        self._dog = dog
        self._lock = threading.Lock()
        self._control = control or RunControl()
        self.options = self._control.options
        self._limit_ns = 0
        self.started_ns = 0  # 0 = nothing runs

    def run(self, engine: Engine, feeds: Mapping[str, Array], limit_ns: int) -> dict[str, Array]:
        """Run, to be ended at `limit_ns` (monotonic). Raises: EngineFailed."""
        with self._lock:  # orders are given under it: none for the run before is on its way any more...
            self._control.rearm()  # ...and what one left behind is gone
            self._limit_ns = limit_ns
            self.started_ns = clock.monotonic_ns()
        self._dog.notice()
        try:
            return engine.run(feeds, control=self._control)
        finally:
            self.clear()

    def begin(self, now_ns: int, limit_ns: int) -> None:
        """A run that its owner makes by itself, with `options`. It ends with `started_ns = 0`; if it failed, `clear`.

        Without the lock an end order may then reach the next run that begins so (never one of `run`): whoever runs so
        must look at the clock when a run fails.
        """
        self._limit_ns = limit_ns
        self.started_ns = now_ns
        if self._dog.asleep:
            self._dog.notice()

    def clear(self) -> None:
        """Nothing runs any more, and what ended the last run does not end the next one."""
        with self._lock:
            self.started_ns = 0
            self._control.rearm()

    def end(self) -> None:
        """End the run, whatever its limit."""
        with self._lock:
            if self.started_ns:
                self._control.stop()

    def end_if_late(self, now_ns: int) -> None:
        """End the run if its time is over; the lock keeps the order from reaching the run after it."""
        with self._lock:
            if self.started_ns and now_ns > self._limit_ns:
                self._control.stop()


class Watchdog:
    """One thread that ends runs at their limit. Sleeps while nothing runs."""

    def __init__(self, stuck_after_s: float, on_unstoppable: Callable[[], None]) -> None:
        """`on_unstoppable` is called, on this thread, when a run ignores its end order: only a new process helps."""
        self._fatal_ns = int((stuck_after_s + UNSTOPPABLE_S) * 1e9)
        self._on_unstoppable = on_unstoppable
        self._watches: list[Watch] = []
        self._closing = threading.Event()
        self._wake = threading.Event()
        self.asleep = False  # nothing ran for a while
        self._thread = threading.Thread(target=self._patrol, name="watchdog", daemon=True)
        self._thread.start()

    def watch(self) -> Watch:
        """A watch for one more thread."""
        watch = Watch(self)
        self._watches.append(watch)
        return watch

    def notice(self) -> None:
        """A run starts."""
        if self.asleep:
            self._wake.set()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join()

    def _patrol(self) -> None:
        idle = 0
        while not self._closing.wait(TICK_S):
            now_ns = clock.monotonic_ns()
            idle += 1
            for watch in self._watches:
                watch.end_if_late(now_ns)
                started_ns = watch.started_ns
                if started_ns:
                    idle = 0
                if started_ns and now_ns - started_ns > self._fatal_ns:
                    self._on_unstoppable()
            if idle > IDLE_TICKS:
                self._sleep()
                idle = 0

    def _sleep(self) -> None:
        # `asleep` first, then look: a run that starts in between sees it and sets the event
        self.asleep = True
        if not any(watch.started_ns for watch in self._watches):
            self._wake.wait()
        self.asleep = False
        self._wake.clear()
