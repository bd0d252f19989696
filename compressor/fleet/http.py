"""What devices reach over HTTP: the update repository, the upload of recordings, enrolment.

    GET  /repository/metadata/...   GET /repository/targets/...     with Range; content-addressed = immutable
    PUT  /samples/<device>/<id>     one-time token of the request, size bounded before and while reading
    POST /enrol                     one-time token of an operator; the device it enrolled may ask again
    GET  /healthz

Nothing here is trusted by devices: what the repository serves is signed. Nothing a device sends is believed:
a recording is read by `samples` before it counts. Errors are a status and exactly {"error": "..."}.
The operator's page is another application on another socket (`compressor.web`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from agent.contract.errors import ArtifactError, DiskFull, EdgewardenError
from agent.contract.topics import IDENTIFIER
from compressor.files import storage_error
from compressor.fleet.database import Database, Row, devices, plans, timeline
from compressor.fleet.samples import Recordings, Shape, read_recordings
from compressor.fleet.tokens import hash_token

IMMUTABLE = "public, max-age=31536000, immutable"
ALWAYS_ASK = "no-cache"
MAX_ENROL_BYTES = 4096
MAX_ATTEMPTS = 5  # uploads of one recording
UPLOADS = 4  # at the same time
UPLOAD_TIMEOUT_S = 300.0
_METADATA = re.compile(r"metadata/(?P<version>\d{1,9}\.)?[a-z0-9-]{1,60}\.json")
_TARGET = re.compile(r"targets/(?:[a-z0-9-]{1,60}/){0,4}[0-9a-f]{64}\.[A-Za-z0-9._-]{1,80}")


class Refusal(EdgewardenError):
    """An answer with a status other than 2xx."""

    code = "refused"

    def __init__(self, status: int, text: str, *, retry_after_s: int = 0) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Doors:
    """What the application needs of the service around it.

    `shape_of`: what recordings of a service look like; `on_change`: something new is committed.
    """

    database: Database
    repository: Path | None
    uploads: Path
    fleet: str
    public_url: Callable[[], str]
    max_samples_bytes: int
    shape_of: Callable[[str], Shape]
    on_change: Callable[[], None]
    clock: Callable[[], float]


def make_app(doors: Doors) -> Starlette:
    """The device side's application."""
    uploads = asyncio.Semaphore(UPLOADS)

    async def repository(request: Request) -> Response:
        return await run_in_threadpool(_repository_file, doors.repository, request.path_params["path"])

    async def upload(request: Request) -> Response:
        if uploads.locked():
            raise Refusal(503, "too many uploads at once", retry_after_s=5)
        async with uploads:
            return await _upload(doors, request)

    async def enrol(request: Request) -> Response:
        return await _enrol(doors, request)

    async def health(_request: Request) -> Response:
        return JSONResponse({"fleet": doors.fleet, "ready": True})

    return Starlette(
        routes=[
            Route("/repository/{path:path}", repository, methods=["GET"]),
            Route("/samples/{device}/{sample}", upload, methods=["PUT"]),
            Route("/enrol", enrol, methods=["POST"]),
            Route("/healthz", health, methods=["GET"]),
        ],
        exception_handlers={Refusal: _refused, EdgewardenError: _failed, 404: _not_found, 405: _not_found},
    )


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)  # noqa: S101 - registered for it
    headers = {"retry-after": str(error.retry_after_s)} if error.retry_after_s else {}
    return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)


async def _failed(_request: Request, error: Exception) -> Response:
    status = 507 if isinstance(error, DiskFull) else 500
    return JSONResponse({"error": str(error)}, status_code=status)


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return JSONResponse({"error": f"{request.method} {request.url.path[:200]} is not offered"}, status_code=status)


# --- repository ------------------------------------------------------------------------------------------------
def _repository_file(repository: Path | None, path: str) -> Response:
    metadata = _METADATA.fullmatch(path)
    if repository is None or not (metadata or _TARGET.fullmatch(path)):
        raise Refusal(404, "the repository has no such file")
    file = repository / path
    if not file.is_file() or file.is_symlink():
        raise Refusal(404, "the repository has no such file")
    fixed = metadata is None or metadata["version"] is not None
    return FileResponse(
        file,
        media_type="application/json" if metadata else "application/octet-stream",
        headers={"cache-control": IMMUTABLE if fixed else ALWAYS_ASK},
    )


# --- recordings ------------------------------------------------------------------------------------------------
def sweep(uploads: Path) -> None:
    """Remove what uploads left that a former host's end cut off; before anything may be uploaded."""
    for part in uploads.glob("*.part"):
        with contextlib.suppress(OSError):
            part.unlink()


async def _upload(doors: Doors, request: Request) -> Response:
    sample = await run_in_threadpool(_asked_for, doors, request)
    part = doors.uploads / f"{sample.id}.{secrets.token_hex(4)}.part"
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            digest, size = await _receive(request, part, most=int(sample.max_bytes))
        recordings = await run_in_threadpool(_accept, doors, sample, part, digest, size)
    except TimeoutError:
        raise Refusal(408, f"the upload took longer than {UPLOAD_TIMEOUT_S:.0f} s") from None
    except ClientDisconnect:
        raise Refusal(400, "the upload broke off") from None
    finally:
        part.unlink(missing_ok=True)
    doors.on_change()
    return JSONResponse({"rows": recordings.rows, "sha256": digest}, status_code=201)


def _asked_for(doors: Doors, request: Request) -> Row[Any]:
    """The request this upload answers, once the token fits. Raises: Refusal."""
    device, name = request.path_params["device"], request.path_params["sample"]
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    with doors.database.writing() as tx:
        sample = plans.sample(tx, name[:64])
        known = sample is not None and sample.device == device
        if sample is None or not known or not hmac.compare_digest(sample.token_sha256, hash_token(token)):
            raise Refusal(401, "no recording was asked for with this token")
        _check_open(sample, request)
        held = sum(row.size_bytes or 0 for row in plans.samples(tx, states=("accepted",)))
        if held + int(sample.max_bytes) > doors.max_samples_bytes:
            raise Refusal(507, "the host holds as many recordings as it may", retry_after_s=3600)
        plans.change_sample(tx, sample.id, attempts=sample.attempts + 1)
    return sample


def _check_open(sample: Row[Any], request: Request) -> None:
    if sample.state != "asked":
        raise Refusal(409, f"this recording is {sample.state} already")
    if sample.attempts >= MAX_ATTEMPTS:
        raise Refusal(429, f"this recording was tried {sample.attempts} times")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > sample.max_bytes:
        raise Refusal(413, f"a recording may have {sample.max_bytes} bytes, not {length[:20]}")


async def _receive(request: Request, part: Path, *, most: int) -> tuple[str, int]:
    """Write the body to `part`; returns its digest and size. Raises: Refusal, StorageError."""
    digest, size = hashlib.sha256(), 0
    try:
        part.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise Refusal(413, f"a recording may have {most} bytes")
                digest.update(chunk)
                await run_in_threadpool(file.write, chunk)
            await run_in_threadpool(_flush, file)
    except OSError as error:
        raise storage_error(error, part) from error
    return digest.hexdigest(), size


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _accept(doors: Doors, sample: Row[Any], part: Path, digest: str, size: int) -> Recordings:
    """Read the recording; keep it or say why not. Raises: Refusal, StorageError."""
    now_s = doors.clock()
    try:
        recordings = read_recordings(part, doors.shape_of(sample.service), max_bytes=4 * int(sample.max_bytes))
    except ArtifactError as error:
        _settle(doors, sample, "rejected", str(error), now_s, severity="warning")
        raise Refusal(400, str(error)) from None
    path = doors.uploads / f"{sample.id}.npz"
    text = f"{recordings.rows} windows of {recordings.recordings} recordings, {size:,} bytes"
    _settle(
        doors, sample, "accepted", text, now_s, move=(part, path), path=str(path), sha256=digest, size_bytes=size,
        rows=recordings.rows,
    )  # fmt: skip
    return recordings


def _settle(
    doors: Doors, sample: Row[Any], state: str, text: str, now_s: float, *, severity: str = "info",
    move: tuple[Path, Path] | None = None, **values: Any,
) -> None:  # fmt: skip
    """`move`: the file goes to its place in the same transaction: of two uploads at once the first is kept."""
    with doors.database.writing() as tx:
        current = plans.sample(tx, sample.id)
        if current is None or current.state != "asked":
            raise Refusal(409, "this recording was settled meanwhile")
        if move is not None:
            _move(*move)
        plans.change_sample(tx, sample.id, state=state, settled_at=now_s, text=text, **values)
        timeline.add(tx, "sample", f"recording {state}: {text}", at=now_s, device=sample.device, severity=severity)


def _move(part: Path, path: Path) -> None:
    try:
        part.replace(path)
    except OSError as error:
        raise storage_error(error, path) from error


# --- enrolment -------------------------------------------------------------------------------------------------
class Enrolment(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    token: str = Field(min_length=16, max_length=128)
    device: str = Field(pattern=f"^{IDENTIFIER.pattern}$")
    public_key: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")  # Ed25519, for signed reports


async def _enrol(doors: Doors, request: Request) -> Response:
    body = await _small_body(request, MAX_ENROL_BYTES)
    try:
        asked = Enrolment.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refusal(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    await run_in_threadpool(_enrol_now, doors, asked)
    doors.on_change()
    url = doors.public_url()
    return JSONResponse({"fleet": doors.fleet, "device": asked.device, "repository": f"{url}/repository"})


def _enrol_now(doors: Doors, asked: Enrolment) -> None:
    """Spend the token, or see that it was spent by this very device, which then hears the same answer again."""
    now_s = doors.clock()
    with doors.database.writing() as tx:
        digest = hash_token(asked.token)
        if devices.is_repeated(tx, digest, asked.device, asked.public_key, now_s=now_s):
            return
        if not devices.use_token(tx, digest, asked.device, now_s=now_s):
            raise Refusal(403, "the enrolment token is unknown, used, over or for another device")
        devices.change(tx, asked.device, now_s=now_s, enrolled_at=now_s, public_key=asked.public_key or None)
        timeline.add(tx, "enrolment", "enrolled with a one-time token", at=now_s, device=asked.device)


async def _small_body(request: Request, most: int) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise Refusal(413, f"at most {most} bytes are read here")
    return body
