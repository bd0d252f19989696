"""Composition root of `edgewarden-compressor serve`: builds, starts and stops the host; decides nothing.

One process. Threads: `broker` and paho's (receive), `ingest` (commits), `steward` (decides and acts, once a second or
when something arrived); the main thread runs both HTTP servers. SIGTERM and SIGINT end it in order: no new
requests, pipeline ended, last commit, goodbye to the broker. A killed host resumes where the database says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from agent import clock
from agent.contract.errors import ConfigError, EdgewardenError
from compressor.config import HostConfig
from compressor.files import storage_error
from compressor.fleet.broker import BrokerAddress, make_tls, read_password
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Database, devices, plans
from compressor.fleet.http import Doors, make_app, sweep
from compressor.fleet.inbox import Roster
from compressor.fleet.ingest import Ingest
from compressor.fleet.known import Known
from compressor.fleet.means import Director, Means, Publisher, Trainer
from compressor.fleet.pipelines import SubprocessTrainer
from compressor.fleet.situation import HELD
from compressor.fleet.steward import Steward
from compressor.fleet.tokens import new_token

STEP_S = 1.0  # at least so often the steward looks
REST_S = 0.1  # and never more often than that
TIDY_S = 300.0
STOP_S = 3  # open connections get so long to end
MAX_CONNECTIONS = 256
LEAST_TOKEN = 16  # characters

Say = Callable[[str, str, str], None]


class Changes:
    """Counts what changed, so that open pages know when to look again. Any thread."""

    def __init__(self) -> None:
        self.count = 0
        self.wake = threading.Event()
        self._lock = threading.Lock()

    def note(self) -> None:
        """There is something to look at, and perhaps something to do."""
        self.seen()
        self.wake.set()

    def seen(self) -> None:
        """There is something to look at."""
        with self._lock:  # two at once are two: a page that has seen one of them looks again
            self.count += 1


class Service:
    """One host. `trainer`, `publisher`, `director`: None = made from the configuration."""

    def __init__(
        self,
        config: HostConfig,
        *,
        say: Say,
        trainer: Trainer | None = None,
        publisher: Publisher | None = None,
        director: Director | None = None,
    ) -> None:
        """Take the state folder and the ports.

        Raises:
            ConfigError: a key, password or port cannot be used.
            StateLocked: another host serves from this folder.
            StateUnreadable, DiskFull
        """
        self.config, self._say = config, say
        self.changes = Changes()
        self._counters: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        repository = Path(config.repository.folder) if config.repository.folder else None
        if publisher is None and director is None and repository is not None:
            publisher, director = open_repository(config)
        self._trainer = trainer or make_trainer(config)
        address = make_address(config)
        self.database = Database(config.host.folder, serving=True)
        sweep(config.host.folder / "samples")
        try:
            self._sockets = listen(config)
            self.token = read_token(config)
        except EdgewardenError:
            self.database.close()
            raise
        self.catalogue = Catalogue(repository)
        self.catalogue.refresh()
        self.ingest = Ingest(
            address, self.database, self._roster(), on_change=self.changes.note, say=say, clock=clock.wall_s
        )
        self.steward = Steward(config, self.database, self.catalogue, Means(
            trainer=self._trainer, publisher=publisher, director=director, wire=self.ingest.broker,
            topics=self.ingest.topics, public_url=self.public_url, say=say,
        ))  # fmt: skip
        self._thread = threading.Thread(target=self._run_steward, name="steward", daemon=True)

    # --- addresses ----------------------------------------------------------------------------------------------
    def public_url(self) -> str:
        """How devices reach this host."""
        if self.config.http.public_url:
            return self.config.http.public_url.rstrip("/")
        scheme = "https" if self.config.http.tls_cert else "http"
        host = self.config.http.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._sockets['http'].getsockname()[1]}"

    def page_url(self) -> str:
        """Where a person finds the page; "" = there is none."""
        return f"http://127.0.0.1:{self._sockets['web'].getsockname()[1]}/" if "web" in self._sockets else ""

    def statistics(self) -> dict[str, Any]:
        names = ("steps", "step_failures")
        return {
            "ingest": self.ingest.statistics(), "database": self.database.statistics(),
            "steward": {name: self._counters[name] for name in names},
        }  # fmt: skip

    # --- life ---------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`."""
        try:
            asyncio.run(self._serve())
        finally:
            self._end()

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._stopping.set()
        self.changes.wake.set()

    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def wait_ready(self, timeout_s: float) -> bool:
        """Both servers accept."""
        return self._ready.wait(timeout_s)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # not on the main thread: `stop`
                loop.add_signal_handler(number, self.stop)
        servers = self._servers()
        tasks = [asyncio.create_task(server.serve(sockets=[bound])) for server, bound in servers]
        while not all(server.started for server, _ in servers):  # noqa: ASYNC110 - uvicorn offers a flag only
            await asyncio.sleep(0.01)
        self.ingest.start()
        self._thread.start()
        self._ready.set()
        self._say("notice", "host.ready", f"devices: {self.public_url()}  page: {self.page_url() or 'off'}")
        await asyncio.to_thread(self._stopping.wait)
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*tasks)

    def _servers(self) -> list[tuple[_Server, socket.socket]]:
        from compressor.web.app import make_app as make_page

        http = self.config.http
        doors = Doors(
            database=self.database,
            repository=Path(self.config.repository.folder) if self.config.repository.folder else None,
            uploads=self.config.host.folder / "samples", fleet=self.config.fleet.name, public_url=self.public_url,
            max_samples_bytes=http.max_samples_bytes, shape_of=self.catalogue.shape, on_change=self._enrolled,
            clock=clock.wall_s,
        )  # fmt: skip
        found = [(_Server(_settings(make_app(doors), http.tls_cert, http.tls_key)), self._sockets["http"])]
        if "web" in self._sockets:
            found.append((_Server(_settings(make_page(self), "", "")), self._sockets["web"]))
        return found

    def _end(self) -> None:
        self._stopping.set()
        self.changes.wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._trainer is not None:
            self._trainer.stop()
        self.ingest.stop()
        for bound in self._sockets.values():
            bound.close()
        self.database.close()
        self._say("notice", "host.stopped", "stopped")

    # --- who may speak ------------------------------------------------------------------------------------------
    def _roster(self) -> Roster:
        fleet = self.config.fleet
        self._known = Known(self._members)
        return Roster(
            fleet=fleet.name, prefix=self.config.link.prefix, known=self._known.__contains__,
            quota=fleet.max_messages_per_day,
        )  # fmt: skip

    def _members(self) -> set[str]:
        """Devices enrolled by token, and those that the configuration puts into a cohort."""
        with self.database.reading() as tx:
            enrolled = devices.known(tx)
        return enrolled | {device for members in self.config.fleet.cohorts.values() for device in members}

    def _enrolled(self) -> None:
        """Somebody new is here, or a recording of a device."""
        self._known.refresh()
        self.changes.note()

    # --- the steward's thread -----------------------------------------------------------------------------------
    def _run_steward(self) -> None:
        tidied_s, refreshed = clock.monotonic_s() - TIDY_S, False
        while not self._stopping.is_set():
            self.changes.wake.wait(STEP_S)
            self.changes.wake.clear()
            try:
                if not refreshed:
                    self.steward.start(now_s=clock.wall_s())
                    refreshed = True
                if self.steward.step(self.ingest.replies(), now_s=clock.wall_s()):
                    self.changes.seen()
                if clock.monotonic_s() - tidied_s >= min(TIDY_S, self.config.repository.refresh_s):
                    tidied_s = clock.monotonic_s()
                    self.steward.tidy(now_s=clock.wall_s())
                    self._known.refresh()
                self._counters["steps"] += 1
            except EdgewardenError as error:
                self._failed_step(error.sentence())
            except Exception as error:  # noqa: BLE001 - the process loop: a bug in one step must not end ingest
                self._failed_step(f"{type(error).__name__}: {error}")
            self._stopping.wait(REST_S)

    def _failed_step(self, text: str) -> None:
        self._counters["step_failures"] += 1
        self._say("error", "steward.step", text)
        self._stopping.wait(STEP_S)

    # --- what an operator may do --------------------------------------------------------------------------------
    def hold(self, *, held: bool) -> None:
        """Stop or allow automatic regeneration. Raises: StorageError."""
        with self.database.writing() as tx:
            plans.put_setting(tx, HELD, held)
        self.changes.note()

    def halt(self, rollout: int) -> bool:
        """Ask for a rollout to be halted; False when there is none. Raises: StorageError."""
        with self.database.writing() as tx:
            found = plans.change_rollout(tx, rollout, halt_asked=True)
        self.changes.note()
        return found


class _Server(uvicorn.Server):
    """Leaves the signals to us: two servers share one loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _settings(app: Starlette, certificate: str, key: str) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", server_header=False, date_header=True,
        timeout_keep_alive=30, timeout_graceful_shutdown=STOP_S, limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=16 * 1024, ws="none", http="h11", loop="asyncio",
        ssl_certfile=certificate or None, ssl_keyfile=key or None,
    )  # fmt: skip


# --- made from the configuration ---------------------------------------------------------------------------------
def open_repository(config: HostConfig) -> tuple[Publisher, Director]:
    """The signed repository and its director. Raises: ConfigError."""
    from compressor.fleet.approval import SignedRepository
    from compressor.fleet.director import KeyDirector
    from compressor.keys import KeyRing

    ring = KeyRing(Path(config.repository.keys))
    return SignedRepository(Path(config.repository.folder), ring), KeyDirector(ring)


def make_trainer(config: HostConfig) -> Trainer | None:
    regeneration = config.regeneration
    if not regeneration.recipe:
        return None
    return SubprocessTrainer(
        Path(regeneration.recipe), regeneration.cache, device_class=regeneration.device_class,
        settings=regeneration.settings, timeout_s=regeneration.timeout_s, mark=config.host.folder / "pipeline.pid",
    )  # fmt: skip


def make_address(config: HostConfig) -> BrokerAddress:
    """Raises: ConfigError."""
    link = config.link
    return BrokerAddress(
        host=link.host, port=link.port, client_id=f"edgewarden-host-{config.fleet.name}", username=link.username,
        password=read_password(link.password_file), tls=make_tls(link.tls_ca, link.tls_cert, link.tls_key),
        keepalive_s=link.keepalive_s, session_s=link.session_s,
    )  # fmt: skip


def listen(config: HostConfig) -> dict[str, socket.socket]:
    """The listening sockets, by name. Raises: ConfigError."""
    found: dict[str, socket.socket] = {}
    wanted = [("http", config.http.host, config.http.port)]
    if config.web.enabled:
        wanted.append(("web", config.web.host, config.web.port))
    for name, host, port in wanted:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            found[name] = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            for bound in found.values():
                bound.close()
            raise ConfigError(
                f"cannot listen on {host}:{port} for [{name}]: {error.strerror or error}",
                hint=f"Set another {name}.port; 0 takes any free one.",
            ) from None
    return found


def read_token(config: HostConfig) -> str:
    """The operator's token for the page; made at the first start. Raises: ConfigError, StorageError."""
    path = Path(config.web.token_file) if config.web.token_file else config.host.folder / "web.token"
    try:
        token = path.read_text(encoding="utf-8").strip() if path.exists() else _make_token(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token {path}: {error}") from None
    if len(token) < LEAST_TOKEN:
        raise ConfigError(
            f"the token in {path} has {len(token)} characters, at least {LEAST_TOKEN} are needed",
            hint="Remove the file: the host makes a new token at its next start.",
        )
    return token


def _make_token(path: Path) -> str:
    """A new token in a file that nobody else can read at any moment. Raises: StorageError."""
    token, fresh = new_token(), path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise storage_error(error, path) from error
    return token
