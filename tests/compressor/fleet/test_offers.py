"""Rollouts from draft to end, without network or time."""

from __future__ import annotations

import json

from agent.contract.errors import ConfigError
from compressor.fleet.database import devices, plans
from tests.compressor.fleet.doubles import DEVICES, NOW
from tests.compressor.fleet.world import World


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
    assert {t: json.loads(b) for t, b in world.wire.retained.items()} == {t: json.loads(b) for t, b in before.items()}


def test_what_was_withdrawn_is_withdrawn_again_by_a_new_host(world: World) -> None:
    """The former one may have ended before its broker heard of it: devices would take up a halted rollout."""
    world.to_rollout()
    world.reports("w2", 1, "quarantined", "golden_mismatch")
    world.step()
    before = dict(world.wire.retained)
    assert b"" in before.values()
    world.wire.retained.clear()
    world.new_steward().start(now_s=world.now)
    emptied = {topic for topic, body in world.wire.retained.items() if not body}
    assert emptied == {topic for topic, body in before.items() if not body}


def test_desired_versions_only_grow(world: World) -> None:
    with world.database.writing() as tx:
        devices.change(tx, "w1", now_s=NOW, desired_version=41)
    world.to_rollout()
    assert world.rollout().versions == {"w1": 42, "w2": 1, "w3": 1}


def test_a_rotated_director_key_signs_anew_what_devices_still_have_to_believe(world: World) -> None:
    world.to_rollout()
    before = world.desired()
    world.reports("w1", 1, "committed")
    world.reports("w2", 1, "fetching")  # w3 has not heard of it yet
    world.director.key = "second"
    world.step(later_s=6)
    after = world.desired()
    assert {device: key for device, (key, _) in after.items()} == {"w1": "second", "w2": "first", "w3": "second"}
    assert {device: body for device, (_, body) in after.items()} == {d: body for d, (_, body) in before.items()}
    assert world.story("desired")[-1] == "signed anew with the director key second: w1, w3"
    world.reports("w2", 1, "committed")
    world.reports("w3", 1, "committed")
    world.step(later_s=6)
    assert world.desired()["w2"][0] == "second"
    world.step(later_s=31)
    assert world.rollout().state == "completed"


def test_what_a_device_undid_is_not_brought_up_again_by_a_rotation(world: World) -> None:
    world.to_rollout()
    world.reports("w1", 1, "rolled_back", "engine_failed")
    world.step()
    world.director.key = "second"
    world.step(later_s=6)
    assert world.desired()["w1"][0] == "first"


def test_a_key_rotated_while_the_host_was_away_is_taken_up_at_its_start(world: World) -> None:
    world.to_rollout()
    world.wire.retained.clear()
    world.director.key = "second"
    world.new_steward().start(now_s=world.now)
    assert {key for key, _ in world.desired().values()} == {"second"}


def test_a_director_key_that_cannot_be_read_holds_up_nothing_else(world: World) -> None:
    world.director.failure = ConfigError("cannot read the key director.pem")
    for device in DEVICES:
        world.drifts(device)
    world.step()
    with world.database.reading() as tx:
        assert plans.samples(tx) == []  # nobody was asked, and everybody still may be
    world.director.failure = None
    world.step()
    for device in DEVICES:
        world.delivers(device)
    world.director.failure = ConfigError("cannot read the key director.pem")
    for _ in range(5):
        world.step()
    assert (world.job().state, world.rollout().state) == ("done", "draft")
    world.director.failure = None
    world.step(later_s=11)
    assert world.rollout().state == "running"


def test_what_an_operator_starts_is_offered_like_a_regeneration(world: World) -> None:
    first, second = (world.publishes(version) for version in (1, 2))
    number = world.starts({"wrist": second}, "w1", "w3")
    world.step()
    assert world.wire.retained.keys() == {"ew/1/demo/w1/desired", "ew/1/demo/w3/desired"}
    key, document = world.desired()["w3"]
    assert (key, document["rollback"], document["rollout"], document["deadline_s"]) == (
        "first",
        False,
        str(number),
        200,
    )
    assert document["services"] == {"wrist": {"artifacts": {"wrist": second}, "order": ["wrist"]}}
    for device in ("w1", "w3"):
        world.reports(device, 1, "committed")
    world.step()
    world.step(later_s=31)
    assert world.rollout().state == "completed"
    world.starts({"wrist": first}, "w3", rollback=True)
    world.step()
    assert world.desired()["w3"][1]["rollback"] is True
    assert world.desired()["w3"][1]["version"] == 2
    assert world.desired()["w1"][1]["version"] == 1


def test_a_device_gets_one_rollout_at_a_time(world: World) -> None:
    digests = [world.publishes(version) for version in (1, 2, 3)]
    for digest, devices_ in zip(digests, (("w1",), ("w1", "w2"), ("w2",)), strict=True):
        world.starts({"wrist": digest}, *devices_)
    world.step()
    assert world.states() == ["running", "draft", "draft"]  # the third waits for the second, which is older
    world.reports("w1", 1, "committed")
    for _ in range(3):  # soaking, completed, and then the next
        world.step(later_s=31)
    assert world.states() == ["completed", "running", "draft"]
    with world.database.writing() as tx:
        plans.change_rollout(tx, 2, halt_asked=True)
    for _ in range(2):
        world.step(later_s=11)
    assert world.states() == ["completed", "halted", "running"]


def test_what_an_operator_starts_waits_for_its_approval_too(world: World) -> None:
    world.publisher.missing = ["all"]
    world.starts({"wrist": world.publishes(1)}, "w1")
    world.step()
    assert world.rollout().text.startswith("awaits approval of wrist v1: edgewarden-compressor publish --approve")
    assert world.rollout().text.endswith(" ARTIFACT...")


def test_a_repository_that_cannot_be_read_is_asked_again_after_a_while(world: World) -> None:
    asked: list[str] = []

    def unapproved(family: str, *_: object) -> list[str]:
        asked.append(family)
        raise ConfigError("the repository knows no family")

    world.publisher.unapproved = unapproved  # type: ignore[method-assign]
    world.starts({"wrist": world.publishes(1)}, "w1")
    for _ in range(9):
        world.step()
    assert (len(asked), world.rollout().state) == (1, "draft")
    world.step(later_s=11)
    assert len(asked) == 2
