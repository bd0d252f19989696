"""What goes wrong on real devices: each a clear sentence, a documented exit code, nothing lost, no traceback."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
from pathlib import Path

import pytest

from agent.client import Client
from agent.store import Store
from tests.artifacts import gyro_off, record
from tests.system.conftest import Agent, Load, wait_until

pytestmark = pytest.mark.system


def refused(agent: Agent) -> tuple[int, str]:
    """Exit code and words of an agent that should not start."""
    agent.spawn()
    code = agent.wait()
    text = agent.log.read_text()
    assert "Traceback" not in text
    return code, text


def test_a_second_agent_on_the_state_folder_is_told_who_runs_there(agent: Agent, short: Path) -> None:
    agent.start()
    second = Agent(short / "second", agent.artifacts) if (short / "second").mkdir() is None else agent
    second.state = agent.state
    second.write()
    code, text = refused(second)
    assert code == 7
    assert f"process {agent.status()['agent']['pid']}" in text
    assert agent.status()["worker"]["phase"] == "serving"


def test_a_port_in_use_is_said_so_and_leaves_nothing_behind(agent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        agent.config.write_text(
            agent.config.read_text().replace("[serving]", f'[serving]\ntcp = "127.0.0.1:{taken.getsockname()[1]}"')
        )
        code, text = refused(agent)
    assert code == 2
    assert "port is in use" in text
    assert not agent.serve.exists()
    agent.start()  # the lock was given back
    assert agent.stop() == 0


def test_a_socket_another_agent_answers_on_is_not_stolen(agent: Agent, short: Path) -> None:
    agent.start()
    (short / "second").mkdir()
    second = Agent(short / "second", agent.artifacts)
    second.serve = agent.serve
    second.write()
    code, text = refused(second)
    assert code == 2
    assert "another process already listens" in text
    with Client(agent.address) as client:
        assert client.ready()


def test_a_typo_in_the_configuration_names_the_nearest_key(agent: Agent) -> None:
    agent.write("[fallback]\ndwel_s = 3\n")
    code, text = refused(agent)
    assert code == 2
    assert "unknown key 'fallback.dwel_s'" in text
    assert "did you mean 'dwell_s'" in text
    assert agent.command("check-config").returncode == 2


def damaged(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    raw = bytearray((target / "model.onnx").read_bytes())
    raw[len(raw) // 2] ^= 1
    (target / "model.onnx").write_bytes(raw)
    return target


def test_a_corrupt_model_without_an_alternative_is_refused(agent: Agent, short: Path) -> None:
    agent.artifacts = {**agent.artifacts, "wrist": damaged(agent.artifacts["wrist"], short / "damaged")}
    agent.write(fallbacks=())
    code, text = refused(agent)
    assert code == 4
    assert "does not match the digest in its manifest" in text
    doctor = agent.command("doctor")
    assert doctor.returncode == 4
    assert "digest" in doctor.stdout


def test_a_corrupt_model_with_an_alternative_is_left_out_and_told(agent: Agent, short: Path) -> None:
    agent.artifacts = {**agent.artifacts, "wrist": damaged(agent.artifacts["wrist"], short / "damaged")}
    agent.write()
    agent.start()
    with Client(agent.address) as client:
        assert client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by == "wrist-accel"
    assert any("digest" in problem for problem in agent.service()["problems"])
    assert any("digest" in event["text"] for event in agent.status()["events"])


def test_a_damaged_state_is_set_aside_and_serving_goes_on(agent: Agent) -> None:
    agent.state.mkdir()
    (agent.state / "agent.db").write_bytes(os.urandom(20_000))
    agent.start()
    with Client(agent.address) as client:
        assert client.ready("wrist")
    assert (agent.state / "agent.damaged").exists()
    assert any("set aside" in event["text"] for event in agent.status()["events"])


@pytest.mark.parametrize(
    "body",
    ['{"guards": {"channels": ["ax", "ay", "az", "gx", "gy", "gz"]}, "regimes": {"reference": 3}}', "[1]", "{"],
)
def test_a_memory_of_another_version_is_no_reason_not_to_serve(agent: Agent, body: str) -> None:
    store = Store(agent.state, outbox_bytes=1 << 20)
    for name in ("monitor:wrist", "supervisor"):
        store.put_value(name, {"version": 1})
    store.close()
    with sqlite3.connect(agent.state / "agent.db") as database:
        database.execute("UPDATE value SET body = ?", (body,))
    database.close()
    agent.start()
    assert "Traceback" not in agent.log.read_text()
    with Client(agent.address) as client:
        assert client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by == "wrist"


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as ballast:
        while True:
            ballast.write(b"x" * 4096)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_stops_neither_serving_nor_alarms(agent: Agent) -> None:
    agent.state.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(agent.state)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        agent.start()
        with pytest.raises(OSError, match="No space"):
            fill(agent.state / "ballast")
        with Client(agent.address) as client:

            def answering() -> str:
                return client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by

            assert agent.command("pin", "wrist", "wrist-accel").returncode == 0
            wait_until(lambda: answering() == "wrist-accel", "the worker is told")
            agent.command("unpin", "wrist")
            agent.command("pin", "wrist", "wrist-floor")
            wait_until(lambda: answering() == "wrist-floor", "the worker is told again")
        (agent.state / "ballast").unlink()
        agent.command("unpin", "wrist")
        wait_until(lambda: agent.service()["serving"] == "wrist", "the pin is released")
        assert agent.status()["faults"] == 0
        assert agent.stop() == 0
        agent.start()
        assert agent.service()["serving"] == "wrist"
        assert agent.stop() == 0
    finally:
        agent.stop()
        subprocess.run(["umount", str(agent.state)], capture_output=True)


def test_status_without_an_agent_says_how_to_start_one(agent: Agent) -> None:
    for command in (["status"], ["pin", "wrist", "wrist"], ["status", "--json"]):
        done = agent.command(*command)
        assert done.returncode == 9
        assert "edgewarden-agent run" in done.stderr
        assert "Traceback" not in done.stderr


def test_clients_that_send_batches_without_pause_leave_the_agent_time_for_everything_else(agent: Agent) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(agent.folder / "notify.sock"))
        agent.spawn(environment={"NOTIFY_SOCKET": str(agent.folder / "notify.sock")})
        wait_until(lambda: agent.admin.exists() and agent._serves(), "the agent serves")
        with Load(agent.address, gyro_off(record(seed=9).windows[:64])) as load:
            wait_until(lambda: load.answered >= 50, "the clients are at work")
            with contextlib.suppress(BlockingIOError):
                while manager.recv(4096, socket.MSG_DONTWAIT):
                    pass  # signs of life from before
            manager.settimeout(60)
            signs = 0
            while signs < 5:
                signs += b"WATCHDOG=1" in manager.recv(4096)
            assert agent.status()["worker"]["generation"] == 1
    assert not load.failed
    wait_until(lambda: agent.status()["ring"]["behind"] == 0, "all is read")
    assert agent.service()["guards"]
