"""The systemd units, judged by systemd itself where it is present."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.config import absent_artifacts, load_config

UNITS = Path(__file__).resolve().parents[2] / "systemd"
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
WORST_EXPOSURE = 2.0  # systemd's own scale, 10 is worst; measured 1.1


def root_with_units(folder: Path) -> Path:
    """A file tree in which the units are installed, with a program to start."""
    units = folder / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in ("edgewarden-agent.service", "edgewarden-agent.socket"):
        shutil.copy(UNITS / name, units / name)
    program = folder / "opt/edgewarden/bin/edgewarden-agent"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return folder


@pytest.mark.system
@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    root = root_with_units(tmp_path)
    names = ["edgewarden-agent.service", "edgewarden-agent.socket"]
    done = subprocess.run(
        [str(ANALYZE), "verify", f"--root={root}", "--man=no", "--recursive-errors=no", *names],
        capture_output=True, text=True,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "edgewarden" in line]
    assert complaints == []


def test_the_socket_outlives_the_service_so_that_clients_wait_through_a_restart() -> None:
    text = (UNITS / "edgewarden-agent.socket").read_text()
    keys = {line.partition("=")[0] for line in text.splitlines() if "=" in line and not line.startswith("#")}
    assert not keys & {"PartOf", "BindsTo", "StopPropagatedFrom", "ConsistsOf"}


@pytest.mark.system
@needs_systemd
def test_the_service_is_hardened(tmp_path: Path) -> None:
    root = root_with_units(tmp_path)
    done = subprocess.run(
        [str(ANALYZE), "security", "--offline=true", "--no-pager", f"--root={root}", "edgewarden-agent.service"],
        capture_output=True, text=True,
    )  # fmt: skip
    level = re.search(r"Overall exposure level[^:]*: ([0-9.]+)", done.stdout)
    assert level, done.stdout + done.stderr
    assert float(level[1]) <= WORST_EXPOSURE


def test_the_example_configuration_has_no_unknown_key(tmp_path: Path) -> None:
    for name in ("wrist", "wrist-accel", "wrist-gyro", "wrist-norm", "wrist-floor"):
        (tmp_path / "artifacts" / name).mkdir(parents=True)
        (tmp_path / "artifacts" / name / "manifest.json").write_text("{}")
    text = (UNITS / "agent.toml").read_text()
    (tmp_path / "agent.toml").write_text(text.replace("/var/lib/edgewarden/artifacts", "artifacts"))
    config = load_config(tmp_path / "agent.toml", {}).config
    assert config.service[0].name == "wrist"
    assert "holds no artifact" in absent_artifacts(load_config(UNITS / "agent.toml", {}))[0]
