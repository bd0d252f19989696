"""Silero's voice detector on recorded speech: state carried by the client, a scalar input, branches in the graph."""

from __future__ import annotations

import asyncio
import hashlib
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from agent.client import Client
from agent.client.aio import AsyncClient
from agent.contract.plan import EngineKind, EnginePlan, RuntimePlan, ServicePlan, TensorPlan
from tests.interop.conftest import SPEECH
from tests.models import worker_plan
from tests.processes import RunningWorker, Sockets

pytestmark = pytest.mark.system
RATE = np.array(16000, np.int64)
STEP, CONTEXT = 512, 64  # samples of one request, and of the one before that it sees again
STATE = np.zeros((2, 1, 128), np.float32)
SILENCE = np.zeros((1, CONTEXT + STEP), np.float32)
RECORDINGS = {  # sha256: what was listened to when these tests were written
    "goforward.raw": "f15c60ec54059d8b66e410d0064945a0b0a04ea56e1ddca1958e493c0cf70e71",
    "librivox/sense_and_sensibility_01_austen_64kb-0870.wav":
        "b0557cf95c974d930577e58e46b7f068c432a6e3afcc286563d88922b2a5315c",
    "cards/005.wav": "090f18f5f76cf8b2b43cd9e6b07823f4685a4742d9a36cd98b174a6586c18cf9",
}  # fmt: skip

Array = np.ndarray[Any, Any]


def model(interop: Path) -> Path:
    return interop / "silero_vad/silero_vad/data/silero_vad.onnx"


@pytest.fixture(scope="module")
def bare(interop: Path) -> onnxruntime.InferenceSession:
    """The runtime without us, with the same one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model(interop)), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sockets(
    interop: Path, bare: onnxruntime.InferenceSession, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sockets]:
    folder = tmp_path_factory.mktemp("silero")
    first = {"input": SILENCE, "state": STATE, "sr": RATE}
    output, state = bare.run(["output", "stateN"], first)
    golden = folder / "golden.npz"
    np.savez(
        golden, **{f"in_{name}": array for name, array in first.items()},
        out_output=output, out_stateN=state, tolerance=np.array(1e-5),
    )  # fmt: skip
    engine = EnginePlan(
        engine="vad", version=6, digest="5" * 64, kind=EngineKind.ONNX, model_path=str(model(interop)),
        model_sha256=hashlib.sha256(model(interop).read_bytes()).hexdigest(), golden_path=str(golden),
        inputs=(
            TensorPlan("input", "FP32", (1, CONTEXT + STEP)), TensorPlan("state", "FP32", (2, 1, 128)),
            TensorPlan("sr", "INT64", ()),
        ),
        outputs=(TensorPlan("output", "FP32", (1, 1)), TensorPlan("stateN", "FP32", (2, 1, 128))),
        runtime=RuntimePlan(control_flow=("If",)),
    )  # fmt: skip
    plan = ServicePlan(service="vad", engines=(engine,), active="vad", guard=None, deadline_ms=5000.0)
    with Sockets(folder) as opened, RunningWorker(opened, worker_plan(plan)) as worker:
        assert [(loaded.engine, loaded.error) for loaded in worker.ready.engines] == [("vad", "")]
        worker.serve()
        yield opened


def samples(name: str) -> Array:
    """A recording of 16,000 samples a second, scaled to -1..1."""
    path = SPEECH / name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == RECORDINGS[name]
    if path.suffix == ".raw":
        raw = path.read_bytes()
    else:
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
            raw = file.readframes(file.getnframes())
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32768


def windows(sound: Array) -> Iterator[Array]:
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), sound])
    for at in range(0, len(sound) - STEP + 1, STEP):
        yield padded[None, at : at + CONTEXT + STEP]


def expected(bare: onnxruntime.InferenceSession, sound: Array) -> list[tuple[Array, Array]]:
    state, answers = STATE, []
    for window in windows(sound):
        output, state = bare.run(["output", "stateN"], {"input": window, "state": state, "sr": RATE})
        answers.append((output, state))
    return answers


def same(given: Mapping[str, Array], wanted: tuple[Array, Array]) -> bool:
    return given["output"].tobytes() == wanted[0].tobytes() and given["stateN"].tobytes() == wanted[1].tobytes()


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_speech_is_told_from_silence_bit_for_bit_as_by_the_bare_runtime(
    sockets: Sockets, bare: onnxruntime.InferenceSession, way: str, name: str
) -> None:
    speech = samples(name)
    sound = np.concatenate([np.zeros(16000, np.float32), speech, np.zeros(16000, np.float32)])
    state, voiced = STATE, []
    with Client(sockets.unix_address if way == "unix" else sockets.tcp_address) as client:
        for window, wanted in zip(windows(sound), expected(bare, sound), strict=True):
            answer = client.infer("vad", {"input": window, "state": state, "sr": RATE})
            assert same(answer.outputs, wanted)
            state = answer.outputs["stateN"]
            voiced.append(bool(answer.outputs["output"][0, 0] > 0.5))
    second = 16000 // STEP
    assert not any(voiced[:second])  # before anybody speaks
    assert not any(voiced[-second // 2 :])  # and when they have stopped
    assert sum(voiced) > 0.5 * len(speech) / STEP


def test_without_its_state_the_model_hears_less(sockets: Sockets, bare: onnxruntime.InferenceSession) -> None:
    """So the tests above would notice a state that got lost on the way."""
    sound = samples("goforward.raw")
    with Client(sockets.unix_address) as client:
        outputs = [client.infer("vad", {"input": w, "state": STATE, "sr": RATE}).outputs for w in windows(sound)]
    assert not all(same(given, wanted) for given, wanted in zip(outputs, expected(bare, sound), strict=True))


def test_speakers_at_the_same_time_keep_their_own_state(sockets: Sockets, bare: onnxruntime.InferenceSession) -> None:
    async def listen(client: AsyncClient, name: str) -> int:
        state, sound, right = STATE, samples(name), 0
        for window, wanted in zip(windows(sound), expected(bare, sound), strict=True):
            answer = await client.infer("vad", {"input": window, "state": state, "sr": RATE})
            right += same(answer.outputs, wanted)
            state = answer.outputs["stateN"]
        return right

    async def scene() -> list[int]:
        async with AsyncClient(sockets.unix_address) as client:
            return await asyncio.gather(*(listen(client, name) for name in RECORDINGS))

    assert asyncio.run(scene()) == [len(samples(name)) // STEP for name in RECORDINGS]


def test_the_public_client_carries_state_too(sockets: Sockets, bare: onnxruntime.InferenceSession) -> None:
    triton = pytest.importorskip("tritonclient.http")
    sound = samples("goforward.raw")
    state = STATE
    client = triton.InferenceServerClient(sockets.tcp_address)
    try:
        for window, wanted in zip(windows(sound), expected(bare, sound), strict=True):
            inputs = []
            for name, array, kind in (("input", window, "FP32"), ("state", state, "FP32"), ("sr", RATE, "INT64")):
                given = triton.InferInput(name, list(array.shape), kind)
                given.set_data_from_numpy(array)
                inputs.append(given)
            result = client.infer("vad", inputs)
            state = result.as_numpy("stateN")
            assert same({"output": result.as_numpy("output"), "stateN": state}, wanted)
    finally:
        client.close()
