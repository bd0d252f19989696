import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentConfig
from agent.journal import Journal, text_style
from agent.parts import Parts, build_parts
from agent.reporter import Reporter
from agent.session import Inbound
from agent.steering import FOLLOWS_HOST, Pilot, Steering, limits_of


@pytest.fixture
def parts(tmp_path: Path, artifacts: dict[str, Path]) -> Iterator[Parts]:
    config = AgentConfig.model_validate({
        "device": {"id": "d", "fleet": "f"}, "state": {"folder": str(tmp_path / "state")},
        "serving": {"unix": str(tmp_path / "s.sock")}, "admin": {"socket": str(tmp_path / "a.sock")},
        "service": [{"name": "wrist", "artifact": str(artifacts["wrist"])}],
        "link": {"enabled": True, "port": 1}, "outbox": {"delete_after": "host"},
    })  # fmt: skip
    parts = build_parts(config, tmp_path / "agent.toml", Journal(io.StringIO(), style=text_style), {})
    yield parts
    parts.close()


def steer(parts: Parts) -> Steering:
    pilot = Pilot(*[lambda *_: None] * 6, statuses=dict)
    return Steering(parts, Reporter(parts.config.topics, parts.outbox, parts.link), pilot)


def arrive(parts: Parts, payload: bytes, topic: str = "ew/1/f/d/ack") -> Steering:
    steering = steer(parts)

    async def story() -> None:
        steering.begin()
        steering._arrived(Inbound(topic, payload))
        steering.tick()

    asyncio.run(story())
    return steering


def sent(parts: Parts) -> int:
    """One message that the broker has taken; its number."""
    from agent.outbox import Priority

    parts.outbox.follow_host()
    seq = parts.outbox.put(Priority.TELEMETRY, "tm", lambda _: b"x", at=0.0)
    (row,) = parts.outbox.take(9, skip_ids=(), skip_topics=(), now=0.0)
    parts.outbox.settle(row)
    return seq


def test_a_device_that_is_not_updated_listens_to_its_host_all_the_same(parts: Parts) -> None:
    seq = sent(parts)
    steering = arrive(parts, json.dumps({"v": 1, "committed": {parts.outbox.boot: seq}}).encode())
    assert parts.outbox.statistics()["rows"] == 0
    assert steering.status()["state"] == "off"
    assert steering.reported() == {}
    assert not (parts.config.state.folder / "slots").exists()


def test_the_first_acknowledgement_is_remembered(parts: Parts) -> None:
    arrive(parts, b'{"v": 1, "committed": {}}')
    assert parts.outbox.follows_host
    assert parts.store.value(FOLLOWS_HOST) is True


def test_a_host_that_waits_in_vain_is_told_so(parts: Parts) -> None:
    """Three messages left with their PUBACK, before there was a host that could have had them."""
    for _ in range(3):
        sent(parts)
        parts.outbox.acknowledge({parts.outbox.boot: 99})
    parts.outbox.acknowledge({})
    steering = steer(parts)

    async def story() -> None:
        steering._reporter.presence("online", "started")
        steering.begin()
        steering._arrived(Inbound("ew/1/f/d/ack", json.dumps({"committed": {parts.outbox.boot: 0}}).encode()))
        steering.tick()

    asyncio.run(story())
    status = json.loads(parts.link._documents["ew/1/f/d/status"])
    assert (status["state"], status["kept_from"]) == ("online", {parts.outbox.boot: 4})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"nonsense",
        b"[]",
        b'{"committed": 7}',
        b'{"committed": {"b": "x"}}',
        b'{"v": 1}',
        b"[" * 9000,
        b'{"committed": {"b": 1e999}}',
        b'{"committed": {"b": -1e999}}',
        b'{"committed": {"b": NaN}}',
    ],
)
def test_a_watermark_that_is_none_changes_nothing(parts: Parts, payload: bytes) -> None:
    sent(parts)
    steering = arrive(parts, payload)
    assert parts.outbox.statistics()["rows"] == 1
    assert steering.status()["acknowledgements"] == {"unreadable": 1}


def test_documents_for_a_device_that_is_not_updated_are_not_looked_at(parts: Parts) -> None:
    steering = arrive(parts, b"anything", topic="ew/1/f/d/desired")
    assert steering.status()["orders"] == {"accepted": 0, "refused": {}, "waiting": 0}


@pytest.mark.parametrize(
    ("window", "window_s"), [("", None), ("02:00-04:30", (7200.0, 16200.0)), ("23:00-01:00", (82800.0, 3600.0))]
)
def test_a_maintenance_window_is_read_in_seconds_of_the_day(window: str, window_s: Any) -> None:
    config = AgentConfig.model_validate({"update": {"window": window, "probation_s": 7}})
    limits = limits_of(config)
    assert (limits.window_s, limits.probation_s) == (window_s, 7.0)
