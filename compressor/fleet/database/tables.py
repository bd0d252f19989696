"""Every table of the host. Times are wall seconds since 1970; JSON columns hold what a message said.

Append a migration for every change; never edit one that was released.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    text,
)

METADATA = MetaData()
_DEVICE = String(36)
_BOOT = String(64)


def _key() -> Column[int]:
    # sqlite only counts an INTEGER key up by itself
    return Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)


SCHEMA = Table("schema", METADATA, Column("version", Integer, nullable=False))

DEVICE = Table(
    "device",
    METADATA,
    Column("id", _DEVICE, primary_key=True),
    Column("enrolled_at", Float),
    Column("public_key", String(64)),
    Column("first_seen_at", Float),
    Column("last_seen_at", Float),
    Column("boot", _BOOT),
    Column("presence", String(16)),
    Column("presence_reason", Text),
    Column("birth", JSON),
    Column("reported", JSON),
    Column("reported_at", Float),
    Column("vitals", JSON),  # newest telemetry: health, gauges, counters
    Column("vitals_at", Float),
    Column("desired", JSON),  # the signed document, as published
    Column("desired_version", Integer, nullable=False, default=0),
    Column("command_seq", Integer, nullable=False, default=0),
)

TOKEN = Table(
    "token",
    METADATA,
    Column("sha256", String(64), primary_key=True),
    Column("device", _DEVICE, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float),
)

BOOT = Table(
    "boot",
    METADATA,
    Column("device", _DEVICE, primary_key=True),
    Column("boot", _BOOT, primary_key=True),
    Column("committed", BigInteger, nullable=False),  # every message up to this one is here
    Column("highest", BigInteger, nullable=False),
    Column("messages", BigInteger, nullable=False),
    Column("last_at", Float, nullable=False),
)

MESSAGE = Table(
    "message",
    METADATA,
    Column("device", _DEVICE, primary_key=True),
    Column("boot", _BOOT, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("received_at", Float, nullable=False),
    sqlite_with_rowid=False,
)
"""Keys of messages above the watermark: what makes a repeated message harmless."""

EVENT = Table(
    "event",
    METADATA,
    _key(),
    Column("device", _DEVICE, nullable=False),
    Column("boot", _BOOT, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("at", Float, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("severity", String(16), nullable=False),
    Column("kind", String(36), nullable=False),
    Column("service", _DEVICE, nullable=False),
    Column("text", Text, nullable=False),
    Column("channels", JSON, nullable=False),
    Column("numbers", JSON, nullable=False),
    Column("details", JSON, nullable=False),
    Index("event_of_device", "device", "id"),
    Index("event_of_kind", "kind", "device", "id"),
)

WINDOW = Table(
    "window",
    METADATA,
    _key(),
    Column("device", _DEVICE, nullable=False),
    Column("boot", _BOOT, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("service", _DEVICE, nullable=False),
    Column("view", String(64), nullable=False),
    Column("reference", String(64), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("body", JSON, nullable=False),  # first, last, clip, fraction_bits, sums, squares, classes, counters
    Index("window_of_device", "device", "service", "id"),
)

SKETCH = Table(
    "sketch",
    METADATA,
    _key(),
    Column("device", _DEVICE, nullable=False),
    Column("boot", _BOOT, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("service", _DEVICE, nullable=False),
    Column("engine", _DEVICE, nullable=False),
    Column("body", JSON, nullable=False),
    Index("sketch_of_device", "device", "service", "id"),
)

REFUSAL = Table(
    "refusal",
    METADATA,
    Column("device", _DEVICE, primary_key=True),
    Column("code", String(36), primary_key=True),
    Column("count", BigInteger, nullable=False),
    Column("last_at", Float, nullable=False),
    Column("text", Text, nullable=False),
)
"""What was not believed, counted per device and reason."""

DECISION = Table(
    "decision",
    METADATA,
    _key(),
    Column("at", Float, nullable=False),
    Column("last_at", Float, nullable=False),
    Column("repeated", Integer, nullable=False, default=0),
    Column("cohort", _DEVICE, nullable=False),
    Column("service", _DEVICE, nullable=False),
    Column("kind", String(24), nullable=False),
    Column("row", String(36), nullable=False),
    Column("devices", JSON, nullable=False),
    Column("reason", Text, nullable=False),
    Column("numbers", JSON, nullable=False),
)

SAMPLE = Table(
    "sample",
    METADATA,
    Column("id", String(36), primary_key=True),
    Column("device", _DEVICE, nullable=False),
    Column("service", _DEVICE, nullable=False),
    Column("reference", String(64), nullable=False),
    Column("decision", Integer),
    Column("state", String(16), nullable=False),  # asked | accepted | used | rejected | refused | expired
    Column("token_sha256", String(64), nullable=False),
    Column("max_bytes", BigInteger, nullable=False),
    Column("asked_at", Float, nullable=False),
    Column("settled_at", Float),
    Column("attempts", Integer, nullable=False, default=0),
    Column("path", Text),
    Column("sha256", String(64)),
    Column("size_bytes", BigInteger),
    Column("rows", Integer),
    Column("text", Text),
    Index("sample_of_device", "device", "service"),
)

JOB = Table(
    "job",
    METADATA,
    _key(),
    Column("cohort", _DEVICE, nullable=False),
    Column("service", _DEVICE, nullable=False),
    Column("decision", Integer),
    Column("state", String(16), nullable=False),  # queued | running | built | done | failed
    Column("devices", JSON, nullable=False),  # whose recordings it learns from
    Column("references", JSON, nullable=False),  # the drift references whose reports it answers
    Column("samples", JSON, nullable=False),  # sample ids
    Column("attempts", Integer, nullable=False, default=0),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("folder", Text),
    Column("artifacts", JSON),  # engine -> manifest digest, once published
    Column("text", Text),
)

ROLLOUT = Table(
    "rollout",
    METADATA,
    _key(),
    Column("cohort", _DEVICE, nullable=False),
    Column("service", _DEVICE, nullable=False),
    Column("job", Integer),  # none: an operator started it
    Column("state", String(16), nullable=False),
    Column("devices", JSON, nullable=False),
    Column("versions", JSON, nullable=False),  # device -> its desired version
    Column("artifacts", JSON, nullable=False),  # engine -> manifest digest
    Column("order", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("since", Float, nullable=False),  # when it entered its state
    Column("text", Text, nullable=False),
    Column("halt_asked", Boolean, nullable=False, default=False),
    Column("rollback", Boolean, nullable=False, default=False),  # lower versions are meant
)

TIMELINE = Table(
    "timeline",
    METADATA,
    _key(),
    Column("at", Float, nullable=False),
    Column("what", String(16), nullable=False),
    Column("severity", String(16), nullable=False),
    Column("device", _DEVICE, nullable=False),
    Column("text", Text, nullable=False),
)

SETTING = Table("setting", METADATA, Column("name", String(36), primary_key=True), Column("value", JSON))


def _first(connection: Connection) -> None:
    METADATA.create_all(connection)


def _rollbacks(connection: Connection) -> None:
    """Not where `_first` made the table as it is now."""
    if "rollback" not in {column["name"] for column in inspect(connection).get_columns(ROLLOUT.name)}:
        connection.execute(text("ALTER TABLE rollout ADD COLUMN rollback BOOLEAN NOT NULL DEFAULT 0"))


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_first, _rollbacks)
"""One step per schema version; the table `schema` counts those applied."""
