from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.clock import wall_s
from agent.contract.errors import ConfigError, ContractError
from agent.contract.repository import FamilyPolicy
from compressor.commands_fleet import register
from compressor.fleet.database import Database, devices, messages, plans, timeline
from compressor.fleet.inbox import EventSeen, Key
from compressor.fleet.tokens import hash_token
from compressor.keys import KeyRing
from compressor.publish import Repository
from tests.compressor.fleet.doubles import NOW, artifact_folder
from tests.compressor.web.test_explanation import EXPLANATION

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


def test_a_decision_is_shown_with_what_its_devices_say_of_their_drift(run: Run, filled: Database) -> None:
    event = EventSeen(
        Key("w1", "b", 2), NOW, "warning", "drift", "wrist", "left", (), {}, {"explanation": EXPLANATION}
    )
    with filled.writing() as tx:
        messages.admit(tx, [event], now_s=wall_s())
    text = run("drift", "show", "1")
    assert "    one sensor (gx), for about 34 rows, 44 s\n    gx mean +0.8 rad/s" in text
    assert "in the fleet: one device of 2 in cohort canary drifts (w1)" in text
    (told,) = json.loads(run("drift", "show", "1", "--json"))["explanations"]
    assert told["explanation"] == EXPLANATION


def test_a_rollout_is_listed_and_halted(run: Run, filled: Database) -> None:
    assert "running" in run("rollout", "list")
    run("rollout", "halt", "1")
    with filled.reading() as tx:
        assert plans.rollouts(tx)[0].halt_asked
    with pytest.raises(ConfigError, match="there is no rollout"):
        run("rollout", "halt", "9")


class Fleet:
    """A host's database and a signed repository: wrist in versions 1 and 2, wrist-accel in version 1."""

    def __init__(self, folder: Path, policy: FamilyPolicy) -> None:
        self.database = Database(folder / "state")
        ring = KeyRing.create(folder / "keys", ["wrist"])
        self.repository = Repository.init(folder / "repository", ring, {"wrist": policy})
        made = [("wrist", 1), ("wrist", 2), ("wrist-accel", 1)]
        folders = [artifact_folder(folder / f"{name}-{version}", version, name) for name, version in made]
        self.v1, self.v2, self.accel = self.repository.publish(folders)
        file = folder / "compressor.toml"
        file.write_text(file.read_text() + '[repository]\nfolder = "repository"\nkeys = "keys"\n')

    def carries(self, device: str, digest: str) -> None:
        with self.database.writing() as tx:
            birth = {"artifacts": {"wrist": digest, "wrist-accel": self.accel}}
            devices.change(tx, device, now_s=NOW, birth=birth)

    def rollouts(self) -> list[Any]:
        with self.database.reading() as tx:
            return plans.rollouts(tx)


@pytest.fixture
def fleet(run: Run, tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, FamilyPolicy("auto", ("w1", "w2"), {"wrist": 1}))


def test_a_rollout_of_published_artifacts_is_drafted_for_a_cohort(run: Run, fleet: Fleet) -> None:
    text = run("rollout", "start", "wrist", "--artifact", fleet.v2[:16], fleet.accel)
    assert text.splitlines() == [
        "Rollout 1 of wrist v2, wrist-accel v1 to w1, w2 is drafted.",
        "The running host offers it; `rollout list` shows how far it got.",
    ]
    (row,) = fleet.rollouts()
    assert (row.state, row.cohort, row.devices, row.job, row.rollback) == (
        "draft",
        "canary",
        ["w1", "w2"],
        None,
        False,
    )
    assert (row.artifacts, row.order) == (
        {"wrist": fleet.v2, "wrist-accel": fleet.accel}, ["wrist", "wrist-accel"],
    )  # fmt: skip
    with fleet.database.reading() as tx:
        assert timeline.newest(tx)[0].text.startswith("rollout 1 of wrist v2, wrist-accel v1 to w1, w2 drafted")
    with pytest.raises(ConfigError, match="rollout 1 is under way on w1, w2"):
        run("rollout", "start", "wrist", "--artifact", fleet.v2, fleet.accel)
    run("rollout", "halt", "1")
    run("rollout", "start", "wrist", "--artifact", fleet.v2, fleet.accel)


def test_a_rollback_to_named_devices_is_told_as_a_document(run: Run, fleet: Fleet) -> None:
    fleet.carries("w2", fleet.v2)
    arguments = ("wrist", "--artifact", fleet.v1, "--artifact", fleet.accel, "--device", "w2")
    with pytest.raises(ConfigError, match="w2 runs 'wrist' version 2") as caught:
        run("rollout", "start", *arguments)
    assert "rollout rollback" in caught.value.hint
    document = json.loads(run("rollout", "rollback", *arguments, "--order", "wrist-accel,wrist", "--json"))
    assert document == {
        "rollout": 1, "service": "wrist", "devices": ["w2"], "rollback": True, "unapproved": [],
        "artifacts": {"wrist": fleet.v1, "wrist-accel": fleet.accel}, "order": ["wrist-accel", "wrist"],
    }  # fmt: skip
    (row,) = fleet.rollouts()
    assert (row.cohort, row.devices, row.rollback, row.order) == ("", ["w2"], True, ["wrist-accel", "wrist"])
    assert "w2" in run("rollout", "list")


def test_below_the_signed_minimum_there_is_no_way_back(run: Run, fleet: Fleet) -> None:
    fleet.carries("w1", fleet.v2)
    fleet.repository.set_policy("wrist", FamilyPolicy("auto", ("w1", "w2"), {"wrist": 2}))
    with pytest.raises(ConfigError, match="below the signed minimum 2"):
        run("rollout", "rollback", "wrist", "--artifact", fleet.v1, fleet.accel, "--device", "w1")
    assert fleet.rollouts() == []


def test_what_waits_for_its_approval_is_said(run: Run, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, FamilyPolicy("approve"))
    fleet.repository.approve([fleet.accel])
    arguments = ("wrist", "--artifact", fleet.v2, fleet.accel)
    assert "waits until wrist v2 is approved: `edgewarden-compressor publish --approve" in run(
        "rollout", "start", *arguments
    )
    run("rollout", "halt", "1")
    fleet.repository.approve([fleet.v2])
    assert json.loads(run("rollout", "start", *arguments, "--json"))["unapproved"] == []


@pytest.mark.parametrize(
    ("service", "to", "words", "hint"),
    [
        ("ankle", (), "knows no family 'ankle'", ""),
        ("wrist", ("--device", "w9"), "nothing is known of a device 'w9'", "device list"),
        ("wrist", ("--cohort", "all"), "no device is in a cohort 'all'", "fleet.cohorts names canary"),
    ],
)
def test_who_shall_get_what_has_to_be_known(
    run: Run, fleet: Fleet, service: str, to: tuple[str, ...], words: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        run("rollout", "start", service, "--artifact", fleet.v2, fleet.accel, *to)
    assert hint in caught.value.hint
    assert fleet.rollouts() == []


def test_a_host_that_signs_nothing_rolls_out_nothing(run: Run, filled: Database) -> None:
    with pytest.raises(ConfigError, match="no update repository") as caught:
        run("rollout", "start", "wrist", "--artifact", "ab" * 32)
    assert "repository.folder" in caught.value.hint


def test_without_a_host_the_person_is_told_what_to_do(run: Run) -> None:
    with pytest.raises(ConfigError, match="there is no host") as caught:
        run("device", "list")
    assert "serve" in caught.value.hint
