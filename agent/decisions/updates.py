"""What an update is made of: what may happen to it, what it may ask for, and the state that survives a restart.

Plain frozen dataclasses with a JSON form. `agent.decisions.lifecycle` decides; the agent process executes one
command at a time and answers with the command's `ticket`, so a late answer to an abandoned step is not mistaken
for the current one. Times are seconds of the decision clock.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    IDLE = "idle"  # nothing was ever asked
    PLANNED = "planned"  # wanted, waits for its moment
    FETCHING = "fetching"  # trust, acceptance and download
    VERIFIED = "verified"  # every byte is here; slots are being built
    STAGED = "staged"  # slots are complete, wait for their moment
    SELFTEST = "selftest"  # a child answers the golden inputs
    PROBATION = "probation"  # serves; the previous selection is kept ready
    COMMITTED = "committed"  # the last known good
    DEFERRED = "deferred"  # tries again later
    REJECTED = "rejected"  # may not be installed here
    SUPERSEDED = "superseded"  # a later document came first
    FAILED = "failed"  # given up; tried again after a long rest if that can help
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    QUARANTINED = "quarantined"  # failed its self-test; these bytes are never tried again


@dataclass(frozen=True, slots=True)
class Choice:
    """One service: engine -> manifest digest, and who answers, best first."""

    artifacts: dict[str, str]
    order: tuple[str, ...]


Selection = dict[str, Choice]
"""Service -> choice: everything a device runs."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a director asked for. `director`: id of the key that signed; `deadline_s`: time to try, 0 = no limit."""

    version: int
    services: Selection
    repository: str
    rollout: str = ""
    rollback: bool = False
    deadline_s: float = 0.0
    director: str = ""

    def digests(self) -> frozenset[str]:
        return digests(self.services)


@dataclass(frozen=True, slots=True)
class Update:
    """Everything the lifecycle knows. `installed`: the selection that was last known good."""

    state: State = State.IDLE
    target: Target | None = None
    installed: Selection = field(default_factory=dict)
    previous: Selection | None = None  # what `installed` replaced; an operator may go back to it
    waiting: Target | None = None  # came while the current update could not be left
    seen: dict[str, int] = field(default_factory=dict)  # director -> highest version ever handled
    quarantined: tuple[str, ...] = ()
    ticket: int = 0
    since_s: float = 0.0
    began_s: float = 0.0  # when the target was planned
    retry_at_s: float = 0.0
    swapped: bool = False  # probation: the candidate serves
    attempts: int = 0  # times fetching began
    restarts: int = 0  # of the agent process, in the current state
    steps: int = 0  # persisted steps of this try
    tries: int = 0  # times a failed target was taken up again
    moved_bytes: int = 0
    code: str = ""
    text: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def digests(selection: Selection) -> frozenset[str]:
    """Manifest digests of a selection."""
    return frozenset(digest for choice in selection.values() for digest in choice.artifacts.values())


def load_update(document: dict[str, Any]) -> Update:
    """What `Update.document` wrote. Raises: KeyError, TypeError, ValueError on a foreign document."""
    fields = dict(document)
    fields["state"] = State(fields["state"])
    fields["installed"] = load_selection(fields["installed"])
    fields["previous"] = None if fields["previous"] is None else load_selection(fields["previous"])
    fields["target"] = None if fields["target"] is None else _target(fields["target"])
    fields["waiting"] = None if fields["waiting"] is None else _target(fields["waiting"])
    fields["quarantined"] = tuple(fields["quarantined"])
    return Update(**fields)


def load_selection(document: dict[str, Any]) -> Selection:
    """Raises: KeyError, TypeError on a foreign document."""
    return {
        service: Choice(dict(choice["artifacts"]), tuple(choice["order"])) for service, choice in document.items()
    }


def _target(document: dict[str, Any]) -> Target:
    return Target(**{**document, "services": load_selection(document["services"])})


# --- events ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class DesiredArrived:
    """A verified desired document reached this device."""

    target: Target


@dataclass(frozen=True, slots=True)
class StepDone:
    ticket: int
    moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StepFailed:
    """`code`: stable, see `lifecycle`; `digests`: the manifests to blame, empty = all that are new."""

    ticket: int
    code: str
    text: str = ""
    moved_bytes: int = 0
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateFailed:
    """On probation: engine failures, latency over budget, crashes. Ignored in any other state."""

    code: str
    text: str = ""
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RollbackAsked:
    """An operator or a signed command wants the previous selection back, now."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class Restarted:
    """A new agent process took over the saved state; no step is being executed."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; nothing else did."""


UpdateEvent = DesiredArrived | StepDone | StepFailed | CandidateFailed | RollbackAsked | Restarted | Tick


# --- commands ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class PersistUpdate:
    """Make this state durable before what follows is executed."""

    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """Publish as `reported`."""

    version: int
    state: State
    code: str
    text: str
    attempt: int
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Refresh trust, accept or refuse every manifest, download what is missing."""

    ticket: int
    target: Target


@dataclass(frozen=True, slots=True)
class Verify:
    """Build the slots and read every byte of them again."""

    ticket: int
    target: Target


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Load every new artifact in a child with limits and compare its golden answers."""

    ticket: int
    target: Target


@dataclass(frozen=True, slots=True)
class Swap:
    """Point at the target and start a generation that serves it; doing it twice changes nothing."""

    ticket: int
    target: Target


@dataclass(frozen=True, slots=True)
class Commit:
    """The target is the last known good: collect what neither it nor `previous` needs. Not answered."""

    ticket: int
    target: Target
    previous: Selection


@dataclass(frozen=True, slots=True)
class Rollback:
    """Point back at `to` and serve it; doing it twice changes nothing."""

    ticket: int
    to: Selection


Effect = Fetch | Verify | SelfTest | Swap | Commit | Rollback
UpdateCommand = PersistUpdate | Report | Effect


def encode(item: UpdateEvent | UpdateCommand) -> dict[str, Any]:
    """One JSON object, tagged with the type's name: what the recorder writes."""
    return {"type": type(item).__name__, **asdict(item)}
