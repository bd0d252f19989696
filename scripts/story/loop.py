"""The second half of the story: new wearers, evidence, regeneration, a signed update, recovery, refusals."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent import clock
from agent.contract.artifact import MANIFEST, Artifact, open_artifact
from agent.engine import OnnxEngine
from compressor.examples.broken import build_broken
from compressor.task import Role, Rows, TaskData
from scripts.story.acts import foreign_orders
from scripts.story.chapters import Context
from scripts.story.fleet import Host, Impostor, Wearer, wait_for_state, wearer_device
from scripts.story.world import FLEET, PROMISED_LOOP_S, SERVICE, StoryError, wait_until

LOOP_LIMIT_S = 420.0  # waited for the whole loop before the story gives up; the promise is PROMISED_LOOP_S
TEST_PACE = 100.0
REFUSED = ("rejected", "failed", "quarantined", "rolled_back")


@dataclass
class Fleet:
    """Host and wearers' devices of this telling."""

    context: Context
    data: TaskData
    out: Path
    artifacts: Path  # version 1
    host: Host
    wearers: list[Wearer]
    recipe: Path
    first_versions: list[int] = field(default_factory=list)  # what each device served before anything happened
    first_report_s: float = 0.0  # when the first drift was reported, monotonic

    def close(self) -> None:
        for wearer in self.wearers:
            wearer.close()
        self.host.close()

    def hands(self) -> int:
        """Steps of a person since the first report: what was noted, or what reached the broker beside the host."""
        world = self.context.world
        noted = world.acts.since(self.first_report_s)
        return max(len(noted), foreign_orders(world.subscriber.heard(), self.host.orders()))

    def of(self, role: Role, wearer: int) -> Rows:
        rows = self.data.role(role)
        return rows.where(rows.sources == wearer)


def gather(
    context: Context, data: TaskData, out: Path, artifacts: Path, numbers: Sequence[int], recipe: Path, *,
    probation_s: float,
) -> Fleet:  # fmt: skip
    """Everybody who takes part; nothing runs yet. `probation_s`: how long each device watches its update."""
    hop_s = context.player.hop_s
    fleet = Fleet(context, data, out, artifacts, Host(out / "host", context.world, numbers), [], recipe)
    for number in numbers:
        train, reference = fleet.of(Role.ENROL_TRAIN, number), fleet.of(Role.ENROL_REFERENCE, number)
        live = _in_time(train.where(train.starts % 64 == 0), reference)  # every second: hop 64, as a device cuts them
        folder = out / wearer_device(number)
        fleet.wearers.append(Wearer(number, context.world, live, hop_s, folder, probation_s=probation_s))
        _record(_in_time(train, reference), out / f"enrolment-{number}.npz")
    return fleet


def _in_time(*parts: Rows) -> Rows:
    joined = Rows(*(
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("windows", "labels", "recordings", "sources", "starts")
    ))  # fmt: skip
    return joined.where(np.lexsort((joined.starts, joined.recordings)))


def _record(rows: Rows, path: Path) -> None:
    """An enrolment recording as a person would leave it on the device: windows with labels."""
    np.savez(
        path, windows=rows.windows.astype(np.float32), labels=rows.labels.astype(np.int64),
        recordings=rows.recordings.astype(np.int64), starts=rows.starts.astype(np.int64),
    )  # fmt: skip


def recover(fleet: Fleet) -> None:
    """(g, h) New wearers, drift, evidence, regeneration, a signed update; nobody types anything."""
    context = fleet.context
    fleet.host.prepare(fleet.artifacts)
    fleet.host.start(fleet.recipe, fleet.out / "cache", ",".join(str(wearer.number) for wearer in fleet.wearers))
    fleet.host.check()
    for wearer in fleet.wearers:
        recording = fleet.out / f"enrolment-{wearer.number}.npz"
        wearer.start(fleet.host.root, f"{fleet.host.url}/repository", fleet.artifacts, recording)
    for wearer in fleet.wearers:
        wait_until(wearer.is_ready, f"{wearer.device} serves")
    fleet.first_versions = [version(wearer) for wearer in fleet.wearers]
    context.console.print(f"   the host's page: {fleet.host.page}")
    before = context.world.subscriber.position()
    for wearer in fleet.wearers:
        wearer.exercise()
    first = _first_drift(fleet, before)
    started = clock.monotonic_s()
    fleet.first_report_s = started
    context.console.print(f"   first report: {first['device']}: {first['text']}")
    _narrate_until_committed(fleet, started)
    loop_s = clock.monotonic_s() - started
    for wearer in fleet.wearers:
        wearer.rest()
    _report_loop(fleet, loop_s)


def _first_drift(fleet: Fleet, before: int) -> dict[str, Any]:
    names = {wearer.device for wearer in fleet.wearers}
    found: list[dict[str, Any]] = []

    def arrived() -> bool:
        fleet.host.check()
        events = fleet.context.world.subscriber.events(before)
        found[:] = [event for event in events if event["device"] in names and event["kind"] == "drift"]
        return bool(found)

    wait_until(arrived, "a new wearer's device reports drift", timeout_s=240)
    return found[0]


def _narrate_until_committed(fleet: Fleet, started: float) -> None:
    """Print decisions and update states as they come; returns when every device has committed."""
    told: set[str] = set()
    deadline = started + LOOP_LIMIT_S
    console = fleet.context.console
    with console.status("0 s since the first report") as waiting:  # shown by a terminal alone
        while True:
            fleet.host.check()
            for line in _news(fleet):
                if line not in told:
                    told.add(line)
                    console.print(f"   {clock.monotonic_s() - started:5.0f} s  {line}")
            states = [_states(fleet, wearer.device) for wearer in fleet.wearers]
            if all(seen and seen[-1]["update_state"] == "committed" for seen in states):
                return
            for wearer, seen in zip(fleet.wearers, states, strict=True):
                if seen and seen[-1]["update_state"] in REFUSED:
                    raise StoryError(
                        f"{wearer.device} ended its update {seen[-1]['update_state']}: {seen[-1]['code']}"
                    )
            if clock.monotonic_s() > deadline:
                raise StoryError(_too_slow(fleet))
            waiting.update(f"{clock.monotonic_s() - started:.0f} s since the first report")
            clock.sleep(2.0)  # asking the host costs half a second of this small machine's time


def _too_slow(fleet: Fleet) -> str:
    """Why it took too long, as far as one can tell: mostly others who want the same cores."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    busy = f"{load:.0f} processes wanted this machine's {cpus} cores in the last minute; " if load > 3 * cpus else ""
    return f"the loop did not close within {LOOP_LIMIT_S:.0f} s; {busy}the host's log: {fleet.host.folder}/host.log"


def _news(fleet: Fleet) -> list[str]:
    lines = [f"decision: {item['kind']}: {item['reason']}" for item in fleet.host.decisions()]
    for wearer in fleet.wearers:
        lines += [
            f"{wearer.device}: {document['update_state']}" + (f" ({document['code']})" if document["code"] else "")
            for document in _states(fleet, wearer.device)
        ]
    return lines


def _states(fleet: Fleet, device: str) -> list[dict[str, Any]]:
    """What a device reported of its update, without repetitions."""
    seen = [item for item in fleet.context.world.subscriber.documents(device, "reported") if item["desired_version"]]
    return [item for i, item in enumerate(seen) if i == 0 or item["update_state"] != seen[i - 1]["update_state"]]


def _report_loop(fleet: Fleet, loop_s: float) -> None:
    context = fleet.context
    decisions = fleet.host.decisions()
    regeneration = next(item for item in decisions if item["kind"] == "regenerate")
    steps = {wearer.device: _states(fleet, wearer.device) for wearer in fleet.wearers}
    artifact = installed(fleet.wearers[0])
    context.report["regeneration"] = {
        "seconds": round(regeneration_seconds(fleet), 1),
        "trigger": next(item for item in decisions if item["kind"].startswith("ask-"))["reason"],
        "decision": regeneration["reason"],
    }
    context.report["update"] = {
        "from": _same(fleet.first_versions),
        "to": _same([version(wearer) for wearer in fleet.wearers]),
        "states": [item["update_state"] for item in steps[fleet.wearers[0].device]],
        "states_by_device": {device: [item["update_state"] for item in seen] for device, seen in steps.items()},
        "moved_bytes": sum(seen[-1]["moved_bytes"] for seen in steps.values()),
        "full_bytes": sum(full_bytes(wearer) for wearer in fleet.wearers),
        **_requests(fleet),
    }
    context.report |= {"devices": len(fleet.wearers), "loop": {"seconds": round(loop_s, 1)}}
    if loop_s > PROMISED_LOOP_S:
        context.console.print(f"   [red]The loop took {loop_s:.0f} s, {PROMISED_LOOP_S:.0f} s are promised.[/]")
    context.timeline.add(
        context.player.time_s, "⟳",
        f"three new wearers drifted; version {artifact.manifest.version} was made from their enrolment recordings, "
        f"signed and committed by all devices {loop_s:.0f} s after the first report, "
        f"{context.report['update']['failed_requests']} of {context.report['update']['requests']} requests failed",
        "green",
    )  # fmt: skip


def _requests(fleet: Fleet) -> dict[str, int]:
    return {
        "failed_requests": sum(wearer.failed for wearer in fleet.wearers),
        "retried_requests": sum(wearer.retried for wearer in fleet.wearers),
        "requests": sum(wearer.requests for wearer in fleet.wearers),
    }


def version(wearer: Wearer) -> int:
    """Version of the active artifact, as the device says."""
    service = next(item for item in wearer.status()["services"] if item["name"] == SERVICE)
    return int(next(engine["version"] for engine in service["engines"] if engine["engine"] == SERVICE))


def _same(versions: list[int]) -> int:
    """Raises: StoryError when devices differ."""
    if len(set(versions)) != 1:
        raise StoryError(f"the devices serve different versions: {versions}")
    return versions[0]


def regeneration_seconds(fleet: Fleet) -> float:
    """How long the pipeline ran, as its own report says."""
    import json

    reports = sorted((fleet.host.folder / "state").rglob("out/report.json"))
    if not reports:
        raise StoryError(f"no pipeline report below {fleet.host.folder / 'state'}")
    return float(sum(json.loads(reports[-1].read_text())["seconds"].values()))


def _digests(wearer: Wearer) -> dict[str, str]:
    """Engine -> manifest digest that serves on a device now."""
    service = next(item for item in wearer.status()["services"] if item["name"] == SERVICE)
    return {engine["engine"]: engine["digest"] for engine in service["engines"]}


def installed(wearer: Wearer) -> Artifact:
    """The active artifact on a device, from its own slots."""
    digest = _digests(wearer)[SERVICE]
    return open_artifact(wearer.folder / "state" / "slots" / digest)


def full_bytes(wearer: Wearer) -> int:
    """What the installed set weighs, manifests included."""
    total = 0
    for digest in _digests(wearer).values():
        folder = wearer.folder / "state" / "slots" / digest
        total += sum(path.stat().st_size for path in folder.iterdir())
    return total


def judge(fleet: Fleet) -> None:
    """(i) The last 60 % of each new recording before and after; enrolled wearers' held-out recordings too."""
    first = OnnxEngine.load(open_artifact(fleet.artifacts / SERVICE).path("model"))
    second = OnnxEngine.load(installed(fleet.wearers[0]).path("model"))
    new, old = fleet.data.role(Role.NEW_TEST), fleet.data.role(Role.STREAM)
    right = 0.0
    for wearer in fleet.wearers:
        rows = fleet.of(Role.NEW_TEST, wearer.number)
        right += wearer.perform(rows, pace=TEST_PACE) * len(rows)
    fleet.context.report["recovery"] = {
        "new_before": _accuracy(first, new),
        "new_after": right / len(new),
        "old_before": _accuracy(first, old),
        "old_after": _accuracy(second, old),
        "new_windows": len(new),
        "old_windows": len(old),
    }
    fleet.context.report["hands"] = fleet.hands()
    fleet.context.report["typed_before"] = fleet.context.world.acts.before(fleet.first_report_s)
    recovery = fleet.context.report["recovery"]
    fleet.context.timeline.add(
        fleet.context.player.time_s, "↗",
        f"new wearers' last 60 %: {recovery['new_before']:.3f} before, {recovery['new_after']:.3f} as served "
        f"by the update; enrolled wearers {recovery['old_before']:.3f} and {recovery['old_after']:.3f}", "green",
    )  # fmt: skip


def _accuracy(engine: OnnxEngine, rows: Rows) -> float:
    return float(np.mean(engine.run({"window": rows.windows})["probability"].argmax(1) == rows.labels))


def refuse(fleet: Fleet) -> None:
    """(j, k) A broken version 3 from the true pipeline, then a sound one signed with foreign keys."""
    wearer, world = fleet.wearers[0], fleet.context.world
    good, serving = installed(wearer), _digests(wearer)
    number_3 = good.manifest.version + 1
    broken = build_broken(good.folder, fleet.out / "broken", number_3)
    number = _states(fleet, wearer.device)[-1]["desired_version"]
    impostor = Impostor(fleet.out / "impostor")
    try:
        true_url = f"{fleet.host.url}/repository"
        refused = [_offer(fleet, wearer, number + 1, fleet.host.publish(broken), true_url)]
        forged = impostor.publish(_renumbered(good, fleet.out / "forged", number_3), wearer.device)
        refused.append(_offer(fleet, wearer, number + 2, forged, impostor.url))
    finally:
        impostor.close()
    if _digests(wearer) != serving:
        raise StoryError("a refused version serves")
    accuracy = wearer.perform(fleet.of(Role.NEW_TEST, wearer.number), pace=2 * TEST_PACE)
    fleet.context.report["refused"] = [{"version": number_3, **item} for item in refused]
    fleet.context.report["update"] |= _requests(fleet)  # nothing failed up to the very end
    fleet.context.timeline.add(
        fleet.context.player.time_s, "⊘",
        f"version {number_3} was refused twice: {refused[0]['code']} (its self-test) and {refused[1]['code']} "
        f"(foreign keys); version {good.manifest.version} serves on with accuracy {accuracy:.3f}", "yellow",
    )  # fmt: skip
    world.subscriber.publish(f"ew/1/{FLEET}/{wearer.device}/desired", b"", retain=True)  # nobody shall meet it again


def _renumbered(artifact: Artifact, folder: Path, version: int) -> Path:
    """A copy of an artifact that calls itself another version: nothing is wrong with it but who signs it."""
    if folder.exists():
        shutil.rmtree(folder)
    place = folder / artifact.manifest.name
    shutil.copytree(artifact.folder, place)
    (place / MANIFEST).unlink()  # a slot's files are links: never write through them
    (place / MANIFEST).write_bytes(artifact.manifest.model_copy(update={"version": version}).encode())
    return place


def _offer(fleet: Fleet, wearer: Wearer, number: int, digest: str, repository: str) -> dict[str, Any]:
    """Let the true director ask for it beside what serves; returns how the device refused."""
    digests = _digests(wearer) | {SERVICE: digest}
    fleet.host.direct(wearer.device, version=number, digests=digests, repository=repository)
    said = wait_for_state(fleet.context.world, wearer.device, number, REFUSED, timeout_s=180)
    return {"code": said["code"], "state": said["update_state"]}
