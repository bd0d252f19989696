"""One request on its way: guard, run, fail over within the same request; and the record it leaves.

Which engine is first is the agent process's decision; going on to the next one when an engine fails is made here,
because it cannot wait for anybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from agent import clock
from agent.blame import Doubt, content_of, disagreement, still_answers
from agent.contract.errors import DeadlineExceeded, EngineFailed, InvalidRequest, Overloaded, ServingError
from agent.contract.plan import EngineKind
from agent.contract.tensors import Array, Tensor
from agent.guard import NO_BITS, Verdict
from agent.lineup import Lineup, Seat
from agent.observation import (
    LABEL_WIDTH,
    MAX_ROWS,
    NO_CLASS,
    NO_ENGINE,
    VIEW_WIDTH,
    Observation,
    Outcome,
    RingWriter,
    label_statistics,
    source_of,
)
from agent.service import Answer, Request, Service
from agent.watchdog import TICK_S, Watch

NO_LABEL = (NO_CLASS, math.nan, math.nan)
NON_FINITE = "non_finite"
SLOW = 3.0  # a row may take so many times what it took while warming


@dataclass(frozen=True, slots=True)
class Trouble:
    """`blamed`: whether it counts against the engine; else too much was asked of it."""

    seat: Seat
    code: str
    text: str
    blamed: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What running a request came to, before anybody is told. `fits`: else it is recorded nowhere."""

    outcome: Outcome
    reply: Answer | ServingError
    first: int
    verdict: Verdict | None = None
    seat: Seat | None = None
    raw: Mapping[str, Array] | None = None
    troubles: tuple[Trouble, ...] = ()
    queue_us: float = 0.0
    fits: bool = True


@dataclass(frozen=True, slots=True)
class Ended:
    """A run of the first engine that was ended at its limit before anybody made an attempt of the request."""

    text: str
    began_ns: int
    limit_ns: int
    late: str


class Attempt:
    """One request on its way through the lineup. Touches nothing shared but `watch`, so any thread may run it."""

    def __init__(self, service: Service, request: Request, rows: int, watch: Watch, stuck_ns: int) -> None:
        self._service = service
        self._request = request
        self._rows = rows
        self._watch = watch
        self._stuck_ns = stuck_ns
        self._lineup = service.lineup  # read once: the whole request sees one order
        self._deadline_ns = service.deadline_ns(request)
        self._queue_us = (clock.monotonic_ns() - request.arrival_ns) / 1e3
        self._verdict: Verdict | None = None
        self._troubles: list[Trouble] = []

    def run(self, ended: Ended | None = None) -> Result:
        """Guard, then ask one engine after the other until one has an answer.

        `ended`: what the first engine came to already, with an input that the guard lets pass as it is.
        """
        name = self._service.plan.service
        if ended is None and clock.monotonic_ns() > self._deadline_ns:
            text = f"'{name}' could not begin within the deadline after {self._queue_us / 1e3:.0f} ms of waiting"
            return self._result(Outcome.DEADLINE, DeadlineExceeded(text))
        feeds = self._guarded()
        if self._verdict is not None and self._verdict.refusal:
            error = InvalidRequest(self._verdict.refusal, hint="The sensor or its driver needs attention.")
            return self._result(Outcome.REFUSED_BY_GUARD, error)
        seats = self._lineup.seats
        if ended is not None:
            trouble = self._failed_run(seats[0], ended.text, ended.limit_ns, ended.late, ended.began_ns)
            self._troubles.append(trouble)
        for place, seat in enumerate(seats[len(self._troubles) :], len(self._troubles)):
            if seat.plan.kind is EngineKind.FLOOR and self._service.plan.floor_status != 200:
                text = f"only the floor is left to answer for '{name}', and it is configured to refuse"
                return self._result(Outcome.ERROR, Overloaded(text))
            raw = self._try(seat, feeds, behind=seats[place + 1] if place + 1 < len(seats) else None)
            if raw is not None:
                return self._served(seat, raw)
            odd = disagreement(seat.plan.inputs, feeds) if self._troubles[-1].code == EngineFailed.code else ""
            if odd:
                error = InvalidRequest(f"{odd}: {self._troubles[-1].text}")
                return Result(Outcome.ERROR, error, NO_ENGINE, queue_us=self._queue_us, fits=False)
        return self._unanswered()

    def _guarded(self) -> Mapping[str, Array]:
        guard, inputs = self._service.guard, self._request.inputs
        if guard is None:
            return inputs
        given = inputs[guard.plan.input]
        self._verdict = guard.check(given, self._lineup.seats[0].plan.reads if self._lineup.seats else None)
        return inputs if self._verdict.x is given else {**inputs, guard.plan.input: self._verdict.x}

    def _try(self, seat: Seat, feeds: Mapping[str, Array], *, behind: Seat | None) -> Mapping[str, Array] | None:
        """Outputs of one engine; None, and one more trouble, when it has none to give."""
        began_ns = clock.monotonic_ns()
        limit_ns, late = self._limit(behind)
        try:
            raw = self._watch.run(seat.engine, feeds, limit_ns)
        except EngineFailed as error:
            self._troubles.append(self._failed_run(seat, str(error), limit_ns, late, began_ns))
            return None
        for output in seat.plan.outputs:
            array = raw[output.name]
            if array.dtype.kind == "f" and np.count_nonzero(np.isfinite(array)) < array.size:
                text = f"output '{output.name}' of engine '{seat.plan.engine}' holds NaN or infinity"
                self._troubles.append(Trouble(seat, NON_FINITE, text))
                return None
        return raw

    def _failed_run(self, seat: Seat, text: str, limit_ns: int, late: str, began_ns: int) -> Trouble:
        """What a run without outputs means: its own failure, or that it was ended, and whose fault that is."""
        now_ns, engine = clock.monotonic_ns(), seat.plan.engine
        if now_ns <= limit_ns:
            return Trouble(seat, EngineFailed.code, text)
        run_ms, rows = (now_ns - began_ns) / 1e6, f"{self._rows} row{'s' if self._rows > 1 else ''}"
        if late != DeadlineExceeded.code:
            return Trouble(seat, late, f"engine '{engine}' was stuck on {rows} and ended after {run_ms:.0f} ms")
        text = f"engine '{engine}' missed its deadline: not done with {rows} after {run_ms:.0f} ms"
        return Trouble(seat, late, text, blamed=not self._asks_too_much(seat, limit_ns - began_ns))

    def _asks_too_much(self, seat: Seat, given_ns: int) -> bool:
        """Whether the caller gave less time than so many rows take at the engine's normal speed.

        Its normal speed is up to SLOW times that of warming, one row a run. One row within the service's own
        deadline is never too much: an engine too slow for that should be left.
        """
        own = self._rows == 1 and self._request.deadline_ms is None
        return not own and given_ns < SLOW * seat.engine.warm_us * 1e3 * self._rows

    def _limit(self, behind: Seat | None) -> tuple[int, str]:
        now_ns = clock.monotonic_ns()
        allowed_ns, late = run_limit(behind, self._deadline_ns - now_ns, rows=self._rows, stuck_ns=self._stuck_ns)
        return now_ns + allowed_ns, late

    def _served(self, seat: Seat, raw: Mapping[str, Array]) -> Result:
        plan, datatypes = seat.plan, self._service.datatypes
        if not self._troubles:
            self._service.doubt = None
        outcome, reason = Outcome.OK, self._lineup.reason
        if self._troubles:
            failed = self._troubles[-1]
            outcome, reason = Outcome.FAILED_OVER, f"failover: {failed.seat.plan.engine} {failed.code}"
        answer = Answer(
            outputs=tuple(Tensor(name, datatypes[name], raw[name]) for name in self._request.outputs or datatypes),
            engine=plan.engine,
            digest=plan.digest,
            version=str(plan.version),
            reason=reason,
            guard="" if self._verdict is None else self._verdict.text,
        )
        return self._result(Outcome.FLOOR if plan.kind is EngineKind.FLOOR else outcome, answer, seat, raw)

    def _unanswered(self) -> Result:
        if not self._troubles:
            return self._result(Outcome.ERROR, Overloaded(f"no engine of '{self._service.plan.service}' is usable"))
        text = "; ".join(trouble.text for trouble in self._troubles)
        if self._troubles[-1].code in (DeadlineExceeded.code, "stuck"):
            return self._result(Outcome.DEADLINE, DeadlineExceeded(text))
        return self._result(Outcome.ERROR, EngineFailed(text))

    def _result(
        self,
        outcome: Outcome,
        reply: Answer | ServingError,
        seat: Seat | None = None,
        raw: Mapping[str, Array] | None = None,
    ) -> Result:
        first = first_engine(self._lineup)
        if self._troubles and (seat is None or seat.plan.kind is EngineKind.FLOOR):
            self._troubles[0] = self._judged(self._troubles[0])
        if outcome is Outcome.ERROR and not self._troubles:
            first = NO_ENGINE  # nothing ran, so nothing failed: the floor that refuses was asked first
        if self._troubles and not self._troubles[0].blamed:
            first = NO_ENGINE  # observed as nobody's failure
        return Result(outcome, reply, first, self._verdict, seat, raw, tuple(self._troubles), self._queue_us)

    def _judged(self, trouble: Trouble) -> Trouble:
        """What nobody but a constant answered may be the request's fault: see `blame`."""
        if trouble.code not in (EngineFailed.code, NON_FINITE):
            return trouble
        limit_ns = min(self._deadline_ns, clock.monotonic_ns() + self._stuck_ns)
        if not still_answers(trouble.seat.engine, self._watch, limit_ns):
            return trouble
        service, before = self._service, self._service.doubt
        service.doubt = Doubt(trouble.seat.index, self._request.arrival_ns, content_of(self._request.inputs))
        if service.doubt.confirmed(before, service.last_ns):
            return trouble
        return replace(trouble, blamed=False, text=f"{trouble.text} (it still answers what it was warmed with)")


def run_limit(behind: Seat | None, left_ns: float, *, rows: int, stuck_ns: int) -> tuple[int, str]:
    """How long a run may take, and the name of its end: in time for the engine behind it, at the latest when stuck.

    `left_ns`: until the answer is due.
    """
    reserve_ns = 0.0 if behind is None else SLOW * 1e3 * behind.engine.warm_us * rows + 2e9 * TICK_S
    due_ns = max(left_ns - reserve_ns, left_ns / 2)
    return (stuck_ns, "stuck") if due_ns > stuck_ns else (int(due_ns), DeadlineExceeded.code)


def observe(ring: RingWriter, service: Service, request: Request, result: Result, rows: int, elapsed_ns: int) -> None:
    """One record per row of the answer's label, else of the request, up to MAX_ROWS.

    Raises: what an output that is not what its plan promised makes numpy raise; then nothing was written.
    """
    seat = result.seat
    views = _views(result)
    labels = None if result.raw is None else result.raw.get(service.plan.label_output)
    if labels is not None and labels.ndim:
        rows = len(labels)
    raw, judged = _labels(labels)
    source = request.source
    if not source and request.client and not math.isnan(request.data_time_s):
        source = source_of(request.client)
    for row in range(min(max(rows, 1), MAX_ROWS)):
        bits = NO_BITS if result.verdict is None else result.verdict.row_bits(row)
        view = b"" if views is None or row >= len(views) else views[row].tobytes()
        label = b"" if raw is None else raw[row].tobytes()
        predicted, confidence, entropy = NO_LABEL if judged is None else judged[row]
        ring.write(
            Observation(
                request.arrival_ns, request.data_time_s, elapsed_ns / 1e3, result.queue_us, service.index,
                NO_ENGINE if seat is None else seat.index, result.first, result.outcome, row, min(rows, 0xFFFF),
                int(predicted), confidence, entropy, *bits, len(view) // 4, view, label, source,
            )
        )  # fmt: skip


def _labels(labels: Array | None) -> tuple[Array | None, list[list[float]] | None]:
    """What records hold of the label output: its raw rows, or three numbers of each; None and None without any."""
    if labels is None or not labels.ndim or not labels.size:
        return None, None
    flat = labels[:MAX_ROWS].reshape(min(len(labels), MAX_ROWS), -1)
    if flat.dtype == np.float32 and flat.shape[1] <= LABEL_WIDTH:
        return np.ascontiguousarray(flat), None
    with np.errstate(over="ignore"):
        return None, np.stack(label_statistics(flat), axis=1).astype(np.float32).tolist()


def observable_labels(labels: Array | None) -> Array | None:
    """The label output's rows as a record can hold them, (rows, at most LABEL_WIDTH) float32; None: it cannot."""
    if labels is None or not labels.ndim or not labels.size:
        return None
    flat = labels.reshape(len(labels), -1)
    return np.ascontiguousarray(flat) if flat.dtype == np.float32 and flat.shape[1] <= LABEL_WIDTH else None


def _views(result: Result) -> Array | None:
    """Hidden outputs side by side, (rows, at most VIEW_WIDTH) float32; None when the engine has none."""
    if result.seat is None or result.raw is None or not result.seat.plan.views:
        return None
    arrays = [result.raw[view.output] for view in result.seat.plan.views]
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
    return joined[:, :VIEW_WIDTH].astype("<f4", copy=False)


def first_engine(lineup: Lineup) -> int:
    """Index of the engine that is asked first."""
    return lineup.seats[0].index if lineup.seats else NO_ENGINE
