"""Where artifacts lie on the device, and which selection is the current one.

    blobs/<sha256>              every file once, by its digest
    slots/<manifest digest>/    an artifact folder: manifest.json and links to blobs
    current.json                the selection that serves and the one before it

Promises: a slot is complete or not there; the pointer is the old or the new one, whatever interrupts; what the
current or previous selection needs is never collected. Fetching blobs is `download`'s business.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.contract.artifact import FILES, MANIFEST, Artifact, Manifest, open_artifact, parse_manifest, sha256
from agent.contract.errors import ArtifactError, Corrupt, StateUnreadable, Unavailable
from agent.decisions.updates import Selection, digests, load_selection
from agent.ota.files import make_folder, read_document, storage_error, sync_folder, write_document, write_file

POINTER = "current.json"


@dataclass(frozen=True, slots=True)
class Pointer:
    """None: nothing was ever installed; the factory's artifacts serve."""

    current: Selection | None = None
    previous: Selection | None = None


class Slots:
    """The blobs, slots and pointer of one device, in its state folder. Owned by one thread."""

    def __init__(self, folder: Path) -> None:
        """Raises: DiskFull, StorageError."""
        self.folder = folder
        self.blobs = folder / "blobs"
        self._slots = folder / "slots"
        for place in (self.blobs, self._slots):
            make_folder(place)

    # --- slots ----------------------------------------------------------------------------------------------
    def path(self, digest: str) -> Path:
        return self._slots / digest

    def has(self, digest: str) -> bool:
        return (self.path(digest) / MANIFEST).is_file()

    def open(self, digest: str) -> Artifact:
        """The artifact in a slot, every byte read and verified.

        Raises:
            Unavailable: no such slot. Corrupt: its bytes changed; build it again.
        """
        if not self.has(digest):
            raise Unavailable(f"no slot holds the manifest {digest[:12]}", hint="Fetch it again.")
        artifact = open_artifact(self.path(digest))
        if artifact.digest != digest:
            raise Corrupt(f"the slot {digest[:12]} holds another manifest ({artifact.digest[:12]})")
        return artifact

    def build(self, digest: str) -> Artifact:
        """Make a slot from its manifest and blobs, all of which are in the store; a sound one is kept as it is.

        Raises:
            Unavailable: a blob is missing. Corrupt: a blob or the manifest is damaged (and is dropped).
            DiskFull, StorageError
        """
        if self.has(digest):
            with contextlib.suppress(ArtifactError):
                return self.open(digest)
        data = self._manifest_bytes(digest)
        temporary = self._slots / f".{digest}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode=0o700)
            self._fill(temporary, data, parse_manifest(data))
            self._put_in_place(temporary, digest)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise storage_error(error, self.path(digest)) from None
        try:
            return self.open(digest)
        except Corrupt:
            self._drop_damaged(digest)
            raise

    def _manifest_bytes(self, digest: str) -> bytes:
        try:
            data = (self.blobs / digest).read_bytes()
        except OSError as error:
            raise Unavailable(f"the manifest {digest[:12]} is not here: {error.strerror}") from None
        if sha256(data) != digest:
            (self.blobs / digest).unlink(missing_ok=True)
            raise Corrupt(f"the stored manifest {digest[:12]} is damaged", hint="It is fetched again.")
        return data

    def _fill(self, folder: Path, data: bytes, manifest: Manifest) -> None:
        for role, blob in manifest.blobs.items():
            if role in FILES:
                source = self.blobs / blob.sha256
                if not source.is_file():
                    raise Unavailable(f"the {role} of '{manifest.name}' is not here", hint="Fetch it again.")
                _link(source, folder / FILES[role])
        write_file(folder / MANIFEST, data)

    def _put_in_place(self, temporary: Path, digest: str) -> None:
        shutil.rmtree(self.path(digest), ignore_errors=True)  # only a damaged one can be there
        temporary.rename(self.path(digest))
        sync_folder(self._slots)

    def _drop_damaged(self, digest: str) -> None:
        """Forget the slot and its blobs: which of them is damaged shows when they are fetched again."""
        with contextlib.suppress(ArtifactError):
            for blob in parse_manifest((self.path(digest) / MANIFEST).read_bytes()).blobs.values():
                if not _is_sound(self.blobs / blob.sha256, blob.sha256):
                    (self.blobs / blob.sha256).unlink(missing_ok=True)
        shutil.rmtree(self.path(digest), ignore_errors=True)

    # --- the pointer ----------------------------------------------------------------------------------------
    def pointer(self) -> Pointer:
        """Raises: StateUnreadable: both copies are damaged; serve the factory's artifacts."""
        document = read_document(self.folder / POINTER)
        if document is None:
            return Pointer()
        try:
            return Pointer(
                *(
                    None if part is None else load_selection(part)
                    for part in (document["current"], document["previous"])
                )
            )
        except (KeyError, TypeError, AttributeError):
            raise StateUnreadable(f"{self.folder / POINTER} is of another format") from None

    def point(self, to: Selection | None) -> Pointer:
        """Make `to` the current selection, atomically; the one it replaces is kept. Twice is once.

        Raises:
            DiskFull, StorageError, StateUnreadable
        """
        before = self.pointer()
        if before.current == to:
            return before
        after = Pointer(to, before.current)
        write_document(self.folder / POINTER, asdict(after))
        return after

    # --- collecting -----------------------------------------------------------------------------------------
    def collect(self, keep: Iterable[str] = ()) -> int:
        """Delete slots that neither pointer nor `keep` (manifest digests) needs, then blobs in no slot; bytes freed.

        Raises:
            StateUnreadable: what is needed is not known; nothing is deleted.
        """
        pointer = self.pointer()
        wanted = set(keep) | digests(pointer.current or {}) | digests(pointer.previous or {})
        for slot in self._slots.iterdir():
            if slot.name not in wanted:
                _remove(slot)
        needed = wanted | {blob for slot in self._slots.iterdir() for blob in _blobs_of(slot)}
        freed = 0
        for blob in self.blobs.iterdir():
            if blob.name not in needed:
                freed += _delete(blob)
        return freed

    def stored(self) -> frozenset[str]:
        """Digests of all blobs."""
        return frozenset(entry.name for entry in self.blobs.iterdir())

    def statistics(self) -> dict[str, float]:
        """Flat numbers for status and metrics."""
        sizes = [entry.stat().st_size for entry in self.blobs.iterdir() if entry.is_file()]
        return {"slots": sum(1 for _ in self._slots.iterdir()), "blobs": len(sizes), "blob_bytes": sum(sizes)}


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # a file system without hard links, or too many of them
        shutil.copyfile(source, place)
        with place.open("rb+") as file:
            os.fsync(file.fileno())


def _blobs_of(slot: Path) -> list[str]:
    try:
        manifest = parse_manifest((slot / MANIFEST).read_bytes())
    except (ArtifactError, OSError):
        return []
    return [blob.sha256 for blob in manifest.blobs.values()]


def _is_sound(path: Path, digest: str) -> bool:
    from agent.contract.artifact import sha256_file

    try:
        return sha256_file(path) == digest
    except OSError:
        return False


def _remove(slot: Path) -> None:
    """Best effort. What is cut off leaves a hidden folder for the next time: under its own name a slot is whole."""
    gone = slot if slot.name.startswith(".") else slot.with_name(f".{slot.name}.gone")
    with contextlib.suppress(OSError):
        if gone is not slot:
            slot.rename(gone)
        shutil.rmtree(gone)


def _delete(path: Path) -> int:
    """Bytes given back; a folder or an unreadable file gives none."""
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        path.unlink()
        return size
    return 0
