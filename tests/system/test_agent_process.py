"""One agent with its worker: who loads what, what survives, how it ends."""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.client import Client
from agent.contract.errors import InvalidRequest, UnknownModel
from tests.artifacts import gyro_off, gyro_turned, record
from tests.system.conftest import Agent, Load, wait_until

pytestmark = pytest.mark.system


def modules_of(agent: Agent, pid: int) -> set[str]:
    """Shared libraries and extension modules mapped by a process, by file name."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if "/" in line}


def answering(agent: Agent) -> str:
    with Client(agent.address) as client:
        return client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by


def test_the_agent_process_never_loads_the_runtime_and_the_worker_no_broker_or_database(agent: Agent) -> None:
    agent.start("-X", "importtime")
    status = agent.status()
    with Client(agent.address) as client:
        client.infer("wrist", {"window": record(seed=9).windows[:1]})
    log = agent.log.read_text()
    imported = {line.rsplit("|", 1)[-1].strip() for line in log.splitlines() if line.startswith("import time:")}
    assert {"agent.daemon", "paho.mqtt.client", "pydantic"} <= imported
    assert not imported & {"onnxruntime", "torch", "tuf"}
    ours, workers = modules_of(agent, status["agent"]["pid"]), modules_of(agent, status["worker"]["pid"])
    assert not any("onnxruntime" in name for name in ours)
    assert any("onnxruntime" in name for name in workers)
    assert not any("pydantic" in name or "_sqlite3" in name or "psutil" in name for name in workers)
    assert any("_sqlite3" in name for name in ours)


def test_a_sensor_that_sends_no_numbers_is_refused_only_until_an_engine_serves_that_does_not_read_it(
    agent: Agent,
) -> None:
    agent.start()
    windows = record(seed=9).windows.copy()
    windows[:, :, 3:] = np.nan
    broken = itertools.cycle(windows)
    with Client(agent.address) as client:
        with pytest.raises(InvalidRequest, match="NaN or infinity in channel gx, gy, gz"):
            client.infer("wrist", {"window": next(broken)[None]})

        def answered() -> bool:
            try:
                return client.infer("wrist", {"window": next(broken)[None]}).served_by == "wrist-accel"
            except InvalidRequest:
                return False

        wait_until(answered, "the fallback answers")
        answer = client.infer("wrist", {"window": next(broken)[None]})
    assert answer.guard == "not_finite:gx,gy,gz"
    assert agent.service()["why"] == "fault"


def test_a_broken_sensor_is_named_and_the_better_fallback_answers(agent: Agent) -> None:
    agent.start()
    data = record(seed=9)
    with Client(agent.address) as client:
        for window in data.windows[:20]:
            assert client.infer("wrist", {"window": window[None]}).served_by == "wrist"
        broken = itertools.cycle(gyro_off(data.windows[20:]))

        def switched() -> bool:
            return client.infer("wrist", {"window": next(broken)[None]}).served_by == "wrist-accel"

        wait_until(switched, "the fallback answers")
        answer = client.infer("wrist", {"window": next(broken)[None]})
    assert answer.guard == "dead:gx,gy,gz"
    assert answer.reason.startswith("switched: ")
    status = agent.status()
    counted = [status["services"][0]["drift"]["rows"], status["services"][0]["latency"]["wrist"]["count"]]
    wait_until(lambda: agent.status()["worker"]["statistics"], "it answers pings")
    counted.append(agent.status()["worker"]["statistics"]["requests"])
    assert [type(number) for number in counted] == [int, int, int]
    service = agent.service()
    assert (service["serving"], service["why"]) == ("wrist-accel", "fault")
    assert service["guards"] == {"dead": ["gx", "gy", "gz"]}
    assert service["alarms"][0]["channels"][0] in ("gx", "gy", "gz")
    screen = agent.command("status").stdout
    assert "wrist-accel" in screen
    assert "gx, gy, gz dead" in screen
    assert "estimate" in screen or "measured" in screen


def test_a_drift_that_a_quiet_witness_contradicts_switches_and_the_model_returns_when_it_ends(agent: Agent) -> None:
    agent.write('[clock]\nsource = "data"\n[fallback]\ndwell_s = 10.0\nprobation_s = 5.0\n')
    agent.start()
    clean = record(seed=9).windows[::4]  # six windows of each recording: many stays in one class
    turned = gyro_turned(clean)
    time_s = 1e6
    with Client(agent.address) as client:

        def play(windows: np.ndarray, until: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
            nonlocal time_s
            for window in itertools.islice(itertools.cycle(windows), 400):
                time_s += 64 / 50
                client.infer("wrist", {"window": window[None]}, time_s=time_s)
                wait_until(lambda: agent.status()["ring"]["behind"] == 0, "the agent keeps up with the data")
                service = agent.service()
                if until(service):
                    return service
            pytest.fail(f"never {what}: {agent.service()}")

        play(clean, lambda service: service["drift"]["rows"] >= 42, "known")
        service = play(turned, lambda service: service["phase"] == "fallback", "switched")
        assert (service["serving"], service["why"]) == ("wrist-accel", "harm")
        assert {alarm["kind"] for alarm in service["alarms"]} == {"drift", "harm"}
        assert "disagrees on" in service["reason"]
        assert "the drift does harm" in agent.command("status").stdout
        requests = service["counters"]["requests"]
        assert requests == service["drift"]["rows"]  # what witnesses say is no request
        assert service["counters"]["rows_witnessed"] >= 8
        assert play(clean, lambda service: service["phase"] == "probation", "on probation")["serving"] == "wrist"
        service = play(clean, lambda service: service["phase"] == "preferred", "back")
        assert (service["serving"], service["alarms"]) == ("wrist", [])


def test_the_preferred_engine_returns_after_dwell_and_probation_in_the_time_of_the_data(agent: Agent) -> None:
    agent.write('[clock]\nsource = "data"\n')  # dwell 120 s and probation 60 s of data
    agent.start()
    data = record(seed=9)
    time_s, served = 1e6, []
    with Client(agent.address) as client:

        def play(windows: np.ndarray, until: str, limit: int = 400) -> None:
            nonlocal time_s
            for number in range(limit):
                time_s += 64 / 50
                answer = client.infer("wrist", {"window": windows[number % len(windows)][None]}, time_s=time_s)
                served.append(answer.served_by)
                wait_until(lambda: agent.status()["ring"]["behind"] == 0, "the agent keeps up with the data")
                if agent.service()["phase"] == until:
                    return
            pytest.fail(f"never {until}: {agent.service()}")

        play(gyro_off(data.windows), "fallback")
        away_s = agent.service()["since_s"]
        play(data.windows, "probation")
        back_s = agent.service()["since_s"]
        assert back_s - away_s >= 120
        play(data.windows, "preferred")
        assert agent.service()["since_s"] - back_s >= 60
        play(data.windows, "preferred")
    assert served[-1] == "wrist"
    assert "wrist-accel" in served


def connected(path: Path) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    return connection


def test_metrics_and_inference_from_files_work_on_a_running_agent(agent: Agent) -> None:
    agent.start()
    np.save(agent.folder / "windows.npy", record(seed=9).windows[:5])
    done = agent.command("infer", str(agent.folder / "windows.npy"), "--json")
    assert [json.loads(line)["served_by"] for line in done.stdout.splitlines()] == ["wrist"] * 5, done.stderr
    wait_until(lambda: agent.service()["requests"] == 1, "the observation is read")
    with contextlib.closing(connected(agent.admin)) as connection:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    assert 'edgewarden_requests_total{service="wrist",outcome="ok"} 1' in page
    assert 'edgewarden_serving{service="wrist",engine="wrist"} 1' in page


def test_a_failing_engine_hands_the_same_request_to_the_next(agent: Agent) -> None:
    agent.write(active="wrist-faulty", fallbacks=("wrist", "wrist-accel"))
    agent.start()
    with Client(agent.address) as client:
        answers = [client.infer("wrist", {"window": window[None]}) for window in record(seed=9).windows[:30]]
    assert {answer.served_by for answer in answers} == {"wrist"}
    wait_until(lambda: agent.service()["serving"] == "wrist", "the faulty engine is left")
    assert "wrist-faulty" in agent.service()["benched"], agent.log.read_text()


def test_killing_the_worker_under_load_loses_no_request_after_one_retry(agent: Agent) -> None:
    agent.start()
    with Load(agent.address, record(seed=9).windows[:1]) as load:
        for _ in range(2):
            before = load.answered
            wait_until(lambda before=before: load.answered > before + 50, "requests flow")
            status = agent.status()["worker"]
            os.kill(status["pid"], signal.SIGKILL)
            wait_until(
                lambda old=status["pid"]: agent.status()["worker"]["pid"] not in (0, old), "another worker serves"
            )
        before = load.answered
        wait_until(lambda: load.answered > before + 50, "requests flow again")
    assert load.failed == []
    assert agent.status()["worker"]["lost"] == 2
    assert agent.stop() == 0


def test_a_hung_worker_is_replaced(agent: Agent) -> None:
    agent.write("[worker]\nping_interval_s = 0.1\n")
    agent.start()
    pid = agent.status()["worker"]["pid"]
    wait_until(lambda: agent.status()["worker"]["statistics"], "it answers pings")
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: agent.status()["worker"]["pid"] not in (0, pid), "another worker serves")
    wait_until(lambda: any("hung" in event["text"] for event in agent.status()["events"]), "the reason is told")


def test_the_worker_ends_with_its_agent_and_the_next_agent_remembers(agent: Agent) -> None:
    agent.start()
    assert agent.command("pin", "wrist", "wrist-accel").returncode == 0
    worker = agent.status()["worker"]["pid"]
    assert agent.process is not None
    agent.process.kill()
    agent.process.wait()
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), "the orphaned worker ends")
    agent.start()  # its sockets were left behind and are taken over
    assert agent.service()["serving"] == "wrist-accel"
    assert agent.service()["pin"] == "wrist-accel"
    wait_until(lambda: answering(agent) == "wrist-accel", "the worker is told")
    assert agent.command("unpin", "wrist").returncode == 0
    assert agent.service()["serving"] == "wrist"


def test_a_graceful_stop_answers_what_was_asked_and_leaves_no_socket(agent: Agent) -> None:
    agent.start()
    windows = np.repeat(record(seed=9).windows, 4, axis=0)
    tensor = {"name": "window", "datatype": "FP32", "shape": windows.shape}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": windows.nbytes}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(connected(agent.serve))) for _ in range(4)]
        for client in clients:  # accepted: who still waits in the queue when it ends has not been heard
            client.request("GET", "/v2/health/live")
            assert client.getresponse().read() is not None
        for client in clients:  # returns when all of it is sent
            client.request("POST", "/v2/models/wrist/infer", head + windows.tobytes(), headers)
        assert agent.stop() == 0
        answers = [client.getresponse() for client in clients]
        assert [answer.status for answer in answers] == [200] * len(clients)
        for answer in answers:
            (output,) = json.loads(answer.read())["outputs"]
            assert output["shape"][0] == len(windows)
    assert not agent.serve.exists()
    assert not agent.admin.exists()


def test_sockets_of_the_service_manager_are_served(agent: Agent) -> None:
    with socket.socket(socket.AF_UNIX) as passed:
        path = agent.folder / "passed.sock"
        passed.bind(str(path))
        passed.listen()
        launcher = (
            f"import os, sys; os.dup2({passed.fileno()}, 3)\n"
            "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}\n"
            f"os.execv(sys.executable, [sys.executable, '-m', 'agent', 'run', '--config', {str(agent.config)!r}])"
        )
        with agent.log.open("ab") as log:
            agent.process = subprocess.Popen(
                [sys.executable, "-c", launcher], pass_fds=[passed.fileno()], stdout=log, stderr=log
            )
        wait_until(agent._serves, "the agent serves")
        with Client(f"unix:{path}") as client:
            assert client.ready()
            with pytest.raises(UnknownModel):
                client.infer("other", {"window": record(seed=9).windows[:1]})
        assert not agent.serve.exists()
        agent.stop()
        assert path.exists()  # not ours to remove
