"""Fetches one blob by its digest: resumed where it was cut, bounded by what is signed, there whole or not at all.

    partial/<sha256>   grows while it is fetched, and survives a killed process
    blobs/<sha256>     appears by one rename, after its digest was right and its bytes were durable

Bytes that are here are not fetched again. Leaves to others: who signed size and digest.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agent import clock
from agent.contract.artifact import sha256_file
from agent.contract.errors import Corrupt, DiskFull, TooLarge, Unavailable
from agent.ota import wire
from agent.ota.files import make_folder, storage_error, sync_folder

ATTEMPTS_WITHOUT_PROGRESS = 3
RESERVE_BYTES = 1024 * 1024  # room left for everything else


@dataclass(frozen=True, slots=True)
class Wanted:
    """`size` and `sha256` come from signed metadata."""

    url: str
    sha256: str
    size: int


class Downloads:
    """The download store of one device. Blocking; owned by the thread that executes updates."""

    def __init__(
        self, folder: Path, *, tls: ssl.SSLContext | None = None, timeout_s: float = 15.0, pause_s: float = 0.5
    ) -> None:
        """`folder`: the state folder, shared with `Slots`. `pause_s`: before a try after one that brought nothing.

        Raises:
            DiskFull, StorageError
        """
        self._blobs = folder / "blobs"
        self._partial = folder / "partial"
        self._tls = tls
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self.moved_bytes = self.resumed = self.restarted = 0
        for place in (self._blobs, self._partial):
            make_folder(place)

    def has(self, wanted: Wanted) -> bool:
        """Whether it is here whole: by size; its digest was checked on arrival and is again before use."""
        return _size(self._blobs / wanted.sha256) == wanted.size

    def fetch(
        self, wanted: Wanted, *, deadline_s: float = 3600.0, cancelled: Callable[[], bool] = lambda: False
    ) -> Path:
        """Where the blob lies, fetched if it has to be.

        Raises:
            Unavailable: the server cannot be reached, refuses, is too slow, or this was cancelled; what came is kept.
            TooLarge: the server sends more than was signed. Corrupt: it sent other bytes. Both: nothing is kept.
            DiskFull: no room; nothing is kept. StorageError
        """
        place = self._blobs / wanted.sha256
        if self.has(wanted):
            return place
        self._check_room(wanted)
        until_s = clock.monotonic_s() + deadline_s
        try:
            self._gather(wanted, until_s, cancelled)
            self._settle(wanted, place)
        except (Corrupt, TooLarge, DiskFull):
            self._drop(wanted)
            raise
        return place

    def forget(self, keep: frozenset[str] = frozenset()) -> None:
        """Delete what was begun and is not wanted any more (`keep`: blob digests)."""
        for path in self._partial.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def statistics(self) -> dict[str, float]:
        """Flat numbers for status and metrics; `moved_bytes` counts what came over the wire, needed or not."""
        return {"moved_bytes": self.moved_bytes, "resumed": self.resumed, "restarted": self.restarted}

    # --- inside ---------------------------------------------------------------------------------------------
    def _gather(self, wanted: Wanted, until_s: float, cancelled: Callable[[], bool]) -> None:
        """Ask again from where the last answer was cut, as long as every few tries bring something new."""
        idle = 0
        while (have := max(_size(self._partial / wanted.sha256), 0)) != wanted.size:
            if have > wanted.size:
                self._drop(wanted)
                have = 0
            try:
                self._ask(wanted, have, until_s, cancelled)
            except Unavailable:
                idle = 0 if _size(self._partial / wanted.sha256) > have else idle + 1
                if idle >= ATTEMPTS_WITHOUT_PROGRESS or cancelled() or clock.monotonic_s() > until_s:
                    raise
                clock.sleep(self._pause_s * idle)

    def _ask(self, wanted: Wanted, have: int, until_s: float, cancelled: Callable[[], bool]) -> None:
        with wire.get(wanted.url, until_s=until_s, timeout_s=self._timeout_s, offset=have, tls=self._tls) as answer:
            self._check_answer(wanted, answer, have)
            self.resumed += answer.start > 0
            self.restarted += have > 0 and answer.start == 0
            try:
                with (self._partial / wanted.sha256).open("r+b" if have else "wb", buffering=0) as file:
                    file.truncate(answer.start)
                    file.seek(answer.start)
                    self._copy(wanted, answer, file, cancelled)
                    os.fsync(file.fileno())
            except OSError as error:
                raise storage_error(error, self._partial) from None

    def _check_answer(self, wanted: Wanted, answer: wire.Answer, have: int) -> None:
        if answer.status == 416:  # what we have is not a part of what the server has
            self._drop(wanted)
            raise Unavailable(f"{wanted.url} cannot go on from byte {have}")
        if answer.status not in {200, 206} or answer.start not in {0, have}:
            raise Unavailable(f"{wanted.url} answered {answer.status}", hint="It is tried again.")
        if answer.total is not None and answer.total > wanted.size:
            raise TooLarge(f"{wanted.url} announces {answer.total} bytes, {wanted.size} are signed")
        if answer.total is not None and answer.total < wanted.size:
            raise Corrupt(f"{wanted.url} announces {answer.total} bytes, {wanted.size} are signed")

    def _copy(self, wanted: Wanted, answer: wire.Answer, file: BinaryIO, cancelled: Callable[[], bool]) -> None:
        at = answer.start
        for chunk in answer.body:
            self.moved_bytes += len(chunk)
            at += len(chunk)
            if at > wanted.size:
                raise TooLarge(f"{wanted.url} sends more than the {wanted.size} bytes that are signed")
            _write(file, chunk)
            if cancelled():
                raise Unavailable(f"fetching {wanted.url} was cancelled")
        if at < wanted.size:
            raise Unavailable(f"{wanted.url} was cut after {at} of {wanted.size} bytes")

    def _settle(self, wanted: Wanted, place: Path) -> None:
        partial = self._partial / wanted.sha256
        try:
            partial.touch()  # an empty blob was never asked for
            if sha256_file(partial) != wanted.sha256:
                raise Corrupt(f"{wanted.url} does not have the digest that is signed", hint="It is fetched again.")
            partial.chmod(0o444)
            partial.replace(place)
            sync_folder(place.parent)
        except OSError as error:
            raise storage_error(error, place) from None

    def _check_room(self, wanted: Wanted) -> None:
        missing = wanted.size - max(_size(self._partial / wanted.sha256), 0)
        space = os.statvfs(self._partial)
        if space.f_bavail * space.f_frsize < missing + RESERVE_BYTES:
            raise DiskFull(
                f"no room for the {missing} bytes of {wanted.url}", hint="Free disk space; serving goes on."
            )

    def _drop(self, wanted: Wanted) -> None:
        with contextlib.suppress(OSError):
            (self._partial / wanted.sha256).unlink(missing_ok=True)


def _write(file: BinaryIO, chunk: bytes) -> None:
    """All of it: an unbuffered write on a nearly full disk stops half-way before it fails."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


def _size(path: Path) -> int:
    """-1 = not there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
