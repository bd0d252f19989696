"""Opens the host's database: one writer at a time, one host per database, foreign errors translated.

SQLite in WAL mode; a committed transaction survives a power cut (synchronous = FULL), which is what an
acknowledgement to a device promises. Readers never wait for the writer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, create_engine, event, insert, inspect, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from agent.contract.errors import DiskFull, StateLocked, StateUnreadable, StorageError
from compressor.fleet.database.tables import MIGRATIONS, SCHEMA

DATABASE = "fleet.db"
LOCK = "fleet.lock"
BUSY_S = 10.0
WAL_LIMIT_BYTES = 16 * 1024 * 1024
_FULL = ("database or disk is full", "disk I/O error")

__all__ = ["DATABASE", "Connection", "Database", "Row"]


class Database:
    """Tables of one fleet. Any thread may read; writers queue up."""

    def __init__(self, folder: Path, *, serving: bool = False) -> None:
        """Open and migrate. `serving` takes the folder for this process alone; commands do without.

        Raises:
            StateLocked: another host serves from this folder.
            StateUnreadable: the folder or database cannot be used, or is of a newer version.
            DiskFull
        """
        self.path = folder / DATABASE
        self._lock = _take_lock(folder) if serving else None
        self._writing = threading.Lock()
        self._engines: tuple[Engine, ...] = ()
        try:
            self._writer = self._open("BEGIN IMMEDIATE")
            self._reader = self._open("BEGIN")
            with self.writing() as tx:
                _migrate(tx, self.path)
        except StorageError:
            self.close()
            raise

    def close(self) -> None:
        for engine in self._engines:
            engine.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction: everything in it is durable when the block ends, or nothing is.

        Raises: DiskFull, StateUnreadable.
        """
        with self._writing, translated(self.path), self._writer.begin() as tx:
            yield tx

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view. Raises: StateUnreadable."""
        with translated(self.path), self._reader.begin() as tx:
            yield tx

    def statistics(self) -> dict[str, float]:
        wal = self.path.with_name(f"{DATABASE}-wal")
        return {name: float(path.stat().st_size) if path.exists() else 0.0
                for name, path in (("database_bytes", self.path), ("wal_bytes", wal))}  # fmt: skip

    def _open(self, begin: str) -> Engine:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        engine = create_engine(f"sqlite:///{self.path}", connect_args={"timeout": BUSY_S})
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        self._engines = (*self._engines, engine)
        return engine


def _prepare(raw: Any, _record: Any) -> None:
    raw.isolation_level = None  # we begin transactions ourselves
    for pragma in (
        "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", f"journal_size_limit = {WAL_LIMIT_BYTES}",
    ):  # fmt: skip
        raw.execute(f"PRAGMA {pragma}")


def _migrate(tx: Connection, path: Path) -> None:
    if not inspect(tx).has_table(SCHEMA.name):
        SCHEMA.create(tx)
        tx.execute(insert(SCHEMA).values(version=0))
    version = int(tx.execute(select(SCHEMA.c.version)).scalar_one())
    if version > len(MIGRATIONS):
        raise StateUnreadable(
            f"{path} has schema {version}, this version knows up to {len(MIGRATIONS)}", hint="Update edgewarden."
        )
    for step in MIGRATIONS[version:]:
        step(tx)
    tx.execute(update(SCHEMA).values(version=len(MIGRATIONS)))


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Errors of the library as ours."""
    try:
        yield
    except DBAPIError as error:
        text = str(error.orig)
        if any(word in text for word in _FULL):
            raise DiskFull(f"cannot write {path}: {text}", hint="Free some space; nothing was lost.") from error
        raise StateUnreadable(f"{path}: {text}", hint="Is the file damaged, or held by another program?") from error
    except SQLAlchemyError as error:
        raise StateUnreadable(f"{path}: {error}") from error


def _take_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateUnreadable(
            f"cannot use the state folder {folder}: {error.strerror}", hint="Make host.folder writable."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        if error.errno not in {errno.EAGAIN, errno.EACCES}:
            raise StateUnreadable(f"cannot lock {folder}: {error.strerror}") from error
        raise StateLocked(
            f"another host (process {owner}) serves from {folder}", hint="Stop it, or set another host.folder."
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock
