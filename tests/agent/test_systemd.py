import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent.systemd import Notifier, read_environment


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_hears_readiness_status_and_signs_of_life(tmp_path: Path, *, abstract: bool) -> None:
    address = f"@edgewarden-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if abstract else address)
        manager.settimeout(60)
        notifier = Notifier({"NOTIFY_SOCKET": address})
        notifier.ready("serving\nwrist")
        notifier.alive()
        notifier.starting(2.5)
        notifier.stopping()
        notifier.close()
        heard = [manager.recv(4096).decode() for _ in range(4)]
    assert heard == ["READY=1\nSTATUS=serving wrist", "WATCHDOG=1", "EXTEND_TIMEOUT_USEC=2500000", "STOPPING=1"]


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "relative"])
def test_without_a_manager_telling_is_silent(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("x")
    notifier.alive()
    notifier.close()


def test_passed_sockets_arrive_with_their_names() -> None:
    program = (
        "import os; from agent.systemd import read_environment\n"
        "environment = {**os.environ, 'LISTEN_PID': str(os.getpid())}\n"
        "manager = read_environment(environment, process_id=os.getpid())\n"
        "print([(name, s.getsockname()[1] > 0, os.get_inheritable(s.fileno())) for name, s in manager.sockets])\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = listener.fileno()

        def place() -> None:
            os.dup2(descriptor, 3, inheritable=True)

        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "serve"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment, preexec_fn=place, pass_fds=[3], capture_output=True, text=True,
        )  # fmt: skip
    assert done.stdout.strip() == "[('serve', True, False)]", done.stderr


def test_what_is_meant_for_another_process_is_left_alone() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}
    manager = read_environment(environment, process_id=os.getpid())
    assert manager.sockets == ()
    assert manager.watchdog_s == 0.0


def test_watchdog_and_credentials_are_found(tmp_path: Path) -> None:
    (tmp_path / "mqtt-password").write_text("secret\n")
    environment = {"WATCHDOG_USEC": "10000000", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    manager = read_environment(environment, process_id=7)
    assert manager.watchdog_s == 10.0
    assert manager.credential("mqtt-password") == "secret"
    assert manager.credential("other") is None
    assert read_environment({}, process_id=7).credential("mqtt-password") is None
