"""Asks the running agent over its admin socket. Plain Python, so that `status` starts fast."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from agent.contract.errors import EdgewardenError, InvalidRequest, NotRunning

TIMEOUT_S = 10.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(path: Path, target: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET `target`, or POST `document` to it, and return the answer.

    Raises:
        NotRunning: nobody answers there.
        InvalidRequest: the agent says no; its own words.
    """
    connection = _UnixConnection(path)
    try:
        body = None if document is None else json.dumps(document)
        connection.request("GET" if body is None else "POST", target, body)
        answer = connection.getresponse()
        return _read(answer.status, answer.read())
    except PermissionError:
        raise NotRunning(
            f"you may not open the admin socket {path}", hint="Run this as the agent's user or as root."
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise NotRunning(
            f"no agent answers on {path}: {_why(error)}",
            hint="Start it with `edgewarden-agent run`, or name its configuration with --config.",
        ) from None
    finally:
        connection.close()


def _read(status: int, body: bytes) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(body)
    except ValueError:
        raise EdgewardenError("the agent's answer is not JSON", hint="Is that another program's socket?") from None
    if status != 200:
        raise InvalidRequest(str(document.get("error", f"the agent answered {status}")).rstrip("."))
    return document


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
