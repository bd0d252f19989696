"""When a lost worker is replaced, and when losing it is a crash loop. Pure.

A lost worker is replaced at once; the second time within CRASH_WINDOW_S only after a pause that doubles. From the
CRASH_LIMIT-th loss on it is a loop, and the supervisor takes the engine that served out of the next worker.

| losses within CRASH_WINDOW_S | 1 | 2   | 3 | 4 | 5 | 6 | 7  | more |
|------------------------------|---|-----|---|---|---|---|----|------|
| pause in s                   | 0 | 0.5 | 1 | 2 | 4 | 8 | 16 | 30   |

The losses are part of the persisted state: a crash loop that takes the agent down too is remembered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

CRASH_WINDOW_S: Final = 60.0  # two of the longest pauses: a loop stays a loop however slowly it turns
CRASH_LIMIT: Final = 3  # one loss is an accident, two a coincidence
PAUSES_S: Final = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # 30 s: the longest a client's retry should have to wait


@dataclass(frozen=True, slots=True)
class Workers:
    """`generation`: the one that serves, 0 = none. `lost_s`: recent losses, oldest first."""

    generation: int = 0
    lost_s: tuple[float, ...] = ()

    @property
    def looping(self) -> bool:
        return len(self.lost_s) >= CRASH_LIMIT

    @property
    def word(self) -> str:
        """up, starting, lost or loop."""
        if self.generation:
            return "up"
        return "loop" if self.looping else "lost" if self.lost_s else "starting"


def ready(workers: Workers, generation: int) -> Workers:
    return replace(workers, generation=generation)


def lost(workers: Workers, generation: int, now_s: float) -> Workers:
    """A worker of `generation` died; the serving one stays if it was another (a replacement that failed to start)."""
    serving = (
        0 if generation >= workers.generation and not _is_replacement(workers, generation) else workers.generation
    )
    recent = (*_recent(workers, now_s), now_s)[-len(PAUSES_S) :]
    return Workers(serving, recent)


def calmed(workers: Workers, now_s: float) -> Workers:
    """Losses older than the window are forgotten."""
    recent = _recent(workers, now_s)
    return workers if recent == workers.lost_s else replace(workers, lost_s=recent)


def pause_s(workers: Workers) -> float:
    """How long to wait before the next start, counted from the last loss."""
    return PAUSES_S[min(len(workers.lost_s), len(PAUSES_S)) - 1] if workers.lost_s else 0.0


def shifted(workers: Workers, by_s: float) -> Workers:
    return replace(workers, lost_s=tuple(lost_s + by_s for lost_s in workers.lost_s))


def _recent(workers: Workers, now_s: float) -> tuple[float, ...]:
    return tuple(lost_s for lost_s in workers.lost_s if now_s - lost_s < CRASH_WINDOW_S)


def _is_replacement(workers: Workers, generation: int) -> bool:
    return 0 < workers.generation < generation
