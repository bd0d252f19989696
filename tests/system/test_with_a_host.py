"""A real agent with a real host: enrolment, acknowledged telemetry, recordings on request."""

from __future__ import annotations

import io
import json
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.clock import monotonic_s, wall_s
from agent.contract.repository import FamilyPolicy
from agent.ota import wire
from compressor.cli import main as edgewarden_compressor
from compressor.config import HostConfig
from compressor.fleet.database import devices, messages, plans
from compressor.fleet.service import Service
from compressor.fleet.tokens import hash_token, new_token
from compressor.keys import KeyRing
from compressor.publish import Repository
from scripts.story.broker import OPERATOR, Broker
from tests.artifacts import record
from tests.system.conftest import DEVICE, FLEET, Agent, wait_until
from tests.system.updating import next_version, update_toml

pytestmark = [pytest.mark.system, pytest.mark.torch]


class Host:
    """`edgewarden-compressor serve` in this process."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        self.folder = folder
        self.service = Service(
            HostConfig.model_validate({
                "host": {"folder": folder / "host"},
                "link": {"host": "127.0.0.1", "port": broker.port, "username": OPERATOR,
                         "password_file": str(broker.password_file(OPERATOR))},
                "fleet": {"name": FLEET}, "http": {"port": 0}, "web": {"enabled": False},
                "repository": {"folder": str(folder / "repository"), "keys": str(folder / "keys")},
                "regeneration": {"soak_s": 0.2},
            }),
            say=lambda *_: None,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.service.run, name="host")
        self.thread.start()
        assert self.service.wait_ready(60)

    def stop(self) -> None:
        self.service.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def token(self) -> str:
        token = new_token()
        with self.service.database.writing() as tx:
            devices.add_token(tx, hash_token(token), DEVICE, now_s=wall_s(), lifetime_s=600.0)
        return token

    def row(self) -> Any:
        with self.service.database.reading() as tx:
            return devices.find(tx, DEVICE)

    def committed(self) -> int:
        with self.service.database.reading() as tx:
            return sum(messages.watermarks(tx, DEVICE).values())

    def ask_for_sample(self) -> None:
        self.service.steward._ask(DEVICE, "wrist", "", 0, wall_s())

    def samples(self) -> list[tuple[str, str]]:
        with self.service.database.reading() as tx:
            return [(row.state, row.text) for row in plans.samples(tx, service="wrist")]


@pytest.fixture
def host(short: Path, broker: Broker) -> Iterator[Host]:
    keys = KeyRing.create(short / "keys", ["wrist"])
    repository = Repository.init(short / "repository", keys, {"wrist": FamilyPolicy("auto", (DEVICE,))})
    (short / "root.json").write_bytes(repository.trusted_root())
    host = Host(short, broker)
    yield host
    host.stop()


def configure(agent: Agent, broker: Broker, host: Host, *, allow: bool = True) -> None:
    token = agent.folder / "token"
    token.write_text(host.token() + "\n")
    recordings = agent.folder / "recordings"
    recordings.mkdir()
    agent.write(
        agent.link_to(broker)
        + update_toml(agent.folder)
        + f"""
[enrolment]
url = "{host.service.public_url()}/enrol"
token_file = "{token}"
[samples]
allow = {str(allow).lower()}
folder = "{recordings}"
max_bytes = 1000000
[outbox]
delete_after = "host"
"""
    )


def save(path: Path, rows: int = 12, **changes: Any) -> None:
    arrays = {"windows": record(seed=4).windows[:rows], "labels": np.zeros(rows, np.int64)}
    np.savez(path, **{**arrays, "recordings": np.arange(rows) // 6, **changes})


def test_a_device_enrols_once_and_then_keeps_messages_until_its_host_has_them(
    agent: Agent, broker: Broker, host: Host
) -> None:
    configure(agent, broker, host)
    agent.start()
    wait_until(lambda: agent.status()["update"]["enrolment"]["state"] == "enrolled", "it is enrolled")
    assert stat.S_IMODE((agent.state / "device.pem").stat().st_mode) == 0o600
    row = wait_until(lambda: (found := host.row()) and found.enrolled_at and found, "the host knows it")
    assert len(row.public_key) == 64
    row = wait_until(lambda: (one := host.row()) and one.birth and one.reported and one, "what it said before")
    assert row.presence == "online"
    assert "BEGIN PRIVATE" not in agent.log.read_text()
    wait_until(lambda: host.committed() >= 3, "telemetry is committed")
    wait_until(lambda: agent.status()["outbox"]["rows"] <= 2, "what is committed is forgotten")
    host.stop()
    wait_until(lambda: agent.status()["outbox"]["rows"] >= 4, "messages are kept while the host is away")
    boot = agent.status()["agent"]["boot"]
    assert agent.stop() == 0
    host.__init__(host.folder, broker)  # type: ignore[misc]
    agent.start()
    assert agent.status()["update"]["enrolment"]["state"] == "enrolled"
    wait_until(lambda: agent.status()["outbox"]["rows"] <= 2, "all of it has arrived")

    def committed() -> int:
        with host.service.database.reading() as tx:
            return messages.watermarks(tx, DEVICE)[boot]

    wait_until(lambda: committed() >= 6, "also of the boot before")

    def missing() -> int:
        with host.service.database.reading() as tx:
            return messages.missing(tx, DEVICE)

    wait_until(lambda: missing() == 0, "every number has arrived")


class Gate(ThreadingHTTPServer):
    """A proxy before the host's enrolment, which says no (503) until it is opened, and can lose answers."""

    def __init__(self, agent: Agent, host: Host) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target, self.is_open, self.lose = f"{host.service.public_url()}/enrol", threading.Event(), 0
        before = agent.config.read_text()
        agent.config.write_text(before.replace(self.target, f"http://127.0.0.1:{self.server_port}/enrol"))
        threading.Thread(target=self.serve_forever, name="gate", daemon=True).start()


class _Forward(BaseHTTPRequestHandler):
    server: Gate

    def do_POST(self) -> None:  # the name the library asks for
        body = self.rfile.read(int(self.headers["content-length"]))
        status, answer = 503, b"{}"
        if self.server.is_open.is_set():
            kind = {"Content-Type": "application/json"}
            until_s = monotonic_s() + 30
            status, answer = wire.send(
                "POST", self.server.target, io.BytesIO(body), len(body), headers=kind, until_s=until_s, tls=None
            )
        if self.server.lose and status == 200:
            self.server.lose -= 1
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


def test_messages_from_before_the_enrolment_are_not_waited_for_in_vain(
    agent: Agent, broker: Broker, host: Host
) -> None:
    """They left with their PUBACK, and the host refused them from a device it did not know."""
    configure(agent, broker, host)
    gate = Gate(agent, host)
    agent.start()
    wait_until(lambda: host.service.ingest.statistics()["refused"] >= 6, "the host refuses a stranger")
    gate.is_open.set()
    wait_until(lambda: agent.status()["update"]["enrolment"]["state"] == "enrolled", "it is enrolled")
    wait_until(lambda: host.committed() >= 8, "the watermark passes what was refused")
    wait_until(lambda: agent.status()["outbox"]["rows"] <= 2, "what is settled is forgotten")
    gate.shutdown()
    gate.server_close()


def test_a_lost_answer_does_not_spend_the_token(agent: Agent, broker: Broker, host: Host) -> None:
    configure(agent, broker, host)
    gate = Gate(agent, host)
    gate.lose = 1
    gate.is_open.set()
    agent.start()
    wait_until(lambda: gate.lose == 0 and host.row() and host.row().enrolled_at, "the host enrolled it")
    wait_until(lambda: agent.status()["update"]["enrolment"]["state"] == "enrolled", "it asked again")
    assert agent.status()["update"]["enrolment"]["repository"].startswith(host.service.public_url())
    gate.shutdown()
    gate.server_close()


def test_a_used_token_is_refused_and_the_device_serves_all_the_same(agent: Agent, broker: Broker, host: Host) -> None:
    configure(agent, broker, host)
    (agent.folder / "token").write_text("A" * 32)
    agent.start()
    wait_until(lambda: agent.status()["update"]["enrolment"]["code"] == "untrusted", "the refusal is told")
    assert agent.service()["serving"] == "wrist"
    assert "A" * 32 not in agent.log.read_text() + str(agent.status())


def test_recordings_are_uploaded_when_asked_for_and_only_sound_ones(agent: Agent, broker: Broker, host: Host) -> None:
    configure(agent, broker, host)
    agent.start()
    wait_until(lambda: agent.status()["update"]["enrolment"]["state"] == "enrolled", "it is enrolled")
    wait_until(lambda: agent.status()["link"]["received"] > 0, "it hears its host")
    folder = agent.folder / "recordings"

    def asked() -> tuple[str, str]:
        before = len(host.samples())
        while len(host.samples()) == before:  # a broker that is slow to answer leaves no request: it is asked again
            host.ask_for_sample()
        return wait_until(
            lambda: (found := host.samples()) and len(found) > before and found[0][0] != "asked" and found[0],
            "it ends",
        )

    assert asked()[0] == "refused"  # there is none
    save(folder / "a.npz")
    state, text = asked()
    assert (state, text.split(",")[0]) == ("accepted", "12 windows of 2 recordings")
    wait_until(lambda: any("were uploaded" in one["text"] for one in agent.status()["events"]), "the event")
    poisoned = record(seed=4).windows[:12].copy()
    poisoned[3, 5, 1] = np.nan
    save(folder / "b.npz", windows=poisoned)
    assert "not finite" in asked()[1]
    save(folder / "c.npz", windows=np.zeros((12, 64, 6), np.float32))
    assert "the model takes" in asked()[1]
    (folder / "d.npz").write_bytes(b"x" * 2_000_000)
    assert "1000000 are allowed" in asked()[1]
    (folder / "d.npz").write_bytes(b"PK\x03\x04 and then nothing")
    assert "no recording" in asked()[1]


def test_an_operator_rolls_out_what_was_published_by_hand_and_takes_it_back(
    agent: Agent, broker: Broker, host: Host, artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    configure(agent, broker, host)
    agent.start()
    wait_until(lambda: (found := host.row()) and found.birth, "the host knows what it carries")
    names = ("wrist", "wrist-accel", "wrist-floor")
    repository = Repository(host.folder / "repository", KeyRing(host.folder / "keys"))
    first = repository.publish([artifacts[name] for name in names])
    second = repository.publish(list(next_version(artifacts, agent.folder, 2, names=names).values()))
    config = host.folder / "compressor.toml"
    config.write_text(
        f'[host]\nfolder = "{host.folder / "host"}"\n[fleet]\nname = "{FLEET}"\n'
        f'[repository]\nfolder = "{host.folder / "repository"}"\nkeys = "{host.folder / "keys"}"\n'
    )

    def ended(number: int) -> str:
        """The last words of a rollout that ended."""
        with host.service.database.reading() as tx:
            (row,) = (row for row in plans.rollouts(tx) if row.id == number)
        return f"{row.state}: {row.text}" if row.state in ("completed", "halted") else ""

    for verb, digests in (("start", second), ("rollback", first)):
        arguments = ("wrist", "--artifact", *digests, "--device", DEVICE, "--config", str(config), "--json")
        assert edgewarden_compressor(["rollout", verb, *arguments]) == 0
        number = json.loads(capsys.readouterr().out)["rollout"]
        words = wait_until(lambda number=number: ended(number), f"rollout {verb} ends")
        assert words.startswith("completed"), words
        wait_until(
            lambda digests=digests: set(host.row().birth["artifacts"].values()) == set(digests),
            "the host hears of it",
        )
        wait_until(lambda: agent.service()["serving"] == "wrist", "the preferred engine answers")
