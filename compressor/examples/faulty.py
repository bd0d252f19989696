"""Makes a broken sibling of an artifact, for trying out what a device does when an engine fails.

The model is the original one behind a look-up table that is too short: the window's mean absolute sample picks
an entry, and only still windows find one. Its golden inputs are still windows, so it loads and proves itself
like any other; a moving wrist makes every run fail inside the runtime. Nothing in the product knows of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from agent.contract.artifact import FILES, MANIFEST, Artifact, Blob, open_artifact, sha256
from agent.contract.errors import EdgewardenError, Incompatible
from agent.engine import OnnxEngine
from compressor.evidence import golden_bytes
from compressor.package import write_artifact

NAME = "faulty"
TABLE_LENGTH = 2  # entries of the look-up table
STEP = 0.05  # raw units of movement per entry: a window that moves more than 0.1 finds none
STILL_ROWS = 4
TOLERANCE = 1e-3


def build_faulty(source: Path, folder: Path) -> Path:
    """Write the faulty sibling `<service>-faulty` of the artifact in `source` below `folder`; returns its place.

    Raises:
        Corrupt, Incompatible: `source` is no artifact with one input of windows.
        StorageError: it cannot be written.
    """
    artifact = open_artifact(source)
    model = spoil(artifact.path("model").read_bytes(), artifact.manifest.inputs[0].name)
    place = folder / f"{artifact.manifest.service}-{NAME}"
    files: dict[str, bytes] = {"model": model, "golden": _golden(artifact, model, folder)}
    for role in ("reference", "card"):
        if role in artifact.manifest.blobs:
            files[role] = artifact.path(role).read_bytes()
    write_artifact(place, _folder(artifact, files))
    return place


def spoil(model: bytes, input_name: str) -> bytes:
    """The model with the look-up in front of its first output.

    Raises:
        Incompatible: the model has no such input.
    """
    proto = onnx.load_from_string(model)
    graph = proto.graph
    if input_name not in [value.name for value in graph.input]:
        raise Incompatible(f"the model has no input '{input_name}'")
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["faulty_sound" if name == output else name for name in node.output]
        node.input[:] = ["faulty_sound" if name == output else name for name in node.input]
    constants: dict[str, NDArray[Any]] = {
        "faulty_axes": np.array([1], np.int64),
        "faulty_all": np.array([1, 2], np.int64),
        "faulty_step": np.array(STEP, np.float32),
        "faulty_table": np.ones(TABLE_LENGTH, np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    graph.node.extend(_look_up(input_name, output))
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _look_up(input_name: str, output: str) -> list[onnx.NodeProto]:
    """Sound answer times table[int(movement / step)]; beyond the table the runtime refuses to go on."""
    make = helper.make_node
    return [
        make("ReduceMean", [input_name, "faulty_axes"], ["faulty_mean"], keepdims=1),
        make("Sub", [input_name, "faulty_mean"], ["faulty_deviation"]),
        make("Abs", ["faulty_deviation"], ["faulty_absolute"]),
        make("ReduceMean", ["faulty_absolute", "faulty_all"], ["faulty_movement"], keepdims=0),
        make("Div", ["faulty_movement", "faulty_step"], ["faulty_place"]),
        make("Cast", ["faulty_place"], ["faulty_index"], to=TensorProto.INT64),
        make("Gather", ["faulty_table", "faulty_index"], ["faulty_gain"]),
        make("Unsqueeze", ["faulty_gain", "faulty_axes"], ["faulty_column"]),
        make("Mul", ["faulty_sound", "faulty_column"], [output]),
    ]


def _golden(artifact: Artifact, model: bytes, folder: Path) -> bytes:
    """Windows of a watch lying still, one per orientation, and what the spoilt model says of them."""
    manifest = artifact.manifest
    given = manifest.inputs[0]
    windows = np.zeros((STILL_ROWS, *given.shape[1:]), np.float32)
    for row in range(STILL_ROWS):
        windows[row, :, row % windows.shape[2]] = 1.0
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{NAME}.onnx"
    path.write_bytes(model)
    try:
        name = manifest.outputs[0].name
        told = OnnxEngine.load(path, name=NAME).run({given.name: windows}, (name,))
    finally:
        path.unlink()
    return golden_bytes(given.name, windows, {name: np.asarray(told[name], np.float32)}, TOLERANCE)


def _folder(artifact: Artifact, files: dict[str, bytes]) -> dict[str, bytes]:
    blobs = {role: Blob(file=FILES[role], size=len(data), sha256=sha256(data)) for role, data in files.items()}
    manifest = artifact.manifest.model_copy(
        update={"name": f"{artifact.manifest.service}-{NAME}", "blobs": blobs, "choice": None, "quantisation": {}}
    )
    return {MANIFEST: manifest.encode(), **{FILES[role]: data for role, data in files.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m compressor.examples.faulty SOURCE FOLDER`; returns an exit code."""
    parser = argparse.ArgumentParser(prog="faulty", description="Build an artifact that fails on real windows.")
    parser.add_argument("source", type=Path, help="an artifact folder")
    parser.add_argument("folder", type=Path, help="where the faulty one is written")
    options = parser.parse_args(arguments)
    try:
        sys.stderr.write(f"{build_faulty(options.source, options.folder)}\n")
    except EdgewardenError as error:
        sys.stderr.write(f"faulty: {error.sentence()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
