"""What one request costs beside a bare run of the same model, in one process: `scripts/bench request`.

Figures are CPU microseconds per request (20th percentile over interleaved rounds of one thread's CPU clock: wall
clocks lie on shared machines), and ratios between rows of this one run. The model is the committed fallback, so no
data and no training are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from agent.blueprint import draw_up
from agent.config import load_config
from agent.contract.tensors import HEADER_LENGTH, Tensor, write_tensors
from agent.drift import RegimeMonitor, load_reference
from agent.engine import OnnxEngine, load_golden
from agent.frontend.openinference import OpenInference
from agent.frontend.server import HttpRequest
from agent.guard import Guard
from agent.lineup import load_lineup
from agent.observation import Observation, RingWriter, create_ring
from agent.serving import Service, Serving

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "fallback_models"
ROUNDS, CALLS = 25, 40


def measure(subjects: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU us per call of each subject, interleaved so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for call in subjects.values():
        for _ in range(CALLS):
            call()
    for _ in range(ROUNDS):
        for name, call in subjects.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                call()
            times[name].append((time.thread_time_ns() - start) / CALLS / 1e3)
    return {name: round(float(np.percentile(values, 20)), 2) for name, values in times.items()}


def subjects(folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    config = folder / "agent.toml"
    config.write_text(
        f'[[service]]\nname = "wrist"\nartifact = "{MODELS / "wrist-accel"}"\nfloor = "{MODELS / "wrist-floor"}"\n'
    )
    blueprint = draw_up(load_config(config, {}).config)[0]
    window = load_golden(MODELS / "wrist-accel/golden.npz").inputs["window"][:1]
    model = MODELS / "wrist-accel/model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    bare = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    engine = OnnxEngine.load(model)
    engine.warm()
    lineup, _ = load_lineup(blueprint.plan)
    ring = RingWriter(create_ring())
    serving = Serving(
        [Service(0, blueprint.plan, lineup)], ring, stuck_after_s=5, on_unstoppable=lambda: None, inline_us=1e9
    )
    handler = OpenInference(serving)
    described, parts = write_tensors([Tensor("window", "FP32", window)], ["window"])
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True, "ew_time_s": 1.0}}).encode()
    headers = {HEADER_LENGTH.lower(): str(len(head))}
    body = b"".join((head, *parts))
    guard = Guard(blueprint.plan.guard) if blueprint.plan.guard else None
    monitor = RegimeMonitor(load_reference(MODELS / "wrist-accel/reference.npz"))
    features = engine.run({"window": window})["ew_view_channels"][0]
    observation = Observation(0, view_width=24, view=features.tobytes())
    assert guard is not None

    def request() -> None:
        handler.handle(HttpRequest("POST", "/v2/models/wrist/infer", headers, body, time.monotonic_ns()), _drop)

    return {
        "bare session.run": lambda: bare.run(None, {"window": window}),
        "engine (pre-bound lane)": lambda: engine.run({"window": window}),
        "whole request in process": request,
        "guard": lambda: guard.check(window),
        "ring write": lambda: ring.write(observation),
        "drift monitor, per window (agent process)": lambda: monitor.update(features, 0),
    }


def _drop(_: object) -> None:
    """Where a response goes when nobody waits for it."""


def main() -> int:
    import tempfile

    parser = argparse.ArgumentParser(
        prog="scripts/bench request", description="Cost of a request beside a bare run of its model."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        found = measure(subjects(Path(folder)))
    base = found["bare session.run"]
    machine = {
        "cpu": platform.machine(), "cores": os.cpu_count(), "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "numpy": np.__version__,
    }  # fmt: skip
    if as_json:
        print(
            json.dumps(
                {"machine": machine, "cpu_us": found, "ratio": {k: round(v / base, 3) for k, v in found.items()}}
            )
        )
        return 0
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\n{'':44}{'CPU us':>9}{'ratio':>8}")
    for name, value in found.items():
        print(f"{name:44}{value:9.2f}{value / base:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
