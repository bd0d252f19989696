"""A server that trickles, wherever in the exchange: the time the caller allows is kept."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from agent.clock import monotonic_s
from agent.contract.errors import Unavailable
from agent.ota import wire

ALLOWED_S = 0.5
HEAD = b"HTTP/1.1 200 OK\r\n"


@contextlib.contextmanager
def trickling(beginning: bytes) -> Iterator[str]:
    """A server that answers `beginning` and then one byte every 50 ms; yields host and port."""
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.sendall(beginning)
            while not over.wait(0.05):
                connection.sendall(b"a")

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                serve(listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, name="test-trickle")
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def given_up_in_time(exchange: Callable[[], object]) -> bool:
    began_s = monotonic_s()
    with pytest.raises(Unavailable, match="too slow"):
        exchange()
    return monotonic_s() - began_s < ALLOWED_S + 10.0  # else it would take for ever


def fetch(url: str) -> bytes:
    with wire.get(url, until_s=monotonic_s() + ALLOWED_S) as answer:
        return b"".join(answer.body)


@pytest.mark.parametrize(
    "beginning",
    [
        b"H", HEAD + b"X: ", HEAD + b"\r\n", HEAD + b"Content-Length: 999\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["status", "header", "body without an end", "body", "chunks"],
)  # fmt: skip
def test_an_answer_that_trickles_is_given_up_in_time(beginning: bytes) -> None:
    with trickling(beginning) as place:
        assert given_up_in_time(lambda: fetch(f"http://{place}/x"))


def test_a_handshake_that_trickles_is_given_up_in_time() -> None:
    with trickling(b"\x16\x03\x03\x3f\xff\x02") as place:  # a record of which little ever comes
        assert given_up_in_time(lambda: fetch(f"https://{place}/x"))


@pytest.mark.parametrize("beginning", [HEAD + b"X: ", HEAD + b"\r\n"], ids=["header", "body"])
def test_the_answer_to_a_sent_body_that_trickles_is_given_up_in_time(beginning: bytes) -> None:
    with trickling(beginning) as place:
        assert given_up_in_time(
            lambda: wire.send(
                "PUT", f"http://{place}/x", io.BytesIO(b"body"), 4, headers={}, until_s=monotonic_s() + ALLOWED_S
            )
        )


def test_no_time_is_no_connection() -> None:
    with pytest.raises(Unavailable, match="too slow"), wire.get("http://127.0.0.1:1/x", until_s=monotonic_s()):
        pass


def test_no_thread_stays_behind_an_exchange() -> None:
    with pytest.raises(Unavailable, match="refused"), wire.get("http://127.0.0.1:1/x", until_s=monotonic_s() + 600.0):
        pass
    for thread in threading.enumerate():
        if thread.name == "ew-wire-limit":
            thread.join(60)
            assert not thread.is_alive()
