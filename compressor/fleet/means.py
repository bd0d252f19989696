"""What the steward works with: who trains, publishes, signs and carries messages. Protocols and plain values.

Leaves to others: how they do it (`pipelines`, `approval`, `director`, `broker`), who makes them (`service`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.contract.topics import Topics
from compressor.fleet.database import Connection, timeline


@dataclass(frozen=True, slots=True)
class Built:
    """What a pipeline made: artifact folders of one device class."""

    artifacts: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    text: str


class Trainer(Protocol):
    """Runs one pipeline at a time, in the background."""

    def start(self, folder: Path, recordings: Path, *, version: int, parents: Mapping[str, str]) -> None:
        """Begin to build into `folder`. parents: name -> manifest digest it succeeds. Raises: EdgewardenError."""

    def poll(self) -> Built | Failed | None:
        """What came of it; None = still running, or nothing was started."""

    def stop(self) -> None:
        """End it now, and what a killed host left running."""


class Publisher(Protocol):
    """Signs and publishes."""

    def publish(self, folders: Sequence[Path]) -> list[str]:
        """Manifest digests in the order given; publishing again changes nothing. Raises: EdgewardenError."""

    def unapproved(self, family: str, digests: Sequence[str], devices: Sequence[str]) -> list[str]:
        """Those that some of the devices would refuse as not approved. Raises: EdgewardenError."""

    def refresh_online(self) -> bool:
        """Sign again what is about to expire. Raises: EdgewardenError."""


class Director(Protocol):
    """Signs what devices obey. Every method may raise EdgewardenError."""

    def desired(self, **fields: Any) -> bytes:
        """The envelope of a desired document."""

    def command(self, **fields: Any) -> bytes:
        """The envelope of a command."""

    def key_id(self) -> str:
        """Name of the key that signs now; another one after a rotation."""

    def renewed(self, envelope: Mapping[str, Any]) -> bytes:
        """A stored envelope's document, signed with the present key."""


class Wire(Protocol):
    """How the steward reaches devices."""

    def retain(self, topic: str, body: bytes) -> None:
        """Keep a document retained."""

    def command(self, topic: str, body: bytes, *, answer_to: str, expiry_s: float) -> None:
        """Send once. Raises: LinkError."""


@dataclass(frozen=True, slots=True)
class Means:
    """What the steward works with; None = this host does not do that."""

    trainer: Trainer | None
    publisher: Publisher | None
    director: Director | None
    wire: Wire
    topics: Callable[[str], Topics]
    public_url: Callable[[], str]
    say: Callable[[str, str, str], None]

    def note(self, tx: Connection, what: str, text: str, now_s: float, **more: str) -> None:
        """A row of the timeline, and the same sentence to who listens. more: device, severity."""
        timeline.add(tx, what, text, at=now_s, **more)
        self.say(more.get("severity", "notice"), what, text)
