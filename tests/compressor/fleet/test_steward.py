"""The closed loop without network or time: reports in, a committed update out, and every way it may go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.contract.artifact import sha256
from agent.contract.errors import ConfigError, DiskFull
from agent.contract.topics import Topics
from compressor.config import HostConfig
from compressor.fleet import ingest
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Database, devices, messages, plans, timeline
from compressor.fleet.inbox import EventSeen, Key, ReplySeen, ReportedSeen, TelemetrySeen
from compressor.fleet.situation import HELD, MAX_ASKS_PER_DAY
from compressor.fleet.steward import Failed, Means, Steward, order_of
from tests.compressor.fleet.doubles import (
    DEVICES,
    FLEET,
    NOW,
    REFERENCE,
    FakeDirector,
    FakePublisher,
    FakeTrainer,
    FakeWire,
    artifact_folder,
    drift_window,
    recording,
)


def config_of(folder: Path, **regeneration: Any) -> HostConfig:
    (folder / "recipe.toml").write_text("")
    return HostConfig.model_validate({
        "host": {"folder": folder / "host"},
        "fleet": {"name": FLEET, "cohorts": {"canary": list(DEVICES)}, "patience_s": 10, "collect_s": 60,
                  "sample_timeout_s": 100},
        "repository": {"folder": str(folder / "repository"), "keys": str(folder / "keys")},
        "regeneration": {"recipe": str(folder / "recipe.toml"), "service": "wrist", "budget_per_day": 1,
                         "update_deadline_s": 200, "soak_s": 30, **regeneration},
    })  # fmt: skip


class World:
    """A steward, its database and everything it touches; time is a number."""

    def __init__(self, folder: Path, **regeneration: Any) -> None:
        self.folder = folder
        self.config = config_of(folder, **regeneration)
        self.database = Database(self.config.host.folder)
        self.trainer, self.wire = FakeTrainer(), FakeWire()
        self.publisher = FakePublisher(folder / "repository")
        self.now = NOW
        self.seq = 0
        self.steward = self.new_steward()

    def new_steward(self) -> Steward:
        means = Means(
            trainer=self.trainer, publisher=self.publisher, director=FakeDirector(), wire=self.wire,
            topics=lambda device: Topics(FLEET, device), public_url=lambda: "http://host:1",
            say=lambda *_words: None,
        )  # fmt: skip
        return Steward(self.config, self.database, Catalogue(self.folder / "repository"), means)

    # --- what devices do ---
    def hear(self, item: Any) -> None:
        with self.database.writing() as tx:
            if isinstance(item, EventSeen | TelemetrySeen):
                messages.admit(tx, [item], now_s=self.now)
            ingest.note(tx, item, now_s=self.now)

    def key(self, device: str) -> Key:
        self.seq += 1
        return Key(device, "b1", self.seq)

    def drifts(self, device: str, *, reference: bytes = REFERENCE[1], evidence: bool = True, **details: Any) -> None:
        if evidence:
            window = drift_window(reference=reference)
            fields = {name: window.pop(name) for name in ("service", "view", "reference", "rows")}
            self.hear(TelemetrySeen(self.key(device), NOW, ({**fields, "body": window},), (), {"health": {}}))
        said = {"raised": True, "alarm": "drift", "guards": [], "single_channel": False, "persisted_windows": 64,
                "reference": sha256(reference)}  # fmt: skip
        self.hear(EventSeen(self.key(device), NOW, "warning", "drift", "wrist", "left all regimes", ("ax",), {},
                            said | details))  # fmt: skip

    def breaks(self, device: str, *channels: str) -> None:
        self.hear(EventSeen(self.key(device), NOW, "warning", "sensor", "wrist", "gx is dead", channels, {},
                            {"raised": True, "alarm": "dead", "level": "broken-input"}))  # fmt: skip

    def publishes(self, version: int) -> None:
        self.publisher.publish([artifact_folder(self.folder / f"v{version}", version)])

    def holds_recording(self, device: str, reference: bytes) -> None:
        with self.database.writing() as tx:
            path = self.folder / f"{device}.npz"
            path.write_bytes(recording())
            devices.change(tx, device, now_s=self.now)
            plans.add_sample(tx, id=f"of-{device}", device=device, service="wrist", reference=sha256(reference),
                             decision=0, token_sha256="0" * 64, max_bytes=10, asked_at=self.now)  # fmt: skip
            plans.change_sample(tx, f"of-{device}", state="accepted", settled_at=self.now, path=str(path))

    def delivers(self, device: str) -> None:
        with self.database.writing() as tx:
            (sample,) = plans.samples(tx, device=device, states=("asked",))
            path = self.folder / f"{device}.npz"
            path.write_bytes(recording())
            plans.change_sample(tx, sample.id, state="accepted", settled_at=self.now, path=str(path), size_bytes=10)

    def reports(self, device: str, version: int, state: str, code: str = "") -> None:
        self.hear(ReportedSeen(device, "b1", {"desired_version": version, "update_state": state, "code": code}))

    # --- what happened ---
    def step(self, *replies: ReplySeen, later_s: float = 1.0) -> bool:
        self.now += later_s
        return self.steward.step(replies, now_s=self.now)

    def rows(self) -> list[str]:
        """Rows of the table that decided, oldest first."""
        with self.database.reading() as tx:
            return [row.row for row in plans.decisions(tx)][::-1]

    def story(self, what: str) -> list[str]:
        with self.database.reading() as tx:
            return [row.text for row in timeline.newest(tx, limit=1000) if row.what == what][::-1]

    def rollout(self) -> Any:
        with self.database.reading() as tx:
            return plans.rollouts(tx)[-1]

    def job(self) -> Any:
        with self.database.reading() as tx:
            return plans.jobs(tx)[-1]

    def to_rollout(self) -> None:
        """Through the whole loop until the update is offered."""
        for device in DEVICES:
            self.drifts(device)
        self.step()
        for device in DEVICES:
            self.delivers(device)
        for _ in range(5):
            self.step()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.database.close()


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


def test_a_device_that_rejects_halts_the_rollout_and_others_are_offered_nothing(world: World) -> None:
    world.to_rollout()
    world.reports("w1", 1, "fetching")
    world.reports("w2", 1, "quarantined", "golden_mismatch")
    world.step()
    assert world.rollout().state == "halted"
    assert "w2 quarantined (golden_mismatch)" in world.rollout().text
    assert world.wire.retained["ew/1/demo/w3/desired"] == b""  # had not taken it up
    assert world.wire.retained["ew/1/demo/w1/desired"] != b""
    world.step(later_s=1000)
    assert len(world.trainer.started) == 1


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


def test_a_rollout_waits_for_its_approval_and_says_which_command_gives_it(world: World) -> None:
    world.publisher.missing = ["all"]
    world.to_rollout()
    for _ in range(5):
        world.step(later_s=100)
    assert world.rollout().state == "draft"
    assert world.wire.retained == {}
    assert world.story("rollout")[1:] == [f"rollout 1 {world.rollout().text}"]  # said once
    command = "awaits approval of wrist v1, wrist-accel v1: edgewarden-compressor publish --approve --keys"
    assert world.rollout().text.startswith(command)
    assert world.rollout().text.endswith("/builds/1/out/*/*")
    assert world.rows()[-1] == "running"
    world.publisher.missing = []
    world.step(later_s=11)
    assert world.rollout().state == "running"
    assert len(world.wire.retained) == 3


def test_a_rollout_that_waits_for_its_approval_can_be_halted(world: World) -> None:
    world.publisher.missing = ["all"]
    world.to_rollout()
    with world.database.writing() as tx:
        plans.change_rollout(tx, world.rollout().id, halt_asked=True)
    world.step()
    assert world.rollout().state == "halted"
    assert world.wire.retained == {}


def test_an_operator_halts_a_rollout(world: World) -> None:
    world.to_rollout()
    with world.database.writing() as tx:
        plans.change_rollout(tx, world.rollout().id, halt_asked=True)
    world.step()
    assert (world.rollout().state, world.rollout().text) == ("halted", "an operator halted it")


def test_desired_documents_are_renewed_by_a_new_host(world: World) -> None:
    world.to_rollout()
    before = dict(world.wire.retained)
    world.wire.retained.clear()
    world.new_steward().start(now_s=world.now)
    import json

    assert {t: json.loads(b) for t, b in world.wire.retained.items()} == {t: json.loads(b) for t, b in before.items()}


def test_desired_versions_only_grow(world: World) -> None:
    with world.database.writing() as tx:
        devices.change(tx, "w1", now_s=NOW, desired_version=41)
    world.to_rollout()
    assert world.rollout().versions == {"w1": 42, "w2": 1, "w3": 1}


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


def test_who_answers_best_first(tmp_path: Path) -> None:
    from agent.contract.artifact import open_artifact

    names = ("wrist-floor", "wrist-accel", "wrist")
    artifacts = [open_artifact(artifact_folder(tmp_path / name, 1, name)) for name in names]
    assert order_of(artifacts, "wrist") == ["wrist", "wrist-accel", "wrist-floor"]
