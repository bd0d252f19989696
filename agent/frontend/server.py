"""HTTP/1.1 for one worker: sockets, strict parsing, limits, pipelining, drain. What a path means is its handler's.

httptools (llhttp in strict mode) parses, unless a plan knows the message (`plans`); everything it lets pass that has
two readings is refused here: chunked bodies, an upgrade, a missing or doubled Host. Every error is a status and
exactly {"error": "..."}.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httptools
import msgspec

from agent import clock
from agent.attempt import Ended
from agent.contract.tensors import HEADER_LENGTH, Buffer
from agent.express import Left
from agent.frontend.plans import MAX_PREFIX_BYTES, Plan, PlanCache
from agent.frontend.unread import Unread, put
from agent.sockets import client_of

MAX_HEAD_BYTES = 16 * 1024
MAX_HEADERS = 100
MAX_URL_BYTES = 4 * 1024
MAX_PIPELINED = 32  # unanswered requests of one connection before it is not read any more
WHOLE_BYTES = 4 * 1024  # what was read in one piece is parsed as one; more, message by message
MAX_CONNECTIONS = 512
MAX_JSON_BYTES = 4 * 1024 * 1024  # reading JSON stops the loop for up to 30 ms a MiB; binary tensors are not copied
MAX_BUFFERED_BYTES = 64 * 1024 * 1024  # bodies of all unanswered requests together...
SMALL_BODY_BYTES = 64 * 1024  # ...whose last quarter is kept for bodies up to this size
SLOW_S = 10.0  # for a request to arrive...
SLOWEST_BYTES_PER_S = 64 * 1024  # ...plus its size at this speed
PAUSE_S = 0.25  # a client that was heard so recently may be about to ask again: draining tells it in its next answer
MOVE_POLL_S = 0.002  # how soon after its last answer has been sent a connection moves to the next worker
LINGER_S = 2.0  # how long a refused client may go on sending before it is cut off
ACCEPTS_PER_TURN = 16
MOVE_BATCH = 64  # connections that move together
JSON = "application/json"
BINARY = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One complete request; header names are lower case. `arrival_ns`: monotonic, when its last byte was read.

    `client`: who asks, for fair shares: a process id or an address; empty = not known.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    arrival_ns: int
    client: str = ""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """`json_bytes`: length of the JSON before binary tensors; 0 = all JSON."""

    status: int
    parts: Sequence[Buffer]
    json_bytes: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Leaving:
    """A connection on its way to another process, which must take `descriptor` before this one closes it.

    `unread`: what has arrived of an unfinished request, since `since_ns` (monotonic); empty = between requests.
    """

    descriptor: int
    unread: bytes
    since_ns: int


Give = Callable[[Sequence[Leaving]], Awaitable[None]]
"""Passes connections on; raises OSError when nobody is there who could take them."""

Reply = Callable[[HttpResponse], None]
Handler = Callable[[HttpRequest, Reply], None]
Refuse = Callable[[str, str, str, int], HttpResponse | None]
"""What a request hears whose body is not worth keeping: (method, path, client, monotonic ns); None = it is read."""
MakePlan = Callable[[HttpRequest, bytes, bytes], Plan | None]
"""A plan for messages like this one: (request, its bytes before the binary data, the response to it)."""


def error_response(status: int, text: str, headers: dict[str, str] | None = None) -> HttpResponse:
    """A status and exactly {"error": "..."}."""
    return HttpResponse(status, (msgspec.json.encode({"error": text}),), headers=headers or {})


class Server:
    """Accepts on inherited sockets and answers through a handler. Owned by the event loop's thread."""

    def __init__(
        self,
        handler: Handler,
        *,
        make_plan: MakePlan | None = None,
        refuse: Refuse | None = None,
        max_body_bytes: int,
        max_json_bytes: int = MAX_JSON_BYTES,
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
        max_connections: int = MAX_CONNECTIONS,
        slow_s: float = SLOW_S,
    ) -> None:
        """`make_plan`: for requests that came twice; None = every request is parsed. `refuse`: asked with a head."""
        self.handler = handler
        self.make_plan = make_plan
        self.refuse = refuse
        self.plans = PlanCache()
        self.max_body_bytes = max_body_bytes
        self.max_json_bytes = max_json_bytes
        self._max_buffered_bytes = max(max_buffered_bytes, 2 * max_body_bytes)  # the largest body must fit
        self.buffered_bytes = 0
        self.slow_s = slow_s
        self.draining = False
        self.connections: set[Connection] = set()
        self._max_connections = max_connections
        self._listeners: list[socket.socket] = []
        self._joining: dict[Connection, asyncio.Task[Any]] = {}  # accepted, not all of them in `connections` yet
        self._timer: asyncio.TimerHandle | None = None
        self._accepted = 0
        self._refused = 0
        self._refused_bodies = 0
        self._moved = {"taken": 0, "given": 0}
        self.freed: asyncio.Event | None = None  # while handing over: some connection owes nothing any more
        self.malformed = 0

    def listen(self, listener: socket.socket) -> None:
        """Accept on a listening socket that stays open when this server goes: others wait in its queue."""
        listener.settimeout(0)
        self._listeners.append(listener)
        # accepting here, not through loop.create_server, which would close (and unlink) what belongs to the agent
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)
        if self._timer is None:
            self._sweep()

    async def drain(self, limit_s: float) -> None:
        """Stop accepting, close idle connections, finish busy ones, at most for `limit_s`.

        A client that asks without a pause hears with an answer that its connection ends, and loses no request.
        """
        self.draining = True
        self._stop_accepting()
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while (self.connections or self._joining) and loop.time() < end:
            for connection in tuple(self.connections):
                connection.close_if_idle()
            await asyncio.sleep(0.01)
        self.close()

    async def hand_over(self, give: Give, limit_s: float) -> None:
        """Stop accepting and give every connection away as soon as nothing is owed on it: no client notices.

        What cannot move (nobody takes it, a request too large to move that does not arrive) is drained; all within
        `limit_s`.
        """
        self._stop_accepting()
        self.freed = asyncio.Event()
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        try:
            async with asyncio.timeout(max(0.0, limit_s - 2 * PAUSE_S)):
                while self.connections or self._joining:
                    self.freed.clear()
                    await self._give(give)
                    poll = loop.call_later(MOVE_POLL_S, self.freed.set)  # sent is not told, only answered
                    await self.freed.wait()
                    poll.cancel()
        except (OSError, TimeoutError):
            self.freed = None
            for connection in self.connections:
                connection.stay()
        await self.drain(max(0.0, end - loop.time()))

    async def _give(self, give: Give) -> None:
        """Give away those that are free now; each is closed here as soon as it has been taken."""
        free = [connection for connection in tuple(self.connections) if connection.hold()]
        between = [connection for connection in free if not connection.has_unread]
        batches = [between[start : start + MOVE_BATCH] for start in range(0, len(between), MOVE_BATCH)]
        for batch in [*batches, *([connection] for connection in free if connection.has_unread)]:
            await give([connection.leaving() for connection in batch])
            for connection in batch:
                connection.leave()
            self._moved["given"] += len(batch)

    def adopt(self, sock: socket.socket, unread: bytes = b"", since_ns: int = 0) -> None:
        """Go on with a connection of another process; what arrived of its request is read first."""
        self._moved["taken"] += 1
        if not self._make_room():
            _turn_away(sock)
            self._refused += 1
            return
        sock.settimeout(0)
        self._join(Connection(self, unread=unread, since_ns=since_ns), sock)
        if self._timer is None:
            self._sweep()

    def _stop_accepting(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def close(self) -> None:
        """Stop at once; the listening sockets stay open."""
        self._stop_accepting()
        self._listeners.clear()
        if self._timer is not None:
            self._timer.cancel()
        for connection in tuple(self.connections):
            connection.abort()

    def statistics(self) -> dict[str, float]:
        """Open connections, bytes of unanswered bodies, and totals.

        accepted, refused for lack of room, malformed, taken over from and given to another worker.
        """
        return {
            "connections": len(self.connections),
            "buffered_bytes": self.buffered_bytes,
            "refused_bodies": self._refused_bodies,
            "accepted": self._accepted,
            "refused_connections": self._refused,
            "malformed": self.malformed,
            "plans": len(self.plans),
            "connections_taken": self._moved["taken"],
            "connections_given": self._moved["given"],
        }

    def has_room(self, size: int) -> bool:
        """Whether `reserve` would set so much aside."""
        share = 1.0 if size <= SMALL_BODY_BYTES else 0.75
        return not size or self.buffered_bytes + size <= share * self._max_buffered_bytes

    def reserve(self, size: int) -> bool:
        """Set room for a body aside, before it is read; False and counted when there is none."""
        if not self.has_room(size):
            self._refused_bodies += 1
            return False
        self.buffered_bytes += size
        return True

    def release(self, size: int) -> None:
        """Give back what `reserve` set aside."""
        self.buffered_bytes -= size

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # out of descriptors: the client waits in the queue until one is free
                self._pause_accepting(listener)
                return
            if not self._make_room():
                _turn_away(sock)
                self._refused += 1
                continue
            sock.settimeout(0)
            self._accepted += 1
            self._join(Connection(self), sock)

    def _join(self, connection: Connection, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(loop.connect_accepted_socket(lambda: connection, sock))
        self._joining[connection] = task
        task.add_done_callback(lambda _: self._joining.pop(connection))

    def _pause_accepting(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(1.0, self._resume_accepting, listener)

    def _resume_accepting(self, listener: socket.socket) -> None:
        if listener in self._listeners and not (self.draining or self.freed):
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _make_room(self) -> bool:
        """At the limit the connection that has been idle longest goes; it may come back when it has a request."""
        if len(self.connections) + len(self._joining.keys() - self.connections) < self._max_connections:
            return True
        idle = [connection for connection in self.connections if connection.idle]
        if not idle:
            return False
        victim = min(idle, key=lambda connection: connection.last_ns)
        self.connections.discard(victim)  # now: it closes a turn later, and must not make room twice
        victim.abort()
        return True

    def _sweep(self) -> None:
        now_ns = clock.monotonic_ns()
        for connection in tuple(self.connections):
            connection.check_pace(now_ns)
        self._timer = asyncio.get_running_loop().call_later(0.5, self._sweep)


class _Refused(Exception):
    """Raised inside parser callbacks; the connection knows why."""


class _Pending:
    """A request whose response has not been written yet. `size`: body bytes reserved for it.

    `kept`: an HTTP/1.0 client must be told that its connection stays. `headless`: no body may follow (HEAD).
    `lesson`: what a plan can be made of once it is answered.
    """

    __slots__ = ("closing", "headless", "kept", "lesson", "response", "size")

    def __init__(self, *, closing: bool, size: int = 0, kept: bool = False, headless: bool = False) -> None:
        self.closing = closing
        self.size = size
        self.kept = kept
        self.headless = headless
        self.response: HttpResponse | None = None
        self.lesson: tuple[HttpRequest, bytes] | None = None  # and what its message is before the binary data


class Connection(asyncio.Protocol):
    """One client. Requests may be pipelined; responses go out in their order."""

    def __init__(self, server: Server, *, unread: bytes = b"", since_ns: int = 0) -> None:
        """`unread`, `since_ns`: see `Leaving`; of a connection that another process began."""
        self._server = server
        self._inherited = (unread, since_ns)
        self._unread = Unread()
        self._ended: list[int] = []  # body sizes of the requests that ended in what is being parsed
        self._held = False  # it is about to leave: nothing more is read here
        self._parser = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._client = ""
        self._plan: Plan | None = None  # of the request before
        self._chunk = b""  # what is being parsed, if it begins between requests
        self._last_prefix = b""  # of the last request that was parsed and can have a plan
        self._pending: deque[_Pending] = deque()
        self._handling: _Pending | None = None  # the request whose handler runs
        self._reserved_bytes = 0  # for the body being read
        self._refusal: tuple[int, str] | None = None
        self._turned_away: HttpResponse | None = None  # said already to the request whose body is being dropped
        self._discarding_since_ns = 0  # a refused client is read and ignored for a moment, so that it sees why
        self._reading_since_ns = 0  # 0 = between requests
        self._in_head = False
        self._partial_bytes = 0
        self._left_bytes = 0  # of the body being read
        self._parsing = False
        self._backlog = b""  # received and not parsed yet: the client is too far ahead of its answers
        self._owes_continue = False  # this request's client waits to hear that it may send its body
        self._paused = False
        self._write_paused = False
        self.last_ns = clock.monotonic_ns()
        self.on_message_begin()
        self._reading_since_ns = 0

    @property
    def idle(self) -> bool:
        """Nothing is being read, answered or refused."""
        return not (self._pending or self._backlog or self._reading_since_ns or self._discarding_since_ns)

    # --- asyncio ---------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._client = client_of(transport.get_extra_info("socket"))
        self._server.connections.add(self)
        unread, since_ns = self._inherited
        if unread:
            self.data_received(unread)
            self._inherited = (b"", 0)
            self._reading_since_ns = self._reading_since_ns and since_ns

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._server.connections.discard(self)
        self._transport = None
        self._backlog = b""
        self._drop_body()

    def data_received(self, data: bytes) -> None:
        plan, server = self._plan, self._server
        if plan is None or len(data) != plan.size_bytes or not data.startswith(plan.prefix):
            self._plan = plan = server.plans.find(data)
        if (
            plan is None
            or self._pending or self._reading_since_ns or self._discarding_since_ns or self._paused
            or server.draining or server.freed
            or (server.buffered_bytes and not server.has_room(plan.body_bytes))
        ):  # fmt: skip
            self._parse(data)
            return
        self.last_ns = now_ns = clock.monotonic_ns()
        try:
            left = None if plan.serve is None else plan.serve(data, now_ns, self._transport.write)
        except Exception as error:  # noqa: BLE001 - as behind the parser
            self._plan = None
            self._fail(error)
            return
        if left is None and plan.serve is not None:
            return
        if isinstance(left, Left):
            self._plan = None  # if it is stale, there is a new one when this is answered
            self._parse(data)
        else:
            self._skip_parser(plan, data, left)

    def _skip_parser(self, plan: Plan, data: bytes, ended: Ended | None) -> None:
        """Go on as behind the parser."""
        self._server.reserve(plan.body_bytes)
        pending = _Pending(closing=False, size=plan.body_bytes)
        self._pending.append(pending)
        self._handling = pending
        numbers = memoryview(data)[len(plan.prefix) :]
        try:
            plan.submit(numbers, self.last_ns, self._client, ended, lambda response: self._reply(pending, response))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told and the worker lives on
            self._fail(error)
        self._handling = None

    def _parse(self, data: bytes) -> None:
        self._parse_some(data)
        if self._backlog:
            self._go_on()
            self._balance()

    def _go_on(self) -> None:
        """Parse what had to wait, as far as the client takes its answers."""
        while self._backlog and not (self._parsing or self._is_ahead()):
            data, self._backlog = self._backlog, b""
            self._parse_some(data)

    def _parse_some(self, data: bytes) -> None:
        """Parse all, or what its client is not too far ahead with; the rest is the backlog then."""
        if self._discarding_since_ns:
            return
        self._chunk = data if self.idle and self._server.make_plan is not None else b""
        self.last_ns = clock.monotonic_ns()
        self._parsing = True
        if len(data) <= max(WHOLE_BYTES, self._left_bytes):
            self._feed(data)
        else:
            self._feed_one_by_one(data)
        self._parsing = False
        self._flush()
        self._chunk = b""

    def _feed_one_by_one(self, data: bytes) -> None:
        """Feed head by head and body by body, until the client is too far ahead of its answers."""
        at = 0
        while at < len(data) and not self._discarding_since_ns:
            if self._is_ahead():
                self._backlog = data[at:]
                return
            head_end = data.find(b"\r\n\r\n", at) + 4
            end = at + self._left_bytes if self._left_bytes else head_end if head_end > 3 else len(data)
            self._feed(memoryview(data)[at:end])
            at = end

    def _is_ahead(self) -> bool:
        """Whether the client, between two requests, should take some answers first."""
        return not self._reading_since_ns and (self._write_paused or len(self._pending) > MAX_PIPELINED)

    def _feed(self, data: bytes | memoryview) -> None:
        was_in_head = self._in_head
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            if self._refusal is None:
                self._fail(error)
            else:
                self._refuse(*self._refusal)
        except httptools.HttpParserError:
            self._refuse(400, "the request is not well-formed HTTP/1.1")
        else:
            if was_in_head and self._in_head:
                self._partial_bytes += len(data)
                if self._partial_bytes > MAX_HEAD_BYTES:
                    self._refuse(431, f"the request's headers are over {MAX_HEAD_BYTES} bytes")
            if self._reading_since_ns or self._unread.size:
                whole = self._ended and not self._reading_since_ns  # of such a piece nothing is kept
                self._unread.feed(b"" if whole else bytes(data), self._ended, reading=bool(self._reading_since_ns))
                if self._reading_since_ns and self._turned_away is not None:
                    self._unread.drop_body()
            self._ended.clear()

    def eof_received(self) -> bool:
        """Keep the connection half open while answers are still owed."""
        if not self._pending:
            return False
        self._pending[-1].closing = True  # nothing is parsed later: who is not read has not ended either
        return True

    def pause_writing(self) -> None:
        self._write_paused = True
        self._balance()

    def resume_writing(self) -> None:
        self._write_paused = False
        self._go_on()
        self._balance()

    # --- httptools -------------------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._head_bytes = self._partial_bytes = 0
        self._body: list[bytes | bytearray] = []
        self._size = self._left_bytes = 0
        self._turned_away = None
        self._owes_continue = False
        self._in_head = True
        self._reading_since_ns = self.last_ns

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > MAX_URL_BYTES:
            self._stop(414, f"the request's path is over {MAX_URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD_BYTES or len(self._headers) >= MAX_HEADERS:
            self._stop(431, f"the request's headers are over {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} lines")
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").rstrip(" \t")  # the parser keeps blanks
        if key in self._headers:
            if key in ("host", "content-length", "inference-header-content-length"):
                self._stop(400, f"the header {key} is given twice")
            text = f"{self._headers[key]}, {text}"  # which means the same
        self._headers[key] = text

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._size = self._left_bytes = self._check_head()
        waits = self._headers.get("expect", "").lower() == "100-continue" and self._parser.get_http_version() == "1.1"
        if self._size and self._server.refuse is not None and not waits:
            self._turned_away = self._server.refuse(self._method(), self._path(), self._client, self.last_ns)
            if self._turned_away is not None:
                return
        if not self._server.reserve(self._size):
            self._stop(503, f"no room for a body of {self._size} bytes while so many others are being answered")
        self._reserved_bytes = self._size
        told = bool(self._inherited[0])  # by the process that had this connection before
        self._owes_continue = bool(waits and self._size and not told)
        self._tell_to_go_on()

    def _tell_to_go_on(self) -> None:
        """Answer `Expect: 100-continue`, in its turn."""
        if self._owes_continue and not self._pending and self._transport is not None:
            self._owes_continue = False
            if not self._transport.is_closing():
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_head(self) -> int:
        """Size of the body that follows; what is not accepted is refused."""
        headers, version = self._headers, self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._stop(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        if "host" not in headers and version == "1.1":
            self._stop(400, "the Host header is missing")
        if self._parser.should_upgrade():
            self._stop(400, "no other protocol is spoken here")
        if "transfer-encoding" in headers:
            self._stop(400, "bodies in chunks are not accepted, send a Content-Length")
        encodings = headers.get("content-encoding", "identity").lower().split(",")
        if any(encoding.strip() != "identity" for encoding in encodings):
            self._stop(415, "compressed bodies are not accepted")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            self._stop(400, "the Content-Length is not a number")
        size = int(length)
        json_bytes, most = _json_bytes(headers, size), self._server.max_json_bytes
        if json_bytes > most:
            text = f"the request has {json_bytes} bytes of JSON, at most {most} are accepted"
            self._stop(413, f"{text}. Send the tensors as binary data.")
        if size > self._server.max_body_bytes:
            self._stop(413, f"the body has {size} bytes, at most {self._server.max_body_bytes} are accepted")
        return size

    def on_body(self, body: bytes) -> None:
        self._left_bytes -= len(body)
        self._owes_continue = False
        if self._turned_away is None:
            put(self._body, body)

    def on_message_complete(self) -> None:
        self._reading_since_ns = 0
        self._ended.append(self._size)
        method = self._method()
        pending = _Pending(
            closing=not self._parser.should_keep_alive(),
            size=self._reserved_bytes,
            kept=self._parser.get_http_version() == "1.0",
            headless=method == "HEAD",
        )
        self._reserved_bytes = 0
        self._pending.append(pending)
        if self._turned_away is not None:
            self._reply(pending, self._turned_away)
        else:
            self._handle(pending, method)
        if len(self._pending) > MAX_PIPELINED:
            self._balance()

    def _handle(self, pending: _Pending, method: str) -> None:
        body = bytes(self._body[0]) if len(self._body) == 1 else b"".join(self._body)
        request = HttpRequest(method, self._path(), self._headers, body, self.last_ns, self._client)
        self._body = []
        if self._chunk and not (pending.closing or pending.kept):
            pending.lesson = self._lesson(request)
        self._handling = pending
        self._server.handler(request, lambda response: self._reply(pending, response))
        self._handling = None

    def _method(self) -> str:
        return str(self._parser.get_method().decode("latin-1"))

    def _path(self) -> str:
        return self._url.decode("latin-1")

    def _lesson(self, request: HttpRequest) -> tuple[HttpRequest, bytes] | None:
        """For a request whose whole message, and nothing else, came in one piece, for the second time in a row."""
        if request.method != "POST" or "expect" in request.headers or not request.body:
            return None
        chunk, head_bytes = self._chunk, self._chunk.find(b"\r\n\r\n") + 4
        if head_bytes + len(request.body) != len(chunk):
            return None
        is_text = (
            HEADER_LENGTH.lower() not in request.headers
        )  # a document whose numbers are in it: its head is the key
        json_bytes = 0 if is_text else _json_bytes(request.headers, len(request.body))
        prefix = chunk[: head_bytes + json_bytes]
        if len(prefix) > MAX_PREFIX_BYTES or len(prefix) == len(chunk):
            return None
        again, self._last_prefix = prefix == self._last_prefix, prefix
        return (request, prefix) if again else None

    # --- leaving ---------------------------------------------------------------------------------------------
    @property
    def has_unread(self) -> bool:
        """Part of a request has arrived."""
        return bool(self._reading_since_ns)

    def hold(self) -> bool:
        """Read no more, unless the request that is arriving is too large to move; whether it can leave now."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._discarding_since_ns:
            return False
        if self.has_unread and not self._unread.movable:
            return False
        self._held = True
        self._balance()
        return not (self._pending or self._backlog or self._write_paused or transport.get_write_buffer_size())

    def leaving(self) -> Leaving:
        """What another process needs to go on with it; after `hold` said yes."""
        descriptor = self._transport.get_extra_info("socket").fileno()
        if self.has_unread:
            return Leaving(descriptor, self._unread.raw(), self._reading_since_ns)
        return Leaving(descriptor, b"", 0)

    def leave(self) -> None:
        """Another process has it: close this one's descriptor, which ends nothing (no shutdown)."""
        self._server.connections.discard(self)
        self.abort()

    def stay(self) -> None:
        """Nobody took it: go on here."""
        self._held = False
        self._balance()

    # --- answering -------------------------------------------------------------------------------------------
    def close_if_idle(self) -> None:
        """For a draining server: between requests, and not just before the next one, nobody loses anything."""
        quiet_ns = clock.monotonic_ns() - self.last_ns
        if self.idle and quiet_ns > PAUSE_S * 1e9 and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def check_pace(self, now_ns: int) -> None:
        """Refuse a request that takes too long to arrive; cut off a refused client that does not go."""
        if self._discarding_since_ns:
            if now_ns - self._discarding_since_ns > LINGER_S * 1e9:
                self.abort()
            return
        if self._held:
            return
        allowed_s = self._server.slow_s + self._size / SLOWEST_BYTES_PER_S
        if self._reading_since_ns and now_ns - self._reading_since_ns > allowed_s * 1e9:
            self._refuse(408, f"the request did not arrive within {allowed_s:.0f} s")

    def _stop(self, status: int, text: str) -> None:
        self._refusal = (status, text)
        raise _Refused

    def _fail(self, error: Exception) -> None:
        """A handler raised what it should not: told to the process loop, which counts it; the worker lives on."""
        _tell_bug("a request handler failed", error.__context__ or error)
        pending, self._handling = self._handling, None
        self._read_no_more()
        if pending is None:
            pending = _Pending(closing=True)
            self._pending.append(pending)
        pending.closing = True
        if pending.response is None:
            self._reply(pending, error_response(500, "internal error"))
        elif not self._pending and self._transport is not None:
            self._transport.close()  # it was answered before its handler failed: one request, one answer

    def _refuse(self, status: int, text: str) -> None:
        """Answer what was asked before, then this error, then nothing more."""
        if status != HTTPStatus.SERVICE_UNAVAILABLE:
            self._server.malformed += 1
        self._read_no_more()
        pending = _Pending(closing=True)
        self._pending.append(pending)
        self._reply(pending, error_response(status, text, {"Retry-After": "1"} if status == 503 else None))

    def _read_no_more(self) -> None:
        self._discarding_since_ns = self.last_ns = clock.monotonic_ns()
        self._reading_since_ns = self._left_bytes = 0
        self._backlog = b""
        self._drop_body()

    def _drop_body(self) -> None:
        """Forget a body that will not be read to its end."""
        self._body = []
        self._owes_continue = False
        self._server.release(self._reserved_bytes)
        self._reserved_bytes = 0

    def _reply(self, pending: _Pending, response: HttpResponse) -> None:
        if pending.response is not None:
            _tell_bug("a request was answered twice; the second answer was dropped")
            return
        self._server.release(pending.size)
        pending.response = response
        self._flush()
        if self._backlog:
            self._go_on()
        if self._paused:
            self._balance()
        if self._server.freed is not None and not self._pending:
            self._server.freed.set()

    def _learn(self, request: HttpRequest, prefix: bytes, response: bytes) -> None:
        known = self._server.plans.find_prefix(prefix)
        if self._server.make_plan is None or (known is not None and not known.stale()):
            return
        plan = self._server.make_plan(request, prefix, response)
        if plan is not None:
            self._server.plans.keep(plan)

    def _flush(self) -> None:
        """Write what is next; a draining server's last answer, to all that has arrived, ends the connection."""
        draining = self._server.draining
        if self._parsing and draining:
            return  # which answer is the last is known behind it
        while self._pending and self._pending[0].response is not None:
            pending = self._pending.popleft()
            pending.closing = pending.closing or (draining and not self._pending and not self._backlog)
            self._write(pending, pending.response)
        if self._owes_continue:
            self._tell_to_go_on()

    def _write(self, pending: _Pending, response: HttpResponse | None) -> None:
        if self._transport is None or self._transport.is_closing() or response is None:
            return
        raw = encode_response(response, closing=pending.closing, kept=pending.kept, headless=pending.headless)
        if pending.lesson is not None and response.status == HTTPStatus.OK and not pending.closing:
            self._learn(*pending.lesson, raw)
        self._transport.write(raw)
        if not pending.closing:
            return
        self._pending.clear()  # nothing may follow, not even the refusal of what came behind this request
        if self._discarding_since_ns:
            with contextlib.suppress(OSError):
                self._transport.write_eof()
        else:
            self._transport.close()

    def _balance(self) -> None:
        """Read only while the client takes its answers and is not too far ahead of them, and only while it stays."""
        wanted = self._held or self._write_paused or bool(self._backlog) or len(self._pending) > MAX_PIPELINED
        if self._transport is None or wanted == self._paused or self._transport.is_closing():
            return
        self._paused = wanted
        if wanted:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()


def _tell_bug(message: str, exception: BaseException | None = None) -> None:
    context: dict[str, Any] = {"message": message}
    if exception is not None:
        context["exception"] = exception
    asyncio.get_running_loop().call_exception_handler(context)


def _json_bytes(headers: dict[str, str], size: int) -> int:
    """How much of a body is JSON; what is no number is refused by whoever reads the body."""
    given = headers.get(HEADER_LENGTH.lower(), "")
    return min(int(given), size) if given.isascii() and given.isdigit() and len(given) < 16 else size


_REASONS = {status.value: status.phrase for status in HTTPStatus}


def encode_response(
    response: HttpResponse, *, closing: bool = False, kept: bool = False, headless: bool = False
) -> bytes:
    """The bytes of a response. `closing`, `kept`, `headless`: see `_Pending`."""
    size = sum(map(len, response.parts))
    lines = f"HTTP/1.1 {response.status} {_REASONS[response.status]}\r\nContent-Length: {size}\r\n"
    if response.json_bytes:
        lines += f"Content-Type: {BINARY}\r\n{HEADER_LENGTH}: {response.json_bytes}\r\n"
    else:
        lines += f"Content-Type: {JSON}\r\n"
    for name, value in response.headers.items():
        lines += f"{name}: {value}\r\n"
    if closing:
        lines += "Connection: close\r\n"
    elif kept:
        lines += "Connection: keep-alive\r\n"
    if headless:
        return (lines + "\r\n").encode("latin-1")
    return b"".join((lines.encode("latin-1"), b"\r\n", *response.parts))


def _turn_away(sock: socket.socket) -> None:
    response = error_response(503, "too many connections are open", {"Retry-After": "1"})
    with sock, contextlib.suppress(OSError):
        sock.settimeout(0)
        sock.send(encode_response(response, closing=True))
