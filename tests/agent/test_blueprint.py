import json
import shutil
from pathlib import Path

import pytest

from agent.blueprint import draw_up
from agent.config import AgentConfig
from agent.contract.artifact import MANIFEST, canonical, parse_manifest, sha256
from agent.contract.errors import ArtifactError
from agent.contract.plan import EngineKind, GapPolicy, GuardPolicy, WindowPlan
from agent.decisions.events import AgentStarted, AlarmKind, EngineServed, WorkerReady
from agent.decisions.supervisor import Supervisor


def configure(artifacts: dict[str, Path], **changes: object) -> AgentConfig:
    service = {
        "name": "wrist",
        "artifact": artifacts["wrist"],
        "fallbacks": [artifacts["wrist-accel"]],
        "floor": str(artifacts["wrist-floor"]),
    }
    return AgentConfig.model_validate({"service": [service | changes.pop("service", {})], **changes})  # type: ignore[operator]


def damaged(folder: Path, target: Path, name: str = "model.onnx") -> Path:
    shutil.copytree(folder, target)
    raw = bytearray((target / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (target / name).write_bytes(raw)
    return target


def test_a_service_becomes_plan_policy_and_monitor(artifacts: dict[str, Path]) -> None:
    (made,) = draw_up(configure(artifacts))
    assert [plan.engine for plan in made.plan.engines] == ["wrist", "wrist-accel", "wrist-floor"]
    assert [plan.kind for plan in made.plan.engines] == [EngineKind.ONNX, EngineKind.ONNX, EngineKind.FLOOR]
    assert made.plan.active == made.policy.preferred == "wrist"
    assert made.plan.engines[0].views[0].width == 24
    assert [plan.reads for plan in made.plan.engines] == [None, ("ax", "ay", "az"), ()]
    assert [output.name for output in made.plan.engines[0].outputs] == ["probability"]
    assert made.plan.guard is not None
    assert [channel.name for channel in made.plan.guard.channels] == ["ax", "ay", "az", "gx", "gy", "gz"]
    assert set(made.plan.guard.group_rms or {}) == {"accel", "gyro"}
    assert made.plan.guard.not_finite is GuardPolicy.REFUSE
    assert made.monitor.view == "channels"
    assert made.monitor.latency_p95_us == 1e6
    assert made.reference is not None
    (row,) = made.policy.card.rows
    assert (row.kind, row.accuracy["wrist-accel"] > row.accuracy["wrist"]) == (AlarmKind.DEAD, True)
    assert made.policy.card["wrist-accel"].reads == {"ax", "ay", "az"}
    assert made.problems == ()


def test_the_configuration_overrides_what_the_manifest_says(artifacts: dict[str, Path]) -> None:
    (made,) = draw_up(configure(artifacts, guard={"not_finite": "impute"}, budget={"latency_p95_us": 500.0}))
    assert made.plan.guard is not None
    assert made.plan.guard.not_finite is GuardPolicy.IMPUTE
    assert made.plan.guard.channels[0].mean != 0.0
    assert made.monitor.latency_p95_us == 500.0


def test_whether_harm_switches_is_configured(artifacts: dict[str, Path]) -> None:
    (made,) = draw_up(configure(artifacts))
    assert made.reference is not None
    assert [one.engine for one in made.reference.witnesses] == ["wrist-accel"]
    assert made.monitor.accuracy["wrist-accel"] == made.policy.card["wrist-accel"].accuracy
    assert AlarmKind.HARM in made.policy.switching
    (told,) = draw_up(configure(artifacts, drift={"switch": False, "least_gain": 0.3}))
    assert told.policy.switching == made.policy.switching - {AlarmKind.HARM}
    assert told.policy.least_gain == 0.3


def test_single_channels_have_policies_of_their_own(artifacts: dict[str, Path], tmp_path: Path) -> None:
    manifest = json.loads((artifacts["wrist"] / MANIFEST).read_bytes())
    manifest["inputs"][0]["channels"][0] |= {"missing": "impute", "out_of_range": "clip"}
    shutil.copytree(artifacts["wrist"], tmp_path / "wrist")
    (tmp_path / "wrist" / MANIFEST).write_bytes(canonical(manifest))
    listed = [
        {"name": "ay", "service": "wrist", "not_finite": "pass"},
        {"name": "gz", "out_of_range": "refuse"},
        {"name": "gz", "service": "other", "out_of_range": "pass"},
    ]
    (made,) = draw_up(configure(artifacts | {"wrist": tmp_path / "wrist"}, guard={"channel": listed}))
    assert made.plan.guard is not None
    own = {one.name: (one.not_finite, one.out_of_range) for one in made.plan.guard.channels}
    assert own == {
        "ax": (GuardPolicy.IMPUTE, GuardPolicy.CLIP), "ay": (GuardPolicy.PASS, None), "az": (None, None),
        "gx": (None, None), "gy": (None, None), "gz": (None, GuardPolicy.REFUSE),
    }  # fmt: skip
    assert made.plan.guard.not_finite is GuardPolicy.REFUSE
    (problem,) = made.problems
    assert problem.startswith("[[guard.channel]] names 'gz' of 'other'")
    strict = configure(artifacts | {"wrist": tmp_path / "wrist"}, guard={"not_finite": "refuse"})
    guard = draw_up(strict)[0].plan.guard
    assert guard is not None
    assert guard.channels[0].not_finite is GuardPolicy.REFUSE  # the configuration is above the manifest


def test_repeats_and_rate_are_judged_where_the_manifest_has_a_window(artifacts: dict[str, Path]) -> None:
    (made,) = draw_up(configure(artifacts))
    assert (made.monitor.hop_s, made.monitor.repeats) == (64 / 50, True)
    (made,) = draw_up(configure(artifacts, guard={"repeated": False}))
    assert not made.monitor.repeats
    assert not made.policy.switching & {AlarmKind.REPEATED, AlarmKind.RATE}


def test_streams_follow_the_manifest_and_the_configuration(artifacts: dict[str, Path]) -> None:
    choice = {"gap_policy": "interpolate", "max_gap_s": 2.0, "max_streams": 7}
    (made,) = draw_up(configure(artifacts, service=choice))
    assert made.plan.window == WindowPlan("window", 128, 64, 50.0, GapPolicy.INTERPOLATE, 2.0, 7)
    assert made.plan_of(("wrist-accel",)).window == made.plan.window


@pytest.mark.parametrize(
    "change",
    [
        {"window": None},
        {"window": {"length": 64, "hop": 64, "rate_hz": 50.0}},
        {"inputs": 2},
    ],
)
def test_a_manifest_whose_window_does_not_fit_its_input_takes_no_streams(
    artifacts: dict[str, Path], tmp_path: Path, change: dict[str, object]
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(artifacts["wrist"], odd)
    document = parse_manifest((odd / MANIFEST).read_bytes()).model_dump(mode="json")
    if "inputs" in change:
        change = {"inputs": [*document["inputs"], document["inputs"][0] | {"name": "state"}]}
    (odd / MANIFEST).write_bytes(parse_manifest(json.dumps(document | change).encode()).encode())
    (made,) = draw_up(configure(artifacts, service={"artifact": odd, "fallbacks": [], "floor": ""}))
    assert made.plan.window is None


def test_a_plan_of_fewer_engines_keeps_their_order(artifacts: dict[str, Path]) -> None:
    (made,) = draw_up(configure(artifacts))
    plan = made.plan_of(("wrist-accel", "wrist-floor"))
    assert [engine.engine for engine in plan.engines] == ["wrist-accel", "wrist-floor"]
    assert plan.active == "wrist-accel"
    assert made.plan_of(("wrist-accel", "wrist")).active == "wrist"


def test_a_damaged_artifact_is_left_out_while_another_model_can_answer(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    bad = damaged(artifacts["wrist"], tmp_path / "bad")
    (made,) = draw_up(configure(artifacts, service={"artifact": bad}))
    assert made.policy.preferred == "wrist-accel"
    assert "does not match the digest" in made.problems[0]
    assert made.policy.missing == f"the active artifact {bad} cannot be used, wrist-accel takes its place"


def test_a_service_without_its_configured_active_model_is_degraded_and_says_so(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    (made,) = draw_up(configure(artifacts, service={"artifact": tmp_path / "none"}))
    supervisor = Supervisor([made.policy])
    for event in (AgentStarted(), WorkerReady(1, {"wrist": ("wrist-accel", "wrist-floor")})):
        supervisor.handle(event, 0.0)
    supervisor.handle(EngineServed("wrist", "wrist-accel", 5), 100.0)
    status = supervisor.status("wrist")
    assert (status["serving"], status["health"], status["complaints"]) == (
        "wrist-accel", "degraded", [made.policy.missing]
    )  # fmt: skip
    assert status["reason"] == made.policy.missing
    (repaired,) = draw_up(configure(artifacts))
    assert Supervisor([repaired.policy], supervisor.state()).serving("wrist") == "wrist"


def test_without_any_sound_model_every_fault_is_told(artifacts: dict[str, Path], tmp_path: Path) -> None:
    bad, none = damaged(artifacts["wrist"], tmp_path / "bad"), tmp_path / "none"
    only = {"artifact": bad, "fallbacks": [none], "floor": ""}
    with pytest.raises(ArtifactError, match=r"service 'wrist' has no usable model: .*digest.*; cannot read") as told:
        draw_up(configure(artifacts, service=only))
    assert told.value.exit_code == 4
    both = [only | {"name": "one"}, {"name": "two", "artifact": none}]
    with pytest.raises(ArtifactError, match=r"service 'one' has no .*service 'two' has no usable model"):
        draw_up(AgentConfig.model_validate({"service": both}))


@pytest.mark.parametrize("card", [b"[]", b'{"accuracy":{"wrist":"good"}}', b'{"faults":[{"kind":"dead"}]}'])
def test_an_artifact_whose_card_is_malformed_is_left_out(
    artifacts: dict[str, Path], tmp_path: Path, card: bytes
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(artifacts["wrist"], bad)
    (bad / "card.json").write_bytes(card)
    manifest = parse_manifest((bad / MANIFEST).read_bytes())
    blob = manifest.blobs["card"].model_copy(update={"size": len(card), "sha256": sha256(card)})
    (bad / MANIFEST).write_bytes(manifest.model_copy(update={"blobs": {**manifest.blobs, "card": blob}}).encode())
    (made,) = draw_up(configure(artifacts, service={"artifact": bad}))
    assert made.policy.engines[0] == "wrist-accel"
    assert "card" in made.problems[0]


def test_siblings_that_do_not_fit_are_left_out(artifacts: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(artifacts["wrist-accel"], other)
    manifest = parse_manifest((other / MANIFEST).read_bytes())
    narrower = manifest.inputs[0].model_copy(update={"shape": [-1, 64, 6]})
    (other / MANIFEST).write_bytes(manifest.model_copy(update={"name": "narrow", "inputs": [narrower]}).encode())
    (made,) = draw_up(configure(artifacts, service={"fallbacks": [other, artifacts["wrist"]]}))
    assert [plan.engine for plan in made.plan.engines] == ["wrist", "wrist-floor"]
    assert "differ from those of 'wrist'" in made.problems[0]
    assert "is called 'wrist' too" in made.problems[1]


def test_one_artifact_may_serve_under_two_names(artifacts: dict[str, Path]) -> None:
    both = [{"name": name, "artifact": artifacts["wrist"]} for name in ("a", "b")]
    made = draw_up(AgentConfig.model_validate({"service": both}))
    assert [one.monitor.index for one in made] == [0, 1]
    assert [one.plan.service for one in made] == ["a", "b"]
