"""A short-lived child that asks the repository what is signed: the only door to TUF on the device.

Started as `python -m agent.ota.trust` (`agent.ota.authority`), so that 22 MB of libraries and a parser of foreign
bytes are not resident in the agent. TUF's client decides; it stores nothing we rely on: its folder is a cache that
may be deleted, versions once seen are remembered by the caller. The embedded root is always the anchor, and the
time is an argument.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined] # re-exported unsaid
from tuf.api.serialization import DeserializationError
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from agent import clock
from agent.contract.artifact import MAX_MANIFEST_BYTES, canonical, sha256
from agent.contract.errors import ArtifactError, Corrupt, StateUnreadable, TooLarge, Unavailable, Untrusted
from agent.contract.repository import (
    DIRECTOR_KEYS,
    MAX_DOCUMENT_BYTES,
    METADATA,
    TARGETS,
    approval_path,
    manifest_path,
    parse_director_keys,
    parse_policy,
    pipeline_role,
    policy_path,
)
from agent.ota import wire
from agent.ota.child import serve
from agent.ota.errors import MetadataStale
from agent.ota.files import make_folder, storage_error

CONFIG = UpdaterConfig(
    max_root_rotations=64,
    max_delegations=8,
    root_max_length=64 * 1024,
    timestamp_max_length=16 * 1024,
    snapshot_max_length=256 * 1024,
    targets_max_length=1024 * 1024,
)
# most special first: the first that fits translates
_CODES: tuple[tuple[type[Exception], type[ArtifactError]], ...] = (
    (DownloadLengthMismatchError, TooLarge),
    (DownloadError, Unavailable),
    (ExpiredMetadataError, MetadataStale),
    (LengthOrHashMismatchError, Corrupt),
    (DeserializationError, Corrupt),  # a captive portal's page, say
    (BadVersionNumberError, Untrusted),
    (RepositoryError, Untrusted),
)


@dataclass(frozen=True, slots=True)
class Request:
    """`now_s`: trusted time. `marks`: role -> [version, keys] seen before. `manifests`: (family, digest).

    `families`: whose policies are wanted beside those of the manifests.
    """

    folder: str
    root: str
    repository: str
    now_s: float
    marks: Mapping[str, Any] = field(default_factory=dict)
    manifests: tuple[tuple[str, str], ...] = ()
    families: tuple[str, ...] = ()
    timeout_s: float = 60.0
    tls_ca: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is signed. `manifests`: digest -> length, custom, role, approved.

    A manifest or policy that nobody signed is missing.
    """

    marks: dict[str, Any]
    signed_at: float
    directors: dict[str, str]
    policies: dict[str, Any]
    manifests: dict[str, Any]


def consult(request: Request) -> Answer:
    """Refresh and look up.

    Raises:
        Untrusted: not signed by who has to, or older than what was seen before.
        MetadataStale: expired at `now_s`. Unavailable, TooLarge, Corrupt: the repository's answers are bad.
        DiskFull, StorageError: the cache cannot be written. StateUnreadable: the embedded root cannot be read.
    """
    until_s = clock.monotonic_s() + request.timeout_s
    make_folder(Path(request.folder))
    try:
        with _alone(Path(request.folder), until_s), contextlib.closing(_Fetcher(until_s, request.tls_ca)) as fetcher:
            client = _Client(request, fetcher)
            client.refresh()
            return client.answer()
    except (RepositoryError, DownloadError) as error:
        _translate(error, request.repository)
    except OSError as error:
        raise storage_error(error, Path(request.folder)) from None


@contextlib.contextmanager
def _alone(folder: Path, until_s: float) -> Iterator[None]:
    """One child at a time on TUF's cache: one whose agent was killed may still be at work."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock.monotonic_s() > until_s:
                    raise Unavailable("another refresh of the repository does not end") from None
                clock.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def main(request: dict[str, Any]) -> dict[str, Any]:
    pairs = tuple((str(family), str(digest)) for family, digest in request.pop("manifests"))
    families = tuple(map(str, request.pop("families")))
    return asdict(consult(Request(**request, manifests=pairs, families=families)))


class _Client:
    """One refresh of one repository."""

    def __init__(self, request: Request, fetcher: FetcherInterface) -> None:
        self._request = request
        base = request.repository.rstrip("/")
        self._updater = Updater(
            request.folder,
            f"{base}/{METADATA}/",
            target_dir=request.folder,
            target_base_url=f"{base}/{TARGETS}/",
            fetcher=fetcher,
            config=CONFIG,
            bootstrap=_read_root(Path(request.root)),
        )
        # no public way to set the time: reference_time is fixed when the client is made
        self._trusted = self._updater._trusted_set  # noqa: SLF001
        self._trusted.reference_time = clock.utc(request.now_s)

    def refresh(self) -> None:
        self._updater.refresh()
        self._check_marks(("root", "timestamp", "snapshot", "targets"))

    def answer(self) -> Answer:
        families = sorted({*self._request.families, *(family for family, _ in self._request.manifests)})
        manifests = {}
        for family, digest in self._request.manifests:
            found = self._manifest(family, digest)
            if found is not None:
                manifests[digest] = found
        roles = ("root", "timestamp", "snapshot", "targets", *map(pipeline_role, families))
        self._check_marks(roles)
        return Answer(
            marks={role: self._mark(role) for role in roles if role in self._trusted},
            signed_at=float(self._trusted.timestamp.unrecognized_fields.get("signed_at", 0)),
            directors=parse_director_keys(self._document(DIRECTOR_KEYS)),
            policies={
                family: parse_policy(self._document(policy_path(family))).document()
                for family in families
                if policy_path(family) in self._trusted.targets.targets
            },
            manifests=manifests,
        )

    def _manifest(self, family: str, digest: str) -> dict[str, Any] | None:
        path = manifest_path(family, digest)
        target = self._updater.get_targetinfo(path)
        if target is None:
            return None
        if target.hashes.get("sha256") != digest:
            raise Untrusted(f"the target {path} does not have the digest in its name")
        if target.length > MAX_MANIFEST_BYTES:
            raise TooLarge(
                f"the manifest {digest[:12]} shall have {target.length} bytes, {MAX_MANIFEST_BYTES} are allowed"
            )
        return {
            "length": target.length,
            "custom": target.custom if isinstance(target.custom, dict) else {},
            "role": self._role_of(path, family),
            "approved": approval_path(family, digest) in self._trusted.targets.targets,
        }

    def _role_of(self, path: str, family: str) -> str:
        """Which of the roles that may speak here signed the target; a sub-delegation is none of them."""
        for role in ("targets", pipeline_role(family)):
            if role in self._trusted and path in self._signed_by(role):
                return role
        return ""

    def _signed_by(self, role: str) -> Mapping[str, TargetFile]:
        targets: Mapping[str, TargetFile] = getattr(self._trusted[role], "targets", {})
        return targets

    def _document(self, path: str) -> bytes:
        """A small target of the top-level role."""
        target: TargetFile | None = self._trusted.targets.targets.get(path)
        if target is None:
            raise Untrusted(f"the repository has no signed {path}")
        if target.length > MAX_DOCUMENT_BYTES:
            raise TooLarge(f"{path} shall have {target.length} bytes, {MAX_DOCUMENT_BYTES} are allowed")
        place = str(Path(self._request.folder) / f"{sha256(path.encode())}.document")
        if self._updater.find_cached_target(target, place) is None:
            self._updater.download_target(target, place)
        return Path(place).read_bytes()

    # --- what was seen before -------------------------------------------------------------------------------
    def _check_marks(self, roles: tuple[str, ...]) -> None:
        """A version once seen is never undercut, cache or no cache; new keys of a role start a new count."""
        for role in roles:
            mark = self._request.marks.get(role)
            if mark is None or role not in self._trusted:
                continue
            version, keys = self._mark(role)
            same_keys = role == "root" or keys == mark[1]
            if same_keys and version < mark[0]:
                raise Untrusted(
                    f"{self._request.repository} serves {role} version {version}, version {mark[0]} was seen before",
                    hint="An old state of the repository is being replayed, or it was restored from a backup.",
                )

    def _mark(self, role: str) -> list[Any]:
        delegator = self._trusted.targets if role.startswith(pipeline_role("")) else self._trusted.root
        keyids = sorted(delegator.get_delegated_role(role).keyids)
        return [self._trusted[role].version, sha256(canonical(keyids))]


class _Fetcher(FetcherInterface):
    """TUF's way to the network: ours. `close` when done: TUF drops an answer that is too long without ending it."""

    def __init__(self, until_s: float, tls_ca: str) -> None:
        self._until_s = until_s
        self._tls = wire.make_tls(tls_ca) if tls_ca else None
        self._exchange = contextlib.ExitStack()  # TUF asks for one thing at a time

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.close()
        # opened before the first byte is asked for: TUF's root walk needs the status
        answer = self._exchange.enter_context(wire.get(url, until_s=self._until_s, tls=self._tls))
        if answer.status != 200:
            self.close()
            raise DownloadHTTPError(f"{url} answered {answer.status}", answer.status)
        return answer.body

    def close(self) -> None:
        """End what was asked for last."""
        self._exchange.close()


def _read_root(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StateUnreadable(
            f"cannot read the embedded root {path}: {error.strerror}", hint="Set the path of the fleet's root.json."
        ) from None


def _translate(error: Exception, repository: str) -> NoReturn:
    kind = next(ours for foreign, ours in _CODES if isinstance(error, foreign))
    text = str(error.__cause__ or error) or type(error).__name__
    hint = "Have the publisher sign anew; serving goes on." if kind is MetadataStale else ""
    raise kind(f"the repository {repository}: {text[:300]}", hint=hint) from None


if __name__ == "__main__":
    sys.exit(serve(main))
