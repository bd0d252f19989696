import os
import socket
import stat
from pathlib import Path

import pytest

from agent.contract.errors import ConfigError
from agent.sockets import address_of, client_of, is_answered, listen_tcp, listen_unix


def test_a_unix_socket_has_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.sock"
    with listen_unix(path, mode=0o660):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert is_answered(path)


def test_a_file_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    listen_unix(path, mode=0o600).close()
    assert path.exists()
    assert not is_answered(path)
    listen_unix(path, mode=0o600).close()


def test_a_living_process_keeps_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with listen_unix(path, mode=0o600) as living:
        with pytest.raises(ConfigError, match="another process already listens"):
            listen_unix(path, mode=0o600)
        assert is_answered(path)
        assert living.fileno() >= 0


@pytest.mark.parametrize("kind", ["file", "long", "parent"])
def test_a_path_that_cannot_be_a_socket_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("data")
    path = {"file": tmp_path / "file", "long": tmp_path / ("x" * 120), "parent": tmp_path / "file" / "a.sock"}[kind]
    with pytest.raises(ConfigError):
        listen_unix(path, mode=0o600)
    assert (tmp_path / "file").read_text() == "data"


def test_an_address_is_told_as_clients_take_it(tmp_path: Path) -> None:
    with listen_unix(tmp_path / "a.sock", mode=0o600) as local, listen_tcp("127.0.0.1:0") as loopback:
        assert address_of(local) == f"unix:{tmp_path / 'a.sock'}"
        assert address_of(loopback) == f"127.0.0.1:{loopback.getsockname()[1]}"


def test_a_port_in_use_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is in use") as caught:
            listen_tcp(f"127.0.0.1:{port}")
    assert caught.value.exit_code == 2
    with listen_tcp(f"127.0.0.1:{port}") as free:
        assert free.getsockname()[1] == port


@pytest.mark.parametrize("address", ["192.0.2.1:80", "127.0.0.1:99999", "no-such-host.invalid:80"])
def test_an_address_that_is_not_ours_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        listen_tcp(address)


def test_a_client_is_a_process_of_this_device_or_an_address(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with listen_unix(path, mode=0o600) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        accepted, _ = listener.accept()
        with accepted:
            assert client_of(accepted) == f"process {os.getpid()}"
    with listen_tcp("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert client_of(accepted) == "127.0.0.1"
    assert client_of(None) == ""
