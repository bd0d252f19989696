"""The wrist service as the decisions see it, and a story teller that feeds events with a clock of its own."""

from __future__ import annotations

import json
from typing import Any

from agent.decisions.choice import Card, read_card
from agent.decisions.events import (
    Activate,
    AgentStarted,
    AlarmCleared,
    AlarmKind,
    AlarmRaised,
    Command,
    EngineServed,
    Event,
    Level,
    Persist,
    Publish,
    StartWorker,
    Tick,
    WorkerReady,
    encode,
)
from agent.decisions.fallback import Limits
from agent.decisions.service import ServicePolicy
from agent.decisions.supervisor import Supervisor

ENGINES = ("wrist", "wrist-accel", "wrist-floor")
ACCEL, GYRO = ("ax", "ay", "az"), ("gx", "gy", "gz")
GROUPS = dict.fromkeys(ACCEL, "accel") | dict.fromkeys(GYRO, "gyro")


def row(name: str, kind: str, channels: tuple[str, ...], *accuracy: float) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "channels": list(channels), "harmful": accuracy[0] < 0.86,
        "accuracy": dict(zip(ENGINES, accuracy, strict=True)),
    }  # fmt: skip


DOCUMENT: dict[str, Any] = {
    "accuracy": {"role": "held-out stream", "wrist": 0.96, "wrist-accel": 0.92, "wrist-floor": 0.14},
    "faults": [
        row("gyro_off", "dead", GYRO, 0.55, 0.90, 0.14),
        row("dead_gx", "dead", ("gx",), 0.84, 0.90, 0.14),
        row("dead_ax", "dead", ("ax",), 0.80, 0.40, 0.14),
        row("stuck_ax", "stuck", ("ax",), 0.91, 0.70, 0.14),
        row("all_off", "dead", ACCEL + GYRO, 0.10, 0.11, 0.14),
        row("ms2", "scale", ACCEL, 0.47, 0.18, 0.14),
        row("deg", "scale", GYRO, 0.55, 0.90, 0.14),
        row("rot30", "unknown", (), 0.61, 0.50, 0.14),
    ],
}


def card(document: dict[str, Any] = DOCUMENT, **changes: Any) -> Card:
    about = {"engines": ENGINES, "reads": {"wrist-accel": ACCEL}, "floors": ("wrist-floor",), "groups": GROUPS}
    return read_card(document, **{**about, **changes})


def policy(**changes: Any) -> ServicePolicy:
    return ServicePolicy(**{"service": "wrist", "card": card(), "limits": Limits(120.0, 60.0, 86_400.0), **changes})


def raised(kind: AlarmKind, *channels: str, engine: str = "", service: str = "wrist") -> AlarmRaised:
    level = Level.DRIFT if kind is AlarmKind.DRIFT else Level.BROKEN_INPUT
    return AlarmRaised(service, kind, level, channels, engine, numbers={"delay_windows": 3.0})


def cleared(kind: AlarmKind, *channels: str, engine: str = "", service: str = "wrist") -> AlarmCleared:
    return AlarmCleared(service, kind, channels, engine)


class Story:
    """A supervisor, the time, and everything it said. Each command is checked to be JSON, Persist to come first."""

    def __init__(self, *policies: ServicePolicy, supervisor: Supervisor | None = None, now_s: float = 1000.0) -> None:
        self.policies = policies or (policy(),)
        self.supervisor = supervisor or Supervisor(self.policies)
        self.now_s = now_s
        self.said: list[tuple[float, Command]] = []

    def started(self) -> Story:
        self.do(AgentStarted())
        self.do(WorkerReady(1, {one.service: one.engines for one in self.policies}), after_s=1.0)
        self.serve(20)
        return self

    def do(self, event: Event, *, after_s: float = 0.0) -> tuple[Command, ...]:
        self.now_s += after_s
        commands = self.supervisor.handle(event, self.now_s)
        json.dumps([encode(command) for command in commands], allow_nan=False)
        persists = [index for index, command in enumerate(commands) if isinstance(command, Persist)]
        assert persists in ([], [0])
        self.said += [(self.now_s, command) for command in commands]
        return commands

    def serve(self, count: int, service: str = "wrist") -> tuple[Command, ...]:
        return self.do(EngineServed(service, self.supervisor.serving(service), count))

    def live(self, seconds: float, *, step_s: float = 1.0, count: int = 2) -> None:
        """Traffic and ticks for a while."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.do(Tick(), after_s=step_s)
            for name in self.supervisor.services:
                self.serve(count, name)

    def restart(self) -> Story:
        """A new agent process that knows what was written, through JSON; its worker is ready a second later."""
        saved = json.loads(json.dumps(self.supervisor.state()))
        self.supervisor = Supervisor(self.policies, saved)
        return self.started()

    # --- what was said ---
    def steps(self) -> list[str]:
        published = (command for _, command in self.said if isinstance(command, Publish))
        return [one.details["step"] for one in published if one.kind == "fallback"]

    def published(self, kind: str) -> list[Publish]:
        return [one for _, one in self.said if isinstance(one, Publish) and one.kind == kind]

    def activated(self) -> list[str]:
        return [one.engine for _, one in self.said if isinstance(one, Activate)]

    def starts(self) -> list[float]:
        return [one.not_before - at for at, one in self.said if isinstance(one, StartWorker)]

    @property
    def serving(self) -> str:
        return self.supervisor.serving("wrist")

    @property
    def phase(self) -> str:
        return str(self.supervisor.status("wrist")["phase"])

    @property
    def health(self) -> str:
        return self.supervisor.health("wrist").value
