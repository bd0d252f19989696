"""The thin client against servers that misbehave; against a real worker it is tested in test_worker.py."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from agent.client import Client
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


def test_any_v2_server_is_understood(tmp_path: Path) -> None:
    with answering(tmp_path, [GOOD]) as (address, seen), Client(address) as client:
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
def test_a_status_becomes_the_error_of_the_same_meaning(tmp_path: Path, status: str, kind: type[Exception]) -> None:
    reply = response(b'{"error": "told why"}', status)
    with answering(tmp_path, [reply]) as (address, _), Client(address) as client:
        with pytest.raises(kind, match="told why") as caught:
            client.infer("m", {"x": X})
        assert type(caught.value) is kind


def test_an_error_without_our_body_still_has_its_status(tmp_path: Path) -> None:
    reply = response(b"<html>", "503 Later")
    with (
        answering(tmp_path, [reply]) as (address, _),
        Client(address) as client,
        pytest.raises(Overloaded, match="503"),
    ):
        client.infer("m", {"x": X})


def test_a_dropped_connection_is_retried_once_if_wanted(tmp_path: Path) -> None:
    with answering(tmp_path, [None, GOOD]) as (address, seen), Client(address, retry_once=True) as client:
        assert client.infer("m", {"x": X}).outputs["y"].tolist() == [0.5]
        assert client.retries == 1
        assert seen[0] == seen[1]


def test_a_second_drop_is_not_retried(tmp_path: Path) -> None:
    with answering(tmp_path, [None, None]) as (address, seen), Client(address, retry_once=True) as client:
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
def test_an_answer_that_is_cut_short_or_no_http_is_a_disconnection(tmp_path: Path, reply: bytes) -> None:
    with answering(tmp_path, [reply]) as (address, _), Client(address) as client, pytest.raises(Disconnected):
        client.infer("m", {"x": X})


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"outputs": [{"name": "y"}]}',
        b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [9], "data": []}]}',
    ],
)
def test_a_malformed_answer_is_the_servers_fault(tmp_path: Path, body: bytes) -> None:
    with answering(tmp_path, [response(body)]) as (address, _), Client(address) as client:
        with pytest.raises(ServingError, match="server's answer") as caught:
            client.infer("m", {"x": X})
        assert type(caught.value) is ServingError


def test_a_server_that_does_not_answer_in_time_is_a_deadline(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        with (
            Client(path, timeout_s=0.05, retry_once=True) as client,
            pytest.raises(DeadlineExceeded, match=r"0\.05 s"),
        ):
            client.live()


def test_nobody_there_is_told_with_the_address(tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/none.sock") as client, pytest.raises(Disconnected, match=r"none\.sock") as caught:
        client.live()
    assert caught.value.hint == "Is the agent running?"


@pytest.mark.parametrize("address", ["", "localhost", "localhost:port", "unix:relative", ":80", "host:99999"])
def test_an_address_of_no_known_form_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="is no address"):
        Client(address)


@pytest.mark.parametrize("model", ["a b", "a/b", "a\r\nX: y", "a?b", "ä"])
def test_a_model_name_cannot_break_out_of_its_path(tmp_path: Path, model: str) -> None:
    with Client(f"{tmp_path}/s.sock") as client, pytest.raises(InvalidRequest, match="cannot be the name"):
        client.infer(model, {"x": X})


def test_the_client_needs_numpy_and_nothing_heavier() -> None:
    code = (
        "import sys, agent.client\n"
        "heavy = ('onnxruntime', 'msgspec', 'pydantic', 'asyncio', 'http', 'ssl', 'httptools')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
