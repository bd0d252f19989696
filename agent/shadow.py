"""Witnesses of one service: engines that are asked about requests which have their answer already.

Promises: nobody waits for them. They run when the response is on its way, at most one set at a time and none while
other requests wait for the thread; what they take is bounded by rows a second and by a share of the time. What they
say leaves records of outcome SHADOW with the arrival of the request they are about, which count nowhere.

Knows nothing of drift: who is asked, and when, is told by the agent process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from agent import clock
from agent.attempt import observable_labels
from agent.contract.errors import EngineFailed
from agent.contract.tensors import Array
from agent.lineup import Seat
from agent.observation import MAX_ROWS, Observation, Outcome, RingWriter
from agent.service import Service
from agent.watchdog import Watch

ROWS_PER_S: Final = 200.0
TIME_SHARE: Final = 0.1
PAUSE_S: Final = 0.002
"""How long after its answer a request's witnesses run: the response is sent by then, and a client that asks again at
once was served."""


@dataclass(frozen=True, slots=True)
class Question:
    """One answered request. `inputs` belong to it alone; `answered_by`: number of the engine in the plan."""

    arrival_ns: int
    data_time_s: float
    inputs: Mapping[str, Array]
    rows: int
    answered_by: int


@dataclass(frozen=True, slots=True)
class Said:
    """What one witness answered."""

    seat: Seat
    labels: Array


class Shadow:
    """`admit` and `record` belong to the event loop's thread, `ask` to the one that runs the service's engines."""

    def __init__(self, service: Service) -> None:
        """Asks nobody until `seats` are given; they may be replaced at any time."""
        self.seats: tuple[Seat, ...] = ()
        self.failed = 0
        self._service = service
        self._not_before_ns = 0
        self._busy = False

    def admit(self, now_ns: int, rows: int) -> bool:
        """Whether a request may be asked about now; then `ask` and `record` must follow."""
        if not self.seats or self._busy or now_ns < self._not_before_ns or not 0 < rows <= MAX_ROWS:
            return False
        self._busy = True
        self._not_before_ns = now_ns + int(rows * 1e9 / ROWS_PER_S)
        return True

    def ask(self, question: Question, watch: Watch, stuck_ns: int) -> list[Said]:
        """One witness after the other; one that fails says nothing."""
        began_ns = clock.monotonic_ns()
        said: list[Said] = []
        for seat in self.seats:
            if seat.index == question.answered_by:
                continue
            try:
                raw = watch.run(seat.engine, question.inputs, began_ns + stuck_ns)
            except EngineFailed:
                self.failed += 1
                continue
            labels = observable_labels(raw.get(self._service.plan.label_output))
            if labels is None or len(labels) != question.rows or not np.isfinite(labels).all():
                self.failed += 1
                continue
            said.append(Said(seat, labels))
        ended_ns = clock.monotonic_ns()
        self._not_before_ns = max(self._not_before_ns, ended_ns + int((ended_ns - began_ns) * (1 / TIME_SHARE - 1)))
        return said

    def record(self, question: Question, said: Sequence[Said], ring: RingWriter) -> None:
        """Leave what was said; row by row, so that all about one row lies together."""
        self._busy = False
        for row in range(question.rows):
            for one in said:
                ring.write(
                    Observation(
                        question.arrival_ns, question.data_time_s, service=self._service.index,
                        engine=one.seat.index, first_engine=question.answered_by, outcome=Outcome.SHADOW,
                        row=row, rows=question.rows, label=one.labels[row].tobytes(),
                    )
                )  # fmt: skip
