"""The host killed at random moments of planning, publishing and serving updates: it goes on where it was, and what it
or the broker acknowledged is in its database exactly once.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import clock
from agent.contract.repository import FamilyPolicy
from compressor.fleet.database import Database, plans
from compressor.fleet.database.store import DATABASE
from compressor.keys import KeyRing
from compressor.publish import Repository
from scripts.story.broker import OPERATOR, Broker, free_port
from scripts.story.subscriber import Subscriber
from tests.artifacts import gyro_off, record
from tests.system.conftest import DEVICE, FLEET, Agent, Load, wait_until
from tests.system.updating import next_version, update_toml, versions

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.torch]

DEVICES = (DEVICE, "bench-2")
HOST = "host"
UPDATE_S = 120.0  # a device whose download the kill cut off tries again after 10 s
BROKEN = gyro_off(record(seed=8).windows[:1])
SOUND = record(seed=8).windows[:1]
UPDATES = (  # stage of an update, and about how long it lasts in seconds
    ("publishing", 0.6), ("publishing", 0.6), ("ordering", 0.2), ("ordering", 0.2), ("fetching", 0.3),
    ("fetching", 0.3), ("probation", 1.0),
)  # fmt: skip
GRAVE = {"rejected", "quarantined", "failed", "rolling_back", "rolled_back"}


class Device(Agent):
    """An agent under another name than the one of the bench, with recordings to give."""

    def __init__(self, folder: Path, artifacts: dict[str, Path], name: str) -> None:
        self.name = name
        folder.mkdir()
        super().__init__(folder, artifacts)

    def configure(self, broker: Broker, root: Path, repository: str) -> None:
        recordings = self.folder / "recordings"
        recordings.mkdir()
        rows = record(seed=4, rows=100)
        np.savez(
            recordings / "a.npz", windows=rows.windows, labels=rows.labels.astype(np.int64),
            recordings=rows.recordings.astype(np.int64),
        )  # fmt: skip
        # the load sends one window over and over: on purpose, and no news
        more = update_toml(root.parent, repository) + "[guard]\nrepeated = false\n"
        samples = f'[samples]\nallow = true\nfolder = "{recordings}"\nmax_bytes = 60000000\n'
        config = self.write(self.link_to(broker, interval_s=0.5) + more + samples)
        config.write_text(config.read_text().replace(DEVICE, self.name))


class Host:
    """`edgewarden-compressor serve`, and its database seen from outside."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        self.folder, self.config, self.log = folder, folder / "compressor.toml", folder / "host.log"
        self.database = folder / "state" / DATABASE
        self.process: subprocess.Popen[bytes] | None = None
        self.kills = 0
        port = free_port()
        self.repository = f"http://127.0.0.1:{port}/repository"
        listed = ", ".join(f'"{device}"' for device in DEVICES)
        self.config.write_text(f"""
[host]
folder = "{folder / "state"}"
[link]
host = "127.0.0.1"
port = {broker.port}
username = "{HOST}"
password_file = "{broker.password_file(HOST)}"
[fleet]
name = "{FLEET}"
quorum = 2
patience_s = 1.0
collect_s = 1.0
[fleet.cohorts]
canary = [{listed}]
[http]
port = {port}
[web]
port = 0
[repository]
folder = "{folder / "repository"}"
keys = "{folder / "keys"}"
[regeneration]
recipe = "{Path(__file__).parent / "loop.recipe.toml"}"
service = "wrist"
budget_per_day = 0
soak_s = 0.5
""")

    def start(self) -> None:
        self.process = None
        said = self._is_ready()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "compressor", "serve", "--config", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(lambda: self._is_ready() > said, "the host is ready")

    def _is_ready(self) -> int:
        """How often it was."""
        said = self.log.read_text() if self.log.exists() else ""
        assert self.process is None or self.process.poll() is None, said[-3000:]
        return said.count("host.ready")

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Whatever fails comes with what the host said and knows."""
        try:
            yield
        except AssertionError as error:
            error.add_note(str(self.ask("SELECT device, state, text, attempts FROM sample")))
            error.add_note(self.log.read_text()[-3000:])
            raise

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        self.process.kill()
        self.process.wait()
        self.kills += 1

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=30)) as database:
            return database.execute(query, values).fetchall()

    def decisions(self) -> list[str]:
        return [row for (row,) in self.ask("SELECT row FROM decision ORDER BY id")]

    def built(self, artifacts: dict[str, Path]) -> int:
        """What a pipeline leaves that has just ended: a job whose artifacts wait for their publication."""
        database = Database(self.folder / "state")
        try:
            with database.writing() as tx:
                number = plans.add_job(
                    tx, cohort="canary", service="wrist", decision=0, created_at=clock.wall_s(), devices=[],
                    references=[], samples=[],
                )  # fmt: skip
                plans.change_job(tx, number, state="built", artifacts={n: str(p) for n, p in artifacts.items()})
        finally:
            database.close()
        return number

    def rollout(self, job: int) -> str:
        """State of the rollout of a job's artifacts; "" = there is none yet."""
        found = self.ask("SELECT state FROM rollout WHERE job = ?", job)
        assert len(found) <= 1, "one job, two rollouts"
        return str(found[0][0]) if found else ""

    def has_completed(self, job: int) -> bool:
        return self.rollout(job) == "completed"

    def has(self, recordings_of: tuple[str, ...]) -> bool:
        accepted = self.ask("SELECT device FROM sample WHERE state = 'accepted'")
        return {device for (device,) in accepted} == {*recordings_of}


class Fleet:
    """The host, two devices and a third party that hears whatever the broker took."""

    def __init__(self, host: Host, devices: list[Device], subscriber: Subscriber) -> None:
        self.host, self.devices, self.subscriber = host, devices, subscriber

    def kill_host(self) -> None:
        """Kill it, look what is left, start it again."""
        self.host.kill()
        assert self.host.ask("PRAGMA integrity_check") == [("ok",)]
        for device in self.devices:
            for boot, committed in self.acknowledged(device).items():
                assert self.watermark(device, boot) >= committed, "the host took back what it had acknowledged"
        self.host.start()

    def acknowledged(self, device: Device) -> dict[str, int]:
        """Up to where the host said, at any time, that it has everything."""
        marks: dict[str, int] = {}
        for document in self.subscriber.documents(device.name, "ack"):
            marks |= {boot: max(seq, marks.get(boot, 0)) for boot, seq in document["committed"].items()}
        return marks

    def watermark(self, device: Device, boot: str) -> int:
        found = self.host.ask("SELECT committed FROM boot WHERE device = ? AND boot = ?", device.name, boot)
        return int(found[0][0]) if found else 0

    def heard(self, device: Device) -> dict[tuple[str, int], dict[str, Any]]:
        """Every numbered message of a device that the broker took: (boot, number) -> document."""
        with self.subscriber.lock:
            return {
                (seen.document["boot"], seen.document["seq"]): seen.document
                for seen in self.subscriber.seen
                if f"/{device.name}/" in seen.topic and (seen.topic.endswith("/tm") or "/ev/" in seen.topic)
            }

    def has_come_to(self, what: str, job: int, version: int) -> bool:
        """Whether a stage of an update has begun: publishing does at once."""
        match what:
            case "ordering":
                return bool(self.host.rollout(job))
            case "fetching" | "probation":
                return any(what in self.said(device, version) for device in self.devices)
            case _:
                return True

    def states(self, device: Device) -> set[str]:
        return {document["update_state"] for document in self.subscriber.documents(device.name, "reported")}

    def said(self, device: Device, version: int) -> set[str]:
        """The states a device reported of one desired version."""
        documents = self.subscriber.documents(device.name, "reported")
        return {one["update_state"] for one in documents if one["desired_version"] == version}


@pytest.fixture
def fleet(short: Path, artifacts: dict[str, Path]) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        broker = Broker(short / "broker", FLEET, DEVICES, hosts=(HOST,))
        broker.prepare()
        broker.start()
        stack.callback(broker.stop)
        keys = KeyRing.create(short / "keys", ["wrist"])
        repository = Repository.init(short / "repository", keys, {"wrist": FamilyPolicy("auto", DEVICES)})
        repository.publish([artifacts["wrist"], artifacts["wrist-accel"]])
        (short / "root.json").write_bytes(repository.trusted_root())
        subscriber = Subscriber(broker.port, OPERATOR, broker.users[OPERATOR], FLEET)
        subscriber.start()
        stack.callback(subscriber.stop)
        host = Host(short, broker)
        host.start()
        stack.callback(host.stop)
        devices = [Device(short / name, artifacts, name) for name in DEVICES]
        for device in devices:
            device.configure(broker, short / "root.json", host.repository)
            stack.callback(device.stop)
            device.start()
        yield Fleet(host, devices, subscriber)


@pytest.mark.timeout(900)
def test_a_host_killed_at_ten_random_moments_loses_nothing_it_acknowledged_and_its_updates_arrive(
    fleet: Fleet, tmp_path: Path
) -> None:
    dice = np.random.default_rng(11)
    host, devices = fleet.host, fleet.devices

    def kill_after(moment: Callable[[], Any], what: str, *, within_s: float) -> None:
        """Wait for the beginning of something, then kill the host at a random moment of it."""
        wait_until(moment, what)
        clock.sleep(float(dice.random()) * within_s)
        fleet.kill_host()

    with contextlib.ExitStack() as loads:
        loads.enter_context(host.telling())
        loaded = [loads.enter_context(Load(device.address, BROKEN, clients=1)) for device in devices]
        # planning: the same sensor dies on both, both are asked for recordings, which they upload
        kill_after(host.decisions, "the host decides", within_s=1.0)
        kill_after(lambda: host.ask("SELECT id FROM sample"), "recordings are asked for", within_s=0.3)
        wait_until(lambda: host.has(DEVICES), "both recordings are here", within_s=UPDATE_S)
        wait_until(lambda: "budget-spent" in host.decisions(), "the host decides on", within_s=UPDATE_S)
        # ingest: what waited for it at the broker comes in one go
        kill_after(lambda: True, "at once", within_s=1.0)
        # publishing, ordering, serving, following: an update each
        for number, (what, within_s) in enumerate(UPDATES, start=1):
            job = host.built(next_version(devices[0].artifacts, tmp_path, number + 1))
            kill_after(partial(fleet.has_come_to, what, job, number), what, within_s=within_s)
            wait_until(partial(host.has_completed, job), f"{what}: the rollout is completed", within_s=UPDATE_S)
            for device in devices:
                assert versions(device)["wrist"] == number + 1
                assert not GRAVE & fleet.states(device)
        assert host.kills == 10
    assert [failure for load in loaded for failure in load.failed] == []
    # decisions continue: one device heals, so what was common is now the other's own trouble
    known = len(host.decisions())
    with Load(devices[1].address, SOUND, clients=1), Load(devices[0].address, BROKEN, clients=1):
        wait_until(lambda: "local-fault" in host.decisions()[known:], "a healed sensor changes the decision")
    assert host.ask("SELECT state FROM rollout WHERE state != 'completed'") == []
    assert host.ask("SELECT text FROM job WHERE state != 'done'") == []
    for device in devices:
        assert device.stop() == 0
        nothing_is_lost_or_doubled(fleet, device)
    assert host.stop() == 0
    host.start()
    assert host.ask("PRAGMA integrity_check") == [("ok",)]


def nothing_is_lost_or_doubled(fleet: Fleet, device: Device) -> None:
    """What a third party heard from the broker is in the database, each message once, and the device was told."""

    def settled() -> dict[tuple[str, int], dict[str, Any]]:
        heard, last = fleet.heard(device), Counter[str]()
        for boot, seq in heard:
            last[boot] = max(seq, last[boot])
        boots = fleet.host.ask("SELECT boot, committed, messages FROM boot WHERE device = ?", device.name)
        same = boots == [(boot, seq, seq) for boot, seq in last.items()] and fleet.acknowledged(device) == last
        return heard if same and len(heard) == last.total() else {}

    heard = wait_until(settled, f"the host has every message of {device.name}, and says so")
    assert len(heard) > 50
    events = fleet.host.ask("SELECT boot, seq FROM event WHERE device = ?", device.name)
    assert Counter(events) == Counter(key for key, document in heard.items() if "severity" in document)
    for table, part in (("window", "drift"), ("sketch", "latency")):
        rows = Counter(fleet.host.ask(f"SELECT boot, seq FROM {table} WHERE device = ?", device.name))  # noqa: S608
        said = {key: len(document.get(part, ())) for key, document in heard.items()}
        assert rows == Counter({key: count for key, count in said.items() if count})
