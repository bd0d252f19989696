"""What this device found out about models: their graphs optimised for this CPU, and how many threads suit them.

    <model sha256>-<key>.json   what was found out, and the digest of the file beside it; written last
    <model sha256>-<key>.onnx   the optimised graph; absent when the runtime could not write one

The key covers everything the result depends on: the model's bytes, the runtime's version, the CPU's features, the
providers, the thread settings, the cores that threads were measured on. An entry that is damaged, half written, or
made elsewhere is not there: it is removed, and made again by whoever needs it. Knows nothing of the runtime, so the
agent process may prune.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
FOLDER = "models"  # in the state folder
MAX_BYTES = 512 * 1024 * 1024
MAX_RECORD_BYTES = 64 * 1024
MAX_ENTRIES = 64


@dataclass(frozen=True, slots=True)
class Key:
    """What a result depends on. `cpu`: the features of this CPU; `threads`: as configured, 0 = measured.

    `cores`: how many there were to measure on, 0 where nothing is measured.
    """

    model_sha256: str
    runtime: str
    cpu: str
    providers: tuple[str, ...]
    threads: int
    spin: bool
    cores: int = 0

    @property
    def name(self) -> str:
        text = json.dumps([FORMAT, asdict(self)], sort_keys=True)
        return f"{self.model_sha256}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class Entry:
    """`optimised`: the graph to load, with optimisation off; None = load the model itself."""

    threads: int
    p50_us: float
    p95_us: float
    optimised: Path | None = None


class ModelCache:
    """One folder. Entries may be read and written by several processes: each file is whole or not there."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    def find(self, key: Key) -> Entry | None:
        """What is known, every byte verified; what is not sound is removed."""
        record = self.folder / f"{key.name}.json"
        if not record.exists():
            return None
        entry = self._read(key, record)
        if entry is None:
            self.drop(key)
        return entry

    def place(self, key: Key) -> Path | None:
        """Where the runtime may write an optimised graph, to be `keep`t or `discard`ed; None = nowhere."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return None
        return self.folder / f".{key.name}.{os.getpid()}.onnx"

    def keep(self, key: Key, entry: Entry) -> Entry | None:
        """Make `entry` durable, `entry.optimised` being the file at `place`; None when that cannot be done."""
        graph, record = self.folder / f"{key.name}.onnx", self.folder / f"{key.name}.json"
        document: dict[str, Any] = {
            "format": FORMAT, "key": asdict(key), "threads": entry.threads,
            "p50_us": entry.p50_us, "p95_us": entry.p95_us, "sha256": "",
        }  # fmt: skip
        try:
            if entry.optimised is not None:
                document["sha256"] = _digest(entry.optimised)
                _commit(entry.optimised, graph)
            temporary = self.folder / f".{key.name}.{os.getpid()}.json"
            temporary.write_text(json.dumps(_sealed(document), sort_keys=True))
            _commit(temporary, record)
        except OSError:
            self.drop(key)
            return None
        finally:
            self.discard(entry.optimised)
        self._shrink()
        return Entry(entry.threads, entry.p50_us, entry.p95_us, graph if entry.optimised is not None else None)

    def discard(self, place: Path | None) -> None:
        """Remove what was written at `place`."""
        if place is not None:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)

    def drop(self, key: Key) -> None:
        for ending in (".json", ".onnx"):  # the record first: without it the graph is nobody's
            self.discard(self.folder / f"{key.name}{ending}")

    def prune(self, models: Collection[str]) -> int:
        """Remove entries of models (sha256) that are not among these; bytes freed."""
        kept = set(models)
        return sum(_remove(path) for path in self._files() if path.name.lstrip(".").partition("-")[0] not in kept)

    def statistics(self) -> dict[str, float]:
        """Flat numbers for status and metrics."""
        files = self._files()
        return {"entries": sum(path.suffix == ".json" for path in files), "bytes": sum(map(_size, files))}

    def _read(self, key: Key, record: Path) -> Entry | None:
        try:
            with record.open("rb") as file:
                document = json.loads(file.read(MAX_RECORD_BYTES))
            if _sealed(document) != document or document["key"] != json.loads(json.dumps(asdict(key))):
                return None
            graph = self.folder / f"{key.name}.onnx" if document["sha256"] else None
            if graph is not None and _digest(graph) != document["sha256"]:
                return None
            threads, p50_us, p95_us = document["threads"], document["p50_us"], document["p95_us"]
            return Entry(int(threads), float(p50_us), float(p95_us), graph)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            return None

    def _files(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return [path for path in self.folder.iterdir() if path.suffix in (".json", ".onnx")]
        return []

    def _shrink(self) -> None:
        """Too much: the oldest entries go, whole."""
        entries: dict[str, list[Path]] = {}
        for path in sorted(self._files(), key=_age):
            entries.setdefault(path.stem.lstrip("."), []).append(path)
        sizes = {name: sum(map(_size, files)) for name, files in entries.items()}
        for name, files in list(entries.items())[:-1]:
            if sum(sizes.values()) <= self._max_bytes and len(sizes) <= MAX_ENTRIES:
                return
            for path in sorted(files, key=lambda one: one.suffix):  # .json before .onnx
                _remove(path)
            del sizes[name]


def _sealed(document: dict[str, Any]) -> dict[str, Any]:
    """With a digest over all other fields."""
    bare = {name: value for name, value in document.items() if name != "seal"}
    return {**bare, "seal": hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(temporary: Path, final: Path) -> None:
    """Make a file's bytes durable, then its name."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    descriptor = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _remove(path: Path) -> int:
    size = _size(path)
    with contextlib.suppress(OSError):
        path.unlink()
        return size
    return 0
