"""Whole generations of a running agent under load: no client notices."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from agent.asking import ask
from agent.client import Client
from tests.artifacts import record
from tests.system.conftest import Agent, Load, wait_until

pytestmark = pytest.mark.system
GENERATIONS = 20
GROUPS = Path("/sys/fs/cgroup/memory")
HEALTH = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
INDEX = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


class RawClient:
    """One connection that is never opened again; reads answers to their end."""

    def __init__(self, agent: Agent) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(agent.serve))
        self._received = b""

    def send(self, raw: bytes) -> None:
        self.socket.sendall(raw)

    def answer(self) -> bytes:
        while b"\r\n\r\n" not in self._received:
            self._more()
        head, _, rest = self._received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert b"Connection: close" not in head
        found = re.search(rb"(?i)content-length: (\d+)", head)
        assert found is not None
        while len(rest) < int(found[1]):
            self._more()
            rest = self._received.partition(b"\r\n\r\n")[2]
        self._received = rest[int(found[1]) :]
        return rest[: int(found[1])]

    def _more(self) -> None:
        chunk = self.socket.recv(65536)
        assert chunk, "the connection was closed"
        self._received += chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class SteadyLoad:
    """Clients that ask without pause, each over the one connection it opened at first."""

    def __init__(self, agent: Agent, inputs: np.ndarray, clients: int = 3) -> None:
        self.answered, self.faults = 0, list[str]()
        self._address, self._inputs = agent.address, inputs
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        try:
            with Client(self._address) as client:  # without retry_once: a closed connection is an error
                client.live()
                opened = client._socket
                while not self._stop.is_set():
                    client.infer("wrist", {"window": self._inputs})
                    self.answered += 1
                if client._socket is not opened or client.retries:
                    self.faults.append("connected again")
        except Exception as error:  # noqa: BLE001 - reported by the test
            self.faults.append(repr(error))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def renew(agent: Agent) -> int:
    """A whole new generation that serves alone."""
    number: int = ask(agent.admin, "/generation", {})["generation"]

    def alone() -> bool:
        worker = agent.status()["worker"]
        return bool(worker["generation"] == number and worker["phase"] == "serving" and worker["leaving"] == 0)

    wait_until(alone, f"generation {number} serves alone")
    return number


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_generations_under_load_and_no_client_notices(agent: Agent) -> None:
    agent.start()
    x = record(seed=9).windows[:1]
    with SteadyLoad(agent, x) as load, contextlib.ExitStack() as opened:
        idle = [opened.enter_context(RawClient(agent)) for _ in range(5)]
        quiet, half, pipelined = (opened.enter_context(RawClient(agent)) for _ in range(3))
        for client in (*idle, quiet):
            client.send(HEALTH)
            client.answer()
        for number in range(GENERATIONS):
            cut = 1 + number * 4 % (len(INDEX) - 1)
            half.send(INDEX[:cut])
            pipelined.send(HEALTH * 40 + INDEX[:cut])
            renew(agent)
            half.send(INDEX[cut:])
            assert b"wrist" in half.answer()
            for _ in range(40):
                pipelined.answer()
            pipelined.send(INDEX[cut:])
            assert b"wrist" in pipelined.answer()
            for client in idle:
                client.send(HEALTH)
                client.answer()
        quiet.send(HEALTH)
        quiet.answer()
        answered = load.answered
        wait_until(lambda: load.answered > answered + 20, "the load goes on")
    assert load.faults == []
    status = agent.status()["worker"]
    assert status["started"] == GENERATIONS + 1
    assert status["lost"] == 0
    assert status["connections_moved"] >= GENERATIONS * 11


@pytest.mark.parametrize("handover", ["beside", "lean"])
def test_reload_serves_from_a_new_worker_and_connections_stay(agent: Agent, handover: str) -> None:
    agent.config.write_text(agent.config.read_text().replace("[serving]\n", f'[serving]\nhandover = "{handover}"\n'))
    agent.start()
    before = agent.status()["worker"]
    with SteadyLoad(agent, record(seed=9).windows[:1]) as load, RawClient(agent) as idle:
        idle.send(HEALTH)
        idle.answer()
        told = agent.command("reload")
        assert told.returncode == 0, told.stderr
        assert "worker 2 serves" in told.stdout
        idle.send(HEALTH)
        idle.answer()
    assert load.faults == []
    after = agent.status()["worker"]
    assert after["generation"] == 2
    assert after["pid"] != before["pid"]
    assert after["lean"] == (handover == "lean")


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group that really limits memory; skips where none can be made."""
    group = GROUPS / f"ew-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError:
        pytest.skip("no memory group can be made here")
    try:
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()


def test_under_a_real_memory_limit_the_old_worker_goes_first_and_nobody_is_refused(agent: Agent) -> None:
    with memory_group(1 << 30) as group:
        try:
            agent.start()
            for pid in (agent.status()["agent"]["pid"], agent.status()["worker"]["pid"]):
                (group / "cgroup.procs").write_text(str(pid))
            renew(agent)
            assert agent.status()["worker"]["lean"] == 0  # there is room for two
            used = int((group / "memory.usage_in_bytes").read_text())
            (group / "memory.limit_in_bytes").write_text(str(used + (48 << 20)))  # ...and now there is not
            with SteadyLoad(agent, record(seed=9).windows[:1]) as load:
                for _ in range(3):
                    renew(agent)
            assert load.faults == []
            assert agent.status()["worker"]["lean"] == 3
            assert agent.status()["worker"]["lost"] == 0
            killed = (group / "memory.oom_control").read_text().split()
            assert killed[killed.index("oom_kill") + 1] == "0"
        finally:
            agent.stop()


def test_a_killed_worker_is_replaced_and_who_connects_meanwhile_is_served(agent: Agent) -> None:
    agent.start()
    x = record(seed=9).windows[:1]
    with Load(agent.address, x) as load:
        for _ in range(2):
            wait_until(lambda: load.answered > 50, "the load runs")
            worker = agent.status()["worker"]
            os.kill(worker["pid"], 9)
            with RawClient(agent) as waiting:  # nobody accepts yet
                waiting.send(HEALTH)
                waiting.answer()
            wait_until(lambda old=worker["pid"]: agent.status()["worker"]["pid"] not in (0, old), "another worker")
            load.answered = 0
    assert load.failed == []


def test_the_agent_dying_in_the_middle_of_a_hand_over_costs_a_client_one_retry(agent: Agent) -> None:
    agent.start()
    x = record(seed=9).windows[:1]
    with Client(agent.address, retry_once=True) as client:
        client.infer("wrist", {"window": x})
        process = agent.process
        assert process is not None
        number = ask(agent.admin, "/generation", {})["generation"]
        wait_until(lambda: agent.status()["worker"]["generation"] == number, "the new one takes over")
        process.kill()
        process.wait()
        agent.start()
        client.infer("wrist", {"window": x})
        assert client.retries <= 1
