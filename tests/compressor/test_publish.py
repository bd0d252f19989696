"""The update repository: signed state before or after, whatever interrupts; nothing changed on disk is made valid."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from agent.contract.errors import ConfigError, ContractError, Corrupt, StateLocked, Untrusted
from agent.contract.repository import FamilyPolicy, approval_path
from agent.contract.signed import key_id
from agent.ota import trust
from compressor import publish
from compressor.keys import KeyRing
from compressor.publish import KEPT_VERSIONS, Repository
from tests.agent.ota.server import serving
from tests.agent.ota.world import DAY_S, FAMILY, NOW_S, World, make_artifact


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where the machine offers that: every write here is fsynced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="edgewarden-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


def seen_by_a_device(world: World, *digests: str, now_s: float = NOW_S) -> dict[str, bool]:
    """Digest -> approved, through the device's own client with an empty cache."""
    with tempfile.TemporaryDirectory() as cache, serving(world.repository.folder) as server:
        pairs = tuple((FAMILY, digest) for digest in digests)
        answer = trust.consult(trust.Request(cache, str(world.root), server.url, now_s, {}, pairs))
    return {digest: entry["approved"] for digest, entry in answer.manifests.items()}


def versions(repository: Repository) -> dict[str, int]:
    """Version of each role as signed now."""
    folder = repository.folder / "metadata"
    timestamp = Metadata.from_file(str(folder / "timestamp.json")).signed
    snapshot = Metadata.from_file(str(folder / f"{timestamp.snapshot_meta.version}.snapshot.json")).signed
    return {name.removesuffix(".json"): meta.version for name, meta in snapshot.meta.items()}


def test_a_published_artifact_is_found_by_a_device_and_approved_apart(world: World) -> None:
    digest = world.publish(approve=False)
    assert seen_by_a_device(world, digest) == {digest: False}
    world.repository.approve([digest], now_s=NOW_S)
    assert seen_by_a_device(world, digest) == {digest: True}
    assert world.repository.published() == [publish.Published(digest, FAMILY, "wrist", 1, approved=True)]


def test_publishing_or_approving_again_changes_nothing(world: World) -> None:
    digest = world.publish()
    before = sorted(path.name for path in world.repository.folder.rglob("*"))
    world.repository.publish([world.folder / "artifact-1"], now_s=NOW_S)
    world.repository.approve([digest], now_s=NOW_S)
    assert sorted(path.name for path in world.repository.folder.rglob("*")) == before


def test_one_version_is_one_content_and_versions_rise(world: World) -> None:
    world.publish(version=2)
    with pytest.raises(ConfigError, match="version 2 is there already"):
        world.publish(version=2, scale=9.0)
    with pytest.raises(ConfigError):
        world.publish(version=1)
    world.publish(version=1, name="wrist-accel")


def test_an_unknown_family_or_a_damaged_artifact_is_not_published(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no family 'door'"):
        world.publish(service="door")
    make_artifact(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.onnx").write_bytes(b"x")
    with pytest.raises(Corrupt):
        world.repository.publish([tmp_path / "damaged"], now_s=NOW_S)
    assert world.repository.published() == []


def test_all_artifacts_of_a_call_become_visible_together_or_not_at_all(world: World, tmp_path: Path) -> None:
    make_artifact(tmp_path / "a", version=2)
    make_artifact(tmp_path / "b", version=1, service="door", name="door")
    with pytest.raises(ConfigError):
        world.repository.publish([tmp_path / "a", tmp_path / "b"], now_s=NOW_S)
    assert world.repository.published() == []


def test_publishing_needs_no_offline_key_and_approving_does(world: World) -> None:
    for name in ("root1", "root2", "root3", "targets"):
        (world.keys.folder / f"{name}.pem").unlink()
    digest = world.publish(approve=False)
    assert world.repository.refresh_online(now_s=NOW_S + DAY_S)
    with pytest.raises(ConfigError, match="cannot sign targets"):
        world.repository.approve([digest], now_s=NOW_S)
    assert seen_by_a_device(world, digest, now_s=NOW_S + DAY_S) == {digest: False}


def test_what_is_not_published_cannot_be_approved(world: World) -> None:
    with pytest.raises(ConfigError, match="is published"):
        world.repository.approve(["a" * 64])


def test_old_versions_leave_the_metadata_and_their_files_stay(world: World) -> None:
    digests = [world.publish(version=version, approve=False) for version in range(1, KEPT_VERSIONS + 3)]
    assert [entry.digest for entry in world.repository.published()] == digests[2:]
    role = next(iter(sorted((world.repository.folder / "metadata").glob("*.pipeline-wrist.json"), key=_number)[-1:]))
    targets = Metadata.from_file(str(role)).signed.targets
    assert len([path for path in targets if "/blobs/" in path]) <= 3 * KEPT_VERSIONS
    assert len(list((world.repository.folder / "targets" / "wrist" / "manifests").iterdir())) == len(digests)


def _number(path: Path) -> int:
    return int(path.name.split(".")[0])


def test_refreshing_signs_only_what_has_lived_half_its_life(world: World) -> None:
    first = versions(world.repository)
    assert not world.repository.refresh_online(now_s=NOW_S + 0.4 * DAY_S)
    assert world.repository.refresh_online(now_s=NOW_S + 0.6 * DAY_S)
    assert versions(world.repository) == first
    assert world.repository.refresh_online(now_s=NOW_S + 20 * DAY_S)
    assert versions(world.repository) == first | {"pipeline-wrist": 2}
    assert seen_by_a_device(world, now_s=NOW_S + 20.9 * DAY_S) == {}
    assert 344 < world.repository.days_left(now_s=NOW_S + 20 * DAY_S)["targets"] < 346


def test_a_policy_is_signed_and_its_minimum_never_falls(world: World) -> None:
    world.repository.set_policy(FAMILY, FamilyPolicy("auto", ("b", "a"), {"wrist": 3}), now_s=NOW_S)
    assert world.repository.policy(FAMILY) == FamilyPolicy("auto", ("a", "b"), {"wrist": 3})
    for minimum in ({}, {"wrist": 2}):
        with pytest.raises(ConfigError, match="cannot be lowered"):
            world.repository.set_policy(FAMILY, FamilyPolicy(minimum_version=minimum), now_s=NOW_S)
    with pytest.raises(ConfigError):
        world.repository.policy("door")


@pytest.mark.parametrize("family", ["approved", "policy", "director"])
def test_a_family_cannot_take_a_name_that_has_a_meaning(world: World, family: str) -> None:
    world.keys.add_family(family)
    with pytest.raises(ConfigError, match="cannot be called"):
        world.repository.set_policy(family, FamilyPolicy(), now_s=NOW_S)


def test_a_family_is_an_identifier(world: World) -> None:
    with pytest.raises(ContractError):
        world.keys.add_family("../x")


def test_a_second_repository_in_the_same_folder_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="already"):
        Repository.init(world.repository.folder, world.keys, {})


def test_an_init_that_was_interrupted_can_be_run_again(world: World) -> None:
    (world.repository.folder / "metadata" / "timestamp.json").unlink()
    Repository.init(world.repository.folder, world.keys, {FAMILY: FamilyPolicy()}, now_s=NOW_S)
    assert world.repository.published() == []


@pytest.mark.parametrize("file", ["timestamp", "1.snapshot", "1.targets", "1.pipeline-wrist", "1.root"])
@pytest.mark.parametrize("damage", ["flip", "gone", "nonsense", "strangers"])
def test_metadata_changed_on_disk_is_never_signed_again(world: World, tmp_path: Path, file: str, damage: str) -> None:
    path = world.repository.folder / "metadata" / f"{file}.json"
    if damage == "gone":
        path.unlink()
    elif damage == "strangers":
        other = World(tmp_path / "other")
        shutil.copy(other.repository.folder / "metadata" / f"{file}.json", path)
    else:
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"version":1', b'"version":9') if damage == "flip" else b"{]")
    with pytest.raises((Untrusted, ConfigError)):
        world.publish()
    with pytest.raises((Untrusted, ConfigError)):
        world.repository.refresh_online(now_s=NOW_S + DAY_S)


def test_a_publisher_with_other_keys_cannot_sign_for_this_repository(world: World, tmp_path: Path) -> None:
    keys = KeyRing.create(tmp_path / "other-keys", [FAMILY])
    make_artifact(tmp_path / "a")
    with pytest.raises(Untrusted, match="not signed by the keys"):
        Repository(world.repository.folder, keys).publish([tmp_path / "a"], now_s=NOW_S)


def test_two_publishers_take_turns_and_neither_waits_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "LOCK_WAIT_S", 0.05)
    with world.repository._locked(), pytest.raises(StateLocked):
        Repository(world.repository.folder, world.keys).published()
    assert world.repository.published() == []


def test_publishing_from_many_threads_loses_nothing(world: World, tmp_path: Path) -> None:
    for number in range(4):
        make_artifact(tmp_path / f"a{number}", name=f"wrist-{number}")
    threads = [
        threading.Thread(
            target=lambda folder: Repository(world.repository.folder, world.keys).publish([folder], now_s=NOW_S),
            args=(tmp_path / f"a{number}",),
        )
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.name for entry in world.repository.published()] == [f"wrist-{number}" for number in range(4)]


# --- rotation ----------------------------------------------------------------------------------------------
NAMES = ("root1", "root2", "root3", "targets", "snapshot", "timestamp", "pipeline-wrist", "director")


@pytest.mark.parametrize("name", NAMES)
def test_a_rotated_key_is_worth_nothing(world: World, name: str) -> None:
    digest = world.publish()
    old = key_id(world.keys.public(name))
    world.repository.rotate(name, now_s=NOW_S)
    assert seen_by_a_device(world, digest) == {digest: True}
    newest = [_newest(world, role) for role in ("root", "targets", "snapshot", "pipeline-wrist")]
    assert not any(old.encode() in path.read_bytes() for path in newest if name not in {"root1", "root2", "root3"})
    world.publish(version=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_publisher_that_runs_while_a_key_is_rotated_beside_it_goes_on(world: World, name: str) -> None:
    running = Repository(world.repository.folder, KeyRing(world.keys.folder))
    world.publish()
    running.published()
    world.repository.rotate(name, now_s=NOW_S)
    assert running.refresh_online(now_s=NOW_S + 5 * DAY_S)
    assert [entry.version for entry in running.published()] == [1]


def _newest(world: World, role: str) -> Path:
    return max((world.repository.folder / "metadata").glob(f"*.{role}.json"), key=_number)


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_a_rotation_interrupted_at_any_write_can_be_finished(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = world.publish()
    write = publish.write_file
    finished = False
    for survive in range(12):
        count = 0

        def fragile(path: Path, data: bytes, survive: int = survive) -> None:
            nonlocal count
            if count == survive:
                raise _Interrupted
            count += 1
            write(path, data)

        monkeypatch.setattr(publish, "write_file", fragile)
        try:
            world.repository.rotate(name, now_s=NOW_S)
            finished = True
        except _Interrupted:
            monkeypatch.setattr(publish, "write_file", write)
            Repository(world.repository.folder, KeyRing(world.keys.folder)).rotate(name, now_s=NOW_S)
        monkeypatch.setattr(publish, "write_file", write)
        assert not world.keys.is_rotating(name)
        assert seen_by_a_device(world, digest) == {digest: True}
        world.keys = KeyRing(world.keys.folder)
        world.repository = Repository(world.repository.folder, world.keys)
        if finished:
            break
    assert finished


@pytest.mark.parametrize("name", NAMES)
def test_a_rotation_interrupted_before_the_key_takes_its_place_can_be_finished(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = world.publish()

    def die(*_: object) -> None:
        raise _Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(KeyRing, "promote", die)
        with pytest.raises(_Interrupted):
            world.repository.rotate(name, now_s=NOW_S)
    assert seen_by_a_device(world, digest) == {digest: True}
    world.repository.refresh_online(now_s=NOW_S + DAY_S)  # the publisher goes on meanwhile
    Repository(world.repository.folder, KeyRing(world.keys.folder)).rotate(name, now_s=NOW_S + DAY_S)
    assert seen_by_a_device(world, digest, now_s=NOW_S + DAY_S) == {digest: True}
    assert not world.keys.is_rotating(name)


@pytest.mark.parametrize("name", ["targets", "timestamp", "snapshot"])
def test_any_operation_heals_a_rotation_that_stopped_after_the_root(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = world.publish()
    write = publish.write_file

    def root_only(path: Path, data: bytes) -> None:
        if "root" not in path.name:
            raise _Interrupted
        write(path, data)

    monkeypatch.setattr(publish, "write_file", root_only)
    with pytest.raises(_Interrupted):
        world.repository.rotate(name, now_s=NOW_S)
    monkeypatch.setattr(publish, "write_file", write)
    world.publish(version=2)
    assert seen_by_a_device(world, digest) == {digest: True}
    world.repository.rotate(name, now_s=NOW_S)
    assert not world.keys.is_rotating(name)


_PUBLISH = """
import sys
from pathlib import Path
from compressor.keys import KeyRing
from compressor.publish import Repository
repository = Repository(Path(sys.argv[1]), KeyRing(Path(sys.argv[2])))
print("ready", flush=True)
repository.publish([Path(folder) for folder in sys.argv[4:]], now_s=float(sys.argv[3]))
"""


@pytest.mark.system
def test_kill_at_random_moments_of_publishing_shows_devices_the_old_or_the_new(world: World, tmp_path: Path) -> None:
    shown = [world.publish()]
    for round_ in range(8):
        folder = tmp_path / f"a{round_}"
        digest = make_artifact(folder, version=2 + round_)
        arguments = [str(world.repository.folder), str(world.keys.folder), str(NOW_S), str(folder)]
        process = subprocess.Popen([sys.executable, "-c", _PUBLISH, *arguments], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(round_ * 0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = seen_by_a_device(world, *shown, digest)
        assert set(found) - {digest} == set(shown)
        world.repository.publish([folder], now_s=NOW_S)
        shown = [*shown, digest][-4:]
        assert set(seen_by_a_device(world, *shown)) == set(shown)


def test_an_approval_lies_where_only_targets_may_sign(world: World) -> None:
    digest = world.publish()
    targets = Metadata.from_file(str(_newest(world, "targets"))).signed.targets
    assert approval_path(FAMILY, digest) in targets
