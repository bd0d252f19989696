"""What one worker leaves to the next: real socket pairs, every descriptor counted, hostile messages refused."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from agent import handover
from agent.contract.errors import MalformedMessage
from agent.handover import (
    BATCH,
    INLINE_BYTES,
    Connection,
    Connections,
    Giver,
    Heir,
    Pair,
    Stream,
    Streams,
    Taker,
    bundled,
)


class Stage:
    """A giver, the taking end that the agent process keeps, and what an heir was told."""

    def __init__(self) -> None:
        pair = Pair.open()
        self.giver = Giver(pair.giving)
        self.raw = pair.giving
        self.taking = pair.taking
        self.connections: list[tuple[socket.socket, bytes, int]] = []
        self.streams: list[tuple[str, str, bytes]] = []
        self.ends = 0
        self.taker: Taker | None = None

    def take(self) -> Taker:
        """Another successor begins to read."""
        heir = Heir(
            lambda sock, unread, since_ns: self.connections.append((sock, unread, since_ns)),
            lambda service, stream, state: self.streams.append((service, stream, state)),
            self._end,
        )
        self.taker = Taker(self.taking.dup(), heir)
        self.taker.start()
        return self.taker

    def _end(self) -> None:
        self.ends += 1

    def send(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """What no giver would."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self.raw.sendmsg([payload], rights if descriptors else [])

    def close(self) -> None:
        for sock, _, _ in self.connections:
            sock.close()
        if self.taker is not None:
            self.taker.close()
        self.giver.close()
        self.taking.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def pairs(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    made = [socket.socketpair() for _ in range(count)]
    try:
        yield made
    finally:
        for pair in made:
            for end in pair:
                end.close()


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 - conditions without an event of their own
        await asyncio.sleep(0.002)


def play(story: Callable[[Stage], Awaitable[None]]) -> None:
    async def scene() -> None:
        stage = Stage()
        try:
            await asyncio.wait_for(story(stage), 60)
        finally:
            stage.close()

    asyncio.run(scene())  # once, so that what an event loop opens for good is open
    before = open_descriptors()
    asyncio.run(scene())
    assert open_descriptors() == before


def test_connections_move_with_what_waits_in_the_kernel_and_in_the_process() -> None:
    async def story(stage: Stage) -> None:
        stage.take()
        with pairs(3) as made:
            for client, server in made:
                client.sendall(b"rest")
                server.settimeout(0)
            (first, second, third) = (server for _, server in made)
            await stage.giver.give(Connections(2), [first.fileno(), second.fileno()])
            await stage.giver.give(Connection(b"begun ", 7), [third.fileno()])
            for _, server in made:
                server.close()
            await until(lambda: len(stage.connections) == 3)
            assert [(unread, since_ns) for _, unread, since_ns in stage.connections] == [
                (b"", 0),
                (b"", 0),
                (b"begun ", 7),
            ]
            for (client, _), (taken, _, _) in zip(made, stage.connections, strict=True):
                assert taken.recv(10) == b"rest"
                taken.sendall(b"answer")
                assert client.recv(10) == b"answer"

    play(story)


@pytest.mark.parametrize("size", [0, 10, INLINE_BYTES + 1, 3 * 1024 * 1024])
def test_a_state_of_any_size_arrives_as_it_was(size: int) -> None:
    async def story(stage: Stage) -> None:
        stage.take()
        state = os.urandom(size)
        await stage.giver.give(Streams((Stream("wrist", "left", state),)))
        await until(lambda: stage.streams)
        assert stage.streams == [("wrist", "left", state)]

    play(story)


def test_what_was_given_waits_for_a_successor_and_outlives_one_that_dies() -> None:
    async def story(stage: Stage) -> None:
        with pairs(500) as made:
            servers = [server for _, server in made]
            for start in range(0, 500, BATCH):
                batch = servers[start : start + BATCH]
                await stage.giver.give(Connections(len(batch)), [server.fileno() for server in batch])
                for server in batch:
                    server.close()
            stage.giver.close()
            for client, _ in made:
                client.sendall(b"asked while nobody was there")
            stage.take().close()  # one that dies before it has read anything
            stage.take()
            await until(lambda: stage.ends == 1)
            assert len(stage.connections) == 500
            assert {taken.recv(100) for taken, _, _ in stage.connections} == {b"asked while nobody was there"}

    play(story)


def test_a_giver_waits_while_nobody_takes_and_goes_on_afterwards() -> None:
    async def story(stage: Stage) -> None:
        states = [os.urandom(INLINE_BYTES - 100) for _ in range(2000)]

        async def give() -> None:
            for state in states:
                await stage.giver.give(Streams((Stream("wrist", "left", state),)))

        giving = asyncio.ensure_future(give())
        await asyncio.sleep(0.05)
        assert not giving.done()
        assert stage.giver.given["streams"] < 2000
        stage.take()
        await giving
        await until(lambda: len(stage.streams) == 2000)
        assert [state for _, _, state in stage.streams] == states

    play(story)


@pytest.mark.parametrize(("count", "size"), [(4096, 50), (4096, 16 * 1024), (8, 8 * 1024 * 1024)])
def test_all_that_a_worker_may_have_waits_in_the_kernel_while_nobody_takes(count: int, size: int) -> None:
    async def story(stage: Stage) -> None:
        with pairs(1) as ((_, server),):
            for bundle in bundled(Stream("wrist", f"arm-{number}", bytes(size)) for number in range(count)):
                await stage.giver.give(bundle)
            for _ in range(512 // BATCH):
                await stage.giver.give(Connections(BATCH), [server.fileno()] * BATCH)
            stage.giver.close()
            stage.take()
            await until(lambda: stage.ends)
            assert [name for _, name, _ in stage.streams] == [f"arm-{number}" for number in range(count)]
            assert {len(state) for _, _, state in stage.streams} == {size}
            assert len(stage.connections) == 512

    play(story)


def test_without_anybody_left_giving_fails_and_the_connection_is_still_here() -> None:
    async def story(stage: Stage) -> None:
        stage.taking.close()
        with pairs(1) as ((client, server),):
            with pytest.raises(BrokenPipeError):
                await stage.giver.give(Connections(1), [server.fileno()])
            server.sendall(b"still")
            assert client.recv(10) == b"still"
        stage.taking = socket.socket()

    play(story)


def test_a_state_that_is_too_large_is_not_given() -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(MalformedMessage, match="is over"):
            await stage.giver.give(Streams((Stream("wrist", "left", bytes(handover.MAX_PAYLOAD_BYTES)),)))

    play(story)


def message(kind: str, **fields: object) -> bytes:
    return msgspec.msgpack.encode((kind, fields))


@pytest.mark.parametrize(
    ("payload", "descriptors"),
    [
        (b"\xc1 no msgpack", 2),
        (message("Nothing"), 1),
        (message("Connections", count=2), 1),
        (message("Connections", count=1), 2),
        (message("Connections", count=0), 0),
        (message("Connections", count=-1), 0),
        (message("Connections", count=BATCH + 1), 3),
        (message("Connections", count="two"), 2),
        (message("Connection", unread=b"", since_ns=0), 0),
        (message("Connection", unread="text", since_ns=0), 1),
        (message("Connection", since_ns=0), 1),
        (message("Streams", streams=[{"service": "wrist", "stream": "left", "state": b""}]), 1),
        (message("Streams", streams=[{"service": "wrist"}]), 0),
        (message("Stream", service="wrist", stream="left", state=b""), 0),
        (message("_File", size=INLINE_BYTES + 1), 0),
        (message("_File", size=INLINE_BYTES + 1), 1),
        (message("_File", size=1), 1),
        (message("_File", size=1 << 60), 1),
    ],
)
def test_odd_messages_are_refused_their_descriptors_closed_and_the_next_is_taken(
    payload: bytes, descriptors: int
) -> None:
    async def story(stage: Stage) -> None:
        taker = stage.take()
        with pairs(descriptors) as made:
            stage.send(payload, [server.fileno() for _, server in made])
            for _, server in made:
                server.close()
            for client, _ in made:  # closed by the taker too: nobody holds the other end any more
                client.settimeout(60)
                assert await asyncio.to_thread(client.recv, 1) == b""
            await stage.giver.give(Streams((Stream("wrist", "left", b"good"),)))
            await until(lambda: stage.streams)
            assert stage.connections == []
            assert taker.taken == {"connections": 0, "streams": 1, "refused": 1, "lost": 0}

    play(story)


@pytest.mark.parametrize(
    "content", [b"", message("_File", size=1), message("Nothing"), b"\x00", message("Connections", count=1)]
)
def test_odd_memory_files_are_refused(content: bytes) -> None:
    async def story(stage: Stage) -> None:
        taker = stage.take()
        content_ = content.ljust(INLINE_BYTES + 1, b"\x00")
        file = handover._memory_file(content_)
        stage.send(message("_File", size=len(content_)), [file])
        os.close(file)
        await until(lambda: taker.taken["refused"])
        assert taker.taken == {"connections": 0, "streams": 0, "refused": 1, "lost": 0}

    play(story)


@pytest.mark.parametrize("kind", ["file", "pipe", "listener", "datagram", "closed"])
def test_what_is_no_connection_is_refused(kind: str) -> None:
    async def story(stage: Stage) -> None:
        taker = stage.take()
        opened: list[int] = []
        if kind == "file":
            opened = [os.open("/dev/null", os.O_RDONLY)]
        elif kind == "pipe":
            opened = list(os.pipe())
        elif kind == "listener":
            with socket.socket() as listener:
                listener.listen()
                opened = [os.dup(listener.fileno())]
        elif kind == "datagram":
            opened = [end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)]
        else:  # a client that is gone already is a connection all the same: its end is read later
            ours, theirs = socket.socketpair()
            ours.close()
            opened = [theirs.detach()]
        stage.send(message("Connections", count=len(opened)), opened)
        for descriptor in opened:
            os.close(descriptor)
        await until(lambda: sum(taker.taken.values()) == len(opened))
        assert taker.taken["refused" if kind != "closed" else "connections"] == len(opened)

    play(story)


def test_without_a_free_descriptor_some_connections_are_lost_and_counted_and_the_rest_is_taken() -> None:
    async def story(stage: Stage) -> None:
        taker = stage.take()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with pairs(5) as made:
            filling: list[int] = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
            try:
                with contextlib.suppress(OSError):
                    while True:
                        filling.append(os.open("/dev/null", os.O_RDONLY))
                for descriptor in (filling.pop(), filling.pop()):
                    os.close(descriptor)
                await stage.giver.give(Connections(5), [server.fileno() for _, server in made])
                await until(lambda: taker.taken["connections"])
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for descriptor in filling:
                    os.close(descriptor)
            assert taker.taken == {"connections": 2, "streams": 0, "refused": 0, "lost": 3}

    play(story)
