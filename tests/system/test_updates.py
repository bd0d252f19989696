"""Updates of a running agent, with real processes, a real broker and a real signed repository."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.client import Client
from agent.clock import wall_s
from agent.contract.artifact import open_artifact
from compressor.keys import KeyRing
from scripts.story.broker import OPERATOR, Broker
from scripts.story.subscriber import Subscriber
from tests.agent.ota.server import Fault
from tests.artifacts import gyro_off, record
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
    assert load.retries == 0  # not even one had to be asked again
    assert report["update_state"] == "committed", report
    whole = ["planned", "fetching", "verified", "staged", "selftest", "probation", "committed"]
    wait_until(lambda: director.states(version) == whole, f"every state is told once, in this order: {whole}")
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
    wait_until(lambda: director.code() == "untrusted", "the stranger is refused")
    refused = wait_until(lambda: said(subscriber, "update"), "and said so")[-1]
    assert refused["details"]["code"] == "untrusted"
    assert refused["details"]["claimed"] == 41
    director.retain(b'{"signed": {}, "signatures": []}')
    wait_until(lambda: updated.status()["update"]["orders"]["refused"].get("untrusted") == 2, "unsigned")
    director.retain(b'{"no": "envelope"}')
    wait_until(lambda: director.code() == "malformed", "nonsense is refused")
    director.want(new, device="another-1", version=42)
    wait_until(lambda: updated.status()["update"]["orders"]["refused"]["untrusted"] == 3, "another device's")
    assert updated.status()["update"]["state"] == "idle"
    serves_v1(updated)
    assert director.end(director.want(new, version=43))["code"] == ""
    director.want(new, version=42)
    wait_until(lambda: director.code() == "replayed", "an older document is refused")
    assert versions(updated)["wrist"] == 2


def test_commands_are_obeyed_once_in_time_and_only_when_signed(updated: Agent, director: Director) -> None:
    updated.start()
    # who is told of its first message has subscribed before: an order sent earlier would reach nobody
    wait_until(lambda: updated.status()["link"]["published"], "it hears its director")
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
    wait_until(lambda: director.code() == "unavailable", "the trouble is told")
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
    wait_until(lambda: director.code() == "metadata_stale", "the expiry is told")
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
    wait_until(lambda: director.code() == "clock_unknown", "the clock is told")
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
        wait_until(lambda: director.code() == "disk_full", "the full disk is told")
        serves_v1(updated)
        assert not any((updated.state / "slots").iterdir())
        ballast.unlink()
        assert director.end(version)["update_state"] == "committed"
    finally:
        updated.stop()
        subprocess.run(["umount", str(updated.state)], check=True)


# --- after the swap ----------------------------------------------------------------------------------------
def test_a_candidate_that_fails_requests_on_probation_is_taken_back(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    updated.config.write_text(updated.config.read_text().replace("probation_s = 0.5", "probation_s = 60"))
    updated.start()
    bad = director.publish(next_version(updated.artifacts, tmp_path, 2, wrist="wrist-faulty"))
    with Load(updated.address, record(seed=9).windows[:1]) as load:
        report = director.end(director.want(bad))
    assert (report["update_state"], report["code"]) == ("rolled_back", "engine_failed"), report
    assert load.failed == []  # its fallback answered in its place
    serves_v1(updated)
    again = director.end(director.want(bad))
    assert (again["update_state"], again["code"]) == ("rejected", "quarantined")


def test_a_candidate_whose_worker_dies_twice_on_probation_is_taken_back(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    updated.config.write_text(updated.config.read_text().replace("probation_s = 0.5", "probation_s = 60"))
    updated.start()
    version = director.want(director.publish(next_version(updated.artifacts, tmp_path, 2)))
    for _ in range(2):
        wait_until(
            lambda: versions(updated)["wrist"] == 2 and updated.status()["worker"]["phase"] == "serving",
            "the candidate serves",
        )
        pid = updated.status()["worker"]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: updated.status()["worker"]["pid"] != pid, "its worker is gone")
    report = director.end(version)
    assert (report["update_state"], report["code"]) == ("rolled_back", "crashed")
    wait_until(lambda: updated.status()["worker"]["phase"] == "serving", "somebody serves")
    serves_v1(updated)


def test_the_previous_models_come_back_when_an_operator_or_a_director_asks(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    updated.start()
    first = director.publish(next_version(updated.artifacts, tmp_path, 2))
    assert director.end(director.want(first))["update_state"] == "committed"
    second = director.publish(next_version(updated.artifacts, tmp_path, 3))
    assert director.end(director.want(second))["update_state"] == "committed"
    assert updated.command("rollback").returncode == 0
    wait_until(lambda: updated.status()["update"]["state"] == "rolled_back", "it is rolled back")
    wait_until(lambda: versions(updated)["wrist"] == 2, "and serves")
    assert updated.command("rollback").returncode != 0  # there is only one step back
    third = director.publish(next_version(updated.artifacts, tmp_path, 4))
    assert director.end(director.want(third))["update_state"] == "committed"
    assert director.end(director.want(first))["code"] == "downgrade"
    assert director.end(director.want(first, rollback=True))["update_state"] == "committed"
    assert versions(updated)["wrist"] == 2
    assert director.reply("rollback", director.order("rollback"))["ok"] is True
    wait_until(lambda: versions(updated)["wrist"] == 4, "the director's order is obeyed")


def test_a_sensor_that_is_broken_stays_known_over_an_update(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    updated.start()
    with Client(updated.address, retry_once=True) as client:  # idle connections end with their worker
        for window in gyro_off(record(seed=9).windows[:20]):
            client.infer("wrist", {"window": window[None]})
        wait_until(lambda: updated.service()["serving"] == "wrist-accel", "the fallback answers")
        report = director.end(director.want(director.publish(next_version(updated.artifacts, tmp_path, 2))))
        assert report["update_state"] == "committed"
        answer = client.infer("wrist", {"window": gyro_off(record(seed=9).windows[:1])})
    assert answer.served_by == "wrist-accel"
    assert versions(updated)["wrist-accel"] == 2
    assert updated.service()["guards"] == {"dead": ["gx", "gy", "gz"]}


def test_installed_bytes_that_rot_are_noticed_at_the_start_and_fetched_again(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    updated.start()
    new = director.publish(next_version(updated.artifacts, tmp_path, 2))
    assert director.end(director.want(new))["update_state"] == "committed"
    assert updated.stop() == 0
    model = updated.state / "slots" / new["wrist"] / "model.onnx"
    raw = bytearray(model.read_bytes())
    raw[len(raw) // 2] ^= 1
    model.chmod(0o644)
    model.write_bytes(raw)
    updated.start()
    assert any("cannot be served" in event["text"] for event in updated.status()["events"])
    wait_until(lambda: versions(updated)["wrist"] == 2, "it is whole again")
    wait_until(lambda: updated.status()["update"]["state"] == "committed", "and committed")
    assert open_artifact(updated.state / "slots" / new["wrist"]).digest == new["wrist"]


def test_what_was_installed_serves_after_a_restart_without_broker_and_repository(
    updated: Agent, broker: Broker, director: Director, tmp_path: Path
) -> None:
    updated.start()
    new = director.publish(next_version(updated.artifacts, tmp_path, 2))
    assert director.end(director.want(new))["update_state"] == "committed"
    assert updated.stop() == 0
    broker.stop()
    director.server.faults.append(Fault(status=503))
    updated.start()
    assert versions(updated) == {"wrist": 2, "wrist-accel": 2, "wrist-floor": 1}
    assert updated.status()["update"]["state"] == "committed"
    with Client(updated.address) as client:
        assert client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by == "wrist"


def test_outside_its_window_an_update_is_staged_and_waits(updated: Agent, director: Director, tmp_path: Path) -> None:
    def hours(first: int, last: int) -> str:
        """A window from so many hours after the present one to so many after it."""
        hour = int(wall_s() // 3600)
        return f"{(hour + first) % 24:02d}:00-{(hour + last) % 24:02d}:00"

    window = hours(3, 4)
    updated.config.write_text(updated.config.read_text().replace("[update]", f'[update]\nwindow = "{window}"'))
    updated.start()
    version = director.want(director.publish(next_version(updated.artifacts, tmp_path, 2)))
    wait_until(lambda: director.states(version)[-1:] == ["staged"], "it is staged")
    serves_v1(updated)
    assert updated.stop() == 0
    updated.config.write_text(updated.config.read_text().replace(window, hours(-1, 2)))
    updated.start()
    assert director.end(version)["update_state"] == "committed"
