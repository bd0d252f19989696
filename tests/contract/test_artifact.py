"""A folder is an artifact only if every byte the manifest names is there."""

from __future__ import annotations

import hashlib
import os

import pytest

from agent.contract import artifact
from agent.contract.errors import Corrupt, Incompatible, TooLarge


def make(folder, **changes):
    """An artifact folder with a card, written without the code under test reading it back."""
    card = b'{"accuracy":{"role":"select","wrist":0.9}}'
    model = b"not parsed by the contract"
    folder.mkdir(exist_ok=True)
    (folder / "card.json").write_bytes(card)
    (folder / "model.onnx").write_bytes(model)
    fields = {
        "name": "wrist",
        "version": 1,
        "service": "wrist",
        "task": "test",
        "inputs": [],
        "outputs": [],
        "runtime": {"opset": 20, "minimum": "1.20", "precision": "int8"},
        "blobs": {
            role: {"file": artifact.FILES[role], "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for role, data in (("card", card), ("model", model))
        },
    }
    manifest = artifact.Manifest.model_validate(fields | changes)
    (folder / "manifest.json").write_bytes(manifest.encode())
    return folder


def test_an_intact_folder_opens_and_its_card_is_read(tmp_path):
    opened = artifact.open_artifact(make(tmp_path))
    assert opened.manifest.name == "wrist"
    assert opened.card()["accuracy"]["wrist"] == 0.9
    assert opened.digest == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()


def test_one_flipped_bit_in_a_blob_is_found(tmp_path):
    make(tmp_path)
    raw = bytearray((tmp_path / "model.onnx").read_bytes())
    raw[3] ^= 1
    (tmp_path / "model.onnx").write_bytes(raw)
    with pytest.raises(Corrupt, match=r"model\.onnx does not match"):
        artifact.open_artifact(tmp_path)


def test_a_truncated_blob_is_found_before_hashing(tmp_path):
    make(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"short")
    with pytest.raises(Corrupt, match="has 5 bytes"):
        artifact.open_artifact(tmp_path)


def test_a_missing_blob_is_named(tmp_path):
    make(tmp_path)
    (tmp_path / "card.json").unlink()
    with pytest.raises(Corrupt, match=r"card\.json"):
        artifact.open_artifact(tmp_path)


def test_a_blob_behind_a_link_is_refused(tmp_path):
    make(tmp_path / "a")
    real = tmp_path / "elsewhere"
    (tmp_path / "a" / "model.onnx").rename(real)
    (tmp_path / "a" / "model.onnx").symlink_to(real)
    with pytest.raises(Corrupt, match="plain file"):
        artifact.open_artifact(tmp_path / "a")


def test_a_manifest_cannot_name_a_path(tmp_path):
    blob = {"file": "../../etc/passwd", "size": 1, "sha256": "0" * 64}
    make(tmp_path, blobs={"model": blob})
    with pytest.raises(Corrupt, match=r"must be called model\.onnx"):
        artifact.open_artifact(tmp_path)


@pytest.mark.parametrize(
    "card",
    [b"this is no json", b"[1]", b"\xff\xfe", b"", b'{"accuracy":[]}', b'{"faults":{}}', b'{"faults":[1]}',
     b'{"accuracy":{"wrist":NaN}}', b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"],
)  # fmt: skip
def test_a_card_that_is_none_is_corrupt_though_its_digest_is_right(tmp_path, card):
    (make(tmp_path) / "card.json").write_bytes(card)
    manifest = artifact.parse_manifest((tmp_path / "manifest.json").read_bytes())
    blob = artifact.Blob(file="card.json", size=len(card), sha256=hashlib.sha256(card).hexdigest())
    fields = {"blobs": {**manifest.blobs, "card": blob}}
    (tmp_path / "manifest.json").write_bytes(manifest.model_copy(update=fields).encode())
    with pytest.raises(Corrupt, match=r"card\.json is no card"):
        artifact.open_artifact(tmp_path)


def test_a_pipe_instead_of_a_manifest_is_refused_and_not_waited_for(tmp_path):
    (make(tmp_path) / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(Corrupt, match="not a plain file"):
        artifact.open_artifact(tmp_path)


def test_roles_of_a_later_release_are_ignored(tmp_path):
    make(tmp_path)
    opened = artifact.open_artifact(tmp_path)
    blobs = dict(opened.manifest.blobs) | {"voice": artifact.Blob(file="voice.wav", size=1, sha256="0" * 64)}
    (tmp_path / "manifest.json").write_bytes(opened.manifest.model_copy(update={"blobs": blobs}).encode())
    assert artifact.open_artifact(tmp_path).manifest.name == "wrist"


def test_an_empty_folder_says_which_command_makes_artifacts(tmp_path):
    with pytest.raises(Corrupt) as caught:
        artifact.open_artifact(tmp_path)
    assert "edgewarden-compressor compress" in caught.value.hint


def test_a_huge_manifest_is_not_read(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b" " * (artifact.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(TooLarge):
        artifact.open_artifact(tmp_path)


def test_a_floor_needs_no_model_but_its_constant(tmp_path):
    make(tmp_path, kind="floor", floor_outputs=None)
    with pytest.raises(Corrupt, match="floor_outputs"):
        artifact.open_artifact(tmp_path)


def test_asking_for_a_blob_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(Incompatible, match="no golden"):
        artifact.open_artifact(make(tmp_path)).path("golden")


@pytest.mark.parametrize("name", ["", "Wrist", "a/b", "a" * 37, "..", "wrist\n"])
def test_a_name_that_could_not_stand_in_a_topic_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a-z"):
        make(tmp_path, name=name)
