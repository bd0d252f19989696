"""Listening sockets: bound with the right mode, never stolen from a process that still answers on them."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

from agent.contract.errors import ConfigError

BACKLOG = 1024
MAX_UNIX_PATH_BYTES = 107  # sockaddr_un
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def listen_unix(path: Path, *, mode: int) -> socket.socket:
    """Listen on a Unix socket. A file left by a dead process is replaced, a living one's is not.

    Raises:
        ConfigError: somebody answers there, the path is too long, is no socket, or cannot be made.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise ConfigError(f"the socket path {path} is longer than {MAX_UNIX_PATH_BYTES} bytes", hint="Shorten it.")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.fchmod(listener.fileno(), 0o600)  # before bind: nobody slips in while it is too open
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on the Unix socket {path}: {error.strerror}", hint="Check the folder and its rights."
        ) from None
    listener.settimeout(0.0)
    return listener


def listen_tcp(address: str) -> socket.socket:
    """Listen on `HOST:PORT` (IPv6 in brackets).

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine's.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = "the port is in use by another process" if taken else getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {address}: {reason}", hint="Choose a free port in serving.tcp, or stop that process."
        ) from None
    listener.settimeout(0.0)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} exists and is not a socket", hint="Choose another path.")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot look at {path}: {error.strerror}") from None
    if is_answered(path):
        raise ConfigError(
            f"another process already listens on {path}", hint="Is an agent running? Stop it, or choose another path."
        )
    path.unlink(missing_ok=True)


def is_answered(path: Path) -> bool:
    """Whether somebody listens on that Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # its queue is full: very much alive
            return True
        except OSError:
            return False
    return True


def address_of(listener: socket.socket) -> str:
    """What a client is told to reach a listening socket: "unix:/path" or "host:port", as `agent.client` takes it."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name)}".replace("\0", "@")  # an abstract name has no path
    host, port = name[:2]
    return f"[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{host}:{port}"


def client_of(connection: Any) -> str:
    """Who is at the other end of an accepted socket: a process of this device, else an address; empty = unknown.

    All connections of one process are one client, and so are all of one address.
    """
    try:
        if connection.family == socket.AF_UNIX:
            process, user, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            return f"process {process}" if process else f"user {user}"  # 0: of another process namespace
        return str(connection.getpeername()[0])
    except (OSError, AttributeError, LookupError, struct.error):
        return ""
