from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from agent.contract.artifact import FILES, MANIFEST, Blob, open_artifact, sha256
from agent.contract.errors import Corrupt, Incompatible
from compressor.evidence import golden_bytes
from compressor.verify import verify_artifact
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


@pytest.fixture
def copy(tiny_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.artifact(), tmp_path / "tiny"))


def test_a_flipped_bit_is_found(copy: Path) -> None:
    model = copy / "model.onnx"
    raw = bytearray(model.read_bytes())
    raw[len(raw) // 2] ^= 1
    model.write_bytes(raw)
    with pytest.raises(Corrupt, match="digest"):
        verify_artifact(copy)


def test_wrong_golden_answers_are_found(copy: Path) -> None:
    windows, wrong = np.zeros((2, 32, 3), np.float32), np.full((2, 3), 0.9, np.float32)
    replace(copy, "golden", golden_bytes("wave", windows, {"probability": wrong}, 1e-3))
    with pytest.raises(Incompatible, match="golden"):
        verify_artifact(copy)


def test_a_promise_the_model_does_not_keep_is_found(copy: Path) -> None:
    manifest = open_artifact(copy).manifest
    view = manifest.views[0].model_copy(update={"features": manifest.views[0].features[:-1]})
    (copy / MANIFEST).write_bytes(manifest.model_copy(update={"views": [view]}).encode())
    with pytest.raises(Incompatible, match="promises 'ew_view_channels'"):
        verify_artifact(copy)


def replace(folder: Path, role: str, data: bytes) -> None:
    manifest = open_artifact(folder).manifest
    (folder / FILES[role]).write_bytes(data)
    blobs = {**manifest.blobs, role: Blob(file=FILES[role], size=len(data), sha256=sha256(data))}
    (folder / MANIFEST).write_bytes(manifest.model_copy(update={"blobs": blobs}).encode())
