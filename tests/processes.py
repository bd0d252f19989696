"""A real worker process for tests: the test plays the agent process, holding channel, ring and listening sockets."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from agent.channel import Frame, decode, encode
from agent.contract.plan import Drain, Ping, Pong, Prefer, Preferred, Ready, Serve, Start, WorkerPlan
from agent.observation import RingReader, create_ring

Kind = TypeVar("Kind")
WAIT_S = 60.0


class Sockets:
    """What outlives workers: a Unix and a TCP listening socket and the ring."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "serve.sock"
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.path))
        self.tcp = socket.socket()
        self.tcp.bind(("127.0.0.1", 0))
        for listener in (self.unix, self.tcp):
            listener.listen(128)
        self.port = self.tcp.getsockname()[1]
        self.ring_fd = create_ring()
        self.ring = RingReader(self.ring_fd)

    @property
    def unix_address(self) -> str:
        return f"unix:{self.path}"

    @property
    def tcp_address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ring.close()
        os.close(self.ring_fd)
        self.unix.close()
        self.tcp.close()


class RunningWorker:
    """One worker process that has loaded `plan`; it accepts after `serve()`."""

    def __init__(self, sockets: Sockets, plan: WorkerPlan, *, options: Sequence[str] = ()) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(WAIT_S)
        fds = (theirs.fileno(), sockets.ring_fd, sockets.unix.fileno(), sockets.tcp.fileno())
        names = ("--channel-fd", "--ring-fd", "--listen-fd", "--listen-fd")
        arguments = [text for name, fd in zip(names, fds, strict=True) for text in (name, str(fd))]
        self.process = subprocess.Popen(
            [sys.executable, *options, "-m", "agent.worker", *arguments], pass_fds=fds, stderr=subprocess.PIPE
        )
        theirs.close()
        self.send(Start(plan))
        self.ready = self.expect(Ready)

    def send(self, frame: Frame) -> None:
        self.channel.sendall(encode(frame))

    def receive(self) -> Frame | None:
        """The next frame; None when the worker has closed its end."""
        head = self._exactly(4)
        return decode(self._exactly(struct.unpack("<I", head)[0])) if len(head) == 4 else None

    def expect(self, kind: type[Kind]) -> Kind:
        """The next frame of a kind; others before it are dropped."""
        while (frame := self.receive()) is not None:
            if isinstance(frame, kind):
                return frame
        raise AssertionError(f"no {kind.__name__} before the end; stderr: {self.stderr()}")

    def serve(self) -> Self:
        self.send(Serve())
        return self

    def prefer(self, engine: str, reason: str = "test", service: str = "wrist") -> None:
        self.send(Prefer(service, engine, reason))
        self.expect(Preferred)

    def statistics(self) -> dict[str, float]:
        self.send(Ping(1))
        return self.expect(Pong).statistics

    def drain(self) -> None:
        self.send(Drain())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stderr is not None
            self.process.stderr.close()

    def _exactly(self, size: int) -> bytes:
        received = b""
        while len(received) < size and (chunk := self.channel.recv(size - len(received))):
            received += chunk
        return received
