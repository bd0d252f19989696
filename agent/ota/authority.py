"""Trust with a memory: asks the trust child, and never forgets which versions and which time it has seen.

The marks are ours, fsynced in two copies outside TUF's cache: deleting the cache does not allow a rollback. The
clock has a floor: no earlier than this build, no earlier than the newest time the repository has signed. A clock
below its floor, or a repository signed far in our future, means that freshness cannot be judged: installing waits
(`clock_unknown`), serving does not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agent.contract.errors import Corrupt, Unavailable
from agent.contract.repository import FamilyPolicy, is_digest
from agent.ota import child
from agent.ota.errors import ClockUnknown, Crashed, Killed, ResourceLimit
from agent.ota.files import make_folder, read_document, write_document

BUILT_S = 1_767_225_600.0  # 2026-01-01, before this was written; no clock that is right shows less
BEHIND_S = 300.0  # a clock may lag the publisher's by this much
AHEAD_S = 86_400.0  # and the publisher's lead ours by this much: a wrong host must not raise our floor for ever
MARKS = "marks.json"
CACHE = "metadata"
CHILD_LIMITS = child.Limits(memory_bytes=512 * 1024 * 1024, cpu_s=30, wall_s=90.0)  # 128 MiB is enough


@dataclass(frozen=True, slots=True)
class Marks:
    """`seen`: role -> (highest version, digest of its key ids). `floor_s`: newest time the repository signed.

    `minimums`: family -> name -> the highest minimum version a signed policy ever asked for.
    """

    seen: dict[str, tuple[int, str]] = field(default_factory=dict)
    floor_s: float = BUILT_S
    minimums: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """What is signed about one manifest; see `agent.ota.trust.Answer`."""

    digest: str
    length: int
    name: str
    version: int
    role: str
    approved: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything the repository says now. A manifest or policy that nobody signed is missing."""

    directors: dict[str, str]
    policies: dict[str, FamilyPolicy]
    manifests: dict[str, SignedManifest]


class Authority:
    """The one place that knows what is trusted. Blocking; any thread may ask, one after the other."""

    def __init__(
        self, folder: Path, root: Path, *, tls_ca: str = "", timeout_s: float = 60.0,
        limits: child.Limits = CHILD_LIMITS,
    ) -> None:  # fmt: skip
        """`folder`: for marks and TUF's cache. `root`: the embedded root metadata. Raises: DiskFull, StorageError."""
        self._folder = folder
        self._root = root
        self._tls_ca = tls_ca
        self._timeout_s = timeout_s
        self._limits = limits
        self._refreshes = self._refusals = 0
        self._lock = threading.Lock()  # marks are read, judged with and written by one at a time
        make_folder(folder)

    def consult(
        self,
        repository: str,
        *,
        wall_s: float,
        manifests: Iterable[tuple[str, str]] = (),
        families: Iterable[str] = (),
    ) -> Verdict:
        """Refresh trust in `repository`; look up manifests, as (family, digest), and the policies of all families.

        `wall_s`: the system's clock.

        Raises:
            ClockUnknown, MetadataStale: freshness cannot be shown; nothing may be installed now.
            Untrusted, Corrupt, TooLarge, Unavailable: what the repository answers is refused.
            Unavailable: also when the child was ended or died; a slow network must not look like a bad model.
            DiskFull, StorageError, StateUnreadable: our own files.
        """
        with self._lock:
            return self._consult(repository, wall_s, manifests, families)

    def _consult(
        self, repository: str, wall_s: float, manifests: Iterable[tuple[str, str]], families: Iterable[str]
    ) -> Verdict:
        self._refusals += 1
        marks = self.marks()
        now_s = judge_clock(wall_s, marks.floor_s)
        request = {
            "folder": str(self._folder / CACHE),
            "root": str(self._root.resolve()),
            "repository": repository,
            "now_s": now_s,
            "marks": marks.seen,
            "manifests": sorted(set(manifests)),
            "families": sorted(set(families)),
            "timeout_s": self._timeout_s,
            "tls_ca": self._tls_ca,
        }
        verdict, seen, signed_at = _parse(self._ask(request))
        if signed_at > now_s + AHEAD_S:
            raise ClockUnknown(
                f"the repository was signed {(signed_at - now_s) / 3600:.1f} h in this device's future",
                hint="Set the clock of this device, or of the publisher.",
            )
        minimums = _raised(marks.minimums, verdict.policies)
        self._remember(Marks({**marks.seen, **seen}, max(marks.floor_s, signed_at), minimums), marks)
        self._refusals -= 1
        self._refreshes += 1
        return verdict

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Let the child ask. Raises: Unavailable: it was ended or died; and what it reports."""
        try:
            return child.run("agent.ota.trust", request, self._limits)
        except (ResourceLimit, Crashed, Killed) as error:
            raise Unavailable(f"the repository could not be judged: {error}", hint="It is tried again.") from None

    def marks(self) -> Marks:
        """What was seen so far. Raises: StateUnreadable: both copies are damaged."""
        document = read_document(self._folder / MARKS)
        if document is None:
            return Marks()
        seen = {role: (int(version), str(keys)) for role, (version, keys) in document["seen"].items()}
        minimums = {family: dict(names) for family, names in document.get("minimums", {}).items()}
        return Marks(seen, max(float(document["floor_s"]), BUILT_S), minimums)

    def statistics(self) -> dict[str, float]:
        """Flat numbers for status and metrics."""
        return {"refreshes": self._refreshes, "refusals": self._refusals}

    def _remember(self, marks: Marks, before: Marks) -> None:
        if marks != before:
            write_document(self._folder / MARKS, asdict(marks))


def judge_clock(wall_s: float, floor_s: float) -> float:
    """The time to judge expiry with: the clock, not below its floor. Raises: ClockUnknown."""
    if wall_s < floor_s - BEHIND_S:
        raise ClockUnknown(
            f"the clock is {(floor_s - wall_s) / 3600:.1f} h behind a time this device has seen",
            hint="Installing waits until the clock is set; serving goes on.",
        )
    return max(wall_s, floor_s)


def _raised(before: dict[str, dict[str, int]], policies: Mapping[str, FamilyPolicy]) -> dict[str, dict[str, int]]:
    """The highest minimum of each name, seen before or asked for now."""
    after = {family: dict(names) for family, names in before.items()}
    for family, policy in policies.items():
        names = after.setdefault(family, {})
        for name, minimum in policy.minimum_version.items():
            names[name] = max(minimum, names.get(name, 0))
    return {family: names for family, names in after.items() if names}


def _parse(answer: dict[str, Any]) -> tuple[Verdict, dict[str, tuple[int, str]], float]:
    """The child looked at foreign bytes: its answer is checked too. Raises: Corrupt."""
    try:
        seen = {str(role): (int(version), str(keys)) for role, (version, keys) in answer["marks"].items()}
        policies = {str(family): _policy(document) for family, document in answer["policies"].items()}
        manifests = {str(digest): _manifest(str(digest), entry) for digest, entry in answer["manifests"].items()}
        directors = {str(name): str(key) for name, key in answer["directors"].items()}
        signed_at = float(answer["signed_at"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"the signed metadata lacks what this agent needs: {type(error).__name__} {error}") from None
    return Verdict(directors, policies, manifests), seen, signed_at


def _policy(document: dict[str, Any]) -> FamilyPolicy:
    return FamilyPolicy(document["policy"], tuple(document["canary"]), dict(document["minimum_version"]))


def _manifest(digest: str, entry: dict[str, Any]) -> SignedManifest:
    custom = entry["custom"]
    if not is_digest(digest):
        raise ValueError("a digest was expected")
    return SignedManifest(
        digest, int(entry["length"]), str(custom["name"]), int(custom["version"]), str(entry["role"]),
        entry["approved"] is True,
    )  # fmt: skip
