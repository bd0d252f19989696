"""Where requests end in a stream of bytes, held against the parser itself."""

import random

import httptools
import pytest

from agent.frontend.unread import HEAD_ROOM_BYTES, MAX_MOVABLE_BYTES, WHOLE_PIECE_BYTES, Unread, put


class Parser:
    """The same callbacks as a connection: body sizes of what ended, and whether a request has begun."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.ended: list[int] = []
        self.bodies: list[bytes] = []
        self.reading = False

    def feed(self, data: bytes) -> list[int]:
        self.ended = []
        self.parser.feed_data(data)
        return self.ended

    def on_message_begin(self) -> None:
        self.size, self.body, self.reading = 0, b"", True

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-length":
            self.size = int(value)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.reading = False
        self.ended.append(self.size)
        self.bodies.append(self.body)


def request(rng: random.Random) -> bytes:
    blank = rng.choice([b"", b"", b"\r\n", b"\r\n\r\n"])
    extra = b"".join(b"X-%d: %s\r\n" % (number, b"v" * rng.randrange(40)) for number in range(rng.randrange(4)))
    body = rng.choice([b"", b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(rng.randrange(300))])
    head = b"POST /a HTTP/1.1\r\nHost: x\r\n" + extra + b"Content-Length: %d\r\n\r\n" % len(body)
    return blank + head + body


@pytest.mark.parametrize("seed", range(30))
def test_another_parser_goes_on_wherever_the_stream_was_cut(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - test data
    stream = b"".join(request(rng) for _ in range(12))
    whole = Parser()
    whole.feed(stream)
    first, unread, position = Parser(), Unread(), 0
    while position < len(stream):
        piece = stream[position : position + rng.choice([1, 2, 7, 60, 200, 900])]
        position += len(piece)
        unread.feed(piece, first.feed(piece), reading=first.reading)
        assert unread.movable
        second = Parser()  # takes over here
        second.feed(unread.raw())
        assert second.bodies == []
        second.feed(stream[position:])
        assert first.bodies + second.bodies == whole.bodies


def test_a_request_too_large_to_move_is_not_kept_but_its_end_is_found() -> None:
    size = MAX_MOVABLE_BYTES + 200_000
    begun = b"GET /next HTTP/1.1\r\nHo"
    head = b"\r\nPOST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
    stream = head + b"b" * size + begun
    parser, unread, most = Parser(), Unread(), 0
    for start in range(0, len(stream), 50_000):
        piece = stream[start : start + 50_000]
        unread.feed(piece, parser.feed(piece), reading=parser.reading)
        if not unread.movable:
            most = max(most, len(unread.raw()))
    assert most <= HEAD_ROOM_BYTES
    assert unread.movable
    assert unread.raw() == begun


@pytest.mark.parametrize("seed", range(20))
def test_a_body_that_is_dropped_leaves_the_requests_behind_it_whole(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - test data
    stream = b"".join(request(rng) for _ in range(60))
    whole = Parser()
    whole.feed(stream)
    first, unread, position, dropped = Parser(), Unread(), 0, 0
    while position < len(stream):
        piece = stream[position : position + rng.choice([3, 30, 60, 200])]
        position += len(piece)
        unread.feed(piece, first.feed(piece), reading=first.reading)
        if first.reading and first.body and rng.random() < 0.5:
            unread.drop_body()
            dropped += 1
            assert not unread.movable
            assert unread.raw().endswith(b"\r\n\r\n")
        if unread.movable:
            second = Parser()  # takes over here
            second.feed(unread.raw() + stream[position:])
            assert first.bodies + second.bodies == whole.bodies
    assert dropped


def test_nothing_is_kept_between_requests() -> None:
    parser, unread = Parser(), Unread()
    for piece in (b"GET / HTTP/1.1\r\n", b"Host: x\r\n\r\n\r\n"):
        unread.feed(piece, parser.feed(piece), reading=parser.reading)
    assert not parser.reading
    assert unread.size == 0


def test_many_small_pieces_cost_little_more_than_their_bytes() -> None:
    rng = random.Random(1)  # noqa: S311 - test data
    pieces: list[bytes | bytearray] = []
    received = [rng.randbytes(rng.choice([2, 3, 50, 5000])) for _ in range(2000)]
    small = [rng.randbytes(2) for _ in range(100_000)]
    for piece in [*received, *small]:
        put(pieces, piece)
    assert b"".join(pieces) == b"".join([*received, *small])
    assert pieces[0] is received[0]
    large = sum(len(piece) >= 4096 for piece in received)
    assert len(pieces) <= 2 * large + 2 + 200_000 // WHOLE_PIECE_BYTES
