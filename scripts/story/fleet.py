"""The second half's real things: a signed repository, the host, and one agent for each new wearer."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from agent import clock
from agent.client import Client
from agent.contract.desired import Desired, ServiceChoice, seal
from agent.contract.errors import EdgewardenError
from agent.contract.repository import FamilyPolicy
from compressor.fleet.database import Database, devices, plans
from compressor.keys import KeyRing
from compressor.publish import Repository
from compressor.task import Rows
from scripts.story.player import order_of
from scripts.story.world import DEVICE, FLEET, SERVICE, StoryError, World, admin_status, wait_until

HOST = "host"
QUORUM = 2
ORDER = (SERVICE, f"{SERVICE}-accel", f"{SERVICE}-gyro", f"{SERVICE}-norm", f"{SERVICE}-floor")


def wearer_device(wearer: int) -> str:
    return f"wearer-{wearer}"


@dataclass
class Wearer:
    """One new wearer's device: its agent, and the person who goes on exercising whatever happens."""

    number: int
    world: World
    live: Rows  # what is played while the device is watched: the enrolment part of each recording
    hop_s: float
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    requests: int = 0
    failed: int = 0
    retried: int = 0  # sent again once because a connection closed
    time_s: float = 0.0
    pace: float = 40.0  # times life speed
    probation_s: float = 30.0  # how long an update is watched before it counts
    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    @property
    def device(self) -> str:
        return wearer_device(self.number)

    @property
    def address(self) -> str:
        return f"unix:{self.serve_socket}"

    @property
    def serve_socket(self) -> Path:
        return self.world.short / f"{self.device}.serve"

    @property
    def admin_socket(self) -> Path:
        return self.world.short / f"{self.device}.admin"

    def start(self, root: Path, repository: str, artifacts: Path, recording: Path) -> None:
        """Write the configuration and start the agent; `recording` is what it may upload when asked."""
        if self.folder.exists():  # an earlier telling: this device has never seen an update
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        samples = self.folder / "samples"
        samples.mkdir(exist_ok=True)
        shutil.copy(recording, samples / "enrolment.npz")
        config = self.folder / "agent.toml"
        config.write_text(self._configuration(root, repository, artifacts, samples))
        self.world.acts.note(f"edgewarden-agent run ({self.device})")
        with (self.folder / "agent.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent", "run", "--config", str(config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _configuration(self, root: Path, repository: str, artifacts: Path, samples: Path) -> str:
        return f"""# Written by scripts/quickstart: the device of new wearer {self.number}.
[device]
id = "{self.device}"
fleet = "{FLEET}"

[state]
folder = "{self.folder / "state"}"

[clock]
source = "data"

[serving]
unix = "{self.serve_socket}"

[[service]]
name = "{SERVICE}"
artifact = "{artifacts / ORDER[0]}"
fallbacks = [{", ".join(f'"{artifacts / name}"' for name in ORDER[1:-1])}]
floor = "{artifacts / ORDER[-1]}"

[guard]
repeated = false  # a session that was recorded once is played again and again

[telemetry]
interval_s = 2

[admin]
socket = "{self.admin_socket}"

[update]
enabled = true
root = "{root}"
repository = "{repository}"
device_class = "gateway"
probation_s = {self.probation_s}

[samples]
allow = true
folder = "{samples}"

[link]
enabled = true
host = "127.0.0.1"
port = {self.world.broker.port}
username = "{self.device}"
password_file = "{self.world.broker.password_file(self.device)}"
"""

    def is_ready(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            tail = (self.folder / "agent.log").read_text()[-600:]
            raise StoryError(f"the agent of {self.device} ended with exit code {self.process.returncode}: {tail}")
        with contextlib.suppress(EdgewardenError), Client(self.address, timeout_s=5) as client:
            return client.ready()
        return False

    def status(self) -> dict[str, Any]:
        return admin_status(self.admin_socket)

    # --- the person ---
    def exercise(self) -> None:
        """Go on asking, window after window, until `rest`: recordings in ever new orders."""
        self.stop.clear()
        self.thread = threading.Thread(target=self._ask_on, name=self.device)
        self.thread.start()

    def rest(self) -> None:
        self.stop.set()
        if self.thread is not None:
            self.thread.join()

    def _ask_on(self) -> None:
        order = 0
        with Client(self.address, timeout_s=20, retry_once=True) as client:
            while not self.stop.is_set():
                for row in order_of(self.live, order):
                    if self.stop.wait(self.hop_s / self.pace):
                        break
                    self._ask(client, self.live.windows[row])
                order += 1
            self.retried += client.retries

    def _ask(self, client: Client, window: np.ndarray) -> int:
        """The predicted class; -1 when the request failed."""
        self.time_s += self.hop_s
        self.requests += 1
        try:
            answer = client.infer(SERVICE, {"window": window[None]}, time_s=self.time_s)
        except EdgewardenError:
            self.failed += 1
            return -1
        return int(answer.outputs["probability"][0].argmax())

    def perform(self, rows: Rows, *, pace: float) -> float:
        """Play `rows` once, in recorded order; returns the accuracy of the answers."""
        right = 0
        with Client(self.address, timeout_s=20, retry_once=True) as client:
            for window, label in zip(rows.windows, rows.labels, strict=True):
                clock.sleep(self.hop_s / pace)
                right += self._ask(client, window) == label
            self.retried += client.retries
        return right / len(rows)

    def close(self) -> None:
        self.rest()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass
class Host:
    """Keys, repository, and `edgewarden-compressor serve` as a process."""

    folder: Path
    world: World
    wearers: Sequence[int]
    process: subprocess.Popen[bytes] | None = None
    database: Database | None = None

    def __post_init__(self) -> None:
        self.keys = self.folder / "keys"
        self.repository = self.folder / "repository"
        self.config = self.folder / "compressor.toml"
        self.root = self.folder / "root.json"

    def prepare(self, artifacts: Path) -> None:
        """Make every key, sign version 1, as an operator would on the command line."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._command("keys", "init", "--keys", self.keys, "--family", SERVICE)
        canary = [part for wearer in self.wearers for part in ("--canary", wearer_device(wearer))]
        self._command(
            "publish", *(artifacts / name for name in ORDER), "--keys", self.keys, "--repository", self.repository,
            "--policy", "auto", *canary, "--root", self.root,
        )  # fmt: skip

    def start(self, recipe: Path, cache: Path, new_wearers: str) -> None:
        devices = ", ".join(f'"{wearer_device(wearer)}"' for wearer in self.wearers)
        port, web_port = free_ports(2)
        self.url, self.page = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{web_port}"
        self.config.write_text(f"""# Written by scripts/quickstart.
[host]
folder = "{self.folder / "state"}"

[link]
host = "127.0.0.1"
port = {self.world.broker.port}
username = "{HOST}"
password_file = "{self.world.broker.password_file(HOST)}"

[fleet]
name = "{FLEET}"
quorum = {QUORUM}
patience_s = 120
collect_s = 60
[fleet.cohorts]
canary = [{devices}]
field = ["{DEVICE}"]

[http]
port = {port}

[web]
port = {web_port}

[repository]
folder = "{self.repository}"
keys = "{self.keys}"

[regeneration]
recipe = "{recipe}"
service = "{SERVICE}"
cohort = "canary"
device_class = "gateway"
cache = "{cache}"
settings = ["new_wearers={new_wearers}"]
soak_s = 5
""")
        self.world.acts.note("edgewarden-compressor serve")
        with (self.folder / "host.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "compressor", "serve", "--config", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def publish(self, artifact: Path) -> str:
        """Sign one more artifact with the pipeline's true key; returns the manifest digest."""
        self.world.acts.note(f"signed {artifact.name} with the pipeline's key")
        (digest,) = Repository(self.repository, KeyRing(self.keys)).publish([artifact])
        return digest

    def direct(self, device: str, *, version: int, digests: dict[str, str], repository: str) -> None:
        """Retain a desired document, signed by the true director, at the broker."""
        choice = ServiceChoice(artifacts=digests, order=[name for name in ORDER if name in digests])
        desired = Desired(
            device=device, version=version, issued_at=clock.wall_s(), services={SERVICE: choice},
            repository=repository, rollout="story",
        )  # fmt: skip
        envelope = seal(desired, KeyRing(self.keys).private("director"))
        self.world.subscriber.publish(f"ew/1/{FLEET}/{device}/desired", envelope, retain=True)

    def check(self) -> None:
        """Raises: StoryError when the host has ended."""
        if self.process is not None and self.process.poll() is not None:
            tail = (self.folder / "host.log").read_text()[-800:]
            raise StoryError(f"the host ended with exit code {self.process.returncode}: {tail}")

    def decisions(self) -> list[dict[str, Any]]:
        """Kind and reason of every decision, oldest first, from the host's database."""
        with self._books().reading() as tx:
            return [{"kind": row.kind, "reason": row.reason} for row in reversed(plans.decisions(tx, limit=1000))]

    def orders(self) -> dict[str, tuple[int, int]]:
        """Device -> desired documents and commands that the host made for it, by its own database."""
        with self._books().reading() as tx:
            return {row.id: (row.desired_version, row.command_seq) for row in devices.listed(tx)}

    def _books(self) -> Database:
        if self.database is None:
            self.database = Database(self.folder / "state")
        return self.database

    def _command(self, *arguments: object) -> None:
        """One `edgewarden-compressor` call, as an operator types it. Raises: StoryError with its last words."""
        self.world.acts.note(f"edgewarden-compressor {arguments[0]}")
        run_compressor(*arguments)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.database is not None:
            self.database.close()
            self.database = None


def run_compressor(*arguments: object) -> None:
    """Raises: StoryError with the last words of what failed."""
    done = subprocess.run(
        [sys.executable, "-m", "compressor", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise StoryError(f"edgewarden-compressor {arguments[0]} ended with {done.returncode}: {' '.join(words[-2:])}")


def free_ports(count: int) -> list[int]:
    from scripts.story.broker import free_port

    return [free_port() for _ in range(count)]


@dataclass
class Impostor:
    """Somebody with a repository and keys of their own, who signs what no device should believe."""

    folder: Path

    def publish(self, artifact: Path, device: str) -> str:
        """Sign with foreign keys and serve it at `url`; returns the manifest digest."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        ring = KeyRing.create(self.folder / "keys", [SERVICE])
        policy = FamilyPolicy(policy="auto", canary=(device,))
        repository = Repository.init(self.folder / "repository", ring, {SERVICE: policy})
        (digest,) = repository.publish([artifact])
        self._serve()
        return digest

    def _serve(self) -> None:
        place = str(self.folder / "repository")

        class Quiet(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=place)

            def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base's name
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, name="impostor", daemon=True).start()

    def close(self) -> None:
        if hasattr(self, "server"):
            self.server.shutdown()
            self.server.server_close()


def wait_for_state(
    world: World, device: str, version: int, states: Sequence[str], *, timeout_s: float
) -> dict[str, Any]:
    """The first `reported` document of `device` for desired `version` in one of `states`."""
    found: list[dict[str, Any]] = []

    def arrived() -> bool:
        found[:] = [
            document for document in world.subscriber.documents(device, "reported")
            if document.get("desired_version") == version and document.get("update_state") in states
        ]  # fmt: skip
        return bool(found)

    wait_until(arrived, f"{device} reports {' or '.join(states)} for version {version}", timeout_s=timeout_s)
    return found[0]
