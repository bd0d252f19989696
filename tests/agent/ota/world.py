"""A publisher, its repository behind a real server, artifacts with real models, and thieves. For tests of updates."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from agent import clock
from agent.contract import artifact, repository
from agent.contract.artifact import Blob, Manifest, canonical, sha256
from agent.contract.repository import FamilyPolicy
from agent.contract.signed import key_id, public_bytes
from agent.decisions.updates import Choice, Target
from agent.ota import child
from agent.ota.installer import Installer, Site
from compressor.keys import KeyRing
from compressor.publish import Repository
from tests import models

NOW_S = 1_800_000_000.0
DAY_S = 86_400.0
FAMILY = "wrist"
DEVICE = "gateway-1"
LIMITS = child.Limits(memory_bytes=4 * 1024**3, cpu_s=20, wall_s=30.0)


def make_artifact(
    folder: Path,
    *,
    name: str = "wrist",
    version: int = 1,
    wrong: float = 0.0,
    shift: float = 0.0,
    proto: onnx.ModelProto | None = None,
    device_class: str = "gateway",
    scale: float | None = None,
    golden: bool = True,
    **changes: Any,
) -> str:
    """An artifact folder with a working model; returns its manifest digest.

    `wrong` spoils the golden answers, `shift` moves the golden inputs.
    """
    folder.mkdir(parents=True)
    scale = 1.0 + version / 100 if scale is None else scale  # other bytes for each version
    models.save(proto or models.classifier(scale=scale), folder / "model.onnx")
    if golden:
        x = models.window(shift, rows=4)
        expected = (models.expected_probability(x, scale) + wrong).astype(np.float32)
        np.savez(folder / "golden.npz", in_window=x, out_probability=expected, tolerance=np.array(1e-5))
    (folder / "card.json").write_bytes(canonical({"accuracy": {name: 0.9}}))
    blobs = {
        role: Blob(file=file, size=(folder / file).stat().st_size, sha256=artifact.sha256_file(folder / file))
        for role, file in artifact.FILES.items()
        if (folder / file).exists()
    }
    fields: dict[str, Any] = {
        "name": name, "version": version, "service": FAMILY, "task": "test", "blobs": blobs,
        "inputs": [artifact.Input(name="window", datatype="FP32", shape=[-1, models.LENGTH, models.CHANNELS])],
        "outputs": [artifact.Output(name="probability", datatype="FP32", shape=[-1, models.CLASSES])],
        "views": [artifact.View(name="c", kind="channels", output="ew_view_channels", features=["x", "y", "z"])],
        "runtime": artifact.Runtime(
            opset=17, minimum="1.20", precision="float32", control_flow=["If", "Loop"]
        ),
        "choice": artifact.Choice(variant="v", device_class=device_class, reason="test"),
    }  # fmt: skip
    data = Manifest(**(fields | changes)).encode()
    (folder / "manifest.json").write_bytes(data)
    return sha256(data)


def target(*digests: str, version: int = 1, url: str = "http://127.0.0.1:9", **fields: Any) -> Target:
    """A wish for one service; the first digest is `wrist`, the second `wrist-accel`."""
    names = ("wrist", "wrist-accel")[: len(digests)]
    return Target(version, {FAMILY: Choice(dict(zip(names, digests, strict=True)), names)}, url, **fields)


class World:
    """Everything of one fleet below one folder; time stands at NOW_S."""

    def __init__(self, folder: Path, policy: FamilyPolicy | None = None) -> None:
        self.folder = folder
        self.keys = KeyRing.create(folder / "keys", [FAMILY])
        self.repository = Repository.init(
            folder / "repository", self.keys, {FAMILY: policy or FamilyPolicy()}, now_s=NOW_S
        )
        self.root = folder / "root.json"
        self.root.write_bytes(self.repository.trusted_root())
        self._count = 0

    def publish(self, *, approve: bool = True, now_s: float = NOW_S, **fields: Any) -> str:
        """Build and publish one artifact."""
        self._count += 1
        digest = make_artifact(self.folder / f"artifact-{self._count}", **fields)
        self.repository.publish([self.folder / f"artifact-{self._count}"], now_s=now_s)
        if approve:
            self.repository.approve([digest], now_s=now_s)
        return digest

    def installer(self, device: str = DEVICE, **fields: Any) -> Installer:
        site = Site(device, self.folder / f"state-{device}", self.root, trial_limits=LIMITS)
        return Installer(replace(site, **fields))

    def copy(self, name: str) -> Path:
        """The repository as it is now, elsewhere."""
        place = self.folder / name
        shutil.copytree(self.repository.folder, place)
        return place


class Thief:
    """Holds stolen keys and write access to a copy of the repository; signs with what it has, or with its own key."""

    def __init__(self, folder: Path, keys: KeyRing, stolen: Iterable[str]) -> None:
        self.folder = folder
        self._keys = keys
        self._stolen = frozenset(stolen)
        self._own = KeyRing.create(folder.with_name(folder.name + "-own-keys"), [FAMILY])
        self.timestamp: Timestamp = self._read("timestamp").signed
        self.snapshot: Snapshot = self._read(f"{self.timestamp.snapshot_meta.version}.snapshot").signed
        self.targets: Targets = self._role("targets")
        self.pipeline: Targets = self._role("pipeline-wrist")

    def sign(self, *roles: str, bump: bool = True) -> None:
        """Sign and write these roles, then snapshot and timestamp over them."""
        for role in roles:
            self.write_role(role, self.pipeline if role.startswith("pipeline") else self.targets, bump=bump)
        self._write_snapshot(bump=bump)
        self._write_timestamp(bump=bump)

    def add(self, role: str, folder: Path, digest: str, *, name: str = "wrist", version: int = 1) -> None:
        """Put an artifact's files and targets into a role."""
        targets = self.targets if role == "targets" else self.pipeline
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            is_manifest = path.name == "manifest.json"
            place = (
                repository.manifest_path(FAMILY, digest)
                if is_manifest
                else repository.blob_path(FAMILY, sha256(data))
            )
            custom = {"name": name, "version": version, "blobs": []} if is_manifest else {}
            self.put(targets, place, data, custom)

    def put(self, role: Targets, path: str, data: bytes, custom: dict[str, Any] | None = None) -> None:
        entry = TargetFile.from_data(path, data, ["sha256"])
        if custom:
            entry.unrecognized_fields["custom"] = custom
        role.targets[path] = entry
        stored = self.folder / repository.TARGETS / repository.stored_path(path, sha256(data))
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(data)

    def write_role(self, role: str, signed: Targets, *, bump: bool = True, key: str = "") -> None:
        """Sign one role with the key of that name, else its own, and list it in the snapshot."""
        data = self._sealed(key or role, signed, 30 * DAY_S, bump=bump)
        (self._metadata / f"{signed.version}.{role}.json").write_bytes(data)
        self.snapshot.meta[f"{role}.json"] = MetaFile(signed.version, len(data), {"sha256": sha256(data)})

    def _write_snapshot(self, *, bump: bool) -> None:
        data = self._sealed("snapshot", self.snapshot, 7 * DAY_S, bump=bump)
        (self._metadata / f"{self.snapshot.version}.snapshot.json").write_bytes(data)
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version, len(data), {"sha256": sha256(data)})

    def _write_timestamp(self, *, bump: bool) -> None:
        (self._metadata / "timestamp.json").write_bytes(self._sealed("timestamp", self.timestamp, DAY_S, bump=bump))

    def _sealed(self, role: str, signed: Any, life_s: float, *, bump: bool) -> bytes:
        signed.version += bump
        signed.expires = clock.utc(NOW_S + life_s)
        metadata = Metadata(copy.deepcopy(signed))
        ring = self._keys if role in self._stolen else self._own
        private = ring.private(role)
        real = key_id(self._keys.public(role))  # a wrong key still claims to be the right one
        public = SSlibKey(real, "ed25519", "ed25519", {"public": public_bytes(private).hex()})
        metadata.sign(CryptoSigner(private, public))
        return metadata.to_bytes()

    @property
    def _metadata(self) -> Path:
        return self.folder / repository.METADATA

    def _read(self, name: str) -> Metadata[Any]:
        return Metadata.from_file(str(self._metadata / f"{name}.json"))

    def _role(self, role: str) -> Targets:
        signed: Targets = self._read(f"{self.snapshot.meta[f'{role}.json'].version}.{role}").signed
        return signed
