"""The whole host in one process, against a real broker and real HTTP: the loop without hands."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from agent.contract.desired import Desired, open_command, open_desired
from agent.contract.errors import ConfigError, StateLocked
from agent.contract.repository import FamilyPolicy
from agent.contract.signed import key_id, signers
from compressor.config import HostConfig
from compressor.fleet.database import devices, plans, timeline
from compressor.fleet.service import Service, read_token
from compressor.keys import KeyRing
from compressor.publish import Repository
from scripts.story.broker import OPERATOR, Broker
from tests.compressor.fleet.doubles import (
    DEVICES,
    FLEET,
    Device,
    FakeTrainer,
    drift_window,
    recording,
    telemetry,
    wait_until,
)

pytestmark = pytest.mark.system
Maker = Callable[[str], Device]


def config_of(broker: Broker, folder: Path, **web: Any) -> HostConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text("")
    if not (folder / "keys").exists():
        ring = KeyRing.create(folder / "keys", ["wrist"])
        Repository.init(folder / "repository", ring, {"wrist": FamilyPolicy("auto", DEVICES)})
    return HostConfig.model_validate({
        "host": {"folder": folder},
        "link": {"host": "127.0.0.1", "port": broker.port, "username": OPERATOR,
                 "password_file": str(broker.password_file(OPERATOR)), "session_s": 0},
        "fleet": {"name": FLEET, "cohorts": {"canary": list(DEVICES)}, "patience_s": 0.2, "collect_s": 300},
        "http": {"port": 0},
        "web": {"port": 0, **web},
        "repository": {"folder": str(folder / "repository"), "keys": str(folder / "keys")},
        "regeneration": {"recipe": str(folder / "recipe.toml"), "service": "wrist", "soak_s": 0.2},
    })  # fmt: skip


class Host:
    def __init__(self, config: HostConfig) -> None:
        public = KeyRing(Path(config.repository.keys)).public("director")
        self.director_keys = {key_id(public): public.hex()}
        self.trainer = FakeTrainer()
        self.said: list[tuple[str, str, str]] = []
        self.service = Service(config, say=lambda *words: self.said.append(words), trainer=self.trainer)
        self.thread = threading.Thread(target=self.service.run, name="host")

    def start(self) -> None:
        self.thread.start()
        assert self.service.wait_ready(60)
        assert self.service.ingest.broker.wait_connected(60)

    def stop(self) -> None:
        self.service.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def story(self) -> list[tuple[str, str]]:
        with self.service.database.reading() as tx:
            return [(row.what, row.text) for row in timeline.newest(tx, limit=500)][::-1]

    def rollout_state(self) -> str:
        with self.service.database.reading() as tx:
            found = plans.rollouts(tx)
        return found[-1].state if found else ""


@pytest.fixture
def host(broker: Broker, folder: Path) -> Iterator[Host]:
    host = Host(config_of(broker, folder))
    host.start()
    yield host
    host.stop()


def upload(url: str, token: str, body: bytes) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request("PUT", parts.path, body=body, headers={"authorization": f"Bearer {token}"})
        return connection.getresponse().status
    finally:
        connection.close()


def served(host: Host, path: str) -> int:
    parts = urlsplit(host.service.public_url())
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def live_through(host: Host, device: Device, number: int, all_asked: threading.Barrier) -> None:
    """One device's part of the story: drift, upload when asked, update until committed.

    Nobody uploads before all are asked: the host would begin without a device that spoke late.
    """
    device.send("status", {"device": device.id, "boot": "b1", "state": "online", "reason": "started", "at": 1.0})
    device.send("tm", telemetry(device.id, 1, drift_window()))
    reference = drift_window()["reference"]
    device.event(2, "drift", text="the stream left every known regime", channels=["ax", "gy"], details={
        "raised": True, "alarm": "drift", "level": "drift", "guards": [], "single_channel": False,
        "persisted_windows": 64, "reference": reference,
    })  # fmt: skip
    envelope = device.next("cmd/sample")
    command = open_command(envelope, host.director_keys, device=device.id, topic_op="sample", last_seq=0, now_s=0.0)
    assert command.body["what"] == "enrolment"
    all_asked.wait(60)
    assert upload(command.body["upload"], command.body["token"], recording(seed=number)) == 201
    document = open_desired(device.next("desired"), host.director_keys, device=device.id)
    for state in ("planned", "fetching", "verified", "staged", "selftest", "probation", "committed"):
        device.report(document.version, state)


def test_three_new_wearers_get_their_update_without_hands(host: Host, device: Maker) -> None:
    devices = [device(name) for name in DEVICES]
    errors: list[BaseException] = []
    all_asked = threading.Barrier(len(devices))

    def live(one: Device, number: int) -> None:
        try:
            live_through(host, one, number, all_asked)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=live, args=(one, n)) for n, one in enumerate(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    wait_until(lambda: host.rollout_state() == "completed")
    assert [recordings for _, recordings, _ in host.trainer.started] == [["w1.npz", "w2.npz", "w3.npz"]]
    story = host.story()
    kinds = [what for what, _ in story]
    for what in ("presence", "event", "decision", "sample", "job", "publish", "desired", "reported", "rollout"):
        assert what in kinds, what
    assert any("regenerate:" in text for what, text in story if what == "decision")
    assert kinds.index("decision") < kinds.index("sample") < kinds.index("job") < kinds.index("publish")
    assert host.service.statistics()["steward"]["step_failures"] == 0
    assert any(text.startswith("published wrist v1, wrist-accel v1") for _, text in story)
    assert served(host, "/repository/metadata/timestamp.json") == 200
    assert served(host, "/repository/metadata/2.pipeline-wrist.json") == 200


def test_a_director_key_rotated_beside_the_running_host_reaches_who_waits(host: Host, device: Maker) -> None:
    """By another process, as `edgewarden-compressor keys rotate director` does; the device sleeps meanwhile."""
    config = host.service.config
    with host.service.database.writing() as tx:
        devices.change(tx, "w1", now_s=0.0)
        fields = {"cohort": "canary", "service": "wrist", "devices": ["w1"], "versions": {}, "state": "draft",
                  "artifacts": {"wrist": "ab" * 32}, "order": ["wrist"], "created_at": 0.0, "since": 0.0}  # fmt: skip
        number = plans.add_rollout(tx, job=None, text="", **fields)
    repository = Repository(Path(config.repository.folder), KeyRing(Path(config.repository.keys)))
    w1 = device("w1")

    def desired(keys: dict[str, str]) -> Desired:
        """The next one signed by these keys; the broker still keeps those of other tests' hosts."""
        while not signers(envelope := w1.next("desired"), keys):
            pass
        return open_desired(envelope, keys, device="w1")

    before = desired(host.director_keys)
    assert before.rollout == str(number)
    for name in ("director", "root1", "snapshot"):
        repository.rotate(name)
    public = repository.keys.public("director")
    assert desired({key_id(public): public.hex()}) == before
    host.service.steward.tidy(now_s=0.0)
    assert not [words for words in host.said if words[0] == "error"]


def test_two_hosts_on_one_database_are_one_too_many(host: Host, broker: Broker, folder: Path) -> None:
    with pytest.raises(StateLocked, match=f"process {os.getpid()}"):
        Host(config_of(broker, folder))


def test_a_port_in_use_is_told_and_the_folder_is_free_again(broker: Broker, tmp_path: Path) -> None:
    first = Host(config_of(broker, tmp_path / "one"))
    port = urlsplit(first.service.page_url()).port
    with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port} for \[web\]"):
        Host(config_of(broker, tmp_path / "two", port=port))
    second = Host(config_of(broker, tmp_path / "two"))
    for host in (first, second):
        host.thread.start()
        assert host.service.wait_ready(60)
        host.stop()


@pytest.mark.parametrize("text", ["", "\n", "fifteen-letters"])
def test_a_token_that_anybody_could_guess_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "web.token"
    file.write_text(text)
    config = HostConfig.model_validate({"host": {"folder": tmp_path}, "fleet": {"name": FLEET}})
    with pytest.raises(ConfigError, match="at least 16 are needed"):
        read_token(config)


def test_the_token_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    config = HostConfig.model_validate({"host": {"folder": tmp_path}, "fleet": {"name": FLEET}})
    before = os.umask(0)
    try:
        token = read_token(config)
    finally:
        os.umask(before)
    assert len(token) >= 16
    assert (tmp_path / "web.token").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["web.token"]
    assert read_token(config) == token


def test_an_enrolled_device_may_speak_at_once(host: Host, broker: Broker) -> None:
    from compressor.fleet.tokens import hash_token, new_token

    token = new_token()
    with host.service.database.writing() as tx:
        devices.add_token(tx, hash_token(token), "newcomer", now_s=0.0, lifetime_s=1e12)
    parts = urlsplit(host.service.public_url())
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("POST", "/enrol", json.dumps({"device": "newcomer", "token": token}))
    assert connection.getresponse().status == 200
    connection.close()
    stranger = Device(broker.port, OPERATOR, broker.users[OPERATOR])
    stranger.client.publish(f"ew/1/{FLEET}/newcomer/status", json.dumps(
        {"device": "newcomer", "boot": "b", "state": "online", "at": 1.0})).wait_for_publish(60)  # fmt: skip
    stranger.client.publish(f"ew/1/{FLEET}/nobody/status", json.dumps(
        {"device": "nobody", "boot": "b", "state": "online", "at": 1.0})).wait_for_publish(60)  # fmt: skip
    wait_until(lambda: ("presence", "online") in host.story())
    wait_until(lambda: host.service.ingest.statistics()["refused"] == 1)
    stranger.close()


def test_sigterm_ends_the_process_in_order(broker: Broker, folder: Path) -> None:
    file = folder / "compressor.toml"
    folder.mkdir()
    file.write_text(f"""
[host]
folder = "state"
[link]
host = "127.0.0.1"
port = {broker.port}
username = "{OPERATOR}"
password_file = "{broker.password_file(OPERATOR)}"
[http]
port = 0
[web]
port = 0
""")
    script = (
        "import argparse, sys; from compressor.commands_fleet import register;"
        "p = argparse.ArgumentParser(); register(p.add_subparsers());"
        "o = p.parse_args(sys.argv[1:]); sys.exit(o.run(o))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "serve", "--config", str(file)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(1)]
    while "connected" not in "".join(lines) or "host.ready" not in "".join(lines):
        lines.append(process.stderr.readline())
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "host.stopped" in rest
