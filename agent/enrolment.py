"""The device introduces itself to its host, once: a key pair of its own, a one-time token, and what the host answers.

Promises: the private key never leaves the device and is readable by this user alone; the token is read when it is
used and never stored or told; an unreachable host is asked again, with growing pauses; nothing else waits for it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agent.chores import Chores
from agent.clock import monotonic_s, wall_s
from agent.config import AgentConfig
from agent.contract.errors import ConfigError, EdgewardenError, StateUnreadable, StorageError, Unavailable, Untrusted
from agent.contract.signed import public_bytes
from agent.decisions.events import Publish
from agent.ota import wire
from agent.ota.files import write_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ENROLMENT = "enrolment"  # name of a value in the store
KEY = "device.pem"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 900.0
TIMEOUT_S = 30.0
MAX_TOKEN_BYTES = 256


class Memory(Protocol):
    def value(self, name: str) -> Any: ...

    def put_value(self, name: str, value: Any, *, durable: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the host said."""

    fleet: str
    device: str
    repository: str


class Enrolment:
    """Owned by the event loop. `said(event, done=)` hears how it went."""

    def __init__(self, config: AgentConfig, memory: Memory, chores: Chores, said: Callable[..., None]) -> None:
        self._config = config
        self._memory = memory
        self._chores = chores
        self._said = said
        self._answer: dict[str, Any] = {}
        self._state = "off"
        self._error: tuple[str, str] = ("", "")
        self._pause_s = 0.0
        self._not_before_s = 0.0

    @property
    def repository(self) -> str:
        """The update repository the host named; "" = not enrolled."""
        return str(self._answer.get("repository", ""))

    def begin(self) -> None:
        """Remember, or ask."""
        try:
            self._answer = self._memory.value(ENROLMENT) or {}
        except StorageError as error:
            self._error = (error.code, error.sentence())
        if self._answer:
            self._state = "enrolled"
        elif self._config.enrolment.url:
            self._state = "waiting"
            self.tick()

    def tick(self) -> None:
        """About once a second."""
        if self._state == "waiting" and monotonic_s() >= self._not_before_s:
            self._state = "asking"
            self._chores.start(lambda: enrol(self._config), self._answered)

    def status(self) -> dict[str, Any]:
        """state: off | waiting | asking | enrolled."""
        return {
            "state": self._state, "host": self._config.enrolment.url, "repository": self.repository,
            "code": self._error[0], "text": self._error[1],
        }  # fmt: skip

    def _answered(self, outcome: Accepted | EdgewardenError) -> None:
        if isinstance(outcome, EdgewardenError):
            self._failed(outcome)
            return
        self._answer = {"fleet": outcome.fleet, "repository": outcome.repository, "at": wall_s()}
        try:
            self._memory.put_value(ENROLMENT, self._answer, durable=True)
        except StorageError as error:  # enrolled all the same; a restart asks again, and the host knows our key
            self._error = (error.code, error.sentence())
        self._state, self._error = "enrolled", ("", "")
        self._said(
            Publish("notice", "link", f"enrolled in fleet {outcome.fleet}", details={"enrolled": True}), done=True
        )

    def _failed(self, error: EdgewardenError) -> None:
        self._state = "waiting"
        self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        if not error.retryable:
            self._pause_s = LONGEST_PAUSE_S
        self._not_before_s = monotonic_s() + self._pause_s
        if error.code != self._error[0]:
            text = f"not enrolled yet: {error.sentence()}"
            self._said(Publish("warning", "link", text, details={"enrolled": False, "code": error.code}), done=False)
        self._error = (error.code, error.sentence())


def enrol(config: AgentConfig) -> Accepted:
    """Introduce this device with its key and the token. Blocking.

    Raises:
        Unavailable: the host cannot be reached. Untrusted: it does not accept the token.
        ConfigError: the token cannot be read. DiskFull, StorageError: the key cannot be kept.
    """
    key = device_key(config.state.folder)
    body = json.dumps({
        "token": _token(Path(config.enrolment.token_file)), "device": config.device.id,
        "public_key": public_bytes(key).hex(),
    }).encode()  # fmt: skip
    tls = wire.make_tls(config.update.tls_ca) if config.update.tls_ca else None
    status, answer = wire.send(
        "POST", config.enrolment.url, io.BytesIO(body), len(body), headers={"Content-Type": "application/json"},
        until_s=monotonic_s() + TIMEOUT_S, tls=tls,
    )  # fmt: skip
    return _read(status, answer, config)


def device_key(folder: Path) -> Ed25519PrivateKey:
    """The key pair of this device, made at the first call. Raises: DiskFull, StorageError, StateUnreadable."""
    # not above: see `agent.contract.signed`
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = folder / KEY
    if not path.exists():
        private = Ed25519PrivateKey.generate()
        data = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_file(path, data, mode=0o600)  # no umask: other threads make files meanwhile
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise StateUnreadable(f"{path} holds no key of this device", hint="Move it away and enrol with a new token.")
    return key


def _token(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_TOKEN_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read enrolment.token_file {path}: {getattr(error, 'strerror', error)}") from None


def _read(status: int, answer: bytes, config: AgentConfig) -> Accepted:
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        document = None
    fields = document if isinstance(document, dict) else {}
    if status >= 500 or status in {408, 429}:
        raise Unavailable(f"the host answered {status}: {str(fields.get('error', ''))[:200]}")
    if status != 200:
        raise Untrusted(
            f"the host does not enrol this device ({status}): {str(fields.get('error', ''))[:200]}",
            hint="Ask the host's operator for a new one-time token.",
        )
    repository = str(fields.get("repository", ""))
    if fields.get("device") != config.device.id or not repository.startswith(("http://", "https://")):
        raise Unavailable(f"{config.enrolment.url} answered something else than a host's yes")
    return Accepted(str(fields.get("fleet", ""))[:64], config.device.id, repository[:512])
