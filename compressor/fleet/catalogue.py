"""What the update repository holds, by digest: names for people, shapes of inputs, names of features.

Reads manifests and references that the publisher wrote; verifies nothing (devices do). A repository that is missing
or odd makes an emptier catalogue, never an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.contract.artifact import MAX_MANIFEST_BYTES, Manifest, parse_manifest, sha256
from agent.contract.errors import ArtifactError, ContractError
from agent.contract.repository import TARGETS, blob_path, stored_path
from agent.drift.reference import MAX_REFERENCE_BYTES, load_reference
from compressor.fleet.samples import Shape

MAX_MANIFESTS = 2000
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Published:
    digest: str
    manifest: Manifest

    @property
    def label(self) -> str:
        return f"{self.manifest.name} v{self.manifest.version}"


class Catalogue:
    """Manifests below a repository's `targets`. `refresh` is called by one thread; readers see a whole state."""

    def __init__(self, repository: Path | None) -> None:
        self._targets = repository / TARGETS if repository is not None else None
        self._known: dict[str, Published] = {}
        self._features: dict[str, tuple[str, ...]] = {}  # of references that had to be opened

    def refresh(self) -> bool:
        """Read what is new; True when there was something."""
        if self._targets is None:
            return False
        fresh: dict[str, Published] = {}
        for path in sorted(self._targets.glob("*/manifests/*"))[:MAX_MANIFESTS]:
            digest = path.name.rpartition(".")[2]
            if _DIGEST.fullmatch(digest) and digest not in self._known:
                manifest = _manifest(path, digest)
                if manifest is not None:
                    fresh[digest] = Published(digest, manifest)
        if fresh:
            self._known = {**self._known, **fresh}
        return bool(fresh)

    def find(self, digest: str) -> Published | None:
        return self._known.get(digest)

    def label(self, digest: str) -> str:
        """`wrist v2`, or the beginning of an unknown digest."""
        found = self._known.get(digest)
        return found.label if found is not None else digest[:12]

    def next_version(self, service: str) -> int:
        """Higher than every version of this service that is published."""
        return 1 + max((p.manifest.version for p in self._known.values() if p.manifest.service == service), default=0)

    def deployed(self, service: str, carried: Iterable[Mapping[str, str]]) -> dict[str, str]:
        """Name -> manifest digest that most of these devices carry, the newest of equally many.

        carried: engine -> digest of each device, as it says. What is not published under that name counts nothing.
        """
        counts: Counter[str] = Counter()
        for engines in carried:
            for name, digest in engines.items():
                found = self._known.get(digest)
                if found is not None and (found.manifest.service, found.manifest.name) == (service, name):
                    counts[digest] += 1
        rising = sorted(counts, key=lambda digest: (counts[digest], self._known[digest].manifest.version))
        return {self._known[digest].manifest.name: digest for digest in rising}

    def features(self, reference: str) -> tuple[str, ...]:
        """Names of the view's features whose drift reference has this digest."""
        for published in self._known.values():
            blob = published.manifest.blobs.get("reference")
            if blob is not None and blob.sha256 == reference:
                return self._followed(published.manifest, reference)
        return ()

    def _followed(self, manifest: Manifest, reference: str) -> tuple[str, ...]:
        """Features of the view that the reference is about; of several views only the reference itself says which."""
        views = [tuple(view.features) for view in manifest.views]
        if len(views) < 2 or self._targets is None:
            return views[0] if views else ()
        if reference not in self._features:
            path = self._targets / stored_path(blob_path(manifest.service, reference), reference)
            features = _features(path, reference)
            if features not in views:
                return ()
            self._features[reference] = features
        return self._features[reference]

    def has_reference(self, digest: str) -> bool:
        """Something published drifts from this reference."""
        blobs = (published.manifest.blobs.get("reference") for published in self._known.values())
        return any(blob is not None and blob.sha256 == digest for blob in blobs)

    def shape(self, service: str) -> Shape:
        """What recordings of this service look like, by its newest model."""
        models = [p.manifest for p in self._known.values() if p.manifest.service == service and p.manifest.inputs]
        if not models:
            return Shape()
        newest = max(models, key=lambda manifest: (manifest.kind == "onnx", manifest.version))
        first = newest.inputs[0]
        if len(first.shape) != 3:
            return Shape(labels=len(newest.labels) or None)
        return Shape(
            length=first.shape[1] if first.shape[1] > 0 else None,
            channels=first.shape[2] if first.shape[2] > 0 else None,
            labels=len(newest.labels) or None,
            ranges=tuple((channel.minimum, channel.maximum) for channel in first.channels),
        )


def _features(path: Path, digest: str) -> tuple[str, ...]:
    """Of a published reference; () when it cannot be read."""
    try:
        if path.stat().st_size > MAX_REFERENCE_BYTES:
            return ()
        raw = path.read_bytes()
        return load_reference(raw).features if sha256(raw) == digest else ()
    except (OSError, ArtifactError, ContractError):
        return ()


def _manifest(path: Path, digest: str) -> Manifest | None:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            return None
        raw = path.read_bytes()
        return parse_manifest(raw, where=str(path)) if sha256(raw) == digest else None
    except (OSError, ArtifactError, ContractError):
        return None
