"""The closed loop without network or time: reports in, a committed update out, and every way it may go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.contract.artifact import open_artifact, sha256
from agent.contract.errors import ConfigError, DiskFull, LinkError
from compressor.fleet.database import plans, timeline
from compressor.fleet.inbox import BirthSeen, EventSeen, ReplySeen
from compressor.fleet.means import Failed
from compressor.fleet.situation import HELD, MAX_ASKS_PER_DAY
from tests.compressor.fleet.doubles import (
    DEVICES,
    NOW,
    REFERENCE,
)
from tests.compressor.fleet.world import World


def test_the_loop_runs_from_the_first_report_to_the_committed_update_without_hands(world: World) -> None:
    for device in DEVICES:
        world.drifts(device)
    world.step()
    assert world.rows() == ["new-population"]
    assert [topic for topic, _ in world.wire.commands] == [f"ew/1/demo/{device}/cmd/sample" for device in DEVICES]
    command = world.wire.commands[0][1]
    assert command["op"] == "sample"
    assert command["body"]["upload"] == f"http://host:1/samples/w1/{command['body']['id']}"
    world.step()
    assert len(world.wire.commands) == 3  # nobody is asked twice
    for device in DEVICES:
        world.delivers(device)
    world.step()
    assert world.rows() == ["new-population", "collecting", "regenerate"]
    folder, recordings, version = world.trainer.started[0]
    assert (recordings, version) == (["w1.npz", "w2.npz", "w3.npz"], 1)
    assert folder == world.config.host.folder / "builds" / "1"
    world.step()
    world.step()
    world.step()
    offered = [world.wire.retained[f"ew/1/demo/{device}/desired"] for device in DEVICES]
    assert all(b'"order": ["wrist", "wrist-accel"]' in document for document in offered)
    assert world.rollout().state == "running"
    for state in ("fetching", "selftest", "probation", "committed"):
        for device in DEVICES:
            world.reports(device, 1, state)
        world.step()
    assert world.rollout().state == "soaking"
    world.step(later_s=31)
    assert world.rollout().state == "completed"
    world.step()
    assert world.rows()[-1] == "answered"  # the old reports ask for nothing more
    assert len(world.trainer.started) == 1
    whole = [world.story(what) for what in ("decision", "sample", "job", "publish", "desired", "reported", "rollout")]
    assert [len(texts) for texts in whole] == [5, 3, 3, 1, 3, 12, 4]


def test_a_recording_that_comes_before_the_broker_has_answered_keeps_its_words(world: World) -> None:
    def answer_at_once(command: dict[str, Any]) -> None:
        with world.database.writing() as tx:
            plans.change_sample(tx, command["body"]["id"], state="accepted", text="12 windows", settled_at=world.now)

    world.wire.on_command = answer_at_once
    for device in DEVICES:
        world.drifts(device)
    world.step()
    with world.database.reading() as tx:
        assert {row.text for row in plans.samples(tx)} == {"12 windows"}


def test_a_request_whose_answer_from_the_broker_is_lost_is_kept_when_the_device_got_it(world: World) -> None:
    def deliver_and_be_lost(command: dict[str, Any]) -> None:
        if command["device"] != "w3":
            with world.database.writing() as tx:
                done = {"state": "accepted", "text": "12 windows"} if command["device"] == "w1" else {}
                plans.change_sample(tx, command["body"]["id"], attempts=1, **done)
        raise LinkError("the broker did not take it")

    world.wire.on_command = deliver_and_be_lost
    for device in DEVICES:
        world.drifts(device)
    world.step()
    with world.database.reading() as tx:
        assert {row.device: (row.state, row.text) for row in plans.samples(tx)} == {
            "w1": ("accepted", "12 windows"), "w2": ("asked", None),
        }  # fmt: skip
    world.wire.on_command = lambda _command: None
    world.step()
    assert [command["device"] for _, command in world.wire.commands] == ["w1", "w2", "w3", "w3"]


def test_what_is_built_anew_names_what_it_succeeds(world: World) -> None:
    first, second = (world.publishes(version) for version in (1, 2))
    for device, digest in zip(DEVICES, (first, first, second), strict=True):
        artifacts = {"wrist": digest, "wrist-accel": "ab" * 32}
        world.hear(BirthSeen(device, "b1", {"artifacts": artifacts}))
    world.to_rollout()
    out = world.trainer.started[0][0] / "out" / "gateway"
    wrist, accel = (open_artifact(out / name).manifest for name in ("wrist", "wrist-accel"))
    assert (wrist.version, wrist.parent) == (3, first)
    assert accel.parent is None  # what they carry under that name was never published


def test_one_lying_device_gets_no_training_whatever_it_claims(world: World) -> None:
    world.publishes(1)
    world.drifts("w1", persisted_windows=10**6, level="harmful")
    world.step(later_s=20)
    world.delivers("w1")
    for _ in range(5):
        world.step(later_s=1000)
    assert world.rows() == ["thin-evidence", "under-quorum"]
    assert world.trainer.started == []


def test_devices_whose_windows_show_nothing_do_not_make_a_quorum(world: World) -> None:
    world.publishes(1)
    world.drifts("w1")
    world.drifts("w2", evidence=False)
    world.step(later_s=20)
    assert world.rows() == ["thin-evidence"]
    for device in ("w1", "w2"):
        world.delivers(device)
    world.step(later_s=1000)
    assert world.rows()[-1] == "under-quorum"
    assert world.trainer.started == []


def test_a_device_that_invents_references_is_never_asked(world: World) -> None:
    world.publishes(1)
    for number in range(5):
        world.drifts("w1", reference=f"invented {number}".encode())
        world.step(later_s=20)
    assert set(world.rows()) == {"unknown-model"}
    assert world.wire.commands == []


def test_no_device_is_asked_more_often_than_a_day_allows(world: World) -> None:
    for number in range(5):
        for device in DEVICES[:2]:
            world.drifts(device, reference=f"another {number}".encode())
        world.step(later_s=101)
    assert len(world.wire.commands) == 2 * MAX_ASKS_PER_DAY
    world.step(later_s=86_400)
    assert len(world.wire.commands) == 2 * (MAX_ASKS_PER_DAY + 1)


def test_recordings_go_once_their_rollout_is_completed(world: World) -> None:
    world.to_rollout()
    world.steward.tidy(now_s=world.now)
    assert (world.folder / "w1.npz").exists()
    for device in DEVICES:
        world.reports(device, 1, "committed")
    world.step()
    world.step(later_s=31)
    world.steward.tidy(now_s=world.now)
    assert not list(world.folder.glob("*.npz"))
    world.step()
    assert (world.rows()[-1], len(world.wire.commands)) == ("answered", 3)


def test_recordings_that_nobody_learned_from_go_after_a_month(world: World) -> None:
    world.holds_recording("w1", REFERENCE[1])
    world.steward.tidy(now_s=world.now + 29 * 86_400)
    assert (world.folder / "w1.npz").exists()
    world.steward.tidy(now_s=world.now + 31 * 86_400)
    assert not (world.folder / "w1.npz").exists()
    with world.database.reading() as tx:
        assert [row.state for row in plans.samples(tx)] == ["expired"]


def test_a_recording_that_cannot_be_removed_holds_up_no_other_tidying(world: World) -> None:
    for device in DEVICES[:2]:
        world.holds_recording(device, REFERENCE[1])
    (world.folder / "w1.npz").unlink()
    (world.folder / "w1.npz").mkdir()  # what no unlink removes, whoever asks
    world.steward.tidy(now_s=world.now + 31 * 86_400)
    with world.database.reading() as tx:
        assert {row.device: row.state for row in plans.samples(tx)} == {"w1": "accepted", "w2": "expired"}
    assert world.publisher.refreshed == 1


def test_a_liar_and_a_device_of_another_cohort_contribute_nothing_to_a_training(world: World) -> None:
    world.holds_recording("stranger", REFERENCE[1])
    for device in DEVICES[:2]:
        world.drifts(device)
    world.drifts("w3", reference=b"invented", evidence=False)
    world.step()
    for device in DEVICES:
        world.delivers(device)
    world.step(later_s=100)
    ((_, recordings, _),) = world.trainer.started
    assert recordings == ["w1.npz", "w2.npz"]
    with world.database.reading() as tx:
        assert plans.jobs(tx)[0].references == [sha256(REFERENCE[1])]


def test_recordings_about_something_else_do_not_make_up_for_missing_ones(world: World) -> None:
    for device in DEVICES[:2]:
        world.drifts(device)
    world.drifts("w3", reference=b"invented", evidence=False)
    world.step()
    world.delivers("w1")
    world.delivers("w3")
    world.step(later_s=101)
    world.step(later_s=101)
    world.step()
    assert world.rows()[-1] == "regenerate"
    assert world.trainer.started == []


def test_a_broken_sensor_becomes_advice_and_is_taken_back_when_it_heals(world: World) -> None:
    world.breaks("w2", "gx")
    world.step()
    assert world.rows() == ["local-fault"]
    assert world.wire.commands == []
    world.hear(EventSeen(world.key("w2"), NOW, "notice", "sensor", "wrist", "gx is back", ("gx",), {},
                         {"raised": False, "alarm": "dead"}))  # fmt: skip
    assert not world.step()


def test_a_device_that_refuses_is_not_asked_again(world: World) -> None:
    for device in DEVICES:
        world.drifts(device)
    world.step()
    refused = [
        ReplySeen(device, "sample", command["body"]["id"], ok=False, code="not_allowed", text="samples.allow is off")
        for device, (_, command) in zip(DEVICES, world.wire.commands, strict=True)
    ]
    world.step(*refused)
    world.step()
    assert world.rows()[-1] == "no-recordings"
    assert len(world.wire.commands) == 3
    assert "the device refused: samples.allow is off" in world.story("sample")[-1]


def test_a_refusal_in_the_name_of_another_device_is_ignored(world: World) -> None:
    for device in DEVICES:
        world.drifts(device)
    world.step()
    theirs = world.wire.commands[0][1]["body"]["id"]
    world.step(ReplySeen("w2", "sample", theirs, ok=False, code="no", text="no"))
    with world.database.reading() as tx:
        assert {row.state for row in plans.samples(tx)} == {"asked"}


def test_silence_is_asked_once_more_and_then_given_up(world: World) -> None:
    for device in DEVICES:
        world.drifts(device)
    world.step()
    world.step(later_s=101)
    assert len(world.wire.commands) == 6
    world.step(later_s=101)
    world.step()
    assert len(world.wire.commands) == 6
    assert world.rows()[-1] == "no-recordings"


def test_a_broker_that_is_away_delays_the_request_and_loses_nothing(world: World) -> None:
    world.wire.away = True
    for device in DEVICES:
        world.drifts(device)
    world.step()
    with world.database.reading() as tx:
        assert plans.samples(tx) == []
    world.wire.away = False
    world.step()
    seqs = [command["seq"] for _, command in world.wire.commands]
    assert seqs == [2, 2, 2]  # a number that was perhaps sent is never used again


def test_a_failed_pipeline_is_told_and_not_repeated(world: World) -> None:
    world.trainer.waits = True
    world.to_rollout()
    world.trainer.waits = False
    world.trainer.outcome = Failed("gate 'old data' refused c48: measured 0.91, limit 0.95")
    world.step()
    world.step()
    assert world.job().state == "failed"
    assert world.rows()[-1] == "failed-before"
    assert "gate 'old data' refused" in world.story("job")[-1]
    assert len(world.trainer.started) == 1


def test_the_daily_budget_holds_a_second_regeneration_back(world: World) -> None:
    world.to_rollout()
    for device in DEVICES:
        world.reports(device, 1, "committed")
    world.step()
    world.step(later_s=31)
    for device in DEVICES:
        world.drifts(device, reference=REFERENCE[2])
    world.step()
    for device in DEVICES:
        world.delivers(device)
    world.step()
    assert world.rows()[-1] == "budget-spent"
    world.step(later_s=86_400)
    assert len(world.trainer.started) == 2


def test_an_operator_holds_regeneration_back_and_lets_it_go(world: World) -> None:
    with world.database.writing() as tx:
        plans.put_setting(tx, HELD, True)
    world.to_rollout()
    assert world.rows()[-1] == "held"
    with world.database.writing() as tx:
        plans.put_setting(tx, HELD, False)
    world.step()
    assert len(world.trainer.started) == 1


def test_a_cut_off_pipeline_starts_again_once(world: World) -> None:
    world.trainer.waits = True
    world.to_rollout()
    for expected in ("queued", "failed"):
        again = world.new_steward()
        again.start(now_s=world.now)
        assert world.job().state == expected
        world.steward = again
        world.step()
    assert len(world.trainer.started) == 2


def test_a_request_that_the_hosts_end_kept_from_leaving_is_sent_again_and_one_that_left_is_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object, **__: object) -> None:
        raise SystemExit

    for device in DEVICES:
        world.drifts(device)
    with monkeypatch.context() as patch:
        patch.setattr(world.wire, "command", end)
        with pytest.raises(SystemExit):
            world.step()
    for _ in range(2):
        world.steward = world.new_steward()
        world.steward.start(now_s=world.now)
        world.step()
        assert len(world.wire.commands) == 3
    with world.database.reading() as tx:
        assert [row.state for row in plans.samples(tx)] == ["asked"] * 3


def test_a_full_disk_at_publication_is_tried_again(world: World) -> None:
    world.publisher.failure = DiskFull("the disk is full")
    world.to_rollout()
    assert world.job().state == "built"
    calls = world.publisher.calls
    world.step()
    assert world.publisher.calls == calls
    world.publisher.failure = None
    world.step(later_s=11)
    assert world.job().state == "done"


def test_a_publication_that_is_refused_fails_the_job(world: World) -> None:
    world.publisher.failure = ConfigError("version 1 is there already")
    world.to_rollout()
    assert world.job().state == "failed"
    assert "version 1 is there already" in world.job().text


def test_what_was_halted_answers_nothing_and_is_tried_once_more_within_the_budget(world: World) -> None:
    world.to_rollout()
    for attempt in (1, 2):
        assert len(world.trainer.started) == attempt
        world.reports("w1", attempt, "quarantined", "golden_mismatch")
        world.step()
        assert world.rollout().state == "halted"
        world.step()
        assert world.rows()[-1] == ("budget-spent", "failed-before")[attempt - 1]
        world.step(later_s=86_400)
        for _ in range(4):
            world.step()
    assert len(world.trainer.started) == 2


def test_another_cohort_gets_advice_and_no_requests(tmp_path: Path) -> None:
    world = World(tmp_path, cohort="canary", service="other")
    for device in DEVICES:
        world.drifts(device)
    world.step()
    assert world.rows() == ["new-population"]
    assert world.wire.commands == []
    world.database.close()


def test_every_table_stays_within_its_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_ROWS", 3)
    world.to_rollout()
    world.steward.tidy(now_s=world.now)
    with world.database.reading() as tx:
        assert len(timeline.newest(tx)) == 3
