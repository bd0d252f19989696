"""MQTT topic names, built and parsed in one place: `ew/1/<fleet>/<device>/...`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from agent.contract.errors import ContractError

VERSION = 1
IDENTIFIER = re.compile(r"[a-z0-9-]{1,36}")
_PREFIX = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_KIND = re.compile(r"[a-z0-9_-]{1,36}")


def check_identifier(text: str) -> str:
    """Return `text` if it may stand in a topic as fleet or device.

    Raises:
        ContractError: anything but 1 to 36 of a-z, 0-9 and '-'.
    """
    if not IDENTIFIER.fullmatch(text):
        raise ContractError(
            f"'{text[:60]}' cannot be a fleet or device id",
            hint="Use 1 to 36 characters of a-z, 0-9 and '-'.",
        )
    return text


@dataclass(frozen=True, slots=True)
class Topics:
    """All topics of one device."""

    fleet: str
    device: str
    prefix: str = "ew"

    def __post_init__(self) -> None:
        check_identifier(self.fleet)
        check_identifier(self.device)
        if not _PREFIX.fullmatch(self.prefix):
            raise ContractError(f"'{self.prefix[:60]}' cannot be a topic prefix", hint="Use words joined by '/'.")

    @property
    def base(self) -> str:
        return f"{self.prefix}/{VERSION}/{self.fleet}/{self.device}"

    @property
    def status(self) -> str:
        return f"{self.base}/status"

    @property
    def birth(self) -> str:
        return f"{self.base}/birth"

    @property
    def desired(self) -> str:
        return f"{self.base}/desired"

    @property
    def reported(self) -> str:
        return f"{self.base}/reported"

    @property
    def telemetry(self) -> str:
        return f"{self.base}/tm"

    @property
    def acknowledged(self) -> str:
        return f"{self.base}/ack"

    def event(self, severity: str, kind: str) -> str:
        return f"{self.base}/ev/{_word(severity)}/{_word(kind)}"

    def command(self, op: str) -> str:
        return f"{self.base}/cmd/{_word(op)}"

    def response(self, op: str) -> str:
        return f"{self.base}/res/{_word(op)}"


def is_word(text: str) -> bool:
    """Whether it can be a level of ours: a kind of event, a command."""
    return _KIND.fullmatch(text) is not None


def _word(text: str) -> str:
    if not is_word(text):
        raise ContractError(f"'{text[:60]}' cannot stand in a topic", hint="Use a-z, 0-9, '_' and '-'.")
    return text
