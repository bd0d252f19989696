import shutil
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentConfig
from agent.contract.artifact import MANIFEST, open_artifact, parse_manifest
from agent.contract.errors import ArtifactError, Corrupt, Incompatible, Unavailable
from agent.decisions.events import AlarmKind, AlarmRaised, Level, Pinned
from agent.decisions.supervisor import Supervisor
from agent.decisions.updates import Choice, Selection
from agent.equipment import Depot, Equipment, drift_left_behind, inheritance, succeed
from agent.monitor import Monitor
from agent.ota.slots import Pointer, Slots


def configure(artifacts: dict[str, Path], **service: Any) -> AgentConfig:
    fields = {"name": "wrist", "artifact": artifacts["wrist"], "fallbacks": [artifacts["wrist-accel"]],
              "floor": str(artifacts["wrist-floor"])} | service  # fmt: skip
    return AgentConfig.model_validate({"service": [fields]})


def install(slots: Slots, source: Path, version: int) -> str:
    """A slot with another version of this artifact; its digest."""
    place = slots.folder / "new"
    shutil.copytree(source, place)
    manifest = parse_manifest((place / MANIFEST).read_bytes())
    (place / MANIFEST).write_bytes(manifest.model_copy(update={"version": version}).encode())
    digest = open_artifact(place).digest
    place.rename(slots.path(digest))
    return digest


def select(**artifacts: str) -> Selection:
    named = {name.replace("_", "-"): digest for name, digest in artifacts.items()}
    return {"wrist": Choice(named, tuple(named))}


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path)


def equip(depot: Depot, selection: Selection) -> Equipment:
    made = depot.blueprints(selection)
    supervisor = Supervisor([one.policy for one in made])
    return Equipment(selection, made, supervisor, {one.name: Monitor(one.monitor, one.reference) for one in made})


def damage(folder: Path) -> None:
    model = folder / "model.onnx"
    raw = bytearray(model.read_bytes())
    raw[len(raw) // 2] ^= 1
    model.write_bytes(raw)


def test_what_is_configured_is_a_selection_too(artifacts: dict[str, Path], slots: Slots) -> None:
    depot = Depot(configure(artifacts), slots)
    assert depot.factory_selection["wrist"].order == ("wrist", "wrist-accel", "wrist-floor")
    selection, made, problems = depot.settle(Pointer())
    assert (selection, problems) == (depot.factory_selection, [])
    assert [plan.engine for plan in made[0].plan.engines] == ["wrist", "wrist-accel", "wrist-floor"]
    assert depot.label(depot.factory_selection["wrist"].artifacts["wrist"]) == "wrist v1"
    assert depot.label("ab" * 32) == "abababababab"


def test_a_selection_is_served_in_its_order_with_the_configured_floor_behind_it(
    artifacts: dict[str, Path], slots: Slots
) -> None:
    depot = Depot(configure(artifacts), slots)
    new = install(slots, artifacts["wrist"], 2)
    factory = depot.factory_selection["wrist"].artifacts["wrist-accel"]
    made = depot.blueprints({"wrist": Choice({"wrist": new, "wrist-accel": factory}, ("wrist-accel", "wrist"))})
    assert [(plan.engine, plan.version) for plan in made[0].plan.engines] == [
        ("wrist-accel", 1), ("wrist", 2), ("wrist-floor", 1)
    ]  # fmt: skip
    assert made[0].plan.active == "wrist-accel"


def test_a_floor_is_the_last_wherever_it_was_named(artifacts: dict[str, Path], slots: Slots) -> None:
    depot = Depot(configure(artifacts), slots)
    named = depot.factory_selection["wrist"].artifacts
    made = depot.blueprints({"wrist": Choice(named, ("wrist-floor", "wrist", "wrist-accel"))})
    assert [plan.engine for plan in made[0].plan.engines] == ["wrist", "wrist-accel", "wrist-floor"]


def test_a_selection_is_served_whole_or_not_at_all(artifacts: dict[str, Path], slots: Slots) -> None:
    depot = Depot(configure(artifacts), slots)
    wrist = depot.factory_selection["wrist"].artifacts["wrist"]
    with pytest.raises(Unavailable, match="not here"):
        depot.blueprints(select(wrist=wrist, wrist_accel="0" * 64))
    with pytest.raises(Incompatible, match="no service 'ankle'"):
        depot.blueprints({"ankle": Choice({"wrist": wrist}, ("wrist",))})
    with pytest.raises(Incompatible, match="asked for as engine"):
        depot.blueprints(select(wrist_accel=wrist))
    bad = install(slots, artifacts["wrist-accel"], 2)
    damage(slots.path(bad))
    with pytest.raises(Corrupt):
        depot.blueprints(select(wrist=wrist, wrist_accel=bad))


def test_at_a_start_the_newest_sound_selection_serves(artifacts: dict[str, Path], slots: Slots) -> None:
    depot = Depot(configure(artifacts), slots)
    older, newer = (
        select(wrist=install(slots, artifacts["wrist"], 2)),
        select(wrist=install(slots, artifacts["wrist"], 3)),
    )
    pointer = Pointer(newer, older)
    assert depot.settle(pointer)[0] == newer
    damage(slots.path(newer["wrist"].artifacts["wrist"]))
    selection, _, problems = depot.settle(pointer)
    assert selection == older
    assert "the current selection cannot be served" in problems[0]
    assert depot.recover(newer)[0] == depot.factory_selection
    damage(slots.path(older["wrist"].artifacts["wrist"]))
    selection, made, problems = depot.settle(pointer)
    assert (selection, len(problems)) == (depot.factory_selection, 2)
    assert made[0].plan.engines[0].version == 1


def test_without_any_sound_model_the_fault_is_told(artifacts: dict[str, Path], slots: Slots, tmp_path: Path) -> None:
    shutil.copytree(artifacts["wrist"], tmp_path / "bad")
    damage(tmp_path / "bad")
    depot = Depot(configure(artifacts, artifact=tmp_path / "bad", fallbacks=[]), slots)
    with pytest.raises(ArtifactError, match="no usable model"):
        depot.settle(Pointer())


def test_alarms_about_the_device_and_pins_are_handed_on_and_those_about_engines_are_not(
    artifacts: dict[str, Path], slots: Slots
) -> None:
    depot = Depot(configure(artifacts), slots)
    before = equip(depot, depot.factory_selection)
    for event in (
        AlarmRaised("wrist", AlarmKind.THERMAL, Level.HARMFUL, text="hot"),
        AlarmRaised("wrist", AlarmKind.LATENCY, Level.HARMFUL, engine="wrist", text="slow"),
        Pinned("wrist", "wrist-accel"),
    ):
        before.supervisor.handle(event, 1.0)
    selection = select(wrist=install(slots, artifacts["wrist"], 2))
    after = succeed(before, selection, depot.blueprints(selection))
    told = list(inheritance(before, after))
    assert told == [
        AlarmRaised("wrist", AlarmKind.THERMAL, Level.HARMFUL, text="hot"),
        Pinned("wrist", "wrist-accel"),
    ]
    assert after.digests != before.digests


def test_an_open_drift_alarm_ends_with_its_reference_only(artifacts: dict[str, Path], slots: Slots) -> None:
    depot = Depot(configure(artifacts), slots)
    before = equip(depot, depot.factory_selection)
    before.supervisor.handle(AlarmRaised("wrist", AlarmKind.DRIFT, Level.DRIFT), 1.0)
    same = select(wrist=install(slots, artifacts["wrist"], 2))
    assert drift_left_behind(before, succeed(before, same, depot.blueprints(same))) == []
    made = depot.blueprints(same)
    without = Equipment(same, tuple(_unwatched(one) for one in made), before.supervisor, before.monitors)
    assert drift_left_behind(before, without) == ["wrist"]


def _unwatched(blueprint: Any) -> Any:
    from dataclasses import replace

    return replace(blueprint, reference=None)


def test_models_that_lie_here_are_those_of_the_configuration_and_those_stored(
    artifacts: dict[str, Path], slots: Slots
) -> None:
    (slots.blobs / ("b" * 64)).write_bytes(b"")
    mine = {open_artifact(artifacts[name]).manifest.blobs["model"].sha256 for name in ("wrist", "wrist-accel")}
    assert Depot(configure(artifacts), slots).models() >= {*mine, "b" * 64}
    configured = Depot(configure(artifacts), None).models()
    assert mine <= configured
    assert open_artifact(artifacts["wrist-faulty"]).manifest.blobs["model"].sha256 not in configured
