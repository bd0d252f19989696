"""Rollouts from draft to end, without network or time."""

from __future__ import annotations

import json

from compressor.fleet.database import devices, plans
from tests.compressor.fleet.doubles import NOW
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


def test_desired_versions_only_grow(world: World) -> None:
    with world.database.writing() as tx:
        devices.change(tx, "w1", now_s=NOW, desired_version=41)
    world.to_rollout()
    assert world.rollout().versions == {"w1": 42, "w2": 1, "w3": 1}
