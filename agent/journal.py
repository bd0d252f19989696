"""Log lines for people and machines: a stable event id, fields, then a sentence. Written to one stream.

    2026-01-31T12:00:00.250Z warning worker.lost generation=2 | the worker was killed by signal 9
    <4>worker.lost generation=2 | ...            under systemd, which adds the time itself
    {"at": ..., "event": "worker.lost", ...}     style "json"

An event that repeats itself is written at most `BURST` times in `BURST_S`, then counted. The last events above
`info` are kept for the status page. Secrets never enter fields.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from agent.clock import iso, wall_s

BURST = 10
BURST_S = 10.0
KEPT = 50
MAX_LINE = 2000

Field = str | int | float | bool | None


class Severity(IntEnum):
    """Syslog's numbers."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7


@dataclass(frozen=True, slots=True)
class Line:
    at: float
    severity: Severity
    event: str
    text: str
    fields: Mapping[str, Field]


class TextStream(Protocol):
    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


Style = Callable[[Line], str]


class Journal:
    """Where the agent says what happens. Any thread may write; a line is one write."""

    def __init__(
        self,
        stream: TextStream,
        *,
        style: Style,
        least: Severity = Severity.INFO,
        clock: Callable[[], float] = wall_s,
    ) -> None:
        self._stream = stream
        self._style = style
        self._least = least
        self._clock = clock
        self._recent: deque[Line] = deque(maxlen=KEPT)
        self._bursts: dict[str, tuple[float, int]] = {}
        self._suppressed = 0

    def debug(self, event: str, text: str, **fields: Field) -> None:
        self._note(Severity.DEBUG, event, text, fields)

    def info(self, event: str, text: str, **fields: Field) -> None:
        self._note(Severity.INFO, event, text, fields)

    def notice(self, event: str, text: str, **fields: Field) -> None:
        self._note(Severity.NOTICE, event, text, fields)

    def warning(self, event: str, text: str, **fields: Field) -> None:
        self._note(Severity.WARNING, event, text, fields)

    def error(self, event: str, text: str, **fields: Field) -> None:
        self._note(Severity.ERROR, event, text, fields)

    def critical(self, event: str, text: str, **fields: Field) -> None:
        self._note(Severity.CRITICAL, event, text, fields)

    def say(self, severity: str, event: str, text: str, **fields: Field) -> None:
        """For severities that come as words: info, notice, warning, error, critical."""
        self._note(Severity[severity.upper()], event, text, fields)

    def recent(self) -> list[Line]:
        """The last lines of severity notice and above, oldest first."""
        return list(self._recent)

    def statistics(self) -> dict[str, float]:
        return {"suppressed": self._suppressed}

    # --- inside ---------------------------------------------------------------------------------------------
    def _note(self, severity: Severity, event: str, text: str, fields: Mapping[str, Field]) -> None:
        line = Line(self._clock(), severity, event, text, fields)
        if severity <= Severity.NOTICE:
            self._recent.append(line)
        if severity > self._least or not self._admitted(line):
            return
        try:
            self._stream.write(self._style(line)[:MAX_LINE] + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # a closed terminal or full disk must not stop the agent
            self._suppressed += 1

    def _admitted(self, line: Line) -> bool:
        since, count = self._bursts.get(line.event, (line.at, 0))
        if not 0 <= line.at - since < BURST_S:
            since, count = line.at, 0
        self._bursts[line.event] = (since, count + 1)
        if count >= BURST:
            self._suppressed += 1
        return count < BURST


def text_style(line: Line) -> str:
    return f"{iso(line.at)} {line.severity.name.lower()} {_body(line)}"


def systemd_style(line: Line) -> str:
    """`<N>` tells the journal the severity; see sd-daemon(3)."""
    return f"<{line.severity.value}>{_body(line)}"


def json_style(line: Line) -> str:
    head = {"at": iso(line.at), "severity": line.severity.name.lower(), "event": line.event, "text": line.text}
    return json.dumps({**line.fields, **head}, ensure_ascii=False)


def choose_style(name: str, *, descriptor: int, environment: Mapping[str, str]) -> Style:
    """`text` or `json`; `auto` is text, in systemd's form when `descriptor` leads to the journal."""
    if name == "json":
        return json_style
    return systemd_style if name == "auto" and _is_journal(descriptor, environment) else text_style


def _is_journal(descriptor: int, environment: Mapping[str, str]) -> bool:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM", "") == f"{status.st_dev}:{status.st_ino}"


def _body(line: Line) -> str:
    fields = "".join(f" {name}={_value(value)}" for name, value in line.fields.items() if value not in ("", None))
    return f"{line.event}{fields} | {_one_line(line.text)}"


def _value(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _one_line(str(value))
    return json.dumps(text, ensure_ascii=False) if any(char in text for char in ' "=|') else text


def _one_line(text: str) -> str:
    return " ".join(text.split())
