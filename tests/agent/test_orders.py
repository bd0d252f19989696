"""Judging documents: with real keys and signatures, and a repository that answers what a test wants."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.chores import Chores
from agent.clock import monotonic_s, wall_s
from agent.contract.desired import Desired, SignedCommand, seal
from agent.contract.errors import ContractError, Unavailable
from agent.contract.signed import key_id, public_bytes
from agent.orders import MAX_COMMANDS, MAX_WORDS, SEQUENCE, Handlers, Keys, Orders, Refusal

DIRECTOR, SUCCESSOR, STRANGER = (Ed25519PrivateKey.generate() for _ in range(3))


def public(*keys: Ed25519PrivateKey) -> dict[str, str]:
    return {key_id(public_bytes(key)): public_bytes(key).hex() for key in keys}


def desired(version: int = 1, *, key: Ed25519PrivateKey = DIRECTOR, device: str = "d") -> bytes:
    services = {"wrist": {"artifacts": {"wrist": "a" * 64}, "order": ["wrist"]}}
    return seal(
        Desired(device=device, version=version, issued_at=0.0, services=services, repository="http://named/r"), key
    )


def command(seq: int, op: str = "ping", *, key: Ed25519PrivateKey = DIRECTOR, **fields: Any) -> bytes:
    fields = {"device": "d", "not_after": wall_s() + 60.0, **fields}
    return seal(SignedCommand(op=op, seq=seq, nonce="12345678", **fields), key)


class Memory(dict[str, Any]):
    def value(self, name: str) -> Any:
        return self.get(name)

    def put_value(self, name: str, value: Any, *, durable: bool = False) -> None:
        assert durable
        self[name] = value


class Desk:
    """Orders with somebody who notes what is heard. `answers`: what the repository says, in turn; the last stays."""

    def __init__(self, *answers: dict[str, str] | Exception, repository: str = "http://r") -> None:
        self.memory = Memory()
        self.heard: list[Any] = []
        self.waits: list[str] = []
        self.asked: list[str] = []
        self.answers = list(answers) or [public(DIRECTOR)]
        self.orders = Orders(
            "d", self.memory, Chores("ew-test", on_fault=self._fault), ask=self._ask,
            repository=lambda: repository,
            handlers=Handlers(
                lambda document, director: self.heard.append(("desired", document.version, director)),
                lambda order: self.heard.append((order.command.op, order.command.seq, order.correlation)),
                self.hear,
                lambda code, _text: self.waits.append(code),
            ),
        )  # fmt: skip

    def hear(self, refusal: Refusal) -> None:
        self.heard.append((refusal.what, refusal.code, refusal.claimed))

    def _ask(self, repository: str) -> Keys:
        asked_s = monotonic_s()
        self.asked.append(repository)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return Keys(answer, 1000.0, asked_s)

    def _fault(self, error: Exception) -> None:
        raise error

    async def until(self, true: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not true():
                self.orders._asked_s = self.orders._not_before_s = -1e9  # no test waits for pauses
                self.orders.tick()
                await asyncio.sleep(0.01)


def play(story: Callable[[Desk], Any], desk: Desk) -> Desk:
    async def run() -> None:
        await story(desk)

    asyncio.run(run())
    return desk


def test_a_signed_document_is_passed_on_with_who_signed_it() -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_desired(desired(3))
        await desk.until(lambda: desk.heard)

    desk = play(story, Desk())
    assert desk.heard == [("desired", 3, next(iter(public(DIRECTOR))))]
    assert desk.asked == ["http://r"]


def test_known_keys_are_not_asked_for_again() -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_desired(desired(3))
        await desk.until(lambda: desk.heard)
        desk.orders.take_command("ping", command(1), b"c")
        assert desk.heard[-1] == ("ping", 1, b"c")  # at once

    assert len(play(story, Desk()).asked) == 1


@pytest.mark.parametrize(
    ("envelope", "code"),
    [
        (desired(7, key=STRANGER), "untrusted"),
        (desired(7, device="another"), "untrusted"),
        (b'{"signed": {"version": 7}, "signatures": []}', "untrusted"),
        (command(7), "malformed"),  # signed, but no desired document
        (b"not JSON", "malformed"),
        (b"x" * 300_000, "malformed"),
    ],
    ids=["stranger", "another device", "unsigned", "a command", "nonsense", "too large"],
)
def test_what_is_not_for_us_is_refused_and_counted(envelope: bytes, code: str) -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_desired(envelope)
        await desk.until(lambda: desk.heard)

    desk = play(story, Desk())
    assert desk.heard[0][:2] == ("desired", code)
    assert desk.orders.statistics()["refused"] == {code: 1}
    assert desk.orders.statistics()["waiting"] == 0


def test_the_newer_key_of_a_director_is_asked_for_before_it_is_refused() -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_desired(desired(1))
        await desk.until(lambda: desk.heard)
        desk.orders.take_desired(desired(2, key=SUCCESSOR))
        await desk.until(lambda: len(desk.heard) == 2)

    desk = play(story, Desk(public(DIRECTOR), public(SUCCESSOR)))
    assert [heard[:2] for heard in desk.heard] == [("desired", 1), ("desired", 2)]


def test_while_no_keys_can_be_had_the_newest_document_waits_and_that_is_told_once() -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_desired(desired(1))
        await desk.until(lambda: len(desk.asked) >= 2)
        desk.orders.take_desired(desired(2))
        await desk.until(lambda: desk.heard)

    gone = Unavailable("gone")
    desk = play(story, Desk(gone, gone, gone, public(DIRECTOR)))
    assert [heard[:2] for heard in desk.heard] == [("desired", 2)]
    assert desk.waits == ["unavailable", ""]


def test_a_withdrawn_document_is_forgotten() -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_desired(desired(1))
        desk.orders.take_desired(b"")
        await desk.until(lambda: desk.asked)
        desk.orders.tick()

    assert play(story, Desk()).heard == []


def test_without_a_known_repository_the_one_a_document_names_is_asked() -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_command("ping", command(1), b"")
        desk.orders.tick()
        assert desk.asked == []
        desk.orders.take_desired(desired(1))
        await desk.until(lambda: len(desk.heard) == 2)

    assert play(story, Desk(repository="")).asked == ["http://named/r"]


def test_a_command_is_obeyed_once_and_in_order() -> None:
    async def story(desk: Desk) -> None:
        for seq in (4, 4, 3, 5):
            desk.orders.take_command("ping", command(seq), b"")
        await desk.until(lambda: len(desk.heard) == 4)

    desk = play(story, Desk())
    assert [heard[:2] for heard in desk.heard] == [
        ("ping", 4), ("ping", "untrusted"), ("ping", "untrusted"), ("ping", 5)
    ]  # fmt: skip
    assert desk.memory[SEQUENCE] == 5


@pytest.mark.parametrize(
    "envelope", [command(1, not_after=wall_s() - 1000.0), command(1, "pin"), command(1, device="another")],
    ids=["late", "another topic", "another device"],
)  # fmt: skip
def test_a_command_that_is_late_or_meant_otherwise_is_refused(envelope: bytes) -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_command("ping", envelope, b"")
        await desk.until(lambda: desk.heard)

    desk = play(story, Desk())
    assert desk.heard == [("ping", "untrusted", 1)]
    assert SEQUENCE not in desk.memory


def test_a_clock_below_what_was_signed_does_not_revive_old_commands() -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_command("ping", command(1, not_after=500.0), b"")
        await desk.until(lambda: desk.heard)

    assert play(story, Desk()).heard == [("ping", "untrusted", 1)]


def test_a_flood_of_forgeries_is_bounded_in_memory_in_questions_and_in_words() -> None:
    async def story(desk: Desk) -> None:
        for seq in range(1, 60):
            desk.orders.take_command("ping", command(seq, key=STRANGER), b"")
        assert desk.orders.statistics()["waiting"] == MAX_COMMANDS
        await desk.until(lambda: desk.orders.statistics()["waiting"] == 0)

    desk = play(story, Desk())
    assert sum(desk.orders.statistics()["refused"].values()) == 59
    assert len(desk.heard) == MAX_WORDS
    assert len(desk.asked) <= 2


@pytest.mark.parametrize("op", ["UPPER", "", "ping/again", "x" * 5000, "\u00fc"])
def test_a_command_on_a_topic_that_has_no_answer_is_counted_and_gone(op: str) -> None:
    async def story(desk: Desk) -> None:
        desk.orders.take_command(op, b"junk", b"c")
        desk.orders.take_command(op, command(1), b"c")
        desk.orders.tick()

    desk = play(story, Desk())
    assert desk.heard == []
    assert desk.orders.statistics()["refused"] == {"malformed": 2}
    assert desk.orders.statistics()["waiting"] == 0


def test_a_letter_whose_refusal_goes_wrong_does_not_come_back() -> None:
    class Mute(Desk):
        def hear(self, refusal: Refusal) -> None:
            self.heard.append(refusal.what)
            raise ContractError("there is no way to say so")

    async def story(desk: Desk) -> None:
        desk.orders.take_command("ping", command(1), b"")
        await desk.until(lambda: desk.heard)
        for take in (
            lambda: desk.orders.take_command("ping", b"junk", b""),
            lambda: desk.orders.take_desired(b"junk"),
        ):
            with pytest.raises(ContractError):
                take()
            assert desk.orders.statistics()["waiting"] == 0
            desk.orders.tick()

    assert play(story, Mute()).heard[1:] == ["ping", "desired"]
