"""The artifact: a folder of plain files named by one canonical JSON manifest.

Reading is strict: file names are fixed, sizes are checked before digests, unknown roles are ignored, unknown
fields are kept. Nothing is ever unpickled or extracted.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
)

from agent.contract.errors import Corrupt, Incompatible, TooLarge, UnsupportedVersion
from agent.contract.plan import RuntimePlan
from agent.contract.topics import IDENTIFIER

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 * 1024
MAX_CARD_BYTES = 4 * 1024 * 1024
MAX_BLOB_BYTES = 1024 * 1024 * 1024
FILES = {"model": "model.onnx", "reference": "reference.npz", "golden": "golden.npz", "card": "card.json"}


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Blob(Part):
    file: str
    size: int = Field(ge=0, le=MAX_BLOB_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Channel(Part):
    """One sensor channel on an input's last axis. `minimum`..`maximum` is the sensor's allowed range.

    `missing`, `out_of_range`: its own policies, None = those of the input; not written when None.
    """

    name: str
    unit: str
    group: str
    minimum: float
    maximum: float
    missing: Literal["refuse", "impute", "pass"] | None = None
    out_of_range: Literal["refuse", "impute", "clip", "pass"] | None = None

    @model_serializer(mode="wrap")
    def _brief(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if value is not None}


class Input(Part):
    name: str
    datatype: str
    shape: list[int]
    meaning: str = ""
    channels: list[Channel] = []
    missing: Literal["refuse", "impute", "pass"] = "refuse"
    out_of_range: Literal["refuse", "impute", "clip", "pass"] = "pass"


class Output(Part):
    name: str
    datatype: str
    shape: list[int]
    meaning: str = ""


class View(Part):
    """What drift sees of a request. `output` is a graph output of shape (rows, len(features))."""

    name: str
    kind: Literal["identity", "channels", "image", "hidden", "outputs"]
    source: Literal["graph", "agent"] = "graph"
    output: str = ""
    features: list[str]


class Window(Part):
    """How a stream is cut into model inputs; `length` and `hop` in samples."""

    length: int = Field(gt=0)
    hop: int = Field(gt=0)
    rate_hz: float = Field(gt=0)


class Budget(Part):
    """What this artifact promises on its device class; None = not promised."""

    device_class: str
    latency_p95_us: float | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None
    energy_mj: float | None = None
    accuracy_drop: float | None = None  # against the teacher, 0..1


class Choice(Part):
    """Why this variant: replayed by a rebuild, never measured again."""

    variant: str
    device_class: str
    reason: str


class Runtime(Part):
    opset: int
    minimum: str  # oldest onnxruntime this was tested with
    precision: str  # float32 | int8 | constant
    control_flow: list[str] = []  # operators with graphs inside that it uses (If, Loop...); not written when empty

    @model_serializer(mode="wrap")
    def _brief(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return written if self.control_flow else {k: v for k, v in written.items() if k != "control_flow"}


class Manifest(Part):
    format: int = FORMAT
    name: str
    version: int = Field(ge=1)
    service: str  # the name clients ask for; siblings share it
    task: str
    kind: Literal["onnx", "floor"] = "onnx"
    inputs: list[Input]
    outputs: list[Output]
    labels: list[str] = []
    label_output: str = ""
    reads: list[str] = []  # channels the model looks at; empty = all
    window: Window | None = None
    budgets: list[Budget] = []
    fallbacks: list[str] = []  # sibling names, best first
    views: list[View] = []
    floor_outputs: dict[str, list[float]] | None = None
    runtime: Runtime
    choice: Choice | None = None
    parent: str | None = None
    quantisation: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    blobs: dict[str, Blob] = {}

    @field_validator("name", "service")
    @classmethod
    def _identifier(cls, value: str) -> str:
        if not IDENTIFIER.fullmatch(value):
            raise ValueError("must be 1 to 36 characters of a-z, 0-9 and '-'")
        return value

    def encode(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, one newline at the end."""
        return canonical(self.model_dump(mode="json", exclude_none=False))


def promised(manifest: Manifest) -> Budget:
    """The budget of the device class the artifact was chosen for."""
    chosen = manifest.choice.device_class if manifest.choice else ""
    fitting = [budget for budget in manifest.budgets if budget.device_class == chosen] or manifest.budgets
    return fitting[0] if fitting else Budget(device_class=chosen)


def running(manifest: Manifest, configured: RuntimePlan) -> RuntimePlan:
    """How an artifact is run where `configured` holds: its own limits where that has none, and what it names."""
    return replace(
        configured,
        memory_bytes=configured.memory_bytes or promised(manifest).memory_bytes or 0,
        control_flow=tuple(sorted({*configured.control_flow, *manifest.runtime.control_flow})),
    )


class Card(Part):
    """What every reader of a card may take for granted."""

    accuracy: dict[str, Any] = {}  # engine -> accuracy, and the role it was measured on
    faults: list[dict[str, Any]] = []


_OBJECT = TypeAdapter(dict[str, Any])


def canonical(document: Any) -> bytes:
    """The one byte form of a JSON document; NaN and infinity are refused."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode() + b"\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Artifact(BaseModel):
    """A verified artifact folder. `digest` is the sha256 of its manifest's bytes."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    digest: str
    manifest: Manifest

    def path(self, role: str) -> Path:
        """Where a blob lies.

        Raises:
            Incompatible: this artifact has no such blob.
        """
        if role not in self.manifest.blobs:
            raise Incompatible(f"artifact '{self.manifest.name}' in {self.folder} has no {role}")
        return self.folder / FILES[role]

    def card(self) -> dict[str, Any]:
        """The card as a document; empty when the artifact has none. Raises: Corrupt, TooLarge."""
        return _load_card(self.path("card")) if "card" in self.manifest.blobs else {}


def open_artifact(folder: Path) -> Artifact:
    """Read and verify every byte of an artifact folder.

    Raises:
        Corrupt: a file is missing, a size or digest differs, or manifest or card is malformed.
        TooLarge: a file is larger than the format allows.
        UnsupportedVersion: written by a newer format.
    """
    manifest_path = folder / MANIFEST
    hint = "Name a folder written by `edgewarden-compressor compress`."
    raw = _read(manifest_path, MAX_MANIFEST_BYTES, hint=hint)
    manifest = parse_manifest(raw, where=str(manifest_path))
    for role, blob in manifest.blobs.items():
        if role in FILES:
            _verify(folder, role, blob)
    if manifest.kind == "onnx" and "model" not in manifest.blobs:
        raise Corrupt(f"{manifest_path} names no model")
    if manifest.kind == "floor" and not manifest.floor_outputs:
        raise Corrupt(f"{manifest_path} is a floor without floor_outputs")
    artifact = Artifact(folder=folder, digest=sha256(raw), manifest=manifest)
    artifact.card()
    return artifact


def parse_manifest(raw: bytes, *, where: str = MANIFEST) -> Manifest:
    """Manifest from its bytes.

    Raises:
        Corrupt, UnsupportedVersion
    """
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise Corrupt(f"{where}: {place}: {first['msg']}", hint="The artifact must be built again.") from None
    if manifest.format > FORMAT:
        raise UnsupportedVersion(
            f"{where} has format {manifest.format}, this agent reads up to {FORMAT}", hint="Update the agent."
        )
    return manifest


def _load_card(path: Path) -> dict[str, Any]:
    """A card's document.

    Raises:
        Corrupt: no JSON object, a number in it is not finite, or what it says of accuracy or faults is no table.
        TooLarge: over MAX_CARD_BYTES.
    """
    raw = _read(path, MAX_CARD_BYTES, hint="The artifact is incomplete.")
    try:
        document = _OBJECT.validate_json(raw)
        Card.model_validate(document)
        canonical(document)
    except (ValueError, RecursionError) as error:  # pydantic's is a ValueError
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise Corrupt(f"{path} is no card: {why}", hint="The artifact must be built again.") from None
    return document


def _read(path: Path, max_bytes: int, *, hint: str) -> bytes:
    """The bytes of a plain file; never waits for whoever would write into a pipe. Raises: Corrupt, TooLarge."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Corrupt(f"{path} is not a plain file", hint=hint)
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise Corrupt(f"cannot read {path}: {error.strerror}", hint=hint) from None
    if len(raw) > max_bytes:
        raise TooLarge(f"{path} is larger than the {max_bytes} bytes that are allowed")
    return raw


def _verify(folder: Path, role: str, blob: Blob) -> None:
    path = folder / FILES[role]
    if blob.file != FILES[role]:
        raise Corrupt(f"{folder}: the {role} must be called {FILES[role]}, not '{blob.file[:60]}'")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Corrupt(f"cannot read {path}: {error.strerror}", hint="The artifact is incomplete.") from None
    if path.is_symlink() or not path.is_file():
        raise Corrupt(f"{path} is not a plain file")
    if size != blob.size:
        raise Corrupt(f"{path} has {size} bytes, the manifest says {blob.size}", hint="Copy the artifact again.")
    if sha256_file(path) != blob.sha256:
        raise Corrupt(f"{path} does not match the digest in its manifest", hint="Copy the artifact again.")
