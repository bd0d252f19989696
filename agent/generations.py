"""Which worker serves: the current generation, the one that comes and those that leave.

A new generation starts beside the current one; when it is ready it accepts, and the old one finishes what it
answers and leaves its connections and streams to it (`agent.handover`): no request meets a closed door, since both
share the listening sockets. Without memory for two, the old one leaves first: what it left, and who connects
meanwhile, waits in the kernel for the next. A current one that is lost leaves the connections in the sockets' queues.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence

from agent.contract.plan import FromWorker, Inherited, Ready, ServicePlan, WorkerPlan
from agent.generation import Generation, Patience, Phase
from agent.handover import Pair
from agent.intake import Intake


class Generations:
    """Owned by the event loop. Callbacks get the generation's number."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        intake: Intake,
        patience: Patience,
        environment: Mapping[str, str],
        *,
        first_number: int,
        on_frame: Callable[[int, FromWorker], None],
        on_lost: Callable[[int, str], None],
        admits: Callable[[int, Ready], bool] = lambda _number, _ready: True,
        fits_beside: Callable[[float], bool] = lambda _bytes: True,
    ) -> None:
        """`admits`: asked before a ready generation takes over; False ends it, and the current one stays.

        `fits_beside`: whether there is memory for a second worker of that many bytes; False = the old one goes first.
        """
        self._fits_beside = fits_beside
        self._admits = admits
        self._listeners = listeners
        self._intake = intake
        self._patience = patience
        self._environment = environment
        self._next_number = first_number
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._current: Generation | None = None
        self._incoming: Generation | None = None
        self._tasks: dict[Generation, asyncio.Task[None]] = {}
        self._takings: dict[int, socket.socket] = {}  # where what a generation leaves is taken, until all of it is
        self._making_room: Generation | None = None
        self._counts = {"started": 0, "lost": 0, "lean": 0, "connections_moved": 0, "streams_moved": 0}

    @property
    def current(self) -> Generation | None:
        return self._current

    @property
    def is_starting(self) -> bool:
        return self._incoming is not None

    @property
    def incoming(self) -> int:
        """The number of the one that comes; 0 = none."""
        return self._incoming.number if self._incoming is not None else 0

    @property
    def coming(self) -> tuple[ServicePlan, ...]:
        """What the one that comes serves; empty = none comes."""
        return self._incoming.plan.services if self._incoming is not None else ()

    @property
    def leaving(self) -> int:
        """How many that have served, or were given up, have not ended yet."""
        return sum(one is not self._current and one is not self._incoming for one in self._tasks)

    def start(
        self,
        services: tuple[ServicePlan, ...],
        *,
        max_body_bytes: int,
        stuck_after_s: float,
        cpus: Sequence[int] = (),
    ) -> int:
        """Begin a new generation beside the current one; one that was still coming is given up.

        One that cannot even begin is told as lost like any other.
        """
        plan = WorkerPlan(self._next_number, services, max_body_bytes, stuck_after_s, tuple(cpus))
        self._next_number += 1
        self._counts["started"] += 1
        try:
            pair = Pair.open()
            try:
                ring = self._intake.open(plan)
            except OSError:
                pair.close()
                raise
        except OSError as error:
            reason = f"could not be started: {error.strerror}"
            asyncio.get_running_loop().call_soon(self._lose, plan.generation, reason)
            return plan.generation
        if self._incoming is not None:
            self._incoming.kill("superseded")
        comer = Generation(plan, self._patience, pair.giving, on_frame=self._frame, on_end=self._ended)
        self._incoming = comer
        living = comer.live(self._listeners, ring, self._environment, takings=self._takings, after=self._make_room())
        self._takings[plan.generation] = pair.taking
        self._tasks[comer] = asyncio.create_task(living, name=f"ew-worker-{plan.generation}")
        return plan.generation

    def prefer(self, service: str, engine: str, reason: str) -> None:
        """Tell whoever serves; without a worker it is told when the next one is ready."""
        if self._current is not None:
            self._current.prefer(service, engine, reason)

    def consult(self, service: str, engines: tuple[str, ...]) -> None:
        """Tell whoever serves which engines to ask besides; a worker that comes later asks nobody until told."""
        if self._current is not None:
            self._current.consult(service, engines)

    def tend(self) -> None:
        for generation in list(self._tasks):
            generation.tend()

    async def stop(self) -> None:
        """Let all finish what they answer, then end; bounded by the patience."""
        for generation in self._tasks:
            if generation.phase in (Phase.SERVING, Phase.DRAINING):
                generation.drain()
            else:
                generation.kill("the agent stops")
        while self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=self._patience.ping_s)
            self.tend()
        for number in tuple(self._takings):
            self._forget(number)

    def statistics(self) -> dict[str, float]:
        """Generations started, lost and started `lean`; connections and streams that moved to a successor."""
        return dict(self._counts)

    # --- inside ---------------------------------------------------------------------------------------------
    def _make_room(self) -> asyncio.Task[None] | None:
        """Without memory for two the current one leaves now; what to wait for before the next is spawned."""
        leaver = self._current
        if leaver is None:
            return None
        if leaver is not self._making_room:
            if self._fits_beside(leaver.statistics.get("resident_bytes", 0.0)):
                return None
            self._making_room = leaver
            self._counts["lean"] += 1
            leaver.drain(hand_over=True)
        return self._tasks[leaver]

    def _forget(self, number: int) -> None:
        """Nobody takes over anything from that generation any more."""
        taking = self._takings.pop(number, None)
        if taking is not None:
            taking.close()

    def _frame(self, generation: Generation, frame: FromWorker) -> None:
        if isinstance(frame, Inherited):
            self._counts["connections_moved"] += frame.connections
            self._counts["streams_moved"] += frame.streams
            self._forget(frame.generation)
        if not isinstance(frame, Ready):
            self._on_frame(generation.number, frame)
        elif generation is self._incoming:
            self._incoming = None  # who says no may begin another one
            if self._admits(generation.number, frame):
                self._hand_over(generation, frame)
            else:
                generation.kill("refused")
        else:
            generation.kill("superseded")

    def _hand_over(self, comer: Generation, ready: Ready) -> None:
        leaver, self._current = self._current, comer
        self._on_frame(comer.number, ready)  # whom it prefers is told before it accepts anything
        comer.serve()
        if leaver is not None:
            leaver.drain(hand_over=True)

    def _ended(self, generation: Generation, reason: str) -> None:
        self._tasks.pop(generation, None)
        self._intake.close(generation.number)
        if not generation.has_served:
            self._forget(generation.number)
        if generation is self._current:
            self._current = None
        elif generation is self._incoming:
            self._incoming = None
        else:  # it had already handed over, or was given up
            return
        if generation is self._making_room:
            self._making_room = None
        elif reason != "drained":
            self._lose(generation.number, reason)

    def _lose(self, number: int, reason: str) -> None:
        self._counts["lost"] += 1
        self._on_lost(number, reason)
