"""Our own server: the shipped agent with its worker, configured for the bench."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from agent.asking import ask
from agent.contract.errors import EdgewardenError
from agent.contract.tensors import HEADER_LENGTH, Tensor, write_tensors
from scripts.serving_bench.load import Question, Target, http_request
from scripts.serving_bench.models import Model
from scripts.serving_bench.processes import Group


class Ours:
    """A running agent. As a context it is stopped at the end."""

    def __init__(self, folder: Path, models: Sequence[Model], *, extra: str = "", module: str = "agent") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.models = {model.name: model for model in models}
        self.unix, self.admin = folder / "serve.sock", folder / "admin.sock"
        self.port = free_port()
        config = folder / "agent.toml"
        config.write_text(self._config(models, extra))
        command = [sys.executable, "-m", module, "run", "--config", str(config)]
        self.group = Group(command, folder / "agent.log")

    def wait_ready(self) -> None:
        """Until the worker serves. Raises: Failed."""
        self.group.wait_until(self._serves, "the agent serves")

    def status(self) -> dict[str, Any]:
        return ask(self.admin, "/status")

    def worker_pid(self) -> int:
        return int(self.status()["worker"]["pid"])

    def question(self, model: str, *, binary: bool) -> Question:
        """A request of one row, its answer asked for once to learn its length."""
        raw = ours_request(self.models[model], binary=binary)
        file = self.folder / f"{model}-{'binary' if binary else 'json'}.request"
        file.write_bytes(raw)
        return Question(file, answer_length(self.unix, raw))

    def target(self, *, unix: bool) -> Target:
        return Target(unix=self.unix) if unix else Target(port=self.port)

    def __enter__(self) -> Self:
        self.group.__enter__()
        try:
            self.wait_ready()
        except BaseException:
            self.group.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.group.end()

    def _serves(self) -> bool:
        try:
            return self.status()["worker"]["phase"] == "serving"
        except EdgewardenError:
            return False

    def _config(self, models: Sequence[Model], extra: str) -> str:
        text = f"""
[device]
id = "bench"
fleet = "bench"
[state]
folder = "{self.folder / "state"}"
[serving]
unix = "{self.unix}"
tcp = "127.0.0.1:{self.port}"
[admin]
socket = "{self.admin}"
"""
        for model in models:
            first, *others = model.artifacts
            chain = ", ".join(f'"{one}"' for one in others[:-1])
            text += f"""
[[service]]
name = "{model.name}"
artifact = "{first}"
fallbacks = [{chain}]
floor = "{others[-1]}"
deadline_ms = 2000.0
"""
        return text + extra


def ours_request(model: Model, *, binary: bool) -> bytes:
    """The whole HTTP request for one row."""
    described, parts = write_tensors([Tensor(model.input, "FP32", model.row())], [model.input] if binary else [])
    document: dict[str, Any] = {"inputs": described}
    if binary:
        document["parameters"] = {"binary_data_output": True}
    head = json.dumps(document, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8 if binary else 0)
    headers = {HEADER_LENGTH: str(len(head))} if binary else {"Content-Type": "application/json"}
    return http_request(f"/v2/models/{model.name}/infer", b"".join((head, *parts)), headers)


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def answer_length(unix: Path, request: bytes) -> int:
    """Bytes of the whole answer to a request. Raises: OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(unix))
        sock.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received:
            received += _some(sock)
        head, _, body = received.partition(b"\r\n\r\n")
        lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        size = int(lines[b"content-length"])
        while len(body) < size:
            body += _some(sock)
        return len(head) + 4 + size


def _some(sock: Any) -> bytes:
    data: bytes = sock.recv(65536)
    if not data:
        raise ConnectionError("the answer ended early")
    return data
