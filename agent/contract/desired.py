"""What the director asks of one device: the retained `desired` document, and signed commands. pydantic models.

Both are signed (`agent.contract.signed`) and name the device they are for. A director chooses among artifacts
that other keys signed; what a device accepts is decided by `agent.ota.acceptance`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from agent.contract import signed
from agent.contract.artifact import canonical
from agent.contract.errors import MalformedMessage, Untrusted
from agent.contract.messages import FORMAT, Message

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,36}$")]
MAX_SERVICES = 16
MAX_ENGINES = 16
MAX_SEQUENCE = 2**53 - 1  # exact in every JSON reader
CLOCK_SLACK_S = 300.0
_URL = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+(/[A-Za-z0-9._~\-/]*)?")


class ServiceChoice(Message):
    """Engines of one service by manifest digest; `order`: who answers, best first."""

    artifacts: dict[Name, Digest] = Field(min_length=1, max_length=MAX_ENGINES)
    order: list[Name] = Field(min_length=1, max_length=MAX_ENGINES)

    @model_validator(mode="after")
    def _ordered(self) -> ServiceChoice:
        if sorted(self.order) != sorted(self.artifacts):
            raise ValueError("order must name every artifact once")
        return self


class Desired(Message):
    """Retained: what this device shall run. A later `version` replaces an earlier one."""

    v: int = FORMAT
    type: Literal["desired"] = "desired"
    device: Name
    version: int = Field(ge=1, le=MAX_SEQUENCE)
    issued_at: float  # wall time, seconds
    deadline_s: float = Field(default=0.0, ge=0)  # how long the device may try, from arrival; 0 = its own limit
    rollout: str = Field(default="", max_length=64)
    services: dict[Name, ServiceChoice] = Field(min_length=1, max_length=MAX_SERVICES)
    repository: str = Field(max_length=512)  # base URL: metadata/ and targets/ lie below it
    rollback: bool = False  # a lower version is meant; still not below the signed minimum

    @model_validator(mode="after")
    def _reachable(self) -> Desired:
        if not _URL.fullmatch(self.repository):
            raise ValueError("repository must be a plain http or https URL without query")
        return self


class SignedCommand(Message):
    """One order outside `desired`. `seq` rises strictly per device; nothing is obeyed after `not_after`."""

    v: int = FORMAT
    type: Literal["command"] = "command"
    device: Name
    op: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]{1,36}$")]
    seq: int = Field(ge=1, le=MAX_SEQUENCE)
    not_after: float  # wall time, seconds
    nonce: str = Field(min_length=8, max_length=64)
    body: dict[str, Any] = Field(default_factory=dict)


def seal(document: Desired | SignedCommand, private: Ed25519PrivateKey) -> bytes:
    """The signed envelope that travels."""
    return signed.sign(document.model_dump(mode="json"), private)


def open_desired(envelope: bytes, keys: Mapping[str, str], *, device: str) -> Desired:
    """Read a desired document signed by one of `keys` (key id -> public key, hex) for this device.

    Raises:
        MalformedMessage, UnsupportedVersion: not what the contract says.
        Untrusted: not signed by a director, or for another device.
    """
    document = _document(envelope, keys, "desired")
    desired = Desired.decode(document)
    if desired.device != device:
        raise Untrusted(f"a desired document for '{desired.device}' reached '{device}'")
    return desired


def open_command(
    envelope: bytes, keys: Mapping[str, str], *, device: str, topic_op: str, last_seq: int, now_s: float
) -> SignedCommand:
    """Read a command that this device may obey now.

    `last_seq`: the highest sequence ever obeyed (persist the new one before obeying). `now_s`: wall time.

    Raises:
        MalformedMessage, UnsupportedVersion: not what the contract says.
        Untrusted: wrong key, device or topic, replayed, or too late.
    """
    command = SignedCommand.decode(_document(envelope, keys, "command"))
    if command.device != device:
        raise Untrusted(f"a command for '{command.device}' reached '{device}'")
    if command.op != topic_op:
        raise Untrusted(f"the command '{command.op}' came on the topic of '{topic_op}'")
    if command.seq <= last_seq:
        raise Untrusted(f"command {command.seq} was already obeyed or overtaken; the last was {last_seq}")
    if now_s > command.not_after + CLOCK_SLACK_S:
        raise Untrusted(f"the command '{command.op}' came {now_s - command.not_after:.0f} s too late")
    return command


def _document(envelope: bytes, keys: Mapping[str, str], kind: str) -> bytes:
    document = signed.verify(envelope, keys)
    if document.get("type") != kind:  # asked of the signed bytes: the model would fill in a default
        raise MalformedMessage(f"a signed document of type '{str(document.get('type'))[:20]}' is no {kind}")
    return canonical(document)
