import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agent.cli import main
from agent.sockets import listen_unix
from tests.artifacts import record


@pytest.fixture
def config(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    file = tmp_path / "agent.toml"
    file.write_text(
        f"[state]\nfolder = 'state'\n[serving]\nunix = 's.sock'\n[[service]]\nname = 'wrist'\n"
        f"artifact = '{artifacts['wrist']}'\nfloor = '{artifacts['wrist-floor']}'\n"
    )
    return file


def modules_after(*arguments: str) -> set[str]:
    """What one command has imported when it ends."""
    program = (
        "import sys; from agent.cli import main; main(sys.argv[1:]); print(' '.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    return set(done.stderr.splitlines()[-1].split())


def test_light_commands_load_neither_numpy_nor_a_validation_library(config: Path) -> None:
    loaded = modules_after("status", "--config", str(config))
    assert "agent.asking" in loaded
    assert not loaded & {"numpy", "pydantic", "onnxruntime", "paho", "asyncio"}


def test_the_agent_loads_cryptography_only_when_something_is_signed() -> None:
    program = "import sys, agent.daemon; print(*{'cryptography', 'tuf', 'onnxruntime'}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_value_is_shown_with_its_origin(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fallback.dwell_s") and line.endswith("default") for line in lines)
    assert main(["check-config", "--config", str(config), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["serving.unix"] == {"value": str(config.parent / "s.sock"), "origin": str(config)}


def test_a_configuration_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "check-config", "status", "doctor"):
        assert main([command, "--config", "/none/agent.toml"]) == 2
        told = capsys.readouterr()
        assert "No such file or directory" in told.out + told.err


@pytest.mark.parametrize("arguments", [["status"], ["pin", "wrist", "wrist"], ["unpin", "wrist"], ["reload"]])
def test_without_an_agent_one_is_told_how_to_start_it(
    arguments: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arguments[0], "--config", str(config), *arguments[1:]]) == 9
    assert "edgewarden-agent run" in capsys.readouterr().err


def test_another_programs_socket_is_not_an_agent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    with listen_unix(tmp_path / "x.sock", mode=0o600) as listener:
        listener.settimeout(60)

        def nonsense() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"220 hello\r\n")
            connection.close()

        thread = threading.Thread(target=nonsense)
        thread.start()
        assert main(["status", "--socket", str(tmp_path / "x.sock")]) == 9
        thread.join()
    assert "no agent answers" in capsys.readouterr().err


def test_an_artifact_answers_files_directly(
    artifacts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = record(seed=4)
    np.save(tmp_path / "windows.npy", data.windows[:70])
    assert main(["infer", "--artifact", str(artifacts["wrist"]), str(tmp_path / "windows.npy"), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["row"] for answer in answers] == list(range(70))
    labels = [("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")[label] for label in data.labels[:70]]
    assert [answer["label"] for answer in answers] == labels
    assert main(["infer", "--artifact", str(artifacts["wrist-floor"]), str(tmp_path)]) == 0
    assert "by wrist-floor" in capsys.readouterr().out


def test_an_answer_that_is_no_number_is_null_for_programs(
    artifacts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "lost.npy", np.full((1, 128, 6), np.nan))
    assert main(["infer", "--artifact", str(artifacts["wrist"]), str(tmp_path / "lost.npy"), "--json"]) == 0
    assert None in json.loads(capsys.readouterr().out)["outputs"]["probability"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["infer", "--artifact", "/none", "{data}"], 4, "cannot read /none/manifest.json"),
        (["infer", "--artifact", "{artifact}", "/none.npy"], 8, "no file or folder"),
        (["infer", "--artifact", "{artifact}", "{wrong}"], 8, "takes [-1, 128, 6]"),
        (["infer", "--artifact", "{artifact}", "{cut}"], 8, "cannot read"),
        (["infer", "--artifact", "{artifact}", "{words}"], 8, "Give numbers."),
        (["infer", "--config", "{config}", "{data}"], 8, "Is the agent running?"),
    ],
)
def test_what_infer_cannot_do_is_said_with_a_documented_code(
    arguments: list[str], code: int, says: str, artifacts: dict[str, Path], config: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    np.save(tmp_path / "data.npy", record(seed=4).windows[:1])
    np.save(tmp_path / "wrong.npy", np.zeros((3, 3)))
    np.save(tmp_path / "words.npy", np.full((128, 6), "x"))
    np.savez(tmp_path / "cut.npz", window=np.zeros((128, 6)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:1000])
    places = {
        "data": tmp_path / "data.npy", "wrong": tmp_path / "wrong.npy", "words": tmp_path / "words.npy",
        "cut": tmp_path / "cut.npz",
        "artifact": artifacts["wrist"], "config": config,
    }  # fmt: skip
    assert main([argument.format(**places) for argument in arguments]) == code
    assert says in capsys.readouterr().err


def test_the_doctor_says_what_to_do_and_fails_with_the_codes_of_the_errors(
    config: Path, artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--config", str(config)]) == 0
    told = capsys.readouterr().out
    for words in ("ok    config", "wrist v1", "has no fallback model", "will be made at the first start", "all well"):
        assert words in told
    text = config.read_text()
    config.write_text(text + "[link]\nenabled = true\nhost = '127.0.0.1'\nport = 1\n")
    assert main(["doctor", "--config", str(config), "--json"]) == 5
    broker = next(one for one in json.loads(capsys.readouterr().out) if one["check"] == "broker")
    assert broker["verdict"] == "fail"
    assert "outbox" in broker["advice"]


def test_the_doctor_says_what_engines_will_run_on(
    config: Path, artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text()
    assert main(["doctor", "--config", str(config)]) == 0
    assert "ok    runtime" in capsys.readouterr().out
    wishes = "[serving]\nproviders = ['CUDA']\nmemory_mb = 900_000\ncpus = [0, 4000]\n"
    config.write_text(text.replace("[serving]\n", wishes))
    assert main(["doctor", "--config", str(config)]) == 0  # the CPU does it: no failure
    told = capsys.readouterr().out
    for words in ("CUDAExecutionProvider was asked for and is not there", "allows an engine 900000", "[4000]"):
        assert words in told


def test_the_doctor_goes_on_when_an_artifact_is_missing(
    config: Path, artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text()
    config.write_text(text.replace(str(artifacts["wrist"]), str(config.parent)))
    assert main(["doctor", "--config", str(config)]) == 4
    told = capsys.readouterr().out
    assert "service 'wrist' has no usable model" in told
    assert "ok    clock" in told
    config.write_text(text.replace(str(artifacts["wrist"]), "none") + f"fallbacks = ['{artifacts['wrist']}']\n")
    assert main(["doctor", "--config", str(config)]) == 4
    told = capsys.readouterr().out
    assert "none cannot be used, wrist takes its place" in told
    assert "has no fallback model" not in told


def test_a_missing_artifact_hides_no_key_of_the_configuration(
    config: Path, artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text().replace(str(artifacts["wrist"]), "none"))
    assert main(["check-config", "--config", str(config)]) == 4
    told = capsys.readouterr()
    assert "fallback.dwell_s" in told.out
    assert "problem: service 'wrist'" in told.err
    assert "none holds no artifact" in told.err
    assert main(["check-config", "--config", str(config), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["service.0.name"]["value"] == "wrist"


@pytest.mark.parametrize(
    ("tcp", "unix", "code", "words"),
    [
        ("127.0.0.1:{port}", "s.sock", 2, "the port is in use"),
        ("nowhere.invalid:1", "s.sock", 2, "cannot listen on nowhere.invalid:1"),
        ("127.0.0.1:70000", "s.sock", 2, "at most 65535"),
        ("", "", 2, "there is nothing to serve on"),
        ("127.0.0.1:0", "", 0, "127.0.0.1:0 is free"),
    ],
)
def test_the_doctor_tries_the_addresses_to_serve_on(
    config: Path, capsys: pytest.CaptureFixture[str], tcp: str, unix: str, code: int, words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        tcp = tcp.format(port=other.getsockname()[1])
        config.write_text(config.read_text().replace("unix = 's.sock'", f"unix = '{unix}'\ntcp = '{tcp}'"))
        assert main(["doctor", "--config", str(config)]) == code
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["status", "--watch", "0"], ["pin", "wrist"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert "exit codes" in told
    assert "another agent holds the state folder" in told


def test_an_interrupt_exits_130(config: Path) -> None:
    program = """
import os, signal, sys
from agent import cli
def ask(*_):
    os.kill(os.getpid(), signal.SIGINT)
    return {}
cli.ask = ask
sys.exit(cli.main(["status", "--config", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(config)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
