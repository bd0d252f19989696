"""The services of a worker: who answers a request, and on which thread; then its observation.

Knows nothing of HTTP. Quick models run on the event loop's thread, slow ones on a thread per service behind a bounded
queue, so that probes stay answered.
"""

from __future__ import annotations

import asyncio
import math
import queue
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from agent import clock
from agent.admission import Judgement, retry_after_s
from agent.attempt import Attempt, Ended, Result, Trouble, first_engine, observe
from agent.contract.errors import EngineFailed, Overloaded, ServingError, UnknownModel
from agent.contract.plan import EngineTrouble
from agent.contract.tensors import Array
from agent.express import Aside, Express, Serve, Wire
from agent.handback import Handback
from agent.lineup import INLINE_US, Seat
from agent.observation import NO_ENGINE, Outcome, RingWriter
from agent.service import MAX_BATCH_ROWS, Answer, Request, Service
from agent.shadow import PAUSE_S, Question, Said, Shadow
from agent.tally import COUNTED
from agent.watchdog import UNSTOPPABLE_S, Watch, Watchdog

__all__ = ["MAX_BATCH_ROWS", "Answer", "Done", "Request", "Service", "Serving"]

TOO_MANY_REQUESTS = 429  # of this client's; when the device is full for everybody it is 503
# what an output that is not what its plan promised can raise while it is recorded
_UNRECORDABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)

Done = Callable[[Answer | ServingError], None]


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
        for service in services:
            service.count_in(ring)
        self._ring = ring
        self._stuck_ns = int(stuck_after_s * 1e9)
        self._dog = Watchdog(stuck_after_s, on_unstoppable)
        self._watch = self._dog.watch()
        self._runners: dict[str, _Runner] = {}
        self._handback: Handback | None = None
        self._troubles: dict[tuple[str, str, str], EngineTrouble] = {}
        self._on_trouble = on_trouble
        self._inline_us = inline_us
        self._unrecorded = 0
        self._express: dict[str, Express | None] = {}
        self._known_shadows: dict[str, Shadow] = {}
        self._shadows: dict[str, Shadow] = {}  # those that ask somebody now
        self._shadow_timers: set[asyncio.TimerHandle] = set()

    def service(self, name: str) -> Service:
        """Raises: UnknownModel: no service has this name."""
        if name not in self.services:
            raise UnknownModel(f"there is no model '{name[:60]}', served are: {', '.join(self.services)}")
        return self.services[name]

    def submit(self, request: Request, done: Done, ended: Ended | None = None) -> None:
        """Answer a request, whose inputs passed `Service.check_input`, on this thread: at once, or in its turn.

        `ended`: what `Express` left to us with this request.

        Raises:
            InvalidRequest, UnknownModel: the request does not fit the service; `done` is not called.
        """
        service = self.service(request.service)
        rows = service.check(request)
        if rows * service.slowest_us < self._inline_us:
            result = Attempt(service, request, rows, self._watch, self._stuck_ns).run(ended)
            self._finish(service, request, rows, result, done)
            return
        refusal = _refusal(service, request.client, (request.deadline_ms or service.plan.deadline_ms) * 1e3)
        if refusal is not None:
            self._finish(service, request, rows, refusal, done)
            return
        if request.service not in self._runners:
            self._handback = self._handback or Handback()
            self._runners[request.service] = _Runner(service, self._dog.watch(), self._stuck_ns, self._handback)
        service.admission.enter(request.client)
        self._runners[request.service].put(
            request, rows, lambda result: self._leave(service, request, rows, result, done)
        )

    def turn_away(self, service: Service, client: str, arrival_ns: int) -> ServingError | None:
        """Why a request need not be looked at: there is no place in the queue, whatever it says. None: it may be.

        The refused request is counted and observed here.
        """
        if service.slowest_us < self._inline_us:
            return None
        refusal = _refusal(service, client, math.inf)
        if refusal is None or not isinstance(refusal.reply, ServingError):
            return None
        request = Request(service.plan.service, {}, arrival_ns, client=client)
        self._finish(service, request, 1, refusal, lambda _: None)
        return refusal.reply

    def express(self, request: Request, wire: Callable[[Express], Wire | None]) -> Serve | None:
        """The short way for all requests that differ from this one in their numbers only; None: there is none.

        `wire`: what such messages look like.
        """
        service = self.service(request.service)
        if service.check(request) * service.slowest_us >= self._inline_us:
            return None
        known = self._express.get(request.service)
        if known is None or known.stale:
            known = self._express[request.service] = Express.prepare(service)
        found = None if known is None else wire(known)
        if known is None or found is None:
            return None
        aside = Aside(self._shadows, lambda arrival_ns, inputs: self._consult_quick(service, arrival_ns, inputs))
        return known.serve(request, found, self._watch, self._ring, self._stuck_ns, aside)

    def prefer(self, service_name: str, engine: str, reason: str) -> None:
        """Let `engine` answer first from the next request on.

        Raises:
            UnknownModel: no such service, or no usable engine of this name.
        """
        service = self.service(service_name)
        service.lineup = service.lineup.prefer(engine, active=service.plan.active, reason=reason)

    def consult(self, service_name: str, engines: Sequence[str]) -> None:
        """Ask these engines too, from the next request on, after each answer; those not usable are left out.

        Raises:
            UnknownModel: no such service.
        """
        service = self.service(service_name)
        seats = sorted((one for one in service.lineup.seats if one.plan.engine in engines), key=lambda one: one.index)
        shadow = self._known_shadows.setdefault(service_name, Shadow(service))
        shadow.seats = tuple(seats)
        if seats:
            self._shadows[service_name] = shadow
        else:
            self._shadows.pop(service_name, None)

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
            "unwitnessed": sum(shadow.failed for shadow in self._known_shadows.values()),
        }
        for outcome in COUNTED:
            numbers[outcome.name.lower()] = sum(c.by_outcome[outcome] for c in every)
        queues = [service.admission.statistics() for service in self.services.values()]
        return numbers | {name: sum(queue[name] for queue in queues) for name in queues[0]} if queues else numbers

    def close(self) -> None:
        """End the threads; queued requests are dropped."""
        for timer in self._shadow_timers:
            timer.cancel()
        for runner in self._runners.values():
            runner.close()
        if self._handback is not None:
            self._handback.close()
        self._dog.close()

    def _leave(self, service: Service, request: Request, rows: int, result: Result, done: Done) -> None:
        ran_us = (clock.monotonic_ns() - request.arrival_ns) / 1e3 - result.queue_us
        ran = result.troubles or result.outcome is not Outcome.DEADLINE  # else its deadline passed before its turn
        service.admission.leave(request.client, ran_us if ran else None)
        self._finish(service, request, rows, result, done)

    def _finish(self, service: Service, request: Request, rows: int, result: Result, done: Done) -> None:
        done(result.reply)
        elapsed_ns = clock.monotonic_ns() - request.arrival_ns
        service.queue_us += result.queue_us
        service.last_ns = request.arrival_ns
        for trouble in result.troubles:
            self._note(service, trouble)
        if not result.fits:
            return
        try:
            observe(self._ring, service, request, result, rows, elapsed_ns)
        except _UNRECORDABLE:  # the request has its answer; raising would only give it a second one
            self._unrecorded += 1
            observe(self._ring, service, request, replace(result, raw=None), rows, elapsed_ns)  # it counts
        if self._shadows and result.seat is not None:
            self._consult_after(service, request, result.seat, self._seen(service, request, result), rows)

    # --- witnesses ------------------------------------------------------------------------------------------
    def _seen(self, service: Service, request: Request, result: Result) -> Mapping[str, Array]:
        """What the engine got: the guard may have repaired it."""
        if service.guard is None or result.verdict is None:
            return request.inputs
        return {**request.inputs, service.guard.plan.input: result.verdict.x}

    def _consult_quick(self, service: Service, arrival_ns: int, inputs: Mapping[str, Array]) -> None:
        """Of the short way: its inputs are in memory that the next request writes to."""
        shadow, seat = self._shadows.get(service.plan.service), service.lineup.seats[0]
        if shadow is None or not shadow.admit(arrival_ns, 1):
            return
        copies = {name: array.copy() for name, array in inputs.items()}
        self._later(shadow, Question(arrival_ns, math.nan, copies, 1, seat.index))

    def _consult_after(
        self, service: Service, request: Request, seat: Seat, inputs: Mapping[str, Array], rows: int
    ) -> None:
        name = service.plan.service
        shadow, inline = self._shadows.get(name), rows * service.slowest_us < self._inline_us
        if shadow is None or (not inline and service.admission.statistics()["waiting"]):
            return
        if not shadow.admit(request.arrival_ns, rows):
            return
        question = Question(request.arrival_ns, request.data_time_s, inputs, rows, seat.index)
        if inline:
            self._later(shadow, question)
        elif name in self._runners:
            self._runners[name].consult(shadow, question, lambda said: shadow.record(question, said, self._ring))

    def _later(self, shadow: Shadow, question: Question) -> None:
        def run() -> None:
            self._shadow_timers.discard(timer)
            said: list[Said] = []
            try:
                said = shadow.ask(question, self._watch, self._stuck_ns)
            finally:
                shadow.record(question, said, self._ring)

        timer = asyncio.get_running_loop().call_later(PAUSE_S, run)
        self._shadow_timers.add(timer)  # one of each service at most

    def _note(self, service: Service, trouble: Trouble) -> None:
        key = (service.plan.service, trouble.seat.plan.engine, trouble.code)
        count = self._troubles[key].count + 1 if key in self._troubles else 1
        self._troubles[key] = EngineTrouble(*key, trouble.text, count)
        self._on_trouble()


class _Runner:
    """The thread of one service with slow engines."""

    def __init__(self, service: Service, watch: Watch, stuck_ns: int, handback: Handback) -> None:
        self._service = service
        self._watch = watch
        self._stuck_ns = stuck_ns
        self._handback = handback
        self._closing = False
        # bounded by the plan's queue_limit, which `_refusal` keeps
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"run-{service.plan.service}", daemon=True)
        self._thread.start()

    def put(self, request: Request, rows: int, done: Callable[[Result], None]) -> None:
        def run() -> None:
            try:
                result = Attempt(self._service, request, rows, self._watch, self._stuck_ns).run()
            except Exception as error:  # noqa: BLE001 - told as a bug; the thread is all that answers its service
                self._handback.give(_tell, error)
                result = Result(Outcome.ERROR, EngineFailed("internal error"), first=NO_ENGINE)
            self._handback.give(done, result)

        self._queue.put(run)

    def consult(self, shadow: Shadow, question: Question, done: Callable[[list[Said]], None]) -> None:
        def run() -> None:
            said: list[Said] = []
            try:
                said = shadow.ask(question, self._watch, self._stuck_ns)
            except Exception as error:  # noqa: BLE001 - told as a bug, as above
                self._handback.give(_tell, error)
            self._handback.give(done, said)

        self._queue.put(run)

    def close(self) -> None:
        self._closing = True
        self._watch.end()
        self._queue.put(None)
        self._thread.join(UNSTOPPABLE_S)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None and not self._closing:
            job()


def _tell(error: Exception) -> None:
    raise error


def _refusal(service: Service, client: str, deadline_us: float) -> Result | None:
    """Why a request may not even wait: see `agent.admission`."""
    admission = service.admission
    judgement = admission.ask(client, deadline_us)
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
    return Result(Outcome.OVERLOADED, error, first=first_engine(service.lineup))
