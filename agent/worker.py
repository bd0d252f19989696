"""The worker process: composition root of one generation of served models.

    python -m agent.worker --channel-fd N --ring-fd N --listen-fd N [--listen-fd N ...]
                           [--giving-fd N] [--taking-fd GENERATION:N ...]

Started by file descriptors only: the channel to the agent process, the observation ring, the listening sockets, and
the ends over which connections and streams come from and go to other generations (`agent.handover`).
It loads what the plan in `Start` names, says `Ready`, accepts after `Serve`, and ends when the channel closes, after
`Drain` or SIGTERM, or when a run cannot be stopped. Decides nothing.

Exit codes: 0 drained or no longer wanted; 2 a plan that cannot be served; 3 frames that make no sense; 70 a run that
ignored its end order; 1 anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, assert_never

from agent import clock
from agent.channel import Channel
from agent.contract.errors import ContractError, EdgewardenError, Overloaded, ServingError
from agent.contract.plan import (
    Consult,
    Drain,
    Drained,
    EngineLoaded,
    EngineTrouble,
    FromWorker,
    Inherited,
    Ping,
    Pong,
    Prefer,
    Preferred,
    Ready,
    Serve,
    Start,
    WorkerPlan,
)
from agent.express import expect_any_number
from agent.frontend.openinference import OpenInference, body_limit
from agent.frontend.server import Leaving, Server
from agent.handover import MAX_PAYLOAD_BYTES, Connection, Connections, Giver, Heir, Stream, Taker, bundled
from agent.lineup import load_lineup
from agent.observation import RingWriter
from agent.serving import Service, Serving

TROUBLE_INTERVAL_S = 0.25
DRAIN_LIMIT_S = 30.0
LAST_STREAMS_S = 1.0  # for streams nobody is connected to, where nobody takes them
DESCRIPTORS = 4096
MAX_STATE_BYTES = MAX_PAYLOAD_BYTES - 4096
EXIT_INTERNAL = 1
EXIT_STUCK = 70  # a run ignored its end order; only a new process helps


class Worker:
    """One generation: the event loop's side of it."""

    def __init__(
        self,
        channel: Channel,
        ring: RingWriter,
        listeners: Sequence[socket.socket],
        *,
        giving: socket.socket | None = None,
        takings: Mapping[int, socket.socket] | None = None,
    ) -> None:
        """`giving`, `takings`: ends for what is left to a successor and by other generations; owned by the worker."""
        self._giver = Giver(giving) if giving else None
        self._takings = dict(takings or {})
        self._takers: dict[int, Taker] = {}
        self._channel = channel
        self._ring = ring
        self._listeners = listeners
        self._plan: WorkerPlan | None = None
        self._serving: Serving | None = None
        self._api: OpenInference | None = None
        self._server: Server | None = None
        self._trouble_timer: asyncio.TimerHandle | None = None
        self._leaving: asyncio.Future[None] | None = None
        self._bugs = 0
        self._unsent = 0

    async def run(self) -> int:
        """Serve the channel until it closes; returns the exit code.

        Raises:
            ContractError: the other end sent what is no frame for a worker.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._report)
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        try:
            while (frame := await self._channel.receive()) is not None:
                match frame:
                    case Start(plan=plan):
                        self._start(plan)
                    case Serve():
                        self._serve()
                    case Prefer():
                        self._prefer(frame)
                    case Consult():
                        self._consult(frame)
                    case Ping(nonce=nonce):
                        self._send(Pong(nonce, self.statistics()))
                    case Drain():
                        await self._drain(frame)
                        return 0
                    case Ready() | Preferred() | EngineTrouble() | Pong() | Drained() | Inherited():
                        raise ContractError(f"a worker was sent a {type(frame).__name__} frame")
                    case _:
                        assert_never(frame)
            return 0
        finally:
            self._close()

    def statistics(self) -> dict[str, float]:
        """Flat numbers of this process for a Pong."""
        numbers: dict[str, float] = {
            "cpu_s": clock.cpu_s(),
            "resident_bytes": _resident_bytes(),
            "bugs": self._bugs,
            "unsent_frames": self._unsent,
        }
        if self._serving is not None:
            numbers |= self._serving.statistics()
        if self._api is not None:
            numbers |= self._api.streams.statistics()
        if self._server is not None:
            numbers |= self._server.statistics()
        return numbers

    def _start(self, plan: WorkerPlan) -> None:
        if self._serving is not None:
            raise ContractError("a worker was started twice")
        _stay_on(plan.cpus)
        services: list[Service] = []
        reports: list[EngineLoaded] = []
        for index, service in enumerate(plan.services):
            lineup, loaded = load_lineup(service)
            services.append(Service(index, service, lineup))
            reports += loaded
        self._plan = plan
        self._serving = Serving(
            services,
            self._ring,
            stuck_after_s=plan.stuck_after_s,
            on_unstoppable=_end_process,
            on_trouble=self._note_trouble,
        )
        # what lives now lives as long as the process: a full collection later would stop requests for 50 ms
        gc.collect()
        gc.freeze()
        _give_back()
        self._send(Ready(plan.generation, os.getpid(), tuple(reports)))

    def _serve(self) -> None:
        if self._serving is None or self._plan is None:
            raise ContractError("a worker was told to serve before it was started")
        if self._server is not None:
            return
        limit = body_limit(self._serving.services.values(), self._plan.max_body_bytes)
        self._api = OpenInference(self._serving)
        self._server = Server(
            self._api.handle, make_plan=self._api.plan, refuse=self._api.refuse, max_body_bytes=limit
        )
        for number, taking in self._takings.items():
            self._take_over(self._server, number, taking)
        self._takings.clear()
        for listener in self._listeners:
            self._server.listen(listener)

    # --- hand-over ------------------------------------------------------------------------------------------
    def _take_over(self, server: Server, number: int, taking: socket.socket) -> None:
        """Go on with what that generation leaves."""

        def told() -> None:
            self._send(Inherited(number, **taker.taken))

        taker = self._takers[number] = Taker(taking, Heir(server.adopt, self._adopt_stream, told))
        taker.start()

    def _adopt_stream(self, service: str, stream: str, state: bytes) -> None:
        if self._api is not None:
            with contextlib.suppress(ContractError, ServingError):  # then its next answer says "moved"
                self._api.streams.adopt(service, stream, state)

    async def _give(self, leaving: Sequence[Leaving]) -> None:
        """Leave some connections to the next generation, streams first. Raises: OSError: nobody takes them."""
        if self._giver is None:
            raise BrokenPipeError
        await self._give_streams(self._giver)
        between = [one.descriptor for one in leaving if not one.unread]
        if between:
            await self._giver.give(Connections(len(between)), between)
        for one in leaving:
            if one.unread:
                await self._giver.give(Connection(one.unread, one.since_ns), [one.descriptor])

    async def _give_streams(self, giver: Giver) -> None:
        """Leave every stream that nobody is feeding. Raises: OSError: nobody takes them."""
        if self._api is None:
            return
        streams = self._api.streams

        surrendered: dict[tuple[str, str], None] = {}  # and not given yet

        def leaving() -> Iterator[Stream]:
            for place in tuple(streams.movable()):
                with contextlib.suppress(KeyError):  # it is being fed again, or ended, since a bundle had to wait
                    state = streams.surrender(*place)
                    surrendered[place] = None
                    yield Stream(*place, state if len(state) < MAX_STATE_BYTES else b"")

        try:
            for bundle in bundled(leaving()):
                await giver.give(bundle)
                for one in bundle.streams:
                    del surrendered[one.service, one.stream]
        except (OSError, asyncio.CancelledError):
            for place in surrendered:
                streams.lose(*place)
            raise

    # --- the end --------------------------------------------------------------------------------------------
    def _prefer(self, frame: Prefer) -> None:
        if self._serving is None:
            raise ContractError("a worker was told a preference before it was started")
        try:
            self._serving.prefer(frame.service, frame.engine, frame.reason)
        except ServingError as error:
            self._send(EngineTrouble(frame.service, frame.engine, error.code, str(error), 1))
        else:
            self._send(Preferred(frame.service, frame.engine))

    def _consult(self, frame: Consult) -> None:
        if self._serving is None:
            raise ContractError("a worker was told whom to ask before it was started")
        with contextlib.suppress(ServingError):  # it may know another lineup than who asks
            self._serving.consult(frame.service, frame.engines)

    async def _drain(self, order: Drain) -> None:
        for taker in self._takers.values():
            taker.close()  # what has not been taken yet is for the next generation
        if self._server is None:
            pass
        elif order.hand_over:
            await self._server.hand_over(self._give, order.limit_s)
            if self._giver is not None:
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(LAST_STREAMS_S):  # of clients that are not connected now
                        await self._give_streams(self._giver)
        else:
            await self._server.drain(order.limit_s)
        self._flush_troubles()
        self._send(Drained(0 if self._plan is None else self._plan.generation))
        await self._channel.drain()

    def _terminate(self) -> None:
        """SIGTERM: drain, and leave the way a closed channel does."""

        async def leave() -> None:
            await self._drain(Drain(DRAIN_LIMIT_S))
            await self._channel.close()

        self._leaving = asyncio.ensure_future(leave())

    def _note_trouble(self) -> None:
        """Tell the first trouble soon, then a few times a second however many there are."""
        if self._trouble_timer is None:
            loop = asyncio.get_running_loop()
            self._trouble_timer = loop.call_later(TROUBLE_INTERVAL_S, self._flush_troubles)

    def _flush_troubles(self) -> None:
        if self._trouble_timer is not None:
            self._trouble_timer.cancel()
            self._trouble_timer = None
        if self._serving is not None:
            for trouble in self._serving.take_troubles():
                self._send(trouble)

    def _send(self, frame: FromWorker) -> None:
        try:
            self._channel.send(frame)
        except Overloaded:  # the agent process hangs; serving goes on without it
            self._unsent += 1

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The process loop's last resort: count, tell stderr once, go on."""
        self._bugs += 1
        if self._bugs == 1:
            loop.default_exception_handler(context)

    def _close(self) -> None:
        for taker in self._takers.values():
            taker.close()
        for taking in self._takings.values():
            taking.close()
        if self._giver is not None:
            self._giver.close()
        if self._trouble_timer is not None:
            self._trouble_timer.cancel()
        if self._server is not None:
            self._server.close()
        if self._serving is not None:
            self._serving.close()


async def _main(given: argparse.Namespace) -> int:
    channel = await Channel.open(socket.socket(fileno=given.channel_fd))
    ring = RingWriter(given.ring_fd)
    listeners = [socket.socket(fileno=fd) for fd in given.listen_fd]
    giving = None if given.giving_fd is None else socket.socket(fileno=given.giving_fd)
    takings = {number: socket.socket(fileno=fd) for number, fd in given.taking_fd}
    try:
        return await Worker(channel, ring, listeners, giving=giving, takings=takings).run()
    finally:
        await channel.close()
        for listener in listeners:
            listener.close()
        ring.close()


def _give_back() -> None:
    """Memory that loading needed and nobody needs now: 15 MB behind the first load of a MobileNet-like model."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> float:
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - read every second; Path costs more than the read
        return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _allow_descriptors() -> None:
    """Room for the connections of two generations: the kernel closes what arrives and finds no free descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _numbered(text: str) -> tuple[int, int]:
    number, _, descriptor = text.partition(":")
    return int(number), int(descriptor)


def _stay_on(cpus: Sequence[int]) -> None:
    """Run on these CPUs only; those that are not here are left out, and if none is, nothing is restricted."""
    here = os.sched_getaffinity(0) & set(cpus)
    if here:
        os.sched_setaffinity(0, here)


def _end_process() -> None:
    os._exit(EXIT_STUCK)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one worker until it is no longer wanted."""
    parser = argparse.ArgumentParser(prog="agent.worker", description="Serves models for the agent process.")
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--ring-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, action="append", default=[])
    parser.add_argument("--giving-fd", type=int)
    parser.add_argument("--taking-fd", type=_numbered, action="append", default=[])
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the agent process ends us
    _allow_descriptors()
    expect_any_number()
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        try:
            return runner.run(_main(given))
        except EdgewardenError as error:
            sys.stderr.write(f"worker: {error.sentence()}\n")
            return error.exit_code
        except OSError as error:
            sys.stderr.write(f"worker: a descriptor cannot be used: {error.strerror}.\n")
            return EXIT_INTERNAL


if __name__ == "__main__":
    sys.exit(main())
