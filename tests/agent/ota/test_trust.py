"""A hostile, broken or merely old repository, a wrong clock, a deleted cache: each gets its stable code."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.contract.errors import ArtifactError, Corrupt, StateUnreadable, TooLarge, Unavailable, Untrusted
from agent.contract.repository import FamilyPolicy
from agent.ota import authority, child, trust
from agent.ota.authority import AHEAD_S, BEHIND_S, BUILT_S, Authority, Marks, judge_clock
from agent.ota.errors import ClockUnknown, Crashed, MetadataStale, ResourceLimit
from agent.ota.files import read_document, write_document
from tests.agent.ota.server import Fault, Server, serving
from tests.agent.ota.world import DAY_S, DEVICE, FAMILY, LIMITS, NOW_S, Thief, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world", FamilyPolicy("auto", (DEVICE,)))


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    with serving(world.repository.folder) as server:
        yield server


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's answer without the child (0.4 s each); tests marked `system` start it."""
    if "system" not in request.keywords:
        monkeypatch.setattr(child, "run", lambda _module, question, _limits: trust.main(dict(question)))


def ask(world: World, url: str, *, wall_s: float = NOW_S, manifests: tuple[str, ...] = ()) -> authority.Verdict:
    trusted = Authority(world.folder / "trust", world.root, timeout_s=60.0, limits=LIMITS)
    return trusted.consult(url, wall_s=wall_s, manifests=[(FAMILY, digest) for digest in manifests])


def marks(world: World) -> Marks:
    return Authority(world.folder / "trust", world.root).marks()


def test_what_is_signed_is_found(world: World, server: Server) -> None:
    digest = world.publish(version=3)
    verdict = ask(world, server.url, manifests=(digest, "a" * 64))
    assert set(verdict.manifests) == {digest}
    manifest = verdict.manifests[digest]
    assert (manifest.name, manifest.version, manifest.role, manifest.approved) == ("wrist", 3, "pipeline-wrist", True)
    assert verdict.policies[FAMILY].canary == (DEVICE,)
    assert list(verdict.directors.values()) == [world.keys.public("director").hex()]
    assert marks(world).seen["pipeline-wrist"][0] == 2
    assert marks(world).floor_s == NOW_S


def test_a_steady_poll_costs_two_requests(world: World, server: Server) -> None:
    digest = world.publish()
    ask(world, server.url, manifests=(digest,))
    server.asked.clear()
    ask(world, server.url, manifests=(digest,))
    assert [asked.path for asked in server.asked] == ["/metadata/2.root.json", "/metadata/timestamp.json"]


@pytest.mark.system
def test_the_real_child_answers_the_same(world: World, server: Server) -> None:
    digest = world.publish()
    assert set(ask(world, server.url, manifests=(digest,)).manifests) == {digest}
    with pytest.raises(Unavailable, match="cannot fetch"):
        ask(world, "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("timestamp.json", endless=True), TooLarge),
        (Fault("timestamp.json", extra=b" " * 20_000), TooLarge),
        (Fault("timestamp.json", body=b"<html>log in first</html>"), Corrupt),
        (Fault("timestamp.json", status=500), Unavailable),
        (Fault("timestamp.json", status=404), Unavailable),
        (Fault("timestamp.json", cut_after=100), Unavailable),
        (Fault("snapshot.json", body=b"{}"), Corrupt),
        (Fault("targets.json", extra=b" "), TooLarge),
        (Fault("pipeline-wrist.json", endless=True), TooLarge),
        (Fault("policy/", body=b'{"canary": [], "minimum_version": {}, "policy": "auto"}'), ArtifactError),
        (Fault("director/", endless=True), TooLarge),
        (Fault("2.root.json", body=b"<html>log in first</html>"), Corrupt),
        (Fault("2.root.json", status=200, endless=True), TooLarge),
        (Fault("2.root.json", status=500), Unavailable),
        (Fault("", status=302), Unavailable),
    ],
)
def test_a_repository_that_lies_is_refused_and_recovers(
    world: World, server: Server, fault: Fault, error: type[ArtifactError]
) -> None:
    digest = world.publish()
    server.faults = [fault]
    with pytest.raises(error) as caught:
        ask(world, server.url, manifests=(digest,))
    assert caught.value.code in {"too_large", "corrupt", "unavailable"}
    assert marks(world) == Marks()
    server.faults = []
    assert set(ask(world, server.url, manifests=(digest,)).manifests) == {digest}


def test_an_answer_that_is_broken_off_is_ended_at_once_and_not_when_its_error_is_forgotten(
    world: World, server: Server
) -> None:
    server.faults = [Fault("timestamp.json", endless=True)]
    with pytest.raises(TooLarge) as kept:
        ask(world, server.url)
    for thread in threading.enumerate():
        if "process_request" in thread.name:  # sends until its client is gone
            thread.join(60)
            assert not thread.is_alive()
    assert kept.tb is not None


def test_strangers_keys_are_untrusted(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")
    digest = other.publish(version=3)
    with serving(other.repository.folder) as server, pytest.raises(Untrusted):
        ask(world, server.url, manifests=(digest,))


def test_mix_and_match_of_old_and_new_metadata_is_refused(world: World, server: Server) -> None:
    old = world.copy("old")
    digest = world.publish()
    shutil.copy(
        old / "metadata" / "1.pipeline-wrist.json", world.repository.folder / "metadata" / "2.pipeline-wrist.json"
    )
    with pytest.raises(ArtifactError) as caught:
        ask(world, server.url, manifests=(digest,))
    assert caught.value.code in {"corrupt", "untrusted"}


def _delete_cache(world: World) -> None:
    shutil.rmtree(world.folder / "trust" / "metadata")


@pytest.mark.parametrize("between", [_delete_cache, lambda _: None])
def test_an_old_state_is_refused_with_and_without_tufs_cache(
    world: World, server: Server, between: Callable[[World], None]
) -> None:
    old = world.copy("old")
    digest = world.publish()
    ask(world, server.url, manifests=(digest,))
    between(world)
    with serving(old) as replay, pytest.raises(Untrusted):
        ask(world, replay.url, manifests=(digest,))
    assert set(ask(world, server.url, manifests=(digest,)).manifests) == {digest}


def test_an_old_root_is_refused_although_old_keys_signed_all_of_it(world: World, server: Server) -> None:
    old = world.copy("old")
    world.repository.rotate("timestamp", now_s=NOW_S)
    ask(world, server.url)
    _delete_cache(world)
    with serving(old) as replay, pytest.raises(Untrusted, match="root version 1"):
        ask(world, replay.url)


def test_a_rotated_key_starts_its_own_count_so_that_a_thief_cannot_lock_us_out(world: World, server: Server) -> None:
    thief = Thief(world.copy("fast"), world.keys, ("snapshot", "timestamp"))
    thief.timestamp.version = thief.snapshot.version = 2**31
    thief.sign()
    with serving(thief.folder) as fast:
        ask(world, fast.url)
    assert marks(world).seen["timestamp"][0] > 2**31
    with pytest.raises(Untrusted):
        ask(world, server.url)
    for name in ("snapshot", "timestamp"):
        world.repository.rotate(name, now_s=NOW_S)
    ask(world, server.url)
    assert marks(world).seen["timestamp"][0] < 100


def test_every_role_can_be_rotated_under_a_device_that_looks_on(world: World, server: Server) -> None:
    digest = world.publish()
    for name in ("timestamp", "snapshot", "targets", "pipeline-wrist", "root1", "root2", "root3", "director"):
        world.repository.rotate(name, now_s=NOW_S)
        verdict = ask(world, server.url, manifests=(digest,))
        assert set(verdict.manifests) == {digest}
        assert list(verdict.directors.values()) == [world.keys.public("director").hex()]
    assert marks(world).seen["root"][0] == 7


@pytest.mark.parametrize("day", [2, 8, 400, 5000])
def test_expired_metadata_is_stale_until_it_is_signed_again(world: World, server: Server, day: int) -> None:
    with pytest.raises(MetadataStale):
        ask(world, server.url, wall_s=NOW_S + day * DAY_S)
    if day < 10:
        world.repository.refresh_online(now_s=NOW_S + day * DAY_S)
        ask(world, server.url, wall_s=NOW_S + day * DAY_S)


@pytest.mark.parametrize("wall_s", [0.0, 1_577_836_800.0, BUILT_S - 2 * BEHIND_S])
def test_a_clock_before_this_build_is_unknown_and_asks_nobody(world: World, server: Server, wall_s: float) -> None:
    with pytest.raises(ClockUnknown):
        ask(world, server.url, wall_s=wall_s)
    assert server.asked == []


def test_a_clock_behind_a_time_once_signed_is_unknown(world: World, server: Server) -> None:
    ask(world, server.url)
    with pytest.raises(ClockUnknown):
        ask(world, server.url, wall_s=NOW_S - DAY_S)


def test_a_clock_far_behind_the_publishers_is_unknown_and_raises_no_floor(world: World, server: Server) -> None:
    with pytest.raises(ClockUnknown, match="in this device's future"):
        ask(world, server.url, wall_s=NOW_S - AHEAD_S - 60)
    assert marks(world).floor_s == BUILT_S


def test_a_small_lag_is_no_trouble() -> None:
    assert judge_clock(NOW_S - BEHIND_S, NOW_S) == NOW_S
    assert judge_clock(NOW_S + 5, NOW_S) == NOW_S + 5


def test_one_damaged_copy_of_the_marks_forgets_nothing(world: World, server: Server) -> None:
    ask(world, server.url)
    before = marks(world)
    (world.folder / "trust" / "marks.json").write_bytes(b"?")
    assert marks(world) == before


def test_two_damaged_copies_stop_installing_and_say_so(world: World, server: Server) -> None:
    ask(world, server.url)
    for path in (world.folder / "trust").glob("marks*.json"):
        path.write_bytes(b"?")
    with pytest.raises(StateUnreadable):
        ask(world, server.url)


def test_a_document_cut_between_its_copies_reads_as_the_new_one(tmp_path: Path) -> None:
    write_document(tmp_path / "d.json", {"n": 1})
    old = (tmp_path / "d.copy.json").read_bytes()
    write_document(tmp_path / "d.json", {"n": 2})
    (tmp_path / "d.copy.json").write_bytes(old)
    assert read_document(tmp_path / "d.json") == {"n": 2}
    (tmp_path / "d.json").unlink()
    assert read_document(tmp_path / "d.json") == {"n": 1}


def test_any_damage_in_the_cache_heals(world: World, server: Server) -> None:
    digest = world.publish()
    ask(world, server.url, manifests=(digest,))
    for path in sorted((world.folder / "trust" / "metadata").rglob("*")):
        if path.is_file():
            path.write_bytes(b"\x00" * 10)
    assert set(ask(world, server.url, manifests=(digest,)).manifests) == {digest}


def test_one_refresh_at_a_time_and_none_waits_for_ever(world: World, server: Server) -> None:
    ask(world, server.url)
    with trust._alone(world.folder / "trust" / "metadata", 0.0):
        impatient = Authority(world.folder / "trust", world.root, timeout_s=0.1, limits=LIMITS)
        with pytest.raises(Unavailable, match="does not end"):
            impatient.consult(server.url, wall_s=NOW_S)
    ask(world, server.url)


def test_a_missing_root_is_said(world: World, server: Server) -> None:
    world.root.unlink()
    with pytest.raises(StateUnreadable, match="embedded root"):
        ask(world, server.url)


def test_an_oversized_manifest_is_refused_before_it_is_fetched(world: World, server: Server) -> None:
    digest = world.publish()
    thief = Thief(world.copy("attacked"), world.keys, ("pipeline-wrist", "snapshot", "timestamp"))
    thief.pipeline.targets[f"{FAMILY}/manifests/{digest}"].length = 2**40
    thief.sign("pipeline-wrist")
    with serving(thief.folder) as attacked, pytest.raises(TooLarge):
        ask(world, attacked.url, manifests=(digest,))


def test_a_manifest_target_with_another_digest_than_its_name_is_untrusted(world: World) -> None:
    digest = world.publish()
    thief = Thief(world.copy("attacked"), world.keys, ("pipeline-wrist", "snapshot", "timestamp"))
    thief.put(thief.pipeline, f"{FAMILY}/manifests/{digest}", b"{}", {"name": "wrist", "version": 9})
    thief.sign("pipeline-wrist")
    with serving(thief.folder) as attacked, pytest.raises(Untrusted):
        ask(world, attacked.url, manifests=(digest,))


def test_a_signed_manifest_without_name_or_version_is_corrupt(world: World) -> None:
    digest = world.publish()
    thief = Thief(world.copy("attacked"), world.keys, ("pipeline-wrist", "snapshot", "timestamp"))
    thief.pipeline.targets[f"{FAMILY}/manifests/{digest}"].unrecognized_fields["custom"] = {"name": 1}
    thief.sign("pipeline-wrist")
    with serving(thief.folder) as attacked, pytest.raises(Corrupt):
        ask(world, attacked.url, manifests=(digest,))


# --- the child's frame -------------------------------------------------------------------------------------
def _answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Callable[[child.Limits], object]:
    package = tmp_path / "odd"
    package.mkdir()
    (package / "toy.py").write_text(f"import sys\nsys.path.insert(0, {str(Path.cwd())!r})\n{code}\n")
    monkeypatch.setattr(child, "_PACKAGES", package)
    return lambda limits: child.run("toy", {}, limits)


@pytest.mark.system
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", Crashed),
        ("raise SystemExit(3)", Crashed),
        ("print('[' * 100000)", Crashed),
        ("print('{\"error\": 1}')", Crashed),
        ("import sys; [sys.stdout.write('x' * 100000) for _ in range(10**6)]", ResourceLimit),
        ("import time; time.sleep(60)", ResourceLimit),
        ("import os; os.close(1); import time; time.sleep(60)", ResourceLimit),
        ("from agent.ota.child import serve; serve(lambda _: bytearray(2**33))", ResourceLimit),
        ("from agent.ota.child import serve\ndef f(_):\n  while True: pass\nserve(f)", ResourceLimit),
        ('print(\'{"error": {"code": "untrusted", "text": "no", "hint": ""}}\')', Untrusted),
    ],
)
def test_whatever_a_child_does_becomes_one_of_our_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[ArtifactError]
) -> None:
    run = _answers(tmp_path, monkeypatch, code)
    wall_s = 1.5 if error is ResourceLimit else 30.0  # the others end by themselves, however slow the machine
    with pytest.raises(error):
        run(child.Limits(memory_bytes=2**30, cpu_s=1, wall_s=wall_s))


@pytest.mark.system
@pytest.mark.parametrize(
    "code", ["import time; time.sleep(60)", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
)
def test_a_child_that_is_ended_or_dies_is_a_repository_out_of_reach(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    package = tmp_path / "odd" / "agent" / "ota"
    package.mkdir(parents=True)
    (package / "trust.py").write_text(code)
    monkeypatch.setattr(child, "_PACKAGES", tmp_path / "odd")
    hasty = Authority(world.folder / "trust", world.root, limits=child.Limits(2**30, 5, 1.0))
    with pytest.raises(Unavailable, match="the trust child") as caught:
        hasty.consult("http://127.0.0.1:1", wall_s=NOW_S)
    assert caught.value.code == "unavailable"
    assert hasty.marks() == Marks()


def test_the_highest_minimum_ever_signed_is_remembered(world: World, server: Server) -> None:
    trusted = Authority(world.folder / "trust", world.root, timeout_s=60.0, limits=LIMITS)
    trusted.consult(server.url, wall_s=NOW_S, families=[FAMILY, "unknown"])
    assert trusted.marks().minimums == {}
    world.repository.set_policy(FAMILY, FamilyPolicy("auto", (DEVICE,), {"wrist": 3}), now_s=NOW_S)
    trusted.consult(server.url, wall_s=NOW_S, families=[FAMILY])
    trusted.consult(server.url, wall_s=NOW_S)
    assert marks(world).minimums == {FAMILY: {"wrist": 3}}


def test_marks_from_before_minimums_were_kept_can_be_read(world: World) -> None:
    trusted = Authority(world.folder / "trust", world.root)
    write_document(world.folder / "trust" / authority.MARKS, {"seen": {"root": [2, "k"]}, "floor_s": NOW_S})
    assert trusted.marks() == Marks({"root": (2, "k")}, NOW_S)
