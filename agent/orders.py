"""What directors want of this device: signed documents, judged before anybody hears of them.

Promises: only what a director of this fleet signed for this device, in time and for the first time, is passed on;
everything else is refused with a code, and counted. Keys come from the update repository, through a child process in
a thread; until they can be had a document waits, bounded in number and time. Forged documents cost one refresh every
REFRESH_PAUSE_S at most.
Leaves to others: obeying (`agent.updater`, `agent.commands`), and what keys are worth (`agent.ota.authority`).
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from agent.chores import Chores
from agent.clock import monotonic_s, wall_s
from agent.contract import signed
from agent.contract.desired import Desired, SignedCommand, open_command, open_desired
from agent.contract.errors import EdgewardenError
from agent.contract.topics import is_word

SEQUENCE = "command_seq"  # name of a value in the store
KEYS_LIVE_S = 300.0  # a withdrawn key is believed so much longer at most
REFRESH_PAUSE_S = 5.0
FIRST_RETRY_S, LONGEST_RETRY_S = 2.0, 60.0
MAX_COMMANDS = 16
WORD_S, MAX_WORDS = 10.0, 10.0  # a refusal is told at most so often, after so many at once; the rest is counted
WAIT_S = 600.0  # a command that cannot be judged for so long is refused
DESIRED = "desired"


class Memory(Protocol):
    """Where the highest obeyed sequence number is kept."""

    def value(self, name: str) -> Any: ...

    def put_value(self, name: str, value: Any, *, durable: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class Keys:
    """Director keys by id; `floor_s`: no clock that is right shows less; `at_s`: monotonic time of the refresh."""

    public: dict[str, str]
    floor_s: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """A document that was not believed. `claimed`: the version or number it gives itself."""

    what: str  # "desired", or the command's op
    code: str
    text: str
    claimed: int = 0
    correlation: bytes = b""


@dataclass(frozen=True, slots=True)
class Order:
    """A believed command, and what an answer has to carry."""

    command: SignedCommand
    correlation: bytes = b""


@dataclass(frozen=True, slots=True)
class _Letter:
    op: str  # DESIRED, or the command's
    envelope: bytes
    correlation: bytes
    at_s: float = field(default_factory=monotonic_s)


@dataclass(frozen=True, slots=True)
class Handlers:
    """Who hears of it, on the event loop. `desired` also gets the id of the key that signed."""

    desired: Callable[[Desired, str], None]
    command: Callable[[Order], None]
    refused: Callable[[Refusal], None]
    waiting: Callable[[str, str], None]  # code and sentence: why documents cannot be judged; "" = they can again


class Orders:
    """Owned by the event loop."""

    def __init__(
        self,
        device: str,
        memory: Memory,
        chores: Chores,
        *,
        ask: Callable[[str], Keys],
        repository: Callable[[], str],
        handlers: Handlers,
    ) -> None:
        """`ask`: blocking, the keys a repository names. `repository`: the one to ask, "" = none is known yet."""
        self._device = device
        self._memory = memory
        self._chores = chores
        self._ask = ask
        self._repository = repository
        self._handlers = handlers
        self._desired: _Letter | None = None
        self._commands: deque[_Letter] = deque()
        self._keys: Keys | None = None
        self._asking = False
        self._asked_s = -REFRESH_PAUSE_S
        self._not_before_s = 0.0
        self._retry_s = 0.0
        self._trouble: tuple[str, str] = ("", "")
        self._refused: Counter[str] = Counter()
        self._accepted = 0
        self._words, self._spoke_s = MAX_WORDS, monotonic_s()

    # --- what arrives ---------------------------------------------------------------------------------------
    def take_desired(self, envelope: bytes) -> None:
        """A document on the retained topic; an empty one means that nothing is desired any more."""
        self._desired = None
        if envelope:
            self._desired = _Letter(DESIRED, envelope, b"")
            self._judge()

    def take_command(self, op: str, envelope: bytes, correlation: bytes) -> None:
        if not is_word(op):  # the topic's last level is anybody's text; there is no topic to answer on
            self._refused["malformed"] += 1
            return
        letter = _Letter(op, envelope, correlation)
        if len(self._commands) >= MAX_COMMANDS:
            self._refuse(letter, "overflow", f"{MAX_COMMANDS} commands wait already")
            return
        self._commands.append(letter)
        self._judge()

    def tick(self) -> None:
        """About once a second."""
        while self._commands and monotonic_s() - self._commands[0].at_s > WAIT_S:
            self._refuse(self._commands.popleft(), *(self._trouble if self._trouble[0] else ("expired", "too late")))
        self._judge()

    def statistics(self) -> dict[str, Any]:
        """`refused`: how many by code; `waiting`: not judged yet, with `code` and `text` of the reason."""
        return {
            "accepted": self._accepted,
            "refused": dict(self._refused),
            "waiting": len(self._commands) + (self._desired is not None),
            "code": self._trouble[0],
            "text": self._trouble[1],
        }

    # --- judging --------------------------------------------------------------------------------------------
    def _judge(self) -> None:
        """A letter is put away before it is judged: what goes wrong with one cannot come back with every tick."""
        desired, self._desired = self._desired, None
        if desired is not None and not self._is_settled(desired):
            self._desired = desired
        while self._commands:
            letter = self._commands.popleft()
            if not self._is_settled(letter):
                self._commands.appendleft(letter)
                break
        if self._desired is not None or self._commands:
            self._refresh()

    def _is_settled(self, letter: _Letter) -> bool:
        """Accepted or refused; False = keys are needed first."""
        keys = self._keys
        try:
            fresh = keys is not None and monotonic_s() - keys.at_s < KEYS_LIVE_S
            signers = signed.signers(letter.envelope, keys.public if keys and fresh else {})
            if not signers and (keys is None or not fresh or keys.at_s < letter.at_s):
                return False  # the key may be newer than ours
            self._open(letter, keys, signers)
        except EdgewardenError as error:
            self._refuse(letter, error.code, error.sentence())
        return True

    def _open(self, letter: _Letter, keys: Keys | None, signers: tuple[str, ...]) -> None:
        public = keys.public if keys else {}
        if letter.op == DESIRED:
            desired = open_desired(letter.envelope, public, device=self._device)
            self._accepted += 1
            self._handlers.desired(desired, signers[0])
            return
        now_s = max(wall_s(), keys.floor_s if keys else 0.0)
        last = int(self._memory.value(SEQUENCE) or 0)
        command = open_command(
            letter.envelope, public, device=self._device, topic_op=letter.op, last_seq=last, now_s=now_s
        )
        self._memory.put_value(SEQUENCE, command.seq, durable=True)  # before it is obeyed: never twice
        self._accepted += 1
        self._handlers.command(Order(command, letter.correlation))

    def _refuse(self, letter: _Letter, code: str, text: str) -> None:
        self._refused[code] += 1
        now_s = monotonic_s()
        self._words = min(self._words + (now_s - self._spoke_s) / WORD_S, MAX_WORDS)
        self._spoke_s = now_s
        if self._words < 1.0:
            return  # counted: a flood of forgeries must not push other messages out of the outbox
        self._words -= 1.0
        self._handlers.refused(Refusal(letter.op, code, text, _claimed(letter), letter.correlation))

    # --- keys -----------------------------------------------------------------------------------------------
    def _refresh(self) -> None:
        now_s = monotonic_s()
        if self._asking or now_s < max(self._not_before_s, self._asked_s + REFRESH_PAUSE_S):
            return
        repository = self._repository() or (_claimed_repository(self._desired) if self._desired else "")
        if not repository:
            self._note("unavailable", "no update repository is known yet: director keys cannot be asked for")
            return
        self._asking = True
        self._asked_s = now_s
        self._chores.start(lambda: self._ask(repository), self._refreshed)

    def _refreshed(self, outcome: Keys | EdgewardenError) -> None:
        self._asking = False
        if isinstance(outcome, EdgewardenError):
            self._retry_s = min(max(2 * self._retry_s, FIRST_RETRY_S), LONGEST_RETRY_S)
            self._not_before_s = monotonic_s() + self._retry_s
            self._note(outcome.code, outcome.sentence())
            return
        self._keys = outcome
        self._retry_s = 0.0
        self._note("", "")
        self._judge()

    def _note(self, code: str, text: str) -> None:
        if code != self._trouble[0]:
            self._handlers.waiting(code, text)
        self._trouble = (code, text)


def _claimed(letter: _Letter) -> int:
    """What an unbelieved document calls itself: for people to read, nothing else."""
    fields = _unbelieved(letter)
    number = fields.get("version" if letter.op == DESIRED else "seq", 0)
    return number if isinstance(number, int) and 0 <= number < 2**53 else 0


def _claimed_repository(letter: _Letter) -> str:
    """The repository an unbelieved document names: its answer is believed only if the embedded root's keys say so."""
    named = _unbelieved(letter).get("repository", "")
    return named if isinstance(named, str) and named.startswith(("http://", "https://")) and len(named) <= 512 else ""


def _unbelieved(letter: _Letter) -> dict[str, Any]:
    if len(letter.envelope) > signed.MAX_ENVELOPE_BYTES:
        return {}
    try:
        outer = json.loads(letter.envelope)
    except (ValueError, RecursionError):
        return {}
    inner = outer.get("signed") if isinstance(outer, dict) else None
    return inner if isinstance(inner, dict) else {}
