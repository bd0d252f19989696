"""Both thin clients against servers that misbehave; against a real worker they are tested in tests/interop."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from agent.client import Client
from agent.client.aio import AsyncClient
from agent.contract.errors import (
    DeadlineExceeded,
    Disconnected,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServingError,
    UnknownModel,
)

X = np.zeros((1, 2), np.float32)


class Awaited:
    """The asyncio client, called like the one that blocks."""

    def __init__(self, address: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        try:
            self._client = self._runner.run(self._open(address, options))
        except BaseException:
            self._runner.close()
            raise

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *given, **options: self._runner.run(getattr(self._client, name)(*given, **options))

    @property
    def retries(self) -> int:
        return self._client.retries

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    @staticmethod
    async def _open(address: str, options: dict[str, Any]) -> AsyncClient:
        return AsyncClient(address, **options)


@pytest.fixture(params=[Client, Awaited], ids=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Any:
    return request.param


@contextmanager
def answering(folder: Path, replies: Sequence[bytes | None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads one request per connection and gives the next scripted reply; None = hang up at once."""
    path = str(folder / "s.sock")
    seen: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        for reply in replies:
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(65536)
                seen.append(request)
                if reply is not None:
                    connection.sendall(reply)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(8)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield f"unix:{path}", seen


def response(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


GOOD = response(json.dumps({"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [0.5]}]}).encode())


def test_any_v2_server_is_understood(connect: Any, tmp_path: Path) -> None:
    with answering(tmp_path, [GOOD]) as (address, seen), connect(address) as client:
        answer = client.infer("m", {"x": X}, time_s=1.5, deadline_ms=20, outputs=["y"], request_id="i")
        assert answer.outputs["y"].tolist() == [0.5]
        assert (answer.served_by, answer.reason, answer.guard, answer.request_id) == ("", "", "", "")
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v2/models/m/infer HTTP/1.1\r\n")
    document = json.loads(body[: -X.nbytes])
    assert f"Inference-Header-Content-Length: {len(body) - X.nbytes}".encode() in head
    assert document == {
        "id": "i",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
        "outputs": [{"name": "y"}],
        "parameters": {"binary_data_output": True, "ew_deadline_ms": 20, "ew_time_s": 1.5},
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("400 Bad Request", InvalidRequest), ("404 Not Found", UnknownModel), ("413 Too Large", InvalidRequest),
        ("429 Too Many", Overloaded), ("500 Oops", EngineFailed), ("503 Later", Overloaded),
        ("504 Late", DeadlineExceeded), ("418 Teapot", ServingError),
    ],
)  # fmt: skip
def test_a_status_becomes_the_error_of_the_same_meaning(
    connect: Any, tmp_path: Path, status: str, kind: type[Exception]
) -> None:
    reply = response(b'{"error": "told why"}', status)
    with answering(tmp_path, [reply]) as (address, _), connect(address) as client:
        with pytest.raises(kind, match="told why") as caught:
            client.infer("m", {"x": X})
        assert type(caught.value) is kind


def test_an_error_without_our_body_still_has_its_status(connect: Any, tmp_path: Path) -> None:
    reply = response(b"<html>", "503 Later")
    with (
        answering(tmp_path, [reply]) as (address, _),
        connect(address) as client,
        pytest.raises(Overloaded, match="503"),
    ):
        client.infer("m", {"x": X})


def test_a_dropped_connection_is_retried_once_if_wanted(connect: Any, tmp_path: Path) -> None:
    with answering(tmp_path, [None, GOOD]) as (address, seen), connect(address, retry_once=True) as client:
        assert client.infer("m", {"x": X}).outputs["y"].tolist() == [0.5]
        assert client.retries == 1
        assert seen[0] == seen[1]


def test_a_second_drop_is_not_retried(connect: Any, tmp_path: Path) -> None:
    with answering(tmp_path, [None, None]) as (address, seen), connect(address, retry_once=True) as client:
        with pytest.raises(Disconnected, match="POST /v2/models/m/infer"):
            client.infer("m", {"x": X})
        assert len(seen) == 2


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc",
    ],
)
def test_an_answer_that_is_cut_short_or_no_http_is_a_disconnection(
    connect: Any, tmp_path: Path, reply: bytes
) -> None:
    with answering(tmp_path, [reply]) as (address, _), connect(address) as client, pytest.raises(Disconnected):
        client.infer("m", {"x": X})


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"outputs": [{"name": "y"}]}',
        b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [9], "data": []}]}',
    ],
)
def test_a_malformed_answer_is_the_servers_fault(connect: Any, tmp_path: Path, body: bytes) -> None:
    with answering(tmp_path, [response(body)]) as (address, _), connect(address) as client:
        with pytest.raises(ServingError, match="server's answer") as caught:
            client.infer("m", {"x": X})
        assert type(caught.value) is ServingError


def test_a_server_that_does_not_answer_in_time_is_a_deadline(connect: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        with (
            connect(path, timeout_s=0.05, retry_once=True) as client,
            pytest.raises(DeadlineExceeded, match=r"0\.05 s"),
        ):
            client.live()


def test_nobody_there_is_told_with_the_address(connect: Any, tmp_path: Path) -> None:
    with connect(f"unix:{tmp_path}/none.sock") as client, pytest.raises(Disconnected, match=r"none\.sock") as caught:
        client.live()
    assert caught.value.hint == "Is the agent running?"
    assert "Is the agent running?" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("address", ["", "localhost", "localhost:port", "unix:relative", ":80", "host:99999"])
def test_an_address_of_no_known_form_is_refused(connect: Any, address: str) -> None:
    with pytest.raises(InvalidRequest, match="is no address"):
        connect(address)


@pytest.mark.parametrize("model", ["a b", "a/b", "a\r\nX: y", "a?b", "ä"])
def test_a_model_name_cannot_break_out_of_its_path(connect: Any, tmp_path: Path, model: str) -> None:
    with connect(f"{tmp_path}/s.sock") as client, pytest.raises(InvalidRequest, match="cannot be the name"):
        client.infer(model, {"x": X})


def test_the_client_needs_numpy_and_nothing_heavier() -> None:
    code = (
        "import sys, agent.client\n"
        "heavy = ('onnxruntime', 'msgspec', 'pydantic', 'asyncio', 'http', 'ssl', 'httptools')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_when_to_ask_again_is_told_with_the_error(connect: Any, tmp_path: Path) -> None:
    reply = response(b'{"error": "full"}', "503 Later", "Retry-After: 2\r\n")
    with answering(tmp_path, [reply]) as (address, _), connect(address) as client:
        with pytest.raises(Overloaded) as caught:
            client.infer("m", {"x": X})
        assert (caught.value.status, caught.value.retry_after_s) == (503, 2.0)


@pytest.mark.parametrize("given", ["soon", "Wed, 21 Oct 2015 07:28:00 GMT", "-1", "nan", "inf"])
def test_a_retry_after_that_is_no_duration_is_none(connect: Any, tmp_path: Path, given: str) -> None:
    reply = response(b'{"error": "full"}', "429 Later", f"Retry-After: {given}\r\n")
    with answering(tmp_path, [reply]) as (address, _), connect(address) as client:
        with pytest.raises(Overloaded) as caught:
            client.infer("m", {"x": X})
        assert (caught.value.status, caught.value.retry_after_s) == (429, None)


def test_a_connection_that_nobody_answers_says_no_status(connect: Any, tmp_path: Path) -> None:
    with connect(f"unix:{tmp_path}/none.sock") as client, pytest.raises(Disconnected) as caught:
        client.live()
    assert caught.value.status is None


@contextmanager
def echoing(folder: Path, pieces: int) -> Iterator[str]:
    """A server that answers the binary input of every request, sent in so many pieces, until the client goes."""
    path = str(folder / "e.sock")

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as file:
            while line := file.readline():
                assert line.startswith(b"POST")
                headers = {}
                while (line := file.readline()) != b"\r\n":
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = int(value) if value.strip().isdigit() else value
                document = json.loads(file.read(headers["inference-header-content-length"]))
                data = file.read(headers["content-length"] - headers["inference-header-content-length"])
                head = json.dumps({"outputs": document["inputs"], "id": document.get("id", "")}).encode()
                extra = f"Inference-Header-Content-Length: {len(head)}\r\n"
                whole = response(head + data, extra=extra)
                step = -(-len(whole) // pieces)
                for at in range(0, len(whole), step):
                    connection.sendall(whole[at : at + step])

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield path
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("pieces", [1, 7, 300])
def test_every_datatype_and_shape_comes_back_as_it_went(connect: Any, tmp_path: Path, pieces: int) -> None:
    cases = {
        "large": np.arange(300_000, dtype=np.float32).reshape(100, -1), "strided": np.arange(60_000.0)[::3],
        "half": np.array([[0.5, -2.0]], np.float16), "flags": np.array([True, False]),
        "nothing": np.zeros((0, 3), np.int64), "scalar": np.array(7, np.int8), 'a"b:0/c': np.ones(1, np.uint16),
    }  # fmt: skip
    translated = {
        "big endian": np.arange(3, dtype=">i4"), "words": np.array([b"a", "\u00e4", ""], object)
    }  # fmt: skip
    with echoing(tmp_path, pieces) as address, connect(address) as client:
        for given in (cases, cases, {**cases, **translated}):  # the second from what is remembered of the first
            answer = client.infer("m", given)
            assert list(answer.outputs) == list(given)
            for name, array in given.items():
                told = answer.outputs[name]
                assert told.shape == array.shape
                wanted = [b"a", "\u00e4".encode(), b""] if name == "words" else array.tolist()
                assert told.tolist() == wanted
                assert told.dtype == array.dtype.newbyteorder("=")


def test_what_is_remembered_never_answers_another_request(connect: Any, tmp_path: Path) -> None:
    with echoing(tmp_path, 1) as address, connect(address) as client:
        for round_ in range(200):
            array = np.full((1, round_ % 70 + 1), round_, np.float32)
            answer = client.infer("m", {"x": array}, request_id=str(round_) if round_ % 2 else "")
            assert answer.request_id == (str(round_) if round_ % 2 else "")
            assert answer.outputs["x"].tolist() == array.tolist()
            answer.parameters["mine"] = True
            answer.outputs["x"][:] = 0
            assert "mine" not in client.infer("m", {"x": array}).parameters


@pytest.mark.parametrize("array", [np.zeros(1, np.complex64), np.zeros(1, "M8[s]")])
def test_an_array_without_a_datatype_of_the_protocol_is_refused(
    connect: Any, tmp_path: Path, array: np.ndarray
) -> None:
    with connect(f"{tmp_path}/s.sock") as client, pytest.raises(InvalidRequest, match="cannot be sent"):
        client.infer("m", {"x": array})


def test_a_parameter_that_is_no_json_is_refused(connect: Any, tmp_path: Path) -> None:
    with connect(f"{tmp_path}/s.sock") as client, pytest.raises(InvalidRequest, match="parameter"):
        client.infer("m", {"x": X}, parameters={"ew": object()})


# --- what only coroutines can do -----------------------------------------------------------------------------
def test_many_calls_at_once_share_a_few_connections(tmp_path: Path) -> None:
    path = str(tmp_path / "many.sock")
    open_now, most = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0)
            writer.write(response(b"{}"))
        open_now -= 1
        writer.close()

    async def scene() -> None:
        server = await asyncio.start_unix_server(serve, path)
        async with server, AsyncClient(path, connections=3) as client:
            assert await asyncio.gather(*(client.live() for _ in range(50))) == [True] * 50
        assert most == 3

    asyncio.run(scene())


def test_a_cancelled_call_gives_its_connection_up(tmp_path: Path) -> None:
    """Else the next call would read the answer of the cancelled one."""
    path = str(tmp_path / "cancel.sock")
    asked = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readuntil(b"\r\n\r\n")
        if b"stats" in line:
            asked.set()
            await reader.read()
        else:
            writer.write(response(b'{"name": "second"}'))
            await reader.read()
        writer.close()

    async def scene() -> None:
        server = await asyncio.start_unix_server(serve, path)
        async with server, AsyncClient(path, connections=1) as client:
            call = asyncio.ensure_future(client.statistics("m"))
            await asked.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await client.metadata("m") == {"name": "second"}

    asyncio.run(scene())
