"""A private mosquitto on a free loopback port: generated passwords, one ACL line per device, never anonymous.

Everything lies in one 0700 folder. Also used by the system tests.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from agent import clock

OPERATOR = "operator"


def find_mosquitto() -> tuple[str, str]:
    """Paths of mosquitto and mosquitto_passwd. Raises: FileNotFoundError saying what to install."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    found = [shutil.which(name, path=path) for name in ("mosquitto", "mosquitto_passwd")]
    if not all(found):
        raise FileNotFoundError("mosquitto is not installed. Run: apt-get install mosquitto")
    return str(found[0]), str(found[1])


def free_port() -> int:
    """A free port below those the system lends to clients: none of them takes it before the broker, or meanwhile.

    Raises: RuntimeError when none is found.
    """
    for _ in range(100):
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 20000 and 32000 on 127.0.0.1")


@dataclass
class Broker:
    """One broker; `users` maps a device id, or `operator`, to its generated password."""

    folder: Path
    fleet: str
    devices: tuple[str, ...]
    hosts: tuple[str, ...] = ()  # may do what the operator may
    port: int = field(default_factory=free_port)
    users: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Write configuration, passwords and ACL."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        _, passwd = find_mosquitto()
        listed = self.folder / "passwords"
        listed.write_text("")
        listed.chmod(0o600)
        for user in (OPERATOR, *self.hosts, *self.devices):
            self.users[user] = secrets.token_urlsafe(24)
            self.password_file(user).write_text(self.users[user])
            self.password_file(user).chmod(0o600)
        # names and plain passwords in, hashes out: no password ever stands in a process list
        listed.write_text("".join(f"{user}:{word}\n" for user, word in self.users.items()))
        subprocess.run([passwd, "-U", str(listed)], check=True, capture_output=True)
        self._write_acl()
        self._write_configuration(listed)

    def password_file(self, user: str) -> Path:
        return self.folder / f"{user}.password"

    def _write_acl(self) -> None:
        lines = []
        for user in (OPERATOR, *self.hosts):
            lines += [f"user {user}", f"topic readwrite ew/1/{self.fleet}/#", ""]
        for device in self.devices:
            base = f"ew/1/{self.fleet}/{device}"
            lines += [f"user {device}", f"topic readwrite {base}/#", ""]
        acl = self.folder / "acl"
        acl.write_text("\n".join(lines))
        acl.chmod(0o600)

    def _write_configuration(self, passwords: Path) -> None:
        # mosquitto started by root drops to this user; it must be able to read a 0700 folder of ours
        user = pwd.getpwuid(os.getuid()).pw_name
        (self.folder / "mosquitto.conf").write_text(
            f"""listener {self.port} 127.0.0.1
allow_anonymous false
password_file {passwords}
acl_file {self.folder / "acl"}
persistence true
persistence_location {self.folder}/
user {user}
max_packet_size 1000000
max_queued_messages 0
log_dest file {self.folder / "mosquitto.log"}
"""
        )

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Start it and wait until it accepts. Raises: RuntimeError with the broker's last words."""
        mosquitto, _ = find_mosquitto()
        self.process = subprocess.Popen(
            [mosquitto, "-c", str(self.folder / "mosquitto.conf")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = clock.monotonic_s() + timeout_s
        while clock.monotonic_s() < deadline:
            if self.process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=0.2).close()
            except OSError:
                clock.sleep(0.02)
            else:
                return
        log = self.folder / "mosquitto.log"
        words = log.read_text()[-400:] if log.exists() else ""
        raise RuntimeError(f"mosquitto did not start on 127.0.0.1:{self.port}: {words}")

    def kill(self) -> None:
        """Take it away at once, as a power cut would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=60)  # it writes down what it holds
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
