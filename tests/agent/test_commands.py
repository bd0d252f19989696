"""Every order and its answer; the uploads themselves are in test_samples, the whole way in tests/system."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.chores import Chores
from agent.commands import Commands, Crew
from agent.config import AgentConfig
from agent.contract.desired import SignedCommand
from agent.decisions.events import Pinned, Unpinned
from agent.orders import Order, Refusal


class Mouth:
    """A reporter that only answers."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, dict[str, Any], bytes]] = []

    def answer(self, op: str, fields: Mapping[str, Any], correlation: bytes) -> None:
        self.answers.append((op, dict(fields), correlation))


class Bridge:
    def __init__(self, samples: dict[str, Any] | None = None, *, previous: bool = True) -> None:
        self.done: list[Any] = []
        self.mouth = Mouth()
        crew = Crew(
            roll_back=lambda text: self.done.append(text) or previous, decide=self.done.append,
            tell_birth=lambda: self.done.append("birth"), report=lambda: self.done.append("report"),
            publish=self.done.append, refused=self.done.append,
            shape=lambda service: (16, 3) if service == "wrist" else None,
            engines=lambda service: ("wrist", "wrist-accel") if service == "wrist" else (),
        )  # fmt: skip
        config = AgentConfig.model_validate({"samples": samples or {}})
        chores = Chores("ew-test", on_fault=lambda _: None)
        self.commands = Commands(config, chores, crew, self.mouth)  # type: ignore[arg-type]

    def obey(self, op: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        command = SignedCommand(
            device="d", op=op, seq=7, not_after=0.0, nonce="12345678", body={"id": "i1", **(body or {})}
        )

        async def story() -> None:
            self.commands.obey(Order(command, b"c"))
            async with asyncio.timeout(60):
                while not self.mouth.answers:  # noqa: ASYNC110 - what is awaited has no event
                    await asyncio.sleep(0.01)

        asyncio.run(story())
        topic, fields, correlation = self.mouth.answers[-1]
        assert (topic, fields["id"], fields["seq"], correlation) == (op, "i1", 7, b"c")
        return fields


def test_ping_and_rebirth() -> None:
    bridge = Bridge()
    assert bridge.obey("ping")["ok"] is True
    assert Bridge().obey("ping")["agent"]
    other = Bridge()
    assert other.obey("rebirth")["ok"] is True
    assert other.done == ["birth", "report"]


def test_pin_and_unpin_name_what_exists() -> None:
    bridge = Bridge()
    assert bridge.obey("pin", {"service": "wrist", "engine": "wrist-accel"})["ok"] is True
    bridge.mouth.answers.clear()
    assert bridge.obey("unpin", {"service": "wrist"})["ok"] is True
    assert bridge.done == [Pinned("wrist", "wrist-accel"), Unpinned("wrist")]


@pytest.mark.parametrize(
    ("op", "body", "code"),
    [
        ("pin", {"service": "wrist", "engine": "leg"}, "unknown_model"),
        ("pin", {"service": "ankle", "engine": "wrist"}, "unknown_model"),
        ("pin", {"service": "wrist"}, "invalid_request"),
        ("pin", {"service": "wrist", "engine": 7}, "invalid_request"),
        ("unpin", {"service": "x" * 2000}, "invalid_request"),
        ("sing", {}, "invalid_request"),
        ("sample", {"service": "wrist"}, "untrusted"),
    ],
)
def test_what_cannot_be_obeyed_is_answered_with_a_code_and_told(op: str, body: dict[str, Any], code: str) -> None:
    bridge = Bridge()
    fields = bridge.obey(op, body)
    assert (fields["ok"], fields["code"]) == (False, code)
    assert bridge.done[-1].details["code"] == code


def test_rollback_needs_something_to_go_back_to() -> None:
    assert Bridge().obey("rollback")["ok"] is True
    assert Bridge(previous=False).obey("rollback")["code"] == "invalid_request"


def test_a_sample_is_bounded_by_the_device_and_by_who_asks(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"x" * 5000)
    samples = {"allow": True, "folder": str(tmp_path), "max_bytes": 4096}
    asked = {"service": "wrist", "upload": "http://127.0.0.1:1/x", "token": "t"}
    assert "4096 are allowed" in Bridge(samples).obey("sample", asked)["text"]
    samples["max_bytes"] = 10**6
    assert "2000 are allowed" in Bridge(samples).obey("sample", {**asked, "max_bytes": 2000})["text"]
    assert Bridge(samples).obey("sample", asked)["code"] == "corrupt"
    assert Bridge(samples).obey("sample", {**asked, "service": "ankle"})["code"] == "unknown_model"
    assert Bridge(samples).obey("sample", {"service": "wrist"})["code"] == "invalid_request"


def test_a_refused_command_is_answered_too_and_a_refused_document_is_not() -> None:
    bridge = Bridge()
    bridge.commands.refused(Refusal("desired", "untrusted", "who?", 3))
    assert bridge.mouth.answers == []
    bridge.commands.refused(Refusal("ping", "untrusted", "who?", 3, b"c"))
    assert bridge.mouth.answers[0][1]["code"] == "untrusted"
    assert len(bridge.done) == 2
