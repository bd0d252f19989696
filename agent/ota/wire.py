"""One bounded HTTP exchange: a GET with Range, or a body that is sent; what goes wrong on the way is Unavailable.

No redirects, no proxies, no cookies: a captive portal's answer is a status we do not know. The body's length is
whatever comes; the caller bounds it by what is signed.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Self
from urllib.parse import urlsplit

from agent import clock
from agent.contract.errors import ConfigError, Unavailable

CHUNK_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 64 * 1024  # of what is said about a sent body
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_FOREIGN = (OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Answer:
    """`start`: offset of the first body byte. `total`: the server's claim about the whole, None = none made."""

    status: int
    start: int
    total: int | None
    body: Iterator[bytes]


def make_tls(ca: str) -> ssl.SSLContext | None:
    """TLS that trusts the CA file, or the system's for "" and "system". Raises: ConfigError."""
    try:
        return ssl.create_default_context(cafile=ca if ca not in {"", "system"} else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use the CA certificates in {ca}: {error}") from None


@contextlib.contextmanager
def get(
    url: str, *, until_s: float, timeout_s: float = 10.0, offset: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[Answer]:
    """Ask for `url` from `offset` on. `until_s`: monotonic time at which even a trickling answer is given up.

    Raises:
        Unavailable: no connection, no answer in time, or not HTTP.
    """
    connection, path, secure = _connection(url, timeout_s, tls)
    headers = {"Accept-Encoding": "identity", "User-Agent": "edgewarden"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with contextlib.closing(connection), _Limit(url, until_s) as limit:
        try:
            limit.connect(connection, secure)
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
        except (*_FOREIGN, ValueError) as error:
            raise limit.explain(error) from None
        with contextlib.closing(response):
            yield _answer(response, url, limit)


def send(
    method: str, url: str, body: BinaryIO, size: int, *, headers: Mapping[str, str], until_s: float,
    timeout_s: float = 10.0, tls: ssl.SSLContext | None = None,
) -> tuple[int, bytes]:  # fmt: skip
    """Send `size` bytes of `body`; returns the status and the first MAX_ANSWER_BYTES of the answer.

    Raises:
        Unavailable: no connection, no answer in time, or not HTTP.
    """
    connection, path, secure = _connection(url, timeout_s, tls)
    with contextlib.closing(connection), _Limit(url, until_s) as limit:
        try:
            limit.connect(connection, secure)
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in {"User-Agent": "edgewarden", "Content-Length": str(size), **headers}.items():
                connection.putheader(name, value)
            connection.endheaders()
            _send_body(connection, body, size, limit)
            with contextlib.closing(connection.getresponse()) as response:
                answer = response.read(MAX_ANSWER_BYTES)
        except (*_FOREIGN, ValueError) as error:
            raise limit.explain(error) from None
        limit.check()
        return response.status, answer


class _Limit:
    """Opens a connection, and ends it at `until_s` from another thread: a server may trickle where no timeout counts.

    It holds the socket by a number of its own: shutting that down wakes whoever reads or writes, at any time.
    """

    def __init__(self, url: str, until_s: float) -> None:
        self._url = url
        self._until_s = until_s
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._timer = threading.Timer(max(until_s - clock.monotonic_s(), 0.0), self._end)
        self._timer.name, self._timer.daemon = "ew-wire-limit", True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def connect(self, connection: http.client.HTTPConnection, tls: ssl.SSLContext | None) -> None:
        """Raises: OSError, ValueError, Unavailable."""
        self.check()
        left_s = max(self._until_s - clock.monotonic_s(), 0.01)
        timeout_s = min(connection.timeout or left_s, left_s)
        connection.sock = socket.create_connection((connection.host, connection.port), timeout=timeout_s)
        with self._lock:
            self._socket = connection.sock.dup()
        self.check()  # from here on the timer finds it
        connection.sock.settimeout(connection.timeout)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            connection.sock = tls.wrap_socket(connection.sock, server_hostname=connection.host)

    def check(self) -> None:
        """Raises: Unavailable: the time is over."""
        if self._ended or clock.monotonic_s() >= self._until_s:
            raise Unavailable(f"{self._url} was too slow", hint="It is tried again.")

    def explain(self, error: BaseException) -> Unavailable:
        """What an error means that came up meanwhile."""
        try:
            self.check()
        except Unavailable as late:
            return late
        return _unavailable(self._url, error)

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)


def _send_body(connection: http.client.HTTPConnection, body: BinaryIO, size: int, limit: _Limit) -> None:
    """A server that has heard enough may answer and close early: its answer says why."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while size > 0:
            limit.check()
            chunk = body.read(min(CHUNK_BYTES, size))
            if not chunk:
                raise ValueError("the file became shorter")
            connection.send(chunk)
            size -= len(chunk)


def _connection(
    url: str, timeout_s: float, tls: ssl.SSLContext | None
) -> tuple[http.client.HTTPConnection, str, ssl.SSLContext | None]:
    """Not yet opened; the path to ask it for; and how to trust it."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "https":
            secure = tls or make_tls("")
            connection = http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=secure)
            return connection, parts.path or "/", secure
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.netloc, timeout=timeout_s), parts.path or "/", None
    except (http.client.InvalidURL, ValueError) as error:
        raise Unavailable(f"cannot ask '{url[:80]}': {error}") from None
    raise Unavailable(f"cannot fetch from a '{parts.scheme[:20]}' address", hint="Use http or https.")


def _answer(response: http.client.HTTPResponse, url: str, limit: _Limit) -> Answer:
    start, total = 0, response.length
    if response.status == http.client.PARTIAL_CONTENT:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None:
            raise Unavailable(f"{url} answered a part without saying which")
        start = int(match[1])
        total = None if match[2] == "*" else int(match[2])
    return Answer(response.status, start, total, _body(response, url, limit))


def _body(response: http.client.HTTPResponse, url: str, limit: _Limit) -> Iterator[bytes]:
    while True:
        limit.check()
        try:
            chunk = response.read1(CHUNK_BYTES)
        except _FOREIGN as error:
            raise limit.explain(error) from None
        if not chunk:
            limit.check()  # an end that we made is none
            break
        yield chunk
    if response.length:
        raise Unavailable(f"{url} was cut {response.length} bytes before its end", hint="It is tried again.")


def _unavailable(url: str, error: BaseException) -> Unavailable:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Unavailable(f"cannot fetch {url}: {why}", hint="It is tried again.")
