"""HTTP/1.1 on real sockets: pipelining, limits, everything with two readings refused, drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.frontend.server import (
    MAX_HEAD_BYTES,
    SMALL_BODY_BYTES,
    HttpRequest,
    HttpResponse,
    Leaving,
    Reply,
    Server,
    error_response,
)

HEAD = b"Host: x\r\n"
LIMIT_BYTES = 1000
POST = b"POST /a HTTP/1.1\r\n" + HEAD + b"Content-Length: 6\r\n\r\nabcdef"


class Handler:
    """Echoes path and body; paths under /held are answered when the test says so."""

    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []
        self.held: list[Callable[[], None]] = []

    def __call__(self, request: HttpRequest, reply: Reply) -> None:
        self.requests.append(request)
        if request.path == "/bug":
            raise ZeroDivisionError("a bug")
        response = HttpResponse(200, (request.path.encode() + b" ", request.body))
        if request.path.startswith("/twice"):
            reply(response)
        if request.path == "/answered-bug":
            reply(response)
            raise ZeroDivisionError("a bug")
        if request.path.startswith("/held"):
            self.held.append(lambda: reply(response))
        else:
            reply(response)


def busy(method: str, path: str, client: str, now_ns: int) -> HttpResponse | None:
    """No place for what is posted below /busy."""
    assert method in ("GET", "POST", "PUT")
    assert client.startswith("process ")
    assert now_ns
    return error_response(503, f"{path} is full", {"Retry-After": "7"}) if path.startswith("/busy") else None


class Stage:
    def __init__(self, listener: socket.socket, path: str, **options: Any) -> None:
        self.handler = Handler()
        self.server = Server(self.handler, max_body_bytes=LIMIT_BYTES, **options)
        self.listener = listener
        self.server.listen(listener)
        self.path = path

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.path)

    async def exchange(self, raw: bytes) -> bytes:
        """Send bytes, end our side, and return everything that comes back."""
        reader, writer = await self.connect()
        writer.write(raw)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer


@contextmanager
def listening(folder: Path) -> Iterator[tuple[socket.socket, str]]:
    path = str(folder / "http.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        yield listener, path


def play(tmp_path: Path, story: Callable[[Stage], Awaitable[None]], **options: Any) -> None:
    async def scene() -> None:
        with listening(tmp_path) as (listener, path):
            stage = Stage(listener, path, **options)
            try:
                await asyncio.wait_for(story(stage), 60)
            finally:
                stage.server.close()
                await until(lambda: not stage.server.connections)

    asyncio.run(scene())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 - conditions of many kinds, most without an event of their own
        await asyncio.sleep(0.005)


def statuses(raw: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [^\r]*\r\nContent-Length", raw)]


def error(raw: bytes) -> str:
    """The text of an error answer, which must be JSON with this one key."""
    head, _, body = raw.partition(b"\r\n\r\n")
    document = json.loads(body)
    assert list(document) == ["error"]
    assert f"Content-Length: {len(body)}".encode() in head
    text: str = document["error"]
    return text


def test_a_request_is_answered_and_the_connection_kept(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        for body in (b"abc", b""):
            writer.write(b"POST /a HTTP/1.1\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head == (
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n" % (3 + len(body))
            )
            assert await reader.readexactly(3 + len(body)) == b"/a " + body
        assert stage.server.statistics()["accepted"] == 1
        writer.close()

    play(tmp_path, story)


def test_bytes_may_arrive_one_by_one(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        for byte in b"POST /slow HTTP/1.1\r\nhOsT: x\r\nContent-Length: 2\r\n\r\nhi":
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await reader.readuntil(b"/slow hi")).startswith(b"HTTP/1.1 200")
        assert stage.handler.requests[0].headers["host"] == "x"
        writer.close()

    play(tmp_path, story)


def test_pipelined_requests_are_answered_in_their_order(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        for path in (b"/held1", b"/now", b"/held2"):
            writer.write(b"GET " + path + b" HTTP/1.1\r\n" + HEAD + b"\r\n")
        await until(lambda: len(stage.handler.held) == 2)
        stage.handler.held[1]()
        stage.handler.held[0]()
        answers = b""
        while answers.count(b"HTTP/1.1") < 3 or not answers.endswith(b"/held2 "):
            answers += await reader.read(4096)
        assert answers.index(b"/held1 ") < answers.index(b"/now ") < answers.index(b"/held2 ")
        writer.close()

    play(tmp_path, story)


def test_a_client_far_ahead_of_its_answers_is_not_read_any_more(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        one = b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n"
        writer.write(one * 40)
        await until(lambda: len(stage.handler.held) == 40)
        writer.write(one * 1000)
        await asyncio.sleep(0.05)
        assert len(stage.handler.held) == 40
        for answered in range(1040):
            await until(lambda number=answered: len(stage.handler.held) > number)
            stage.handler.held[answered]()
        received = b""
        while received.count(b"/held ") < 1040:
            received += await reader.read(65536)
        writer.close()

    play(tmp_path, story)


def test_a_heap_of_requests_in_one_piece_waits_for_its_client_to_take_the_answers(tmp_path: Path) -> None:
    count, answer = 6_000, b"x" * 4_000
    one = b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n"

    async def story(stage: Stage) -> None:
        stage.server.handler = lambda request, reply: (asked.append(request), reply(HttpResponse(200, (answer,))))  # type: ignore[assignment]
        reader, writer = await stage.connect()
        writer.write(one * count)
        await until(lambda: [waiting for waiting in stage.server.connections if not waiting.idle])
        [connection] = stage.server.connections
        assert len(asked) < 1000  # what the socket's buffers hold, and not all that was read
        assert not connection.has_unread
        received = 0
        while received < count:
            received += (await reader.readuntil(answer)).count(b"HTTP/1.1 200 OK")
        assert len(asked) == count
        await until(lambda: connection.idle)
        writer.close()

    asked: list[HttpRequest] = []
    play(tmp_path, story)


def test_a_heap_of_requests_whose_last_is_not_whole_is_well_formed(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write((b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n") * 1000 + POST[:30])
        await until(lambda: len(stage.handler.requests) == 1000)
        for _ in range(1000):
            assert (await reader.readuntil(b"/a ")).startswith(b"HTTP/1.1 200")
        writer.write(POST[30:])
        assert (await reader.readuntil(b"/a abcdef")).startswith(b"HTTP/1.1 200")
        writer.close()

    play(tmp_path, story)


@pytest.mark.parametrize("seed", range(3))
def test_requests_in_large_pieces_are_cut_where_they_end(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a test's choices
    bodies = [chance.randbytes(chance.choice((0, 1, 5, 900))).replace(b"a", b"\r\n\r\n")[:1000] for _ in range(400)]
    raw = b"".join(b"POST /b HTTP/1.1\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % len(b) + b for b in bodies)

    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        at = 0
        while at < len(raw):
            size = chance.choice((1, 100, 5_000, 60_000))
            writer.write(raw[at : at + size])
            at += size
            await asyncio.sleep(0)
        for body in bodies:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(3 + len(body)) == b"/b " + body
        writer.close()

    play(tmp_path, story)


def test_a_client_that_ends_its_side_still_gets_its_answer(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n")
        writer.write_eof()
        await until(lambda: stage.handler.held)
        stage.handler.held[0]()
        answer = await reader.read()
        assert answer.endswith(b"/held ")
        writer.close()

    play(tmp_path, story)


def test_a_client_that_is_gone_before_its_answer_hurts_nobody(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        _, writer = await stage.connect()
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n")
        await until(lambda: stage.handler.held)
        writer.transport.abort()
        stage.handler.held[0]()
        await until(lambda: not stage.server.connections)
        assert statuses(await stage.exchange(b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n")) == [200]

    play(tmp_path, story)


@pytest.mark.parametrize(
    "head", [b"GET /a HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n", b"GET /a HTTP/1.0\r\n\r\n"]
)
def test_a_client_that_wants_no_more_is_closed_after_its_answer(tmp_path: Path, head: bytes) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(head)
        answer = await reader.read()
        assert statuses(answer) == [200]
        assert b"Connection: close\r\n" in answer
        writer.close()

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 400, "chunks"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", 400, ""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", 400, ""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, ""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na", 400, ""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\na", 400, ""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\na", 400, ""),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "twice"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400, ""),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400, ""),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"Inference-Header-Content-Length: 1\r\n" * 2 + b"\r\n", 400, "twice"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 400, "protocol"),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, ""),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, ""),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400, "well-formed"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\na", 415, "compressed"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Encoding: identity\r\n\r\n", 415, ""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: identity\r\nContent-Encoding: gzip\r\n\r\n", 415, ""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n", 413, "1001 bytes, at most 1000"),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "path"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", 431, "headers"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"H%d: 1\r\n" % n for n in range(101)) + b"\r\n", 431, "lines"),
    ],
)  # fmt: skip
def test_a_request_with_two_readings_or_over_a_limit_is_refused(
    tmp_path: Path, raw: bytes, status: int, words: str
) -> None:
    async def story(stage: Stage) -> None:
        answer = await stage.exchange(raw)
        assert statuses(answer) == [status]
        assert words in error(answer)
        assert b"Connection: close\r\n" in answer
        assert stage.handler.requests == []
        assert stage.server.statistics()["malformed"] == 1

    play(tmp_path, story)


def test_what_was_asked_before_a_malformed_request_is_still_answered(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\nrubbish\r\n\r\n")
        await until(lambda: stage.handler.held and stage.server.statistics()["malformed"])
        stage.handler.held[0]()
        assert statuses(await reader.read()) == [200, 400]
        writer.close()

    play(tmp_path, story)


def test_headers_that_never_end_are_cut_off(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        while not stage.server.statistics()["malformed"]:
            writer.write(b"a" * 1000)
            await asyncio.sleep(0.001)
        assert statuses(await reader.read()) == [431]
        writer.close()

    play(tmp_path, story)


def test_a_refused_client_may_finish_sending_and_then_reads_why(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n")
        writer.write(b"a" * 4_000_000)
        await writer.drain()
        assert statuses(await reader.read()) == [413]
        writer.close()

    play(tmp_path, story)


def test_a_request_that_does_not_arrive_is_a_timeout(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab")
        assert statuses(await reader.read()) == [408]
        writer.close()

    play(tmp_path, story, slow_s=0.05)


def test_idle_connections_are_no_timeout(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        await asyncio.sleep(0.6)  # one sweep
        writer.write(b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert (await reader.readuntil(b"/a ")).startswith(b"HTTP/1.1 200")
        writer.close()

    play(tmp_path, story, slow_s=0.0)


def test_a_client_that_asks_first_is_told_to_go_on(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"POST /a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await reader.readuntil(b"/a hi")).startswith(b"HTTP/1.1 200")
        writer.close()

    play(tmp_path, story)


def test_one_that_asks_first_behind_another_request_is_told_in_its_turn(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        asking = b"POST /a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n" + asking)
        await until(lambda: stage.handler.held)
        stage.handler.held[0]()
        assert (await reader.readuntil(b"/held ")).startswith(b"HTTP/1.1 200")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await reader.readuntil(b"/a hi")).startswith(b"HTTP/1.1 200")
        writer.close()

    play(tmp_path, story)


def test_one_that_asked_first_and_did_not_wait_is_told_nothing(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        asking = b"POST /a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n" + asking + b"h")
        await until(lambda: stage.handler.held)
        stage.handler.held[0]()
        writer.write(b"i")
        answers = await reader.readuntil(b"/a hi")
        assert statuses(answers) == [200, 200]
        assert b"100 Continue" not in answers
        writer.close()

    play(tmp_path, story)


def test_a_client_of_the_older_version_is_told_nothing_it_does_not_know(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        asking = b"POST /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi"
        assert (await stage.exchange(asking)).startswith(b"HTTP/1.1 200")

    play(tmp_path, story)


def test_blanks_behind_a_value_do_not_belong_to_it(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        head = b"Content-Length: 2 \r\nInference-Header-Content-Length: 1\t \r\nContent-Encoding: identity \r\n\r\n"
        assert statuses(await stage.exchange(b"POST /a HTTP/1.1\r\n" + HEAD + head + b"hi")) == [200]
        assert stage.handler.requests[0].headers["inference-header-content-length"] == "1"

    play(tmp_path, story)


@pytest.mark.parametrize("behind", [b"no request\r\n\r\n", b"GET /b HTTP/1.1\r\n" + HEAD + b"\r\n"])
def test_nothing_follows_the_answer_after_which_a_client_wanted_to_be_closed(tmp_path: Path, behind: bytes) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n" + behind)
        await until(lambda: stage.server.malformed)
        stage.handler.held[0]()  # raises what it must not: the caller would lose its observation
        assert statuses(await reader.read()) == [200]
        writer.close()

    play(tmp_path, story)


def test_a_bug_in_a_handler_is_a_500_and_told_to_the_process_loop(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        answer = await stage.exchange(b"GET /bug HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert statuses(answer) == [500]
        assert error(answer) == "internal error"
        assert [type(exception) for exception in told] == [ZeroDivisionError]

    play(tmp_path, story)


def test_a_handler_that_fails_after_its_answer_sends_no_second_one(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        for before, expected in ((b"", [200]), (b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n", [200, 200])):
            reader, writer = await stage.connect()
            writer.write(before + b"GET /answered-bug HTTP/1.1\r\n" + HEAD + b"\r\n")
            await until(lambda: told)
            for answer in stage.handler.held:
                answer()
            assert statuses(await reader.read()) == expected
            assert [type(exception) for exception in told] == [ZeroDivisionError]
            told.clear()
            writer.close()

    play(tmp_path, story)


def test_the_second_answer_to_one_request_is_dropped_and_told(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        two = b"GET /twice HTTP/1.1\r\n" + HEAD + b"\r\nGET /a HTTP/1.1\r\n" + HEAD + b"\r\n"
        answer = await stage.exchange(two)
        assert (statuses(answer), answer.count(b"/twice "), answer.count(b"/a ")) == ([200, 200], 1, 1)
        assert told == ["a request was answered twice; the second answer was dropped"]

    play(tmp_path, story)


# --- memory --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("head", "size", "status"),
    [
        (b"", 100, 200), (b"", 101, 413), (b"Inference-Header-Content-Length: 100\r\n", 1000, 200),
        (b"Inference-Header-Content-Length: 101\r\n", 1000, 413),
        (b"Inference-Header-Content-Length: x\r\n", 101, 413),
    ],
)  # fmt: skip
def test_json_has_a_limit_of_its_own(tmp_path: Path, head: bytes, size: int, status: int) -> None:
    async def story(stage: Stage) -> None:
        request = b"POST /a HTTP/1.1\r\n" + HEAD + head + b"Content-Length: %d\r\n\r\n" % size + b"a" * size
        answer = await stage.exchange(request)
        assert statuses(answer) == [status]
        if status == 413:
            assert "Send the tensors as binary data" in error(answer)
            assert stage.handler.requests == []

    play(tmp_path, story, max_json_bytes=100)


def test_bodies_of_all_unanswered_requests_share_one_limit(tmp_path: Path) -> None:
    def post(path: bytes, size: int) -> bytes:
        return b"POST " + path + b" HTTP/1.1\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % size + b"a" * size

    async def story(stage: Stage) -> None:
        held, writer = await stage.connect()
        writer.write(post(b"/held", 900))
        await until(lambda: stage.handler.held)
        reading, slow_writer = await stage.connect()
        slow_writer.write(post(b"/a", 1000)[:-1])
        await until(lambda: stage.server.statistics()["buffered_bytes"] == 1900)
        answer = await stage.exchange(post(b"/a", 101))
        assert statuses(answer) == [503]
        assert b"Retry-After: 1\r\n" in answer
        assert stage.server.statistics()["refused_bodies"] == 1
        assert stage.server.statistics()["malformed"] == 0
        assert statuses(await stage.exchange(b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n")) == [200]
        slow_writer.transport.abort()
        await until(lambda: stage.server.statistics()["buffered_bytes"] == 900)
        assert statuses(await stage.exchange(post(b"/a", 1000))) == [200]
        stage.handler.held[0]()
        await held.readuntil(b"/held " + b"a" * 900)
        assert stage.server.statistics()["buffered_bytes"] == 0
        writer.close()
        del reading

    play(tmp_path, story, max_buffered_bytes=2000)


def test_the_last_quarter_of_the_room_is_kept_for_small_bodies(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        server, large = stage.server, SMALL_BODY_BYTES + 1
        taken = 0
        while server.reserve(large):
            taken += large
        assert taken <= 750_000
        while server.reserve(SMALL_BODY_BYTES):
            taken += SMALL_BODY_BYTES
        assert 1_000_000 - SMALL_BODY_BYTES < taken <= 1_000_000
        server.release(taken)
        assert server.statistics()["buffered_bytes"] == 0

    play(tmp_path, story, max_buffered_bytes=1_000_000)


def test_a_body_that_is_not_read_to_its_end_gives_its_room_back(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab")
        await until(lambda: stage.server.statistics()["buffered_bytes"] == 9)
        assert statuses(await reader.read()) == [408]
        assert stage.server.statistics()["buffered_bytes"] == 0
        writer.close()

    play(tmp_path, story, slow_s=0.05)


# --- connections ---------------------------------------------------------------------------------------------
FULL = b"POST /busy/%d HTTP/1.1\r\n" + HEAD + b"Content-Length: %d\r\n\r\n"


def test_a_request_without_a_place_is_refused_by_its_head_and_its_connection_goes_on(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(FULL % (1, 900) + b"x" * 500)
        await until(lambda: [one for one in stage.server.connections if one.has_unread])
        assert stage.server.buffered_bytes == 0
        writer.write(b"x" * 400 + POST)
        received = await reader.readuntil(b"/a abcdef")
        assert statuses(received) == [503, 200]
        assert b"Retry-After: 7" in received
        assert error(received[: received.index(b"}") + 1]) == "/busy/1 is full"
        assert b"Connection: close" not in received
        assert [request.body for request in stage.handler.requests] == [b"abcdef"]
        writer.close()

    play(tmp_path, story, refuse=busy)


@pytest.mark.parametrize("seed", range(8))
def test_what_follows_a_refused_body_is_the_next_request_however_it_was_cut(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - test data
    hostile = [b"", b"\r\n\r\n", POST, FULL % (99, 5) + b"abcde", b"0\r\n\r\n"]
    stream, expected = b"", []
    for number in range(30):
        body = rng.choice(hostile) + rng.randbytes(rng.randrange(200))
        full = rng.random() < 0.5
        path = b"/%s/%d" % (b"busy" if full else b"free", number)
        stream += b"POST " + path + b" HTTP/1.1\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
        expected.append((503, b"") if full and body else (200, path + b" " + body))

    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        at = 0
        while at < len(stream):
            size = rng.choice([1, 3, 70, 400, 3000])
            writer.write(stream[at : at + size])
            at += size
            await asyncio.sleep(0)
        for status, content in expected:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            assert int(head[9:12]) == status
            assert body == content or status == 503
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()

    play(tmp_path, story, refuse=busy)


def test_refusals_that_wait_for_an_answer_before_them_are_bounded_too(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n")
        for number in range(200):
            writer.write(FULL % (number, 900) + b"x" * 900)
        await until(lambda: any(one._paused for one in stage.server.connections))
        stage.handler.held[0]()
        received = b""
        while received.count(b"is full") < 200:
            received += await reader.read(65536)
        assert statuses(received) == [200] + [503] * 200
        writer.close()

    play(tmp_path, story, refuse=busy)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (FULL % (1, LIMIT_BYTES + 1), 413),  # it will never have a place
        (b"POST /busy HTTP/1.1\r\nContent-Length: 5\r\n\r\n", 400),  # no host
        (b"POST /busy HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /busy HTTP/1.1\r\n" + HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (FULL % (1, 5) + b"abcdeTHIS IS NO REQUEST\r\n\r\n", 400),
    ],
)
def test_a_full_queue_makes_no_malformed_request_sound(tmp_path: Path, head: bytes, status: int) -> None:
    async def story(stage: Stage) -> None:
        assert statuses(await stage.exchange(head))[-1] == status

    play(tmp_path, story, refuse=busy)


def test_a_body_that_is_dropped_must_arrive_in_time_too(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(FULL % (1, 900) + b"x")
        assert statuses(await reader.read()) == [408]
        writer.close()

    play(tmp_path, story, refuse=busy, slow_s=0.1)


def test_one_that_asks_before_it_sends_is_refused_with_its_body(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"POST /busy HTTP/1.1\r\n" + HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"abcde")
        assert (await reader.readuntil(b"/busy abcde")).startswith(b"HTTP/1.1 200")  # by its handler
        writer.close()

    play(tmp_path, story, refuse=busy)


def test_at_the_limit_the_longest_idle_connection_makes_room(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        first, writer_a = await stage.connect()
        await until(lambda: len(stage.server.connections) == 1)
        _, writer_b = await stage.connect()
        await until(lambda: len(stage.server.connections) == 2)
        writer_b.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n")
        await until(lambda: stage.handler.held)
        third, writer_c = await stage.connect()
        assert await first.read() == b""  # the idle one was cut off
        writer_c.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n")
        await until(lambda: len(stage.handler.held) == 2)
        answer = await stage_read_all(stage)
        assert statuses(answer) == [503]
        assert "too many connections" in error(answer)
        for writer in (writer_a, writer_b, writer_c):
            writer.close()
        del third

    async def stage_read_all(stage: Stage) -> bytes:
        reader, writer = await stage.connect()
        answer = await reader.read()
        writer.close()
        return answer

    play(tmp_path, story, max_connections=2)


def test_a_burst_of_connections_stays_within_the_limit(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        kept = [await stage.connect() for _ in range(4)]
        await until(lambda: len(stage.server.connections) == 4)
        burst = [await stage.connect() for _ in range(60)]
        await until(lambda: sum(stage.server.statistics()[n] for n in ("accepted", "refused_connections")) == 64)
        assert len(stage.server.connections) <= 4
        states = [await is_open(reader) for reader, _ in (*kept, *burst)]
        assert sum(states) <= 4
        for _, writer in (*kept, *burst):
            writer.close()

    async def is_open(reader: asyncio.StreamReader) -> bool:
        """Whether the other side has neither answered nor gone."""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            await asyncio.wait_for(reader.read(), 0.2)
            return False
        return reader.exception() is None

    play(tmp_path, story, max_connections=4)


def test_draining_closes_idle_connections_and_finishes_busy_ones(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        idle, idle_writer = await stage.connect()
        busy, busy_writer = await stage.connect()
        busy_writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n")
        await until(lambda: stage.handler.held)
        drain = asyncio.ensure_future(stage.server.drain(10))
        assert await idle.read() == b""
        assert not drain.done()
        stage.handler.held[0]()
        answer = await busy.read()
        assert statuses(answer) == [200]
        assert b"Connection: close\r\n" in answer
        await drain
        for writer in (idle_writer, busy_writer):
            writer.close()

    play(tmp_path, story)


def test_draining_answers_every_request_that_has_arrived(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        for path in (b"/held1", b"/now", b"/held2", b"/held3"):
            writer.write(b"GET " + path + b" HTTP/1.1\r\n" + HEAD + b"\r\n")
        await until(lambda: len(stage.handler.held) == 3)
        drain = asyncio.ensure_future(stage.server.drain(10))
        for number in (0, 2, 1):
            stage.handler.held[number]()
            await asyncio.sleep(0)
        answers = await reader.read()
        assert statuses(answers) == [200] * 4
        assert answers.count(b"Connection: close") == 1
        assert answers.endswith(b"/held3 ")
        assert b"Connection: close" in answers[answers.index(b"/held2 ") :]
        await drain
        writer.close()

    play(tmp_path, story)


@pytest.mark.parametrize("count", [3, 1000])
def test_what_arrives_in_one_piece_while_draining_is_answered_whole(tmp_path: Path, count: int) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        await until(lambda: stage.server.connections)
        drain = asyncio.ensure_future(stage.server.drain(30))
        await asyncio.sleep(0)
        writer.write((b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n") * count)
        answers = await reader.read()
        assert statuses(answers) == [200] * count
        assert answers.count(b"Connection: close") == 1
        await drain
        writer.close()

    play(tmp_path, story)


def test_after_draining_clients_wait_in_the_queue_of_the_socket_for_the_next_server(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.server.drain(1)
        reader, writer = await stage.connect()
        writer.write(b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n")
        await asyncio.sleep(0.05)
        assert stage.handler.requests == []
        successor = Server(stage.handler, max_body_bytes=LIMIT_BYTES)
        successor.listen(stage.listener)
        assert (await reader.readuntil(b"/a ")).startswith(b"HTTP/1.1 200")
        writer.close()
        successor.close()

    play(tmp_path, story)


def test_draining_does_not_wait_for_ever(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        reader, writer = await stage.connect()
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n")
        await until(lambda: stage.handler.held)
        await stage.server.drain(0.05)
        assert await reader.read() == b""
        writer.close()

    play(tmp_path, story)


# --- hand-over -----------------------------------------------------------------------------------------------
class Heir:
    """Another server in the place of another process: it gets duplicates, as over a socket."""

    def __init__(self, **options: Any) -> None:
        self.handler = Handler()
        self.server = Server(self.handler, max_body_bytes=3_000_000, **options)
        self.unread: list[bytes] = []

    async def take(self, leaving: Sequence[Leaving]) -> None:
        for one in leaving:
            self.unread.append(one.unread)
            self.server.adopt(socket.socket(fileno=os.dup(one.descriptor)), one.unread, one.since_ns)

    async def close(self) -> None:
        self.server.close()
        await until(lambda: not self.server.connections)


def hand_over(tmp_path: Path, story: Callable[[Stage, Heir], Awaitable[None]], **options: Any) -> None:
    async def with_heir(stage: Stage) -> None:
        heir = Heir(**options)
        try:
            await story(stage, heir)
        finally:
            await heir.close()

    play(tmp_path, with_heir, **options)


def test_an_idle_connection_moves_and_its_client_notices_nothing(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        clients = [await stage.connect() for _ in range(70)]
        for reader, writer in clients:
            writer.write(POST)
            assert (await reader.readuntil(b"/a abcdef")).startswith(b"HTTP/1.1 200")
        await stage.server.hand_over(heir.take, 20)
        assert stage.server.statistics()["connections_given"] == 70
        assert not stage.server.connections
        for reader, writer in clients:
            writer.write(POST)
            answer = await reader.readuntil(b"/a abcdef")
            assert b"Connection: close" not in answer
            writer.close()
        assert heir.server.statistics()["connections_taken"] == 70
        assert len(heir.handler.requests) == 70

    hand_over(tmp_path, story)


@pytest.mark.parametrize("cut", [1, 10, 25, len(POST) - 6, len(POST) - 3, len(POST) - 1])
def test_half_a_request_moves_and_the_rest_is_read_by_the_other(tmp_path: Path, cut: int) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        reader, writer = await stage.connect()
        writer.write(POST + POST[:cut])
        await reader.readuntil(b"/a abcdef")
        await until(lambda: [one for one in stage.server.connections if one.has_unread])
        await stage.server.hand_over(heir.take, 20)
        assert heir.unread == [POST[:cut]]
        writer.write(POST[cut:] + POST)
        for _ in range(2):
            assert (await reader.readuntil(b"/a abcdef")).startswith(b"HTTP/1.1 200")
        assert [request.body for request in heir.handler.requests] == [b"abcdef", b"abcdef"]
        writer.close()

    hand_over(tmp_path, story)


def test_a_busy_connection_is_answered_first_and_what_its_client_sent_meanwhile_moves(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        reader, writer = await stage.connect()
        held = b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n"
        writer.write(held + held + POST[:20])
        await until(lambda: len(stage.handler.held) == 2)
        leaving = asyncio.ensure_future(stage.server.hand_over(heir.take, 20))
        await asyncio.sleep(0.02)
        writer.write(POST[20:] + POST)
        await asyncio.sleep(0.02)
        assert not leaving.done()
        assert heir.unread == []
        for answer in stage.handler.held:
            answer()
        await leaving
        assert heir.unread == [POST[:20]]
        received = b""
        while received.count(b"/a abcdef") < 2:
            received += await reader.read(4096)
        assert received.count(b"/held ") == 2
        assert b"Connection: close" not in received
        assert len(stage.handler.requests) == 2
        writer.close()

    hand_over(tmp_path, story)


def test_one_that_is_refused_is_told_by_whom_it_asked_and_does_not_move(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        reader, writer = await stage.connect()
        writer.write(b"nonsense\r\n\r\n")
        await until(lambda: stage.server.statistics()["malformed"])
        leaving = asyncio.ensure_future(stage.server.hand_over(heir.take, 20))
        assert statuses(await reader.read()) == [400]
        writer.close()
        await leaving
        assert heir.unread == []

    hand_over(tmp_path, story)


def test_with_nobody_to_take_it_a_connection_is_drained(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        async def broken(_: Sequence[Leaving]) -> None:
            raise BrokenPipeError

        reader, writer = await stage.connect()
        writer.write(POST + POST[:20])
        await reader.readuntil(b"/a abcdef")
        await until(lambda: [one for one in stage.server.connections if one.has_unread])
        leaving = asyncio.ensure_future(stage.server.hand_over(broken, 20))
        writer.write(POST[20:])
        answer = await reader.read()
        assert answer.endswith(b"/a abcdef")
        assert b"Connection: close" in answer
        writer.close()
        await leaving
        assert heir.unread == []

    hand_over(tmp_path, story)


def test_a_request_too_large_to_move_is_finished_first(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        stage.server.max_body_bytes = size = 2_000_000
        reader, writer = await stage.connect()
        writer.write(b"POST /big HTTP/1.1\r\n" + HEAD + b"Inference-Header-Content-Length: 0\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % size + b"x" * 1_500_000)
        await until(lambda: [one for one in stage.server.connections if not one._unread.movable])
        leaving = asyncio.ensure_future(stage.server.hand_over(heir.take, 20))
        await asyncio.sleep(0.02)
        assert not leaving.done()
        writer.write(b"x" * 500_000 + POST[:30])
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Connection: close" not in head
        await reader.readexactly(size + len(b"/big "))
        await leaving
        writer.write(POST[30:])
        assert (await reader.readuntil(b"/a abcdef")).startswith(b"HTTP/1.1 200")
        assert len(heir.handler.requests) == 1
        writer.close()

    hand_over(tmp_path, story)


def test_one_that_never_gets_free_is_drained_in_the_end(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        reader, writer = await stage.connect()
        writer.write(b"GET /held HTTP/1.1\r\n" + HEAD + b"\r\n")
        await until(lambda: stage.handler.held)
        await stage.server.hand_over(heir.take, 0.7)
        assert await reader.read() == b""
        writer.close()
        assert heir.unread == []

    hand_over(tmp_path, story)


def test_a_client_that_asked_to_be_closed_is(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        reader, writer = await stage.connect()
        writer.write(b"GET /held HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"\r\n")
        await until(lambda: stage.handler.held)
        leaving = asyncio.ensure_future(stage.server.hand_over(heir.take, 20))
        await asyncio.sleep(0.02)
        stage.handler.held[0]()
        assert (await reader.read()).endswith(b"/held ")
        writer.close()
        await leaving
        assert heir.unread == []

    hand_over(tmp_path, story)


def test_a_slow_request_gets_no_more_time_by_moving(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        reader, writer = await stage.connect()
        writer.write(POST[:10])
        await until(lambda: [one for one in stage.server.connections if one.has_unread])
        since_ns = {one._reading_since_ns for one in stage.server.connections}
        await stage.server.hand_over(heir.take, 20)
        await until(lambda: heir.server.connections)
        assert {one._reading_since_ns for one in heir.server.connections} == since_ns
        assert statuses(await reader.read()) == [408]
        writer.close()

    hand_over(tmp_path, story, slow_s=0.5)


def test_a_client_waiting_for_100_continue_is_told_once(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        reader, writer = await stage.connect()
        writer.write(b"POST /a HTTP/1.1\r\nExpect: 100-continue\r\n" + HEAD + b"Content-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await stage.server.hand_over(heir.take, 20)
        writer.write(b"hi")
        assert (await reader.readuntil(b"/a hi")).startswith(b"HTTP/1.1 200")
        writer.close()

    hand_over(tmp_path, story)


def test_a_refused_request_is_finished_where_it_began_and_its_connection_moves_then(tmp_path: Path) -> None:
    async def story(stage: Stage, heir: Heir) -> None:
        reader, writer = await stage.connect()
        writer.write(FULL % (1, 900) + b"x" * 500)
        await until(lambda: [one for one in stage.server.connections if one.has_unread])
        leaving = asyncio.ensure_future(stage.server.hand_over(heir.take, 20))
        await asyncio.sleep(0.02)
        assert not leaving.done()
        writer.write(b"x" * 400 + POST[:20])
        assert statuses(await reader.readuntil(b"}")) == [503]
        await leaving
        writer.write(POST[20:])
        assert (await reader.readuntil(b"/a abcdef")).startswith(b"HTTP/1.1 200")
        assert heir.unread in ([POST[:20]], [b""])
        writer.close()

    hand_over(tmp_path, story, refuse=busy)
