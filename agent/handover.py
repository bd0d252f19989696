"""What a worker leaves to the one that takes over: connections by file descriptor, unread bytes, stream state.

One SEQPACKET socket pair per generation: the worker holds the giving end from its birth, the agent process keeps the
taking end and lets every successor inherit it. So nothing passes through the agent process, whose own work can
stop it for tens of milliseconds; what has been given waits in the kernel, connections open, until somebody takes it,
even if the successor dies first; and no descriptor has to be sent over the channel.

A message is a msgpack pair (kind, fields) and its descriptors. Payloads over INLINE_BYTES travel in a memory file,
the last descriptor, and streams several together. So what one worker may have fits into the socket while nobody
takes: where memory is short, the successor begins only when the giver is gone. The taker believes nothing: what makes
no sense is counted, and its descriptors are closed.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agent.contract.errors import MalformedMessage

BATCH = 64  # connections or streams of one message; the kernel takes 253 descriptors
BUNDLE_BYTES = 1024 * 1024  # of states in one message, unless a single one is larger
INLINE_BYTES = 2 * 1024
MAX_MESSAGE_BYTES = INLINE_BYTES + 4096
SOCKET_BYTES = 1024 * 1024  # asked for; the kernel grants 416 KiB where nobody configured more
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
MESSAGES_PER_TURN = 8  # what is taken over before the event loop answers requests again
RETRY_S = 0.005
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True, slots=True)
class Connections:
    """`count` connections between two requests: one descriptor each."""

    count: int


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection in the middle of a request. `unread`: what arrived of it; `since_ns`: since when (monotonic)."""

    unread: bytes
    since_ns: int


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of a service; `state` as its streams export it."""

    service: str
    stream: str
    state: bytes


@dataclass(frozen=True, slots=True)
class Streams:
    """Several at once, as many as `bundled` puts together."""

    streams: tuple[Stream, ...]


Message = Connections | Connection | Streams


@dataclass(frozen=True, slots=True)
class _File:
    """The real message is in the memory file that comes as the last descriptor."""

    size: int


_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind) for kind in (Connections, Connection, Streams, _File)
}


@dataclass(slots=True)
class Pair:
    """Both ends, as the agent process makes them. `taking` stays open until nothing can be waiting in it."""

    giving: socket.socket
    taking: socket.socket

    @classmethod
    def open(cls) -> Pair:
        """Raises: OSError: no descriptor is free."""
        giving, taking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (giving, taking):
            end.settimeout(0.0)  # of the connection, not of the process: all that inherit an end find it so
        giving.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        return cls(giving, taking)

    def close(self) -> None:
        self.giving.close()
        self.taking.close()


class Giver:
    """The leaving worker's end. A descriptor that was given may be closed here: the kernel holds it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0.0)
        self._socket = sock
        self.given = {"connections": 0, "streams": 0}

    async def give(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Wait until the kernel has taken it.

        Raises:
            OSError: nobody is left who could take it (BrokenPipeError), or no memory or descriptor is free.
            MalformedMessage: it is larger than MAX_PAYLOAD_BYTES.
        """
        payload = _encode(message)
        if len(payload) <= INLINE_BYTES:
            await self._send(payload, descriptors)
        elif len(payload) > MAX_PAYLOAD_BYTES:
            raise MalformedMessage(f"a {type(message).__name__} of {len(payload)} bytes is over {MAX_PAYLOAD_BYTES}")
        else:
            file = _memory_file(payload)
            try:
                await self._send(_encode(_File(len(payload))), [*descriptors, file])
            finally:
                os.close(file)
        if isinstance(message, Streams):
            self.given["streams"] += len(message.streams)
        else:
            self.given["connections"] += message.count if isinstance(message, Connections) else 1

    def close(self) -> None:
        self._socket.close()

    async def _send(self, payload: bytes, descriptors: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        while True:
            try:
                self._socket.sendmsg([payload], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await asyncio.sleep(RETRY_S)
            except OSError as error:
                if error.errno not in (errno.ETOOMANYREFS, errno.ENOBUFS):  # too much is on its way already
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return


@dataclass(frozen=True, slots=True)
class Heir:
    """Who takes over. `end`: nothing more can come."""

    connection: Callable[[socket.socket, bytes, int], None]  # with unread bytes and since when, if any
    stream: Callable[[str, str, bytes], None]
    end: Callable[[], None]


@dataclass(slots=True)
class Taker:
    """The successor's end, on the running event loop. Owns `sock`."""

    sock: socket.socket
    heir: Heir
    taken: dict[str, int] = field(default_factory=lambda: {"connections": 0, "streams": 0, "refused": 0, "lost": 0})
    _open: bool = True

    def start(self) -> None:
        self.sock.settimeout(0.0)
        asyncio.get_running_loop().add_reader(self.sock, self._read)

    def close(self) -> None:
        """Take no more; what waits is for the next successor. Harmless twice."""
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self.sock)
            self.sock.close()

    def _read(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if not self._open:
                return
            try:
                payload, descriptors, flags, _ = socket.recv_fds(
                    self.sock, MAX_MESSAGE_BYTES, BATCH + 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                payload, descriptors, flags = b"", [], 0
            if not payload:  # the giver and all its copies are gone
                self.close()
                self.heir.end()
                return
            self._take(payload, descriptors, flags)

    def _take(self, payload: bytes, descriptors: list[int], flags: int) -> None:
        """Give every descriptor an owner, or close it."""
        try:
            message = _open_message(payload, descriptors)
            truncated = bool(flags & socket.MSG_CTRUNC)  # no descriptor was free: the kernel has closed the rest
            _check(message, descriptors, truncated=truncated)
        except (MalformedMessage, OSError):
            self.taken["refused"] += 1
            for descriptor in descriptors:
                os.close(descriptor)
            return
        if isinstance(message, Streams):
            self.taken["streams"] += len(message.streams)
            for one in message.streams:
                self.heir.stream(one.service, one.stream, one.state)
            return
        count = message.count if isinstance(message, Connections) else 1
        self.taken["lost"] += count - len(descriptors)
        for descriptor in descriptors:
            self._take_connection(descriptor, message)

    def _take_connection(self, descriptor: int, message: Connections | Connection) -> None:
        sock = _connection(descriptor)
        if sock is None:
            self.taken["refused"] += 1
            return
        self.taken["connections"] += 1
        if isinstance(message, Connection):
            self.heir.connection(sock, message.unread, message.since_ns)
        else:
            self.heir.connection(sock, b"", 0)


# --- messages ----------------------------------------------------------------------------------------------
def bundled(streams: Iterable[Stream]) -> Iterator[Streams]:
    """All of them in few messages, none of which keeps a taker busy for long. Lazy: one bundle is drawn at a time."""
    bundle: list[Stream] = []
    size = 0
    for one in streams:
        if bundle and (len(bundle) == BATCH or size + len(one.state) > BUNDLE_BYTES):
            yield Streams(tuple(bundle))
            bundle, size = [], 0
        bundle.append(one)
        size += len(one.state)
    if bundle:
        yield Streams(tuple(bundle))


def _encode(message: Message | _File) -> bytes:
    return _encoder.encode((type(message).__name__, message))


def _decode(payload: bytes) -> Message | _File:
    """Raises: MalformedMessage."""
    try:
        name, fields = _envelopes.decode(payload)
        message: Message | _File = _decoders[name].decode(fields)
    except KeyError:
        raise MalformedMessage(f"a hand-over message has the unknown kind '{name[:40]}'") from None
    except msgspec.MsgspecError as error:
        raise MalformedMessage(f"a hand-over message cannot be read: {error}") from None
    return message


def _open_message(payload: bytes, descriptors: list[int]) -> Message:
    """The message itself; one that came in a memory file takes that file off `descriptors`.

    Raises:
        MalformedMessage, OSError: it makes no sense, or the file does not hold it.
    """
    message = _decode(payload)
    if not isinstance(message, _File):
        return message
    if not descriptors or not INLINE_BYTES < message.size <= MAX_PAYLOAD_BYTES:
        raise MalformedMessage("a hand-over message names a memory file that cannot be")
    file = descriptors[-1]
    held = os.fstat(file)
    if not stat.S_ISREG(held.st_mode) or held.st_size != message.size:
        raise MalformedMessage("a hand-over message came with the wrong memory file")
    content = os.pread(file, message.size, 0)
    os.close(descriptors.pop())
    inner = _decode(content)
    if isinstance(inner, _File):
        raise MalformedMessage("a memory file inside a memory file")
    return inner


def _check(message: Message, descriptors: Sequence[int], *, truncated: bool) -> None:
    """Raises: MalformedMessage: not the descriptors that this message must bring."""
    wanted = 0 if isinstance(message, Streams) else message.count if isinstance(message, Connections) else 1
    if not 0 <= wanted <= BATCH or (isinstance(message, Connections) and wanted == 0):
        raise MalformedMessage(f"a hand-over message of {wanted} connections")
    if len(descriptors) != wanted and not (truncated and len(descriptors) < wanted):
        raise MalformedMessage(f"a hand-over message brought {len(descriptors)} descriptors for {wanted}")


def _connection(descriptor: int) -> socket.socket | None:
    """A connected stream socket; None and closed when the descriptor is anything else."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        return None
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family not in _FAMILIES or sock.type != socket.SOCK_STREAM or listens:
        sock.close()
        return None
    sock.settimeout(0.0)
    return sock


def _memory_file(content: bytes) -> int:
    file = os.memfd_create("ew-handover", os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(file, view) :]
    except OSError:
        os.close(file)
        raise
    return file
