"""Slots and the pointer: whole or not there, old or new, never collected while needed; also under kill -9."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agent.contract.artifact import open_artifact
from agent.contract.errors import Corrupt, StateUnreadable, Unavailable
from agent.decisions.updates import Choice, Selection
from agent.ota.slots import Pointer, Slots
from tests.agent.ota.world import make_artifact

NOBODY = "9" * 64


def stored(slots: Slots, folder: Path) -> str:
    """The artifact's files as blobs, as downloads leave them."""
    artifact = open_artifact(folder)
    for role, blob in artifact.manifest.blobs.items():
        shutil.copyfile(artifact.path(role), slots.blobs / blob.sha256)
    shutil.copyfile(folder / "manifest.json", slots.blobs / artifact.digest)
    return artifact.digest


def choose(digest: str) -> Selection:
    return {"wrist": Choice({"wrist": digest}, ("wrist",))}


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path / "state")


@pytest.fixture
def digest(slots: Slots, tmp_path: Path) -> str:
    make_artifact(tmp_path / "one", version=1)
    return stored(slots, tmp_path / "one")


def test_a_slot_is_an_artifact_folder_made_of_links(slots: Slots, digest: str) -> None:
    artifact = slots.build(digest)
    assert artifact.digest == digest
    assert artifact.folder == slots.path(digest)
    model = artifact.manifest.blobs["model"].sha256
    assert artifact.path("model").samefile(slots.blobs / model)
    assert slots.build(digest) == artifact


def test_a_slot_without_all_its_blobs_is_not_made(slots: Slots, digest: str) -> None:
    blob = next(path for path in slots.blobs.iterdir() if path.name != digest)
    blob.unlink()
    with pytest.raises(Unavailable):
        slots.build(digest)
    assert not slots.has(digest)
    with pytest.raises(Unavailable):
        slots.open(digest)


def test_a_manifest_nobody_fetched_is_unavailable(slots: Slots) -> None:
    with pytest.raises(Unavailable):
        slots.build(NOBODY)


def test_a_damaged_manifest_is_dropped(slots: Slots, digest: str) -> None:
    (slots.blobs / digest).write_bytes(b"{}")
    with pytest.raises(Corrupt):
        slots.build(digest)
    assert not (slots.blobs / digest).exists()


def test_damaged_bytes_are_noticed_dropped_and_healed(slots: Slots, digest: str, tmp_path: Path) -> None:
    model = slots.build(digest).path("model")
    data = bytearray(model.read_bytes())
    data[100] ^= 1
    model.write_bytes(data)
    with pytest.raises(Corrupt):
        slots.open(digest)
    with pytest.raises(Corrupt):  # the blob is the same file: it has to be fetched again
        slots.build(digest)
    assert not slots.has(digest)
    stored(slots, tmp_path / "one")
    assert slots.build(digest).digest == digest


def test_a_slot_under_another_name_is_corrupt(slots: Slots, digest: str) -> None:
    slots.build(digest).folder.rename(slots.path(NOBODY))
    with pytest.raises(Corrupt, match="another manifest"):
        slots.open(NOBODY)


def test_a_file_system_without_links_gets_copies(slots: Slots, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr("os.link", refuse)
    artifact = slots.build(digest)
    assert not artifact.path("model").samefile(slots.blobs / artifact.manifest.blobs["model"].sha256)


def test_the_pointer_keeps_what_it_replaces_and_twice_is_once(slots: Slots) -> None:
    assert slots.pointer() == Pointer(None, None)
    slots.point(choose("a" * 64))
    assert slots.point(choose("b" * 64)) == slots.point(choose("b" * 64)) == slots.pointer()
    assert slots.pointer() == Pointer(choose("b" * 64), choose("a" * 64))
    assert slots.point(None) == Pointer(None, choose("b" * 64))


@pytest.mark.parametrize("damage", [b"", b"{", b"\x00" * 500])
def test_one_damaged_copy_of_the_pointer_does_no_harm(slots: Slots, damage: bytes) -> None:
    slots.point(choose("a" * 64))
    (slots.folder / "current.json").write_bytes(damage)
    assert slots.pointer().current == choose("a" * 64)


def test_a_flipped_bit_in_the_pointer_is_noticed(slots: Slots) -> None:
    slots.point(choose("a" * 64))
    path = slots.folder / "current.json"
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert slots.pointer().current == choose("a" * 64)


def test_two_damaged_copies_are_said_and_nothing_is_collected(slots: Slots, digest: str) -> None:
    slots.build(digest)
    slots.point(choose(digest))
    for path in slots.folder.glob("current*.json"):
        path.write_bytes(b"?")
    with pytest.raises(StateUnreadable):
        slots.pointer()
    with pytest.raises(StateUnreadable):
        slots.collect()
    assert slots.has(digest)


def test_collecting_keeps_what_serves_what_served_and_what_is_asked_for(slots: Slots, tmp_path: Path) -> None:
    digests = []
    for version in range(1, 6):
        make_artifact(tmp_path / f"v{version}", version=version)
        digests.append(stored(slots, tmp_path / f"v{version}"))
        slots.build(digests[-1])
    slots.point(choose(digests[1]))
    slots.point(choose(digests[2]))
    assert slots.collect(keep=[digests[4]]) > 0
    assert [slots.has(digest) for digest in digests] == [False, True, True, False, True]
    assert slots.collect(keep=[digests[4]]) == 0
    assert slots.open(digests[1]).digest == digests[1]
    kept = {blob.sha256 for digest in (1, 2, 4) for blob in slots.open(digests[digest]).manifest.blobs.values()}
    assert {path.name for path in slots.blobs.iterdir()} == kept | {digests[1], digests[2], digests[4]}


def test_leftovers_of_a_killed_build_are_collected(slots: Slots, digest: str) -> None:
    (slots.path(digest).parent / ".half.tmp").mkdir()
    slots.collect(keep=[digest])
    assert [path.name for path in slots.path(digest).parent.iterdir()] == []


def test_a_collection_that_is_cut_off_leaves_no_half_slot_under_its_own_name(
    slots: Slots, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots.build(digest)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder: (folder / "manifest.json").unlink())
        slots.collect()
    folder = slots.path(digest).parent
    assert [path.name for path in folder.iterdir()] == [f".{digest}.gone"]
    slots.collect()
    assert list(folder.iterdir()) == []


_SWAP = """
import sys
from pathlib import Path
from agent.decisions.updates import Choice
from agent.ota.slots import Slots
slots = Slots(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for digest in sys.argv[2:]:
        slots.build(digest)
        slots.point({"wrist": Choice({"wrist": digest}, ("wrist",))})
        slots.collect(keep=sys.argv[2:])
        (slots.path(sys.argv[2]) / "manifest.json").unlink()
"""


@pytest.mark.system
def test_kill_at_random_moments_of_a_swap_leaves_the_old_or_the_new(slots: Slots, tmp_path: Path) -> None:
    digests = []
    for version in (1, 2):
        make_artifact(tmp_path / f"v{version}", version=version)
        digests.append(stored(slots, tmp_path / f"v{version}"))
    slots.build(digests[0])
    slots.point(choose(digests[0]))
    dice = np.random.default_rng(7)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", _SWAP, str(slots.folder), *digests], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(dice.random()) * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        after = Slots(slots.folder)
        current = after.pointer().current
        assert current in (choose(digests[0]), choose(digests[1]))
        assert current is not None
        assert after.build(current["wrist"].artifacts["wrist"]).digest in digests
