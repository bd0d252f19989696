from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.contract.errors import ConfigError, ContractError
from compressor.commands_fleet import register
from compressor.fleet.database import Database, devices, messages, plans
from compressor.fleet.inbox import EventSeen, Key
from compressor.fleet.tokens import hash_token
from tests.compressor.fleet.doubles import NOW

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    file = tmp_path / "compressor.toml"
    file.write_text('[host]\nfolder = "state"\n[fleet]\nname = "demo"\ncohorts = { canary = ["w1", "w2"] }\n')

    def run(*arguments: str) -> str:
        parser = argparse.ArgumentParser()
        register(parser.add_subparsers())
        options = parser.parse_args([*arguments, "--config", str(file)])
        assert options.run(options) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def filled(tmp_path: Path) -> Database:
    database = Database(tmp_path / "state")
    with database.writing() as tx:
        reported = {
            "desired_version": 3, "update_state": "probation", "code": "",
            "services": {"wrist": {"active": "wrist-accel", "preferred": "wrist", "health": "degraded",
                                   "reason": "gx is dead"}},
        }  # fmt: skip
        devices.change(tx, "w1", now_s=NOW, presence="online", reported=reported, desired_version=4, last_seen_at=NOW)
        event = EventSeen(Key("w1", "b", 1), NOW, "warning", "sensor", "wrist", "gx is dead", ("gx",), {}, {})
        messages.admit(tx, [event], now_s=NOW)
        plans.record(tx, {
            "cohort": "canary", "service": "wrist", "kind": "maintenance", "row": "local-fault", "devices": ["w1"],
            "reason": "dead:gx on w1 only", "numbers": {"members": 2, "largest_shift": 1.25},
        }, now_s=NOW)  # fmt: skip
        plans.add_rollout(
            tx, cohort="canary", service="wrist", job=1, state="running", devices=["w1"], versions={"w1": 4},
            artifacts={"wrist": "ab" * 32}, order=["wrist"], created_at=NOW, since=NOW, text="offered to w1",
        )  # fmt: skip
    return database


def test_devices_are_listed_with_what_is_desired_and_reported(run: Run, filled: Database) -> None:
    lines = run("device", "list").splitlines()
    assert lines[0].split() == [
        "DEVICE",
        "COHORT",
        "PRESENCE",
        "ANSWERS",
        "DESIRED",
        "REPORTED",
        "LAST",
        "SEEN",
        "(UTC)",
    ]
    assert lines[1].split()[:8] == ["w1", "canary", "online", "wrist-accel", "degraded", "4", "3", "probation"]
    assert lines[2].split()[:3] == ["w2", "canary", "unknown"]
    (first, _) = json.loads(run("device", "list", "--json"))
    assert (first["desired"], first["seen"], first["services"][0]["reason"]) == (4, 3, "gx is dead")


def test_one_device_is_shown_in_full(run: Run, filled: Database) -> None:
    text = run("device", "show", "w1")
    assert "wrist: wrist-accel answers, degraded. gx is dead" in text
    assert json.loads(run("device", "show", "w1", "--json"))["events"][0]["text"] == "gx is dead"
    with pytest.raises(ConfigError, match="nothing is known of a device 'w9'"):
        run("device", "show", "w9")


def test_enrolling_makes_a_token_that_works_once(run: Run, tmp_path: Path) -> None:
    document = json.loads(run("device", "enrol", "w9", "--json"))
    database = Database(tmp_path / "state")
    with database.writing() as tx:
        assert devices.use_token(tx, hash_token(document["token"]), "w9", now_s=0.0)
    database.close()
    assert document["token"] not in (tmp_path / "state" / "fleet.db").read_bytes().decode(errors="ignore")
    with pytest.raises(ContractError):
        run("device", "enrol", "Not An Id")


def test_decisions_are_shown_with_numbers_and_reason(run: Run, filled: Database) -> None:
    assert "dead:gx on w1 only" in run("drift", "list")
    text = run("drift", "show", "1")
    assert "row 'local-fault'" in text
    assert "largest shift" in text
    assert json.loads(run("drift", "show", "1", "--json"))["numbers"]["largest_shift"] == 1.25
    for wrong in ("7", "one"):
        with pytest.raises(ConfigError, match="there is no decision"):
            run("drift", "show", wrong)


def test_a_rollout_is_listed_and_halted(run: Run, filled: Database) -> None:
    assert "running" in run("rollout", "list")
    run("rollout", "halt", "1")
    with filled.reading() as tx:
        assert plans.rollouts(tx)[0].halt_asked
    with pytest.raises(ConfigError, match="there is no rollout"):
        run("rollout", "halt", "9")


def test_without_a_host_the_person_is_told_what_to_do(run: Run) -> None:
    with pytest.raises(ConfigError, match="there is no host") as caught:
        run("device", "list")
    assert "serve" in caught.value.hint
