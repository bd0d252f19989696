"""Channel frames: every type there and back, bounds, and the end of the other side."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.channel import MAX_FRAME_BYTES, Channel, Frame, decode, encode
from agent.contract import plan
from agent.contract.errors import MalformedMessage, Overloaded

ENGINE = plan.EnginePlan(
    engine="wrist", version=3, digest="ab", kind=plan.EngineKind.ONNX, model_path="/m/model.onnx",
    inputs=(plan.TensorPlan("window", "FP32", (-1, 128, 6)),),
    outputs=(plan.TensorPlan("probability", "FP32", (-1, 7)),),
    views=(plan.ViewPlan("channels", "ew_view_channels", 24),),
)  # fmt: skip
FLOOR = plan.EnginePlan("wrist-floor", 1, "cd", plan.EngineKind.FLOOR, floor_outputs={"probability": [0.5, 0.5]})
GUARD = plan.GuardPlan(
    "window", (plan.ChannelPlan("ax", "accel", -8.0, 8.0, 0.0),), plan.GuardPolicy.IMPUTE,
    group_rms={"accel": (0.5, 2.0)},
)  # fmt: skip
PLAN = plan.WorkerPlan(7, (plan.ServicePlan("wrist", (ENGINE, FLOOR), "wrist", GUARD, ("PEN", "ABD")),))

FRAMES: list[Frame] = [
    plan.Start(PLAN),
    plan.Serve(),
    plan.Prefer("wrist", "wrist-floor", "gyro dead"),
    plan.Drain(),
    plan.Ping(2**40),
    plan.Ready(7, 4711, (plan.EngineLoaded("wrist", "wrist", 12.5, golden_ok=False, error_code="x", error="y"),)),
    plan.Preferred("wrist", "wrist-floor"),
    plan.EngineTrouble("wrist", "wrist", "non_finite", "output 'probability' held NaN", 3),
    plan.Pong(2**40, {"requests": 5.0}),
    plan.Drained(7),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_every_frame_survives_the_wire(frame: Frame) -> None:
    raw = encode(frame)
    assert struct.unpack("<I", raw[:4])[0] == len(raw) - 4
    assert decode(raw[4:]) == frame


@given(st.binary(max_size=300))
def test_random_payloads_are_refused(payload: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        decode(payload)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (("Reboot", {}), "unknown type 'Reboot'"),
        (("Ping", {}), "nonce"),
        (("Ping", {"nonce": "x"}), "int"),
        ({"Ping": 1}, "array"),
    ],
)
def test_foreign_frames_are_refused(document: object, words: str) -> None:
    with pytest.raises(MalformedMessage, match=words):
        decode(msgspec.msgpack.encode(document))


def test_a_frame_that_is_too_large_is_not_written() -> None:
    with pytest.raises(MalformedMessage, match="over"):
        encode(plan.Prefer("s", "e", "x" * (MAX_FRAME_BYTES + 1)))


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


async def pair() -> tuple[Channel, Channel, socket.socket]:
    left, right = socket.socketpair()
    return await Channel.open(left), await Channel.open(right), right


def test_frames_arrive_in_order_and_the_end_is_none() -> None:
    async def story() -> None:
        left, right, _ = await pair()
        for frame in FRAMES:
            left.send(frame)
        await left.close()
        assert [await right.receive() for _ in FRAMES] == FRAMES
        assert await right.receive() is None
        assert right.statistics()["received"] == len(FRAMES)
        await right.close()

    run(story())


def test_an_end_in_the_middle_of_a_frame_is_an_end() -> None:
    async def story() -> None:
        left, right = socket.socketpair()
        channel = await Channel.open(right)
        left.sendall(encode(plan.Ping(1))[:-2])
        left.close()
        assert await channel.receive() is None
        await channel.close()

    run(story())


def test_a_length_over_the_bound_is_refused_before_anything_is_read() -> None:
    async def story() -> None:
        left, right = socket.socketpair()
        channel = await Channel.open(right)
        left.sendall(struct.pack("<I", MAX_FRAME_BYTES + 1))
        with pytest.raises(MalformedMessage, match="announces"):
            await channel.receive()
        left.close()
        await channel.close()

    run(story())


def test_an_end_that_never_reads_is_a_fault_and_not_a_growing_queue() -> None:
    async def story() -> None:
        left, right, _ = await pair()
        big = plan.Prefer("s", "e", "x" * (MAX_FRAME_BYTES // 2))

        def flood() -> None:
            for _ in range(100):
                left.send(big)

        with pytest.raises(Overloaded, match="unread"):
            flood()
        await right.close()
        await left.drain()
        await left.close()

    run(story())
