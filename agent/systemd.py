"""What the service manager and the agent tell each other: readiness, watchdog, sockets, credentials.

All of it is plain environment and datagrams (sd_notify(3), sd_listen_fds(3), systemd.exec(5)); without systemd
every call is a no-op or answers "none".
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FIRST_DESCRIPTOR = 3
MAX_DESCRIPTORS = 32
MAX_CREDENTIAL_BYTES = 64 * 1024


class Notifier:
    """Tells the service manager how the agent is. Never raises: telling is not worth dying for."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket: socket.socket | None = None
        address = environment.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect("\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            self.close()

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={_line(text)}")

    def alive(self) -> None:
        """Only call it when everything the watchdog stands for is well."""
        self._send("WATCHDOG=1")

    def starting(self, more_s: float) -> None:
        """Loading takes longer: do not give up for `more_s` from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(more_s * 1e6)}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(message.encode())


@dataclass(frozen=True, slots=True)
class Manager:
    """What the service manager gave this process. `watchdog_s` 0: it expects no sign of life."""

    sockets: tuple[tuple[str, socket.socket], ...]  # (FileDescriptorName=, listening socket)
    watchdog_s: float
    credentials: Path | None

    def credential(self, name: str) -> str | None:
        """The secret called `name` without its line end, or None."""
        if self.credentials is None:
            return None
        try:
            with (self.credentials / name).open("rb") as file:
                return file.read(MAX_CREDENTIAL_BYTES).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError):
            return None


def read_environment(environment: Mapping[str, str], *, process_id: int) -> Manager:
    """Take over what was passed; descriptors meant for another process are left alone."""
    ours = environment.get("LISTEN_PID") == str(process_id)
    count = min(_number(environment.get("LISTEN_FDS")), MAX_DESCRIPTORS) if ours else 0
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    watched = environment.get("WATCHDOG_PID", str(process_id)) == str(process_id)
    folder = environment.get("CREDENTIALS_DIRECTORY")
    return Manager(
        sockets=tuple(_adopt(index, names) for index in range(count)),
        watchdog_s=_number(environment.get("WATCHDOG_USEC")) / 1e6 if watched else 0.0,
        credentials=Path(folder) if folder else None,
    )


def _adopt(index: int, names: list[str]) -> tuple[str, socket.socket]:
    adopted = socket.socket(fileno=FIRST_DESCRIPTOR + index)
    adopted.settimeout(0.0)
    adopted.set_inheritable(False)
    return names[index] if index < len(names) else "", adopted


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
