"""One request: guard, admit, run, fail over within the same request, observe.

Knows nothing of HTTP. Quick models run on the event loop's thread, slow ones on a thread per service behind a bounded
queue, so that probes stay answered. Which engine is first is the agent process's decision; going on to the next one
when an engine fails is this module's, because it cannot wait for anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from agent import clock
from agent.admission import Admission, Judgement, retry_after_s
from agent.contract.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServingError,
    UnknownModel,
)
from agent.contract.plan import EngineKind, EngineTrouble, ServicePlan
from agent.contract.tensors import Array, Tensor, check_shape
from agent.engine import leading_rows
from agent.guard import NO_BITS, Guard, Verdict
from agent.lineup import Lineup, Seat
from agent.observation import MAX_ROWS, NO_CLASS, NO_ENGINE, VIEW_WIDTH, Observation, Outcome, RingWriter
from agent.watchdog import TICK_S, UNSTOPPABLE_S, Watch, Watchdog

INLINE_US = 300.0  # quicker runs cost less than handing them to another thread and back
MAX_BATCH_ROWS = 4096
MAX_DEADLINE_MS = 3_600_000.0
TOO_MANY_REQUESTS = 429  # of this client's; when the device is full for everybody it is 503
LARGEST_CLASS = 0x7FFF  # what a record can hold
# what an output that is not what its plan promised can raise while it is recorded
_UNRECORDABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)
SLOW = 3.0  # a row may take so many times what it took while warming


@dataclass(frozen=True, slots=True)
class Request:
    """One decoded request. `outputs`: names asked for, empty = all. `data_time_s`: NaN = not given.

    `client`: who asks, for fair shares of the queue; empty = nobody knows.
    """

    service: str
    inputs: Mapping[str, Array]
    arrival_ns: int
    outputs: Sequence[str] = ()
    version: str = ""
    deadline_ms: float | None = None
    data_time_s: float = math.nan
    client: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Public outputs and how they came about. Hidden view outputs are never in here."""

    outputs: tuple[Tensor, ...]
    engine: str
    digest: str
    version: str
    reason: str
    guard: str


Done = Callable[[Answer | ServingError], None]


@dataclass(slots=True)
class Counters:
    """Totals of one service since the worker started; written by the event loop's thread only."""

    requests: int = 0
    rows: int = 0
    answered: int = 0
    failed: int = 0
    by_outcome: list[int] = field(default_factory=lambda: [0] * len(Outcome))
    queue_us: float = 0.0
    latency_us: float = 0.0
    last_wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Trouble:
    """`blamed`: whether it counts against the engine; else too much was asked of it."""

    seat: Seat
    code: str
    text: str
    blamed: bool = True


@dataclass(frozen=True, slots=True)
class _Result:
    """What running a request came to, before anybody is told."""

    outcome: Outcome
    reply: Answer | ServingError
    first: int
    verdict: Verdict | None = None
    seat: Seat | None = None
    raw: Mapping[str, Array] | None = None
    troubles: tuple[_Trouble, ...] = ()
    queue_us: float = 0.0


class Service:
    """One served name: its plan, its lineup (replaced by assignment), its guard and its counters."""

    def __init__(self, index: int, plan: ServicePlan, lineup: Lineup) -> None:
        """Raises: ConfigError: the guard does not fit the service's inputs."""
        _check_guard(plan)
        self.index = index
        self.plan = plan
        self.lineup = lineup
        self.guard = None if plan.guard is None else Guard(plan.guard)
        self.signature = plan.engines[0]
        self._inputs = {tensor.name: tensor for tensor in self.signature.inputs}
        self.datatypes = {tensor.name: tensor.datatype for tensor in self.signature.outputs}
        self.slowest_us = lineup.slowest_us  # a lineup is reordered, but keeps its engines
        self.version = str(next(e.version for e in plan.engines if e.engine == plan.active))
        self.counters = Counters()
        self.admission = Admission(plan.queue_limit, self.slowest_us)  # of requests for the service's thread

    @property
    def ready(self) -> bool:
        """Whether anything but silence can answer."""
        return bool(self.lineup.seats)

    def check_version(self, version: str) -> None:
        """Raises: UnknownModel: another version than the served one is asked for."""
        if version and version != self.version:
            raise UnknownModel(f"'{self.plan.service}' has no version {version[:20]}, it serves {self.version}")

    def check_input(self, name: str, datatype: str, shape: tuple[int, ...]) -> None:
        """Compare one described input with the plan, before anybody looks at its data.

        Raises:
            InvalidRequest: naming the input, what was expected and what was given.
        """
        expected = self._inputs.get(name)
        if expected is None:
            raise InvalidRequest(f"'{self.plan.service}' takes {self._wanted()}, given was '{name[:60]}'")
        if datatype != expected.datatype:
            raise InvalidRequest(f"input '{name}' must be {expected.datatype}, {datatype} was given")
        if shape[1:] != expected.shape[1:] or shape[:1] != expected.shape[:1]:  # else there is nothing to compare
            check_shape(name, expected.shape, shape)
        if expected.shape[:1] == (-1,) and not 0 < shape[0] <= MAX_BATCH_ROWS:
            raise InvalidRequest(f"a request has 1 to {MAX_BATCH_ROWS} rows, not {shape[0]}")

    def check(self, request: Request) -> int:
        """Compare a request, whose inputs passed `check_input`, with the plan; returns its rows.

        Raises:
            InvalidRequest, UnknownModel: naming what is wrong, what was expected and what was given.
        """
        self.check_version(request.version)
        if request.inputs.keys() != self._inputs.keys():
            given = ", ".join(request.inputs) or "none"
            raise InvalidRequest(f"'{self.plan.service}' takes {self._wanted()}, given were {given}")
        for name in request.outputs:
            if name not in self.datatypes:
                only = ", ".join(self.datatypes)
                raise InvalidRequest(f"'{self.plan.service}' has no output '{name[:60]}', only {only}")
        if request.deadline_ms is not None and not 0 < request.deadline_ms <= MAX_DEADLINE_MS:
            raise InvalidRequest(f"ew_deadline_ms must be above 0 and at most {MAX_DEADLINE_MS:.0f}")
        return leading_rows(self.signature.inputs, request.inputs)

    def deadline_ns(self, request: Request) -> int:
        """When the answer is due, monotonic."""
        return request.arrival_ns + int((request.deadline_ms or self.plan.deadline_ms) * 1e6)

    def _wanted(self) -> str:
        return f"the inputs {', '.join(self._inputs)}"


class Serving:
    """All services of a worker. `submit` is called on the event loop's thread and never waits for a queue."""

    def __init__(
        self,
        services: Sequence[Service],
        ring: RingWriter,
        *,
        stuck_after_s: float,
        on_unstoppable: Callable[[], None],
        on_trouble: Callable[[], None] = lambda: None,
        inline_us: float = INLINE_US,
    ) -> None:
        """`on_trouble` is called on the event loop's thread when `take_troubles` has something new.

        Requests expected to take less than `inline_us` are run on the event loop's thread.
        """
        self.services = {service.plan.service: service for service in services}
        self._ring = ring
        self._stuck_ns = int(stuck_after_s * 1e9)
        self._dog = Watchdog(stuck_after_s, on_unstoppable)
        self._watch = self._dog.watch()
        self._runners: dict[str, _Runner] = {}
        self._troubles: dict[tuple[str, str, str], EngineTrouble] = {}
        self._on_trouble = on_trouble
        self._inline_us = inline_us
        self._unrecorded = 0

    def service(self, name: str) -> Service:
        """Raises: UnknownModel: no service has this name."""
        if name not in self.services:
            raise UnknownModel(f"there is no model '{name[:60]}', served are: {', '.join(self.services)}")
        return self.services[name]

    def submit(self, request: Request, done: Done) -> None:
        """Answer a request, whose inputs passed `Service.check_input`, on this thread: at once, or in its turn.

        Raises:
            InvalidRequest, UnknownModel: the request does not fit the service; `done` is not called.
        """
        service = self.service(request.service)
        rows = service.check(request)
        if rows * service.slowest_us < self._inline_us:
            result = _Attempt(service, request, rows, self._watch, self._stuck_ns).run()
            self._finish(service, request, rows, result, done)
            return
        refusal = _refusal(service, request)
        if refusal is not None:
            self._finish(service, request, rows, refusal, done)
            return
        if request.service not in self._runners:
            self._runners[request.service] = _Runner(service, self._dog.watch(), self._stuck_ns)
        service.admission.enter(request.client)
        self._runners[request.service].put(
            request, rows, lambda result: self._leave(service, request, rows, result, done)
        )

    def prefer(self, service_name: str, engine: str, reason: str) -> None:
        """Let `engine` answer first from the next request on.

        Raises:
            UnknownModel: no such service, or no usable engine of this name.
        """
        service = self.service(service_name)
        service.lineup = service.lineup.prefer(engine, active=service.plan.active, reason=reason)

    def take_troubles(self) -> list[EngineTrouble]:
        """Failed runs since the last call, one entry per service, engine and code."""
        troubles = list(self._troubles.values())
        self._troubles.clear()
        return troubles

    def statistics(self) -> dict[str, float]:
        """Totals over all services, and what is waiting now."""
        every = [service.counters for service in self.services.values()]
        numbers: dict[str, float] = {
            "requests": sum(c.requests for c in every),
            "rows": sum(c.rows for c in every),
            "errors": sum(c.failed for c in every),
            "observations": self._ring.written,
            "unrecorded": self._unrecorded,
        }
        for outcome in Outcome:
            numbers[outcome.name.lower()] = sum(c.by_outcome[outcome] for c in every)
        queues = [service.admission.statistics() for service in self.services.values()]
        return numbers | {name: sum(queue[name] for queue in queues) for name in queues[0]} if queues else numbers

    def close(self) -> None:
        """End the threads; queued requests are dropped."""
        for runner in self._runners.values():
            runner.close()
        self._dog.close()

    def _leave(self, service: Service, request: Request, rows: int, result: _Result, done: Done) -> None:
        ran_us = (clock.monotonic_ns() - request.arrival_ns) / 1e3 - result.queue_us
        ran = result.troubles or result.outcome is not Outcome.DEADLINE  # else its deadline passed before its turn
        service.admission.leave(request.client, ran_us if ran else None)
        self._finish(service, request, rows, result, done)

    def _finish(self, service: Service, request: Request, rows: int, result: _Result, done: Done) -> None:
        done(result.reply)
        latency_us = (clock.monotonic_ns() - request.arrival_ns) / 1e3
        counters = service.counters
        counters.requests += 1
        counters.by_outcome[result.outcome] += 1
        counters.queue_us += result.queue_us
        counters.last_wall_s = clock.wall_s()
        if isinstance(result.reply, Answer):
            counters.answered += 1
            counters.rows += rows
            counters.latency_us += latency_us
        else:
            counters.failed += 1
        for trouble in result.troubles:
            self._note(service, trouble)
        try:
            _observe(self._ring, service, request, result, rows, latency_us)
        except _UNRECORDABLE:  # the request has its answer; raising would only give it a second one
            self._unrecorded += 1

    def _note(self, service: Service, trouble: _Trouble) -> None:
        key = (service.plan.service, trouble.seat.plan.engine, trouble.code)
        count = self._troubles[key].count + 1 if key in self._troubles else 1
        self._troubles[key] = EngineTrouble(*key, trouble.text, count)
        self._on_trouble()


class _Runner:
    """The thread of one service with slow engines."""

    def __init__(self, service: Service, watch: Watch, stuck_ns: int) -> None:
        self._service = service
        self._watch = watch
        self._stuck_ns = stuck_ns
        self._closing = False
        self._loop = asyncio.get_running_loop()
        # bounded by the plan's queue_limit, which `_refusal` keeps
        self._queue: queue.SimpleQueue[tuple[Request, int, Callable[[_Result], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"run-{service.plan.service}", daemon=True)
        self._thread.start()

    def put(self, request: Request, rows: int, done: Callable[[_Result], None]) -> None:
        self._queue.put((request, rows, done))

    def close(self) -> None:
        self._closing = True
        self._watch.end()
        self._queue.put(None)
        self._thread.join(UNSTOPPABLE_S)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None and not self._closing:
            request, rows, done = job
            result = _Attempt(self._service, request, rows, self._watch, self._stuck_ns).run()
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                self._loop.call_soon_threadsafe(done, result)


def _check_guard(plan: ServicePlan) -> None:
    """A guard that does not fit would fail at every request."""
    if plan.guard is None:
        return
    shapes = {tensor.name: tensor.shape for tensor in plan.engines[0].inputs}
    shape, channels = shapes.get(plan.guard.input), len(plan.guard.channels)
    if shape is None or (channels and shape[-1] != channels):
        raise ConfigError(
            f"the guard of '{plan.service}' names {channels} channels of input '{plan.guard.input}', "
            f"the inputs are {shapes}"
        )


def _refusal(service: Service, request: Request) -> _Result | None:
    """Why a request may not even wait: see `agent.admission`."""
    admission, client = service.admission, request.client
    judgement = admission.ask(client, (request.deadline_ms or service.plan.deadline_ms) * 1e3)
    if judgement is Judgement.ADMITTED:
        return None
    load, yours = admission.load(client), judgement is Judgement.OVER_SHARE
    whose = f", {load.mine} of them yours" if yours else ""
    error = Overloaded(
        f"'{service.plan.service}' has {load.waiting} requests waiting{whose}, "
        f"about {load.wait_us / 1e3:.0f} ms of work",
        hint="Ask again later, or less often.",
        status=TOO_MANY_REQUESTS if yours else None,
        retry_after_s=retry_after_s(load),
    )
    return _Result(Outcome.OVERLOADED, error, first=_first(service.lineup))


class _Attempt:
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
        self._troubles: list[_Trouble] = []

    def run(self) -> _Result:
        """Guard, then ask one engine after the other until one has an answer."""
        name = self._service.plan.service
        if clock.monotonic_ns() > self._deadline_ns:
            text = f"'{name}' could not begin within the deadline after {self._queue_us / 1e3:.0f} ms of waiting"
            return self._result(Outcome.DEADLINE, DeadlineExceeded(text))
        feeds = self._guarded()
        if self._verdict is not None and self._verdict.refusal:
            error = InvalidRequest(self._verdict.refusal, hint="The sensor or its driver needs attention.")
            return self._result(Outcome.REFUSED_BY_GUARD, error)
        seats = self._lineup.seats
        for place, seat in enumerate(seats):
            if seat.plan.kind is EngineKind.FLOOR and self._service.plan.floor_status != 200:
                text = f"only the floor is left to answer for '{name}', and it is configured to refuse"
                return self._result(Outcome.ERROR, Overloaded(text))
            raw = self._try(seat, feeds, behind=seats[place + 1] if place + 1 < len(seats) else None)
            if raw is not None:
                return self._served(seat, raw)
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
                self._troubles.append(_Trouble(seat, "non_finite", text))
                return None
        return raw

    def _failed_run(self, seat: Seat, text: str, limit_ns: int, late: str, began_ns: int) -> _Trouble:
        """What a run without outputs means: its own failure, or that it was ended, and whose fault that is."""
        now_ns, engine = clock.monotonic_ns(), seat.plan.engine
        if now_ns <= limit_ns:
            return _Trouble(seat, EngineFailed.code, text)
        run_ms, rows = (now_ns - began_ns) / 1e6, f"{self._rows} row{'s' if self._rows > 1 else ''}"
        if late != DeadlineExceeded.code:
            return _Trouble(seat, late, f"engine '{engine}' was stuck on {rows} and ended after {run_ms:.0f} ms")
        text = f"engine '{engine}' missed its deadline: not done with {rows} after {run_ms:.0f} ms"
        return _Trouble(seat, late, text, blamed=not self._asks_too_much(seat, limit_ns - began_ns))

    def _asks_too_much(self, seat: Seat, given_ns: int) -> bool:
        """Whether the caller gave less time than so many rows take at the engine's normal speed.

        Its normal speed is up to SLOW times that of warming, one row a run. One row within the service's own
        deadline is never too much: an engine too slow for that should be left.
        """
        own = self._rows == 1 and self._request.deadline_ms is None
        return not own and given_ns < SLOW * seat.engine.warm_us * 1e3 * self._rows

    def _limit(self, behind: Seat | None) -> tuple[int, str]:
        """When a run is ended, and the name of that: in time for the engine behind it, at the latest when stuck."""
        now_ns = clock.monotonic_ns()
        left_ns = self._deadline_ns - now_ns
        reserve_ns = 0.0 if behind is None else SLOW * 1e3 * behind.engine.warm_us * self._rows + 2e9 * TICK_S
        due_ns = max(left_ns - reserve_ns, left_ns / 2)
        if due_ns > self._stuck_ns:
            return now_ns + self._stuck_ns, "stuck"
        return now_ns + int(due_ns), DeadlineExceeded.code

    def _served(self, seat: Seat, raw: Mapping[str, Array]) -> _Result:
        plan, datatypes = seat.plan, self._service.datatypes
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

    def _unanswered(self) -> _Result:
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
    ) -> _Result:
        first = _first(self._lineup)
        if outcome is Outcome.ERROR and not self._troubles:
            first = NO_ENGINE  # nothing ran, so nothing failed: the floor that refuses was asked first
        if self._troubles and not self._troubles[0].blamed:
            first = NO_ENGINE  # observed as nobody's failure
        return _Result(outcome, reply, first, self._verdict, seat, raw, tuple(self._troubles), self._queue_us)


def _observe(
    ring: RingWriter, service: Service, request: Request, result: _Result, rows: int, latency_us: float
) -> None:
    """One record per row of the answer's label, else of the request, up to MAX_ROWS."""
    seat = result.seat
    views = _views(result)
    labels = None if result.raw is None else result.raw.get(service.plan.label_output)
    if labels is not None and labels.ndim:
        rows = len(labels)
    for row in range(min(rows, MAX_ROWS)):
        bits = NO_BITS if result.verdict is None else result.verdict.row_bits(row)
        view = b"" if views is None or row >= len(views) else views[row].tobytes()
        ring.write(
            Observation(
                request.arrival_ns, request.data_time_s, latency_us, result.queue_us, service.index,
                NO_ENGINE if seat is None else seat.index, result.first, result.outcome, row, min(rows, 0xFFFF),
                *_label(labels, row), *bits, len(view) // 4, view,
            )
        )  # fmt: skip


def _views(result: _Result) -> Array | None:
    """Hidden outputs side by side, (rows, at most VIEW_WIDTH) float32; None when the engine has none."""
    if result.seat is None or result.raw is None or not result.seat.plan.views:
        return None
    arrays = [result.raw[view.output] for view in result.seat.plan.views]
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
    return joined[:, :VIEW_WIDTH].astype("<f4", copy=False)


def _label(labels: Array | None, row: int) -> tuple[int, float, float]:
    """Predicted class, its share, and the entropy in nats; NaN entropy when the row is no distribution."""
    if labels is None or not labels.ndim:
        return NO_CLASS, math.nan, math.nan
    shares = labels[row].ravel().tolist()
    largest = max(shares)
    predicted = min(shares.index(largest), LARGEST_CLASS)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-3:
        return predicted, largest, math.nan
    return predicted, largest, sum(-share * math.log(share) for share in shares if share > 0)


def _first(lineup: Lineup) -> int:
    return lineup.seats[0].index if lineup.seats else NO_ENGINE
