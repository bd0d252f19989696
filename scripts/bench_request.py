"""What one request costs beside a bare run of the same model, in one process: `scripts/bench request`.

Figures are CPU microseconds per request (20th percentile over interleaved rounds of one thread's CPU clock: wall
clocks lie on shared machines), and ratios between rows of this one run. Two models: an MLP 32-64-10 with random
weights, and the committed fallback of the wrist task with its guard and views.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime

from agent.blueprint import draw_up
from agent.config import load_config
from agent.contract.plan import ServicePlan
from agent.contract.tensors import HEADER_LENGTH, Array, Tensor, write_tensors
from agent.drift import drift_monitor, load_reference
from agent.engine import OnnxEngine, load_golden
from agent.frontend.openinference import OpenInference
from agent.frontend.server import Connection, HttpRequest, Server
from agent.guard import Guard
from agent.lineup import load_lineup
from agent.observation import Observe, RingWriter, create_ring
from agent.serving import Service, Serving
from scripts.serving_bench.models import build

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "fallback_models"
ROUNDS, CALLS = 25, 200

Subjects = dict[str, Callable[[], object]]


def measure(subjects: Subjects, rounds: int = ROUNDS) -> dict[str, float]:
    """CPU us per call of each subject, interleaved so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for call in subjects.values():
        for _ in range(CALLS):
            call()
    for _ in range(rounds):
        for name, call in subjects.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                call()
            times[name].append((time.thread_time_ns() - start) / CALLS / 1e3)
    return {name: round(float(np.percentile(values, 20)), 3) for name, values in times.items()}


def measure_inprocess(rounds: int = ROUNDS) -> dict[str, float]:
    """CPU us per request of the MLP 32-64-10 with its hidden layer as a view, interleaved in one run.

    `bare_us`: `InferenceSession.run` as a program would call it, for the public output.
    `path_us`: from the bytes a socket gave to the bytes it is given, the way a worker does it: plan cache, input
    check, watchdog, run, output check, response, and the observation with its counts. No socket, no event loop.
    `unmonitored_us`: the same but for the observation.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mlp = build(folder, "mlp")
        plan = draw_plan(folder, mlp.name, mlp.artifacts)
        feeds = {mlp.input: mlp.row()}
        with _Inprocess(plan) as watched, _Inprocess(plan, ring=Silent) as unwatched:
            subjects: Subjects = {
                "bare_us": _bare(mlp.onnx, plan, feeds),
                "path_us": watched.asking(feeds),
                "unmonitored_us": unwatched.asking(feeds),
            }
            return measure(subjects, rounds)


class Silent(RingWriter):
    """A ring nobody writes to."""

    def observer(self, **_: Any) -> Observe:
        return lambda _: None


class _Nowhere:
    """The transport of a connection whose answers nobody reads; keeps the last one."""

    def __init__(self) -> None:
        self.write: Callable[[bytes], object] = self._keep
        self.last = b""

    def _keep(self, response: bytes) -> None:
        self.last = response

    def get_extra_info(self, _: str) -> None:
        return None

    def is_closing(self) -> bool:
        return False


class _Inprocess:
    """One service with everything a worker has, but for sockets."""

    def __init__(self, plan: ServicePlan, *, ring: type[RingWriter] = RingWriter) -> None:
        self._plan = plan
        self._descriptor = create_ring()
        self._ring = ring(self._descriptor)
        service = Service(0, plan, load_lineup(plan)[0])
        self.serving = Serving([service], self._ring, stuck_after_s=5, on_unstoppable=lambda: None, inline_us=1e9)
        self.handler = OpenInference(self.serving)
        server = Server(self.handler.handle, make_plan=self.handler.plan, max_body_bytes=1 << 26)
        self._transport = _Nowhere()
        self._connection = Connection(server)
        self._connection.connection_made(self._transport)  # type: ignore[arg-type]

    def asking(self, feeds: dict[str, Array]) -> Callable[[], object]:
        """What sends one request; the first ones make its plan."""
        head, body = _binary_request(feeds)
        data = (
            f"POST /v2/models/{self._plan.service}/infer HTTP/1.1\r\nHost: localhost\r\n"
            f"{HEADER_LENGTH}: {len(head)}\r\nContent-Length: {len(head) + len(body)}\r\n\r\n"
        ).encode() + head + body  # fmt: skip
        for _ in range(3):
            self._connection.data_received(data)
            if not self._transport.last.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"the bench's own request was refused: {self._transport.last!r}")
        self._transport.write = _drop
        receive = self._connection.data_received
        return lambda: receive(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.serving.close()
        self._ring.close()
        os.close(self._descriptor)


def draw_plan(folder: Path, service: str, artifacts: Sequence[Path]) -> ServicePlan:
    """What a worker is told of a service with these artifacts: the first is active, the last its floor."""
    active, *fallbacks, floor = (str(path) for path in artifacts)
    config = folder / f"{service}.toml"
    config.write_text(
        f'[[service]]\nname = "{service}"\nartifact = "{active}"\nfallbacks = {json.dumps(fallbacks)}\n'
        f'floor = "{floor}"\n'
    )
    return draw_up(load_config(config, {}).config)[0].plan


def _bare(model: Path, plan: ServicePlan, feeds: dict[str, Array]) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in plan.engines[0].outputs]
    return lambda: session.run(names, feeds)


def _binary_request(feeds: dict[str, Array]) -> tuple[bytes, bytes]:
    """JSON and binary data of a request."""
    described, parts = write_tensors([Tensor(name, "FP32", x) for name, x in feeds.items()], list(feeds))
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    return head, b"".join(parts)


def subjects(path: _Inprocess, plan: ServicePlan) -> Subjects:
    """The steps of one request to the wrist model."""
    window = load_golden(MODELS / "wrist-accel/golden.npz").inputs["window"][:1]
    model = MODELS / "wrist-accel/model.onnx"
    engine = OnnxEngine.load(model)
    engine.warm()
    head, body = _binary_request({"window": window})
    strict = HttpRequest(
        "POST", f"/v2/models/{plan.service}/infer", {HEADER_LENGTH.lower(): str(len(head))}, head + body, 0
    )
    assert plan.guard is not None
    guard = Guard(plan.guard)
    watch = guard.watch(window)
    monitor = drift_monitor(load_reference(MODELS / "wrist-accel/reference.npz"))
    assert monitor is not None
    features = engine.run({"window": window})["ew_view_channels"][:1]
    predicted, time_s = np.zeros(1, np.int64), np.full(1, np.nan)
    return {
        "bare session.run": _bare(model, plan, {"window": window}),
        "engine (pre-bound lane)": lambda: engine.run({"window": window}),
        "whole request in process, by its plan": path.asking({"window": window}),
        "whole request behind the HTTP parser": lambda: path.handler.handle(
            replace(strict, arrival_ns=time.monotonic_ns()), _drop
        ),
        "guard, with what it found": lambda: guard.check(window),
        "guard, whether it finds anything": watch,
        "drift monitor, per window (agent process)": lambda: monitor.follow(features, predicted, time_s),
    }


def _drop(_: object) -> None:
    """Where a response goes when nobody waits for it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench request", description="Cost of a request beside a bare run of its model."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        plan = draw_plan(Path(folder), "wrist", (MODELS / "wrist-accel", MODELS / "wrist-floor"))
        with _Inprocess(plan) as path:
            wrist = measure(subjects(path, plan))
    tables = {"mlp": measure_inprocess(), "wrist": wrist}
    machine = {
        "cpu": platform.machine(), "cores": os.cpu_count(), "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "numpy": np.__version__,
    }  # fmt: skip
    if as_json:
        print(json.dumps({"machine": machine, "cpu_us": tables}))
        return 0
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    for name, found in tables.items():
        base = next(iter(found.values()))
        print(f"\n{name:44}{'CPU us':>9}{'ratio':>8}")
        for step, value in found.items():
            print(f"{step:44}{value:9.2f}{value / base:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
