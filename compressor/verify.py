"""Checks an artifact folder as a device would: every byte, the reference, the engine, the golden inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.contract.artifact import Artifact, open_artifact
from agent.contract.errors import Incompatible
from agent.drift.reference import load_reference
from agent.engine import OnnxEngine, check_golden, load_golden


def verify_artifact(folder: Path) -> dict[str, Any]:
    """What was checked, in words; anything wrong is raised.

    Raises:
        Corrupt, TooLarge, UnsupportedVersion: the bytes are not what the manifest says.
        Incompatible: the model does not do what the manifest says.
    """
    artifact = open_artifact(folder)
    checks = ["every digest is right"]
    if "reference" in artifact.manifest.blobs:
        reference = load_reference(artifact.path("reference"))
        checks.append(f"the reference has {reference.rows} rows")
    if artifact.manifest.kind == "onnx":
        checks += _engine_checks(artifact)
    return {"name": artifact.manifest.name, "digest": artifact.digest, "checks": checks}


def _engine_checks(artifact: Artifact) -> list[str]:
    manifest = artifact.manifest
    engine = OnnxEngine.load(artifact.path("model"), sha256=manifest.blobs["model"].sha256, name=manifest.name)
    given = {tensor.name: tensor.shape for tensor in (*engine.inputs, *engine.outputs)}
    promised = {part.name: tuple(part.shape) for part in manifest.inputs}
    promised |= {part.name: tuple(part.shape) for part in manifest.outputs}
    promised |= {view.output: (-1, len(view.features)) for view in manifest.views if view.source == "graph"}
    for name, shape in promised.items():
        if given.get(name) != shape:
            raise Incompatible(
                f"{artifact.folder}: the manifest promises '{name}' {list(shape)}, the model has {given}"
            )
    checks = ["inputs, outputs and views are as promised"]
    if "golden" in manifest.blobs:
        result = check_golden(engine, load_golden(artifact.path("golden")))
        if not result.passed:
            raise Incompatible(f"{artifact.folder}: {result.text}", hint="Built for another processor or runtime?")
        checks.append(f"golden inputs answered within {result.difference:.1g}")
    return checks
