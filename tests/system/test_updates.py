"""Updates of a running agent, with real processes, a real broker and a real signed repository."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.client import Client
from agent.clock import wall_s
from compressor.keys import KeyRing
from scripts.story.broker import OPERATOR, Broker
from scripts.story.subscriber import Subscriber
from tests.agent.ota.server import Fault
from tests.artifacts import record
from tests.system.conftest import DEVICE, FLEET, Agent, Load, wait_until
from tests.system.updating import Director, fleet, next_version, said, update_toml, versions

DAY_S = 86_400.0

pytestmark = pytest.mark.system


@pytest.fixture
def subscriber(broker: Broker) -> Iterator[Subscriber]:
    subscriber = Subscriber(broker.port, OPERATOR, broker.users[OPERATOR], FLEET)
    subscriber.start()
    yield subscriber
    subscriber.stop()


@pytest.fixture
def director(short: Path, subscriber: Subscriber) -> Iterator[Director]:
    with fleet(short, subscriber) as director:
        yield director


@pytest.fixture
def updated(agent: Agent, broker: Broker, director: Director) -> Agent:
    """An agent that obeys the director; not started yet."""
    agent.write(agent.link_to(broker) + update_toml(agent.folder, director.server.url))
    return agent


def test_a_whole_update_loses_no_request(updated: Agent, director: Director, tmp_path: Path) -> None:
    updated.start()
    new = director.publish(next_version(updated.artifacts, tmp_path, 2))
    with Load(updated.address, record(seed=9).windows[:1]) as load:
        wait_until(lambda: load.answered > 100, "requests flow")
        version = director.want(new)
        report = director.end(version)
        before = load.answered
        wait_until(lambda: load.answered > before + 100, "requests flow on")
    assert load.failed == []
    assert report["update_state"] == "committed", report
    assert director.states(version) == [
        "planned", "fetching", "verified", "staged", "selftest", "probation", "committed"
    ]  # fmt: skip
    assert report["moved_bytes"] > 1000
    assert report["services"]["wrist"]["versions"] == {"wrist": 2, "wrist-accel": 2, "wrist-floor": 1}
    assert report["services"]["wrist"]["digests"]["wrist"] == new["wrist"]
    with Client(updated.address) as client:
        assert client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by == "wrist"
    status = updated.status()["update"]
    assert (status["state"], status["from"], status["to"]) == (
        "committed", {"wrist": "wrist v1"}, {"wrist": "wrist v2"}
    )  # fmt: skip
    assert "wrist v1 -> wrist v2" in updated.command("status").stdout
    assert updated.stop() == 0
    assert "critical" not in updated.log.read_text()


def serves_v1(agent: Agent) -> None:
    assert versions(agent)["wrist"] == 1
    with Client(agent.address) as client:
        assert client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by == "wrist"


# --- bad artifacts -----------------------------------------------------------------------------------------
def test_a_model_that_answers_its_golden_inputs_wrongly_is_refused_and_never_tried_again(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    updated.start()
    broken = director.publish(next_version(updated.artifacts, tmp_path, 3, wrong=True))
    with Load(updated.address, record(seed=9).windows[:1]) as load:
        report = director.end(director.want(broken))
    assert (report["update_state"], report["code"]) == ("quarantined", "golden_mismatch")
    assert load.failed == []
    again = director.end(director.want(broken))
    assert (again["update_state"], again["code"]) == ("rejected", "quarantined")
    serves_v1(updated)
    assert "golden_mismatch" in updated.command("status").stdout or "quarantined" in updated.command("status").stdout


def test_an_artifact_signed_by_a_stranger_is_not_trusted(
    updated: Agent, director: Director, subscriber: Subscriber, short: Path, tmp_path: Path
) -> None:
    updated.start()
    (short / "stranger").mkdir()
    with fleet(short / "stranger", subscriber) as stranger:
        theirs = stranger.publish(next_version(updated.artifacts, tmp_path, 3))
        report = director.end(director.want(theirs, repository=stranger.server.url))
        # nor is it when only its digests are named
        known = director.end(director.want(theirs))
    assert (report["update_state"], report["code"]) == ("rejected", "untrusted")
    assert (known["update_state"], known["code"]) == ("rejected", "untrusted")
    serves_v1(updated)


def test_an_artifact_for_another_class_of_device_is_refused_before_its_model_is_fetched(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    updated.write(
        updated.config.read_text()
        .split("deadline_ms = 20000.0\n")[1]
        .replace("[update]", '[update]\ndevice_class = "gateway"')
    )
    updated.start()
    other = director.publish(next_version(updated.artifacts, tmp_path, 2, device_class="microcontroller"))
    report = director.end(director.want(other))
    assert (report["update_state"], report["code"]) == ("rejected", "incompatible")
    assert "microcontroller" in report["text"]
    model = (updated.artifacts["wrist"] / "model.onnx").stat().st_size
    assert report["moved_bytes"] < model
    serves_v1(updated)


# --- documents that are not believed -----------------------------------------------------------------------
def test_documents_nobody_trusted_signed_are_refused_counted_and_told(
    updated: Agent, director: Director, subscriber: Subscriber, short: Path, tmp_path: Path
) -> None:
    updated.start()
    new = director.publish(next_version(updated.artifacts, tmp_path, 2))
    strangers = KeyRing.create(short / "strangers", ["wrist"])
    director.want(new, keys=strangers, version=41)
    wait_until(lambda: director.reports()[-1]["code"] == "untrusted", "the stranger is refused")
    refused = said(subscriber, "update")[-1]
    assert refused["details"]["code"] == "untrusted"
    assert refused["details"]["claimed"] == 41
    director.retain(b'{"signed": {}, "signatures": []}')
    wait_until(lambda: updated.status()["update"]["orders"]["refused"].get("untrusted") == 2, "unsigned")
    director.retain(b'{"no": "envelope"}')
    wait_until(lambda: director.reports()[-1]["code"] == "malformed", "nonsense is refused")
    director.want(new, device="another-1", version=42)
    wait_until(lambda: updated.status()["update"]["orders"]["refused"]["untrusted"] == 3, "another device's")
    assert updated.status()["update"]["state"] == "idle"
    serves_v1(updated)
    assert director.end(director.want(new, version=43))["code"] == ""
    director.want(new, version=42)
    wait_until(lambda: director.reports()[-1]["code"] == "replayed", "an older document is refused")
    assert versions(updated)["wrist"] == 2


def test_commands_are_obeyed_once_in_time_and_only_when_signed(updated: Agent, director: Director) -> None:
    updated.start()
    assert director.reply("ping", director.order("ping"))["ok"] is True
    births = len(director.subscriber.documents(DEVICE, "birth"))
    assert director.reply("rebirth", director.order("rebirth"))["ok"] is True
    wait_until(lambda: len(director.subscriber.documents(DEVICE, "birth")) > births, "it is born again")
    pinned = director.reply("pin", director.order("pin", {"service": "wrist", "engine": "wrist-accel"}))
    assert pinned["ok"] is True
    assert updated.service()["serving"] == "wrist-accel"
    assert director.reply("unpin", director.order("unpin", {"service": "wrist"}))["ok"] is True
    assert director.reply("pin", director.order("pin", {"service": "leg", "engine": "x"}))["code"] == "unknown_model"
    assert director.reply("sing", director.order("sing"))["code"] == "invalid_request"
    assert director.reply("rollback", director.order("rollback"))["ok"] is False
    sample = director.reply("sample", director.order("sample", {"id": "s1", "service": "wrist"}))
    assert (sample["ok"], sample["code"], sample["id"]) == (False, "untrusted", "s1")
    late = director.order("ping", not_after=wall_s() - 1000.0)
    assert director.reply("ping", late)["code"] == "untrusted"
    assert director.reply("ping", director.order("ping", seq=2))["code"] == "untrusted"  # replayed
    assert updated.stop() == 0
    updated.start()
    assert director.reply("unpin", director.order("unpin", seq=5))["code"] == "untrusted"  # over a restart too


# --- the repository and its metadata -----------------------------------------------------------------------
def test_a_repository_that_is_gone_makes_an_update_wait_and_its_return_ends_that(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    new = director.publish(next_version(updated.artifacts, tmp_path, 2))
    director.server.faults.append(Fault(status=503))
    updated.start()
    version = director.want(new)
    wait_until(lambda: director.reports()[-1]["code"] == "unavailable", "the trouble is told")
    serves_v1(updated)
    assert "waits: " in updated.command("status").stdout or "unavailable" in updated.command("status").stdout
    director.server.faults.clear()
    assert director.end(version)["update_state"] == "committed"


def test_expired_metadata_stops_installing_and_nothing_else(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    director.repository.refresh_online(now_s=wall_s() - 40 * DAY_S)
    new = next_version(updated.artifacts, tmp_path, 2)
    digests = dict(
        zip(new, director.repository.publish(list(new.values()), now_s=wall_s() - 40 * DAY_S), strict=True)
    )
    updated.start()
    version = director.want(digests)
    wait_until(lambda: director.reports()[-1]["code"] == "metadata_stale", "the expiry is told")
    assert updated.status()["update"]["waiting"]["code"] == "metadata_stale"
    serves_v1(updated)
    director.repository.refresh_online()
    assert director.end(version)["update_state"] == "committed"


def test_a_clock_at_1970_stops_installing_and_nothing_else(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    new = director.publish(next_version(updated.artifacts, tmp_path, 2))
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "sitecustomize.py").write_text(
        "import time\n_time, _start = time.time, time.time()\ntime.time = lambda: _time() - _start + 100.0\n"
    )
    updated.spawn(environment={"PYTHONPATH": f"{tmp_path / 'early'}:{Path.cwd()}"})
    wait_until(updated._serves, "the agent serves")
    director.want(new)
    wait_until(lambda: director.reports()[-1]["code"] == "clock_unknown", "the clock is told")
    assert director.reports()[-1]["at"] < 1e6
    serves_v1(updated)
    assert "waits: " in updated.command("status").stdout or "clock_unknown" in updated.command("status").stdout
    updated.stop()
    updated.start()
    assert director.end(director.version)["update_state"] == "committed"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(on="/blobs/", extra=b"x" * 1000), "too_large"),
        (Fault(on="/blobs/", announce=10, cut_after=10), "corrupt"),
        (Fault(on="/blobs/", endless=True), "too_large"),
    ],
    ids=["longer", "shorter", "endless"],
)
def test_a_server_that_lies_about_sizes_installs_nothing(
    updated: Agent, director: Director, tmp_path: Path, fault: Fault, code: str
) -> None:
    new = director.publish(next_version(updated.artifacts, tmp_path, 2))
    director.server.faults.append(fault)
    updated.start()
    director.want(new)
    report = wait_until(
        lambda: next((one for one in director.reports() if one["code"] not in ("", "untrusted")), None), "a refusal"
    )
    assert report["code"] == code
    assert not any((updated.state / "slots").iterdir())
    serves_v1(updated)


def test_a_disk_that_fills_up_during_the_download_stops_neither_serving_nor_later_updates(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    updated.state.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(updated.state)], capture_output=True)
    if made.returncode:
        pytest.skip("this user may not mount")
    try:
        new = director.publish(next_version(updated.artifacts, tmp_path, 2))
        updated.start()
        ballast = updated.state / "ballast"
        space = os.statvfs(updated.state)
        ballast.write_bytes(b"x" * max(space.f_bavail * space.f_frsize - 900_000, 0))
        version = director.want(new)
        wait_until(lambda: director.reports()[-1]["code"] == "disk_full", "the full disk is told")
        serves_v1(updated)
        assert not any((updated.state / "slots").iterdir())
        ballast.unlink()
        assert director.end(version)["update_state"] == "committed"
    finally:
        updated.stop()
        subprocess.run(["umount", str(updated.state)], check=True)
