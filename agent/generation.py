"""One worker's life, seen from the agent process: spawned, loaded, serving, drained or lost.

Promises: a worker that does not start, does not answer pings or does not finish draining is killed in bounded time;
its end is told exactly once, with the reason in words. Only file descriptors cross to it.
Leaves to others: what to do about a lost worker (`agent.decisions`), and which one serves (`agent.generations`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agent.channel import Channel
from agent.clock import monotonic_s
from agent.contract.errors import EdgewardenError, MalformedMessage, Overloaded
from agent.contract.plan import (
    Consult,
    Drain,
    Drained,
    FromWorker,
    Ping,
    Pong,
    Prefer,
    Ready,
    Serve,
    Start,
    ToWorker,
    WorkerPlan,
)

NOT_FOR_WORKERS = (
    "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID",
    "CREDENTIALS_DIRECTORY",
)  # fmt: skip
"""What the service manager tells the agent process alone."""


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"  # loaded and proven by its golden inputs, not accepting yet
    SERVING = "serving"
    DRAINING = "draining"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker may take, seconds."""

    start_s: float = 60.0
    ping_s: float = 1.0
    missed_pings: int = 3
    drain_s: float = 10.0


class Generation:
    """Owned by the event loop. `on_frame` hears every frame but Pong; `on_end` hears the end, once.

    `giving`: where it leaves what a successor takes over; goes to the worker.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        patience: Patience,
        giving: socket.socket,
        *,
        on_frame: Callable[[Generation, FromWorker], None],
        on_end: Callable[[Generation, str], None],
    ) -> None:
        self.plan = plan
        self.phase = Phase.STARTING
        self.pid = 0
        self.has_served = False
        self.statistics: dict[str, float] = {}  # of the newest Pong
        self._patience = patience
        self._giving = giving
        self._on_frame = on_frame
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._channel: Channel | None = None
        self._killed_because = ""
        self._since_s = monotonic_s()
        self._nonce = 0
        self._answered = 0

    @property
    def number(self) -> int:
        return self.plan.generation

    async def live(
        self,
        listeners: Sequence[socket.socket],
        ring: int,
        environment: Mapping[str, str],
        *,
        takings: Mapping[int, socket.socket],
        after: asyncio.Task[None] | None = None,
    ) -> None:
        """Spawn the worker, once `after` has ended, and follow it to its end.

        `takings`: where what each generation leaves is taken, by number; looked at when it is spawned.
        """
        try:
            if after is not None:
                await asyncio.wait([after])
            if not self._killed_because:
                self._since_s = monotonic_s()
                await self._spawn(listeners, ring, environment, takings)
                await self._listen()
        except (EdgewardenError, OSError) as error:
            self.kill(f"could not be started: {getattr(error, 'strerror', None) or error}")
        finally:  # whatever ends it: an end nobody is told of would be waited for for ever
            self._giving.close()
            reason = await self._bury()
            self.phase = Phase.ENDED
            self._on_end(self, reason)

    def serve(self) -> None:
        """Let it accept connections."""
        self.phase = Phase.SERVING
        self.has_served = True
        self._answered = self._nonce
        self._send(Serve())

    def prefer(self, service: str, engine: str, reason: str) -> None:
        self._send(Prefer(service, engine, reason))

    def consult(self, service: str, engines: tuple[str, ...]) -> None:
        self._send(Consult(service, engines))

    def drain(self, *, hand_over: bool = False) -> None:
        """Let it finish what it answers, and exit; `hand_over`: what is idle is left to the next, not closed."""
        if self.phase in (Phase.DRAINING, Phase.ENDED):
            return
        self.phase = Phase.DRAINING
        self._since_s = monotonic_s()
        self._send(Drain(0.8 * self._patience.drain_s, hand_over))

    def kill(self, because: str) -> None:
        if self._process is None:  # not spawned yet: it will be killed as soon as it is
            self._killed_because = self._killed_because or because
        elif self._process.returncode is None:
            self._killed_because = self._killed_because or because
            self._process.kill()

    def tend(self) -> None:
        """Call every `patience.ping_s`: asks for a sign of life and ends what takes too long."""
        waited_s, patience = monotonic_s() - self._since_s, self._patience
        match self.phase:
            case Phase.STARTING if self._process is not None and waited_s > patience.start_s:
                self.kill(f"did not start within {patience.start_s:.0f} s")
            case Phase.DRAINING if waited_s > patience.drain_s:
                self.kill(f"did not finish draining within {patience.drain_s:.0f} s")
            case Phase.SERVING:
                self._ask()

    # --- inside ---------------------------------------------------------------------------------------------
    async def _spawn(
        self,
        listeners: Sequence[socket.socket],
        ring: int,
        environment: Mapping[str, str],
        takings: Mapping[int, socket.socket],
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            given = [("--channel-fd", theirs.fileno()), ("--ring-fd", ring), ("--giving-fd", self._giving.fileno())]
            given += [("--listen-fd", listener.fileno()) for listener in listeners]
            command = [sys.executable, "-m", "agent.worker"]
            for option, descriptor in given:
                command += [option, str(descriptor)]
            others = {number: taking.fileno() for number, taking in takings.items() if number != self.number}
            for number, descriptor in others.items():
                command += ["--taking-fd", f"{number}:{descriptor}"]
            passed = [*(descriptor for _, descriptor in given), *others.values()]
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=passed,
                env={name: value for name, value in environment.items() if name not in NOT_FOR_WORKERS},
                start_new_session=True,  # a Ctrl-C at the terminal is the agent's to handle
            )
            self.pid = self._process.pid
            self._channel = await Channel.open(ours)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            self._giving.close()  # now the worker's alone: its end is the end of what it leaves
        if self._killed_because:
            self._process.kill()
        self._send(Start(self.plan))

    async def _listen(self) -> None:
        assert self._channel is not None  # noqa: S101 - _spawn made it
        while True:
            try:
                frame = await self._channel.receive()
            except MalformedMessage as error:
                self.kill(f"sent a frame nobody understands: {error}")
                return
            if frame is None:
                return
            self._take(frame)

    def _take(self, frame: object) -> None:
        match frame:
            case Pong(nonce=nonce, statistics=statistics):
                self._answered = max(self._answered, nonce)
                self.statistics = statistics
            case Ready():
                self.phase = Phase.READY
                self._on_frame(self, frame)
            case Drained():
                pass  # its exit follows
            case _:
                self._on_frame(self, frame)  # type: ignore[arg-type]

    def _ask(self) -> None:
        if self._nonce - self._answered >= self._patience.missed_pings:
            self.kill(f"hung: {self._nonce - self._answered} pings unanswered")
            return
        self._nonce += 1
        self._send(Ping(self._nonce))

    def _send(self, frame: ToWorker) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(frame)
        except Overloaded:
            self.kill("hung: it does not read its channel")

    async def _bury(self) -> str:
        """Wait for the process's end, close what is ours, and say why it ended."""
        if self._channel is not None:
            with contextlib.suppress(ConnectionError):
                await self._channel.close()
        if self._process is None:
            return self._killed_because
        try:
            async with asyncio.timeout(2.0):
                code = await self._process.wait()
        except TimeoutError:
            self.kill("closed its channel but did not exit")
            code = await self._process.wait()
        except asyncio.CancelledError:
            self.kill("the agent stops")
            raise
        if self._killed_because:
            return self._killed_because
        return "drained" if code == 0 and self.phase is Phase.DRAINING else _exit_in_words(code)


def _exit_in_words(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"killed by signal {-code}"
