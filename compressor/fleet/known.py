"""Which devices may speak, as a set that any thread may look into without asking the database.

Promises: who was enrolled before `refresh` was called is known when it returns, and stays known; a refresh that began
earlier and reads slower does not bring back what was known before.
Leaves to others: who is enrolled (`database.devices`), when to look again (`service`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection


class Known:
    """Any thread."""

    def __init__(self, read: Callable[[], Collection[str]]) -> None:
        """`read`: the devices of now. Raises: what `read` raises."""
        self._read = read
        self._lock = threading.Lock()
        self._begun = self._taken = 0  # refreshes, by number
        self._devices: frozenset[str] = frozenset()
        self.refresh()

    def __contains__(self, device: str) -> bool:
        return device in self._devices

    def refresh(self) -> None:
        """Read anew. Raises: what `read` raises; then nothing changes."""
        with self._lock:
            self._begun += 1
            mine = self._begun
        found = frozenset(self._read())
        with self._lock:
            if mine > self._taken:
                self._devices, self._taken = found, mine
