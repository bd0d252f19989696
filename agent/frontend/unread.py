"""The bytes of a request that has not arrived whole yet, so that another process can go on reading it. Pure.

The parser keeps what it has read and does not give it back; where a request ends follows from its head and the size
of its body, since chunked bodies are refused and heads end in an empty line.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_MOVABLE_BYTES = 1024 * 1024  # a larger request is finished where it began
HEAD_ROOM_BYTES = 64 * 1024  # more than any head that is accepted
SMALL_PIECE_BYTES = 4 * 1024  # pieces below are put together: each by itself costs 40 to 60 bytes more
WHOLE_PIECE_BYTES = 64 * 1024
END_OF_HEAD = b"\r\n\r\n"


def put(pieces: list[bytes | bytearray], data: bytes) -> None:
    """Put what was received behind the pieces before it; the first stays as it came."""
    if not pieces or len(data) >= SMALL_PIECE_BYTES:
        pieces.append(data)
        return
    last = pieces[-1]
    if isinstance(last, bytearray) and len(last) < WHOLE_PIECE_BYTES:
        last += data
    else:
        pieces.append(bytearray(data))


class Unread:
    """What one connection has received of its unfinished request. Fed after the parser, with what the parser saw."""

    __slots__ = ("_kept", "_total", "movable")

    def __init__(self) -> None:
        self._kept: list[bytes | bytearray] = []
        self._total = 0
        self.movable = True  # all of it is here

    @property
    def size(self) -> int:
        return self._total

    def raw(self) -> bytes:
        """From the request's first byte to the last received. Only while `movable`."""
        return b"".join(self._kept)

    def feed(self, data: bytes, ended: Sequence[int], *, reading: bool) -> None:
        """Note one piece of the stream.

        `ended`: body sizes of the requests that ended in it, in order; `reading`: another one has begun since.
        """
        if not ended:
            self._keep(data)
            return
        if not reading:
            self.clear()
            return
        offset = _end_of_request(b"".join(self._kept) + data, 0, ended[0]) - self._total
        for size in ended[1:]:
            offset = _end_of_request(data, offset, size)
        self.clear()
        self._keep(data[offset:])

    def drop_body(self) -> None:
        """The request is finished where it began: of its body only the size is noted. Its head has been fed."""
        if self.movable:
            self._keep_head()

    def clear(self) -> None:
        self._kept = []
        self._total = 0
        self.movable = True

    def _keep(self, data: bytes) -> None:
        if not self._total:
            data = data.lstrip(b"\r\n")
        self._total += len(data)
        if self.movable:
            put(self._kept, data)
            if self._total > MAX_MOVABLE_BYTES:
                self._keep_head()

    def _keep_head(self) -> None:
        raw = self.raw()
        end = raw.find(END_OF_HEAD)
        self._kept = [raw[: HEAD_ROOM_BYTES if end < 0 else end + len(END_OF_HEAD)]]
        self.movable = False


def _end_of_request(raw: bytes, start: int, body_bytes: int) -> int:
    """Where the request that follows `start` ends; empty lines before it are skipped, as the parser does."""
    while raw[start : start + 1] in (b"\r", b"\n"):
        start += 1
    return raw.index(END_OF_HEAD, start) + len(END_OF_HEAD) + body_bytes
