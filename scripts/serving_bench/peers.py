"""The peers: each in an environment of its own below build/, the same MLP, one worker, JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.lib import environments
from scripts.serving_bench.load import Load, Question, Target, http_request
from scripts.serving_bench.models import Model
from scripts.serving_bench.ours import free_port
from scripts.serving_bench.processes import Failed, Group

HERE = Path(__file__).with_name("peers")


@dataclass(frozen=True, slots=True)
class Peer:
    """`command(python's folder, model file, port, scratch folder)`; `path`: where it is asked."""

    name: str
    packages: tuple[str, ...]  # whose versions are printed
    path: str
    command: Callable[[Path, Path, int, Path], list[str]]
    protocol_v2: bool = False


def _fastapi(bin_: Path, model: Path, port: int, _: Path) -> list[str]:
    return [str(bin_ / "python"), str(HERE / "fastapi_server.py"), str(model), str(port)]


def _litserve(bin_: Path, model: Path, port: int, _: Path) -> list[str]:
    return [str(bin_ / "python"), str(HERE / "litserve_server.py"), str(model), str(port)]


def _bentoml(bin_: Path, _model: Path, port: int, _: Path) -> list[str]:
    return [str(bin_ / "bentoml"), "serve", "bentoml_server:Mlp", "--port", str(port), "--host", "127.0.0.1"]


def _mlserver(bin_: Path, model: Path, port: int, scratch: Path) -> list[str]:
    settings = {
        "host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_port": free_port(),
        "parallel_workers": 0, "debug": False, "metrics_endpoint": None,
    }  # fmt: skip
    (scratch / "settings.json").write_text(json.dumps(settings))
    described = {"name": "mlp", "implementation": "mlserver_runtime.Mlp", "parameters": {"uri": str(model)}}
    (scratch / "model-settings.json").write_text(json.dumps(described))
    return [str(bin_ / "mlserver"), "start", str(scratch)]


PEERS = (
    Peer("fastapi", ("fastapi", "pydantic", "uvicorn"), "/predict", _fastapi),
    Peer("mlserver", ("mlserver",), "/v2/models/mlp/infer", _mlserver, protocol_v2=True),
    Peer("litserve", ("litserve",), "/predict", _litserve),
    Peer("bentoml", ("bentoml",), "/predict", _bentoml),
)


def prepare(peer: Peer, folder: Path) -> dict[str, str]:
    """Its environment with the pinned packages, made once; returns the versions of what counts.

    Raises: Failed: pip refuses.
    """
    return environments.prepare(folder / peer.name, HERE / f"{peer.name}.txt", (*peer.packages, "onnxruntime"))


def start(peer: Peer, folder: Path, model: Model, scratch: Path) -> tuple[Group, Target, Question]:
    """Its server on a free port, and the request for it; the caller ends the group."""
    scratch.mkdir(parents=True, exist_ok=True)
    port = free_port()
    row = [[round(value, 6) for value in model.row()[0].tolist()]]
    document = (
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, len(row[0])], "data": row[0]}]}
        if peer.protocol_v2
        else {"x": row}
    )
    file = scratch / "request"
    body = json.dumps(document, separators=(",", ":")).encode()
    file.write_bytes(http_request(peer.path, body, {"Content-Type": "application/json"}))
    quiet = {
        "PYTHONPATH": str(HERE), "EW_BENCH_MODEL": str(model.onnx), "BENTOML_DO_NOT_TRACK": "true",
        "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "BENTOML_HOME": str(scratch / "bentoml"),
    }  # fmt: skip
    command = peer.command(folder / peer.name / "bin", model.onnx, port, scratch)
    group = Group(command, scratch / "log", environment=quiet, folder=HERE)
    return group, Target(port=port), Question(file)


def answers(load: Load, target: Target, question: Question) -> bool:
    """Whether it gives a good answer now."""
    if not listens(target.port):
        return False
    try:
        return int(load.ask(target, question, seconds=10, extra=["--count", "1"])["ok"]) == 1
    except Failed:
        return False


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    import socket

    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0
