"""Is a budget kept? Two judges with hysteresis: worse at once, better slowly. Mutable, no clock; owned by one thread.

`LatencyBudget` judges requests one by one against a 95th percentile, `Limit` judges readings (power, temperature,
memory) against a number. What follows from a raised budget is decided elsewhere (`service.py`).
"""

from __future__ import annotations

from collections import deque
from typing import Final


class LatencyBudget:
    """Is the 95th percentile within the budget? Requests are judged one by one, over or not.

    With the true p95 at the budget, 5 % are over: 10 of WINDOW on average, and RAISE_OVER or more with probability
    9e-8 (binomial tail, checked in the tests). RAISE_OVER requests are enough to raise; clearing takes a
    whole window with at most CLEAR_OVER.
    """

    WINDOW: Final = 200
    RAISE_OVER: Final = 30  # 15 %: the p85 is over what the p95 should be
    CLEAR_OVER: Final = 10  # 5 %: the p95 keeps its budget

    def __init__(self, budget_us: float) -> None:
        self.budget_us = budget_us
        self.reset()

    def reset(self) -> None:
        self._over: deque[bool] = deque(maxlen=self.WINDOW)
        self._count = 0
        self._since = 0
        self.raised = False

    def update(self, over: bool) -> bool:  # noqa: FBT001 - the one thing it is told
        """Count one request; True when the alarm is raised or cleared by it."""
        if len(self._over) == self.WINDOW:
            self._count -= self._over[0]
        self._over.append(over)
        self._count += over
        self._since += 1
        clears = self.raised and self._since >= self.WINDOW and self._count <= self.CLEAR_OVER
        raises = not self.raised and self._count >= self.RAISE_OVER
        if clears or raises:
            self.raised, self._since = raises, 0
        return clears or raises

    def numbers(self) -> dict[str, float]:
        judged = len(self._over)
        share = self._count / judged if judged else 0.0
        return {
            "budget_us": self.budget_us, "over": float(self._count), "of_last": float(judged), "share_over": share
        }  # fmt: skip


class Limit:
    """One reading against one limit, sampled about once a second. None = not measured: nothing changes.

    Raised by RAISE_SAMPLES in a row over the limit (a spike of one sample is no heat), cleared by CLEAR_SAMPLES in
    a row below CLEAR_SHARE of it, so that a value that sits at the limit does not flap.
    """

    RAISE_SAMPLES: Final = 3
    CLEAR_SAMPLES: Final = 10
    CLEAR_SHARE: Final = 0.95

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.raised = False
        self._run = 0

    def update(self, value: float | None) -> bool:
        """True when the alarm is raised or cleared by this sample."""
        if value is None or self.limit <= 0:
            return False
        towards = value < self.limit * self.CLEAR_SHARE if self.raised else value > self.limit
        self._run = self._run + 1 if towards else 0
        if self._run < (self.CLEAR_SAMPLES if self.raised else self.RAISE_SAMPLES):
            return False
        self.raised, self._run = not self.raised, 0
        return True
