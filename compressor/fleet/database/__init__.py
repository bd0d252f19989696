"""The host's durable state: the only door to sqlalchemy.

`store` opens, migrates and locks it; every other module holds the reads and writes of one noun, as functions of
a connection, so that a transaction may span several nouns:

    with database.writing() as tx:
        new = messages.admit(tx, received, now_s=now)
        timeline.add(tx, at=now, what="event", text="...")
"""

from compressor.fleet.database.store import Connection, Database, Row

__all__ = ["Connection", "Database", "Row"]
