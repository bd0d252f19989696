"""Executes one update command: fetch, verify, self-test. Each can be repeated after a power cut.

Promises: nothing is downloaded that is not acceptable, nothing is tested that is not whole, every refusal has a
stable code. Leaves to others: what comes next (`agent.decisions.lifecycle`), serving what was installed (the agent
process), which may collect blobs with `slots.collect` after a commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agent.contract.artifact import FILES, MANIFEST, Artifact, Blob, Manifest, open_artifact, parse_manifest, sha256
from agent.contract.errors import EdgewardenError, Incompatible, TooLarge, Unavailable
from agent.contract.plan import RuntimePlan
from agent.contract.repository import TARGETS, FamilyPolicy, blob_path, manifest_path, stored_path
from agent.decisions.updates import Fetch, Selection, SelfTest, StepDone, StepFailed, Target, Verify, digests
from agent.ota import acceptance, child, wire
from agent.ota.authority import Authority, SignedManifest, Verdict
from agent.ota.download import Downloads, Wanted
from agent.ota.slots import Slots

MAX_ARTIFACT_BYTES = 1024 * 1024 * 1024
TRIAL_LIMITS = child.Limits(memory_bytes=1024 * 1024 * 1024, cpu_s=60, wall_s=120.0)  # 256 MiB do for a small model


@dataclass(frozen=True, slots=True)
class Site:
    """One device. `folder`: its state. `root`: the embedded root metadata. `device_class` "" = any artifact fits.

    `runtimes`: service -> how its engines are configured to be run, for trials; others are tried with defaults.
    `factory`: manifest digest -> folder of the artifacts that came with the configuration.
    """

    device: str
    folder: Path
    root: Path
    device_class: str = ""
    tls_ca: str = ""
    factory: Mapping[str, Path] = field(default_factory=dict)
    runtimes: Mapping[str, RuntimePlan] = field(default_factory=dict)
    max_artifact_bytes: int = MAX_ARTIFACT_BYTES
    fetch_limit_s: float = 3600.0
    trial_limits: child.Limits = TRIAL_LIMITS
    trial_limit_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Trial:
    """How a candidate did on this device. `memory_bytes`: what it took; `peak_rss_bytes`: its whole process."""

    digest: str
    golden_rows: int
    difference: float
    p50_us: float
    peak_rss_bytes: int
    memory_bytes: int = 0


class Installer:
    """Blocking; owned by the one thread that executes updates."""

    def __init__(self, site: Site) -> None:
        """Raises: DiskFull, StorageError, ConfigError."""
        self.site = site
        self.slots = Slots(site.folder)
        self.authority = Authority(site.folder / "trust", site.root, tls_ca=site.tls_ca)
        tls = wire.make_tls(site.tls_ca) if site.tls_ca else None
        self.downloads = Downloads(site.folder, tls=tls)
        self.trials: tuple[Trial, ...] = ()
        self._trying = ""  # the digest on trial: who is to blame if it fails

    def execute(
        self, command: Fetch | Verify | SelfTest, *, installed: Selection, wall_s: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> StepDone | StepFailed:  # fmt: skip
        """Do it and say how it went; `cancelled` is asked while bytes are moved."""
        before = self.downloads.moved_bytes
        try:
            match command:
                case Fetch():
                    self.fetch(command.target, installed=installed, wall_s=wall_s, cancelled=cancelled)
                case Verify():
                    self.verify(command.target, installed=installed)
                case SelfTest():
                    self.trials = self.self_test(command.target, installed=installed)
        except EdgewardenError as error:
            moved = self.downloads.moved_bytes - before
            blamed = (self._trying,) if isinstance(command, SelfTest) and self._trying else ()
            return StepFailed(command.ticket, error.code, error.sentence(), moved, blamed)
        return StepDone(command.ticket, self.downloads.moved_bytes - before)

    def directors(self, repository: str, *, wall_s: float, families: Iterable[str] = ()) -> dict[str, str]:
        """The keys that may sign `desired` and commands; the minimums of `families` are remembered beside.

        Raises: as `Authority.consult`.
        """
        return self.authority.consult(repository, wall_s=wall_s, families=families).directors

    def check_minimums(self, selection: Selection) -> None:
        """Whether a director may order this selection without a document, by the minimums seen so far.

        Quick: manifests are read, not what they describe. Any thread may ask.

        Raises:
            BelowMinimum; StateUnreadable: what was seen is not known. Corrupt, Unavailable: an artifact is not here.
        """
        minimums = self.authority.marks().minimums
        for service, choice in selection.items():
            policy = FamilyPolicy(minimum_version=minimums.get(service, {}))
            for digest in choice.artifacts.values():
                manifest = self._manifest(digest)
                wish = acceptance.Wish(self.site.device, rollback=True)
                acceptance.check_version(manifest.name, manifest.version, policy, wish)

    def _manifest(self, digest: str) -> Manifest:
        folder = self.slots.path(digest) if self.slots.has(digest) else self.site.factory.get(digest)
        try:
            data = (folder / MANIFEST).read_bytes() if folder else b""
        except OSError:
            data = b""
        if sha256(data) != digest:
            raise Unavailable(f"the manifest {digest[:12]} is not here, or damaged")
        return parse_manifest(data)

    def artifact(self, digest: str) -> Artifact:
        """An artifact that is here: in a slot, or from the factory. Raises: Unavailable, Corrupt."""
        if not self.slots.has(digest) and digest in self.site.factory:
            return open_artifact(self.site.factory[digest])
        return self.slots.open(digest)

    # --- fetch ----------------------------------------------------------------------------------------------
    def fetch(
        self, target: Target, *, installed: Selection, wall_s: float, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """Ask what is signed, accept or refuse all of it, then download what is missing.

        Raises:
            every error of `agent.ota.errors` but those of a trial; DiskFull, StorageError
        """
        new = self._new(target, installed)
        verdict = self.authority.consult(
            target.repository, wall_s=wall_s, families=target.services,
            manifests=[(service, digest) for service, _, digest in new],
        )  # fmt: skip
        accepted = self._accept(target, new, verdict, installed)
        blobs: dict[str, Wanted] = {}
        for service, signed in accepted:
            manifest = self._fetch_manifest(target.repository, service, signed, cancelled)
            blobs |= _blobs(target.repository, service, manifest)
        total = sum(wanted.size for wanted in blobs.values())
        if total > self.site.max_artifact_bytes:
            raise TooLarge(f"the update needs {total} bytes, {self.site.max_artifact_bytes} are allowed here")
        self.downloads.forget(keep=frozenset(blobs))
        for wanted in blobs.values():
            self.downloads.fetch(wanted, deadline_s=self.site.fetch_limit_s, cancelled=cancelled)

    def _accept(
        self, target: Target, new: list[tuple[str, str, str]], verdict: Verdict, installed: Selection
    ) -> list[tuple[str, SignedManifest]]:
        versions = {
            (manifest.service, manifest.name): manifest.version for manifest in self._manifests(digests(installed))
        }
        known = target.digests() & self.site.factory.keys() - digests(installed)
        for manifest in self._manifests(known):
            wish = acceptance.Wish(
                self.site.device, versions.get((manifest.service, manifest.name), 0), target.rollback
            )
            acceptance.check_version(manifest.name, manifest.version, verdict.policies.get(manifest.service), wish)
        accepted = []
        for service, engine, digest in new:
            signed = verdict.manifests.get(digest) or SignedManifest(digest, 0, engine, 0, "", approved=False)
            candidate = acceptance.Candidate(
                service, engine, digest, signed.name, signed.version, signed.role, signed.approved
            )
            wish = acceptance.Wish(self.site.device, versions.get((service, signed.name), 0), target.rollback)
            acceptance.accept(candidate, verdict.policies.get(service), wish)
            accepted.append((service, signed))
        return accepted

    def _manifests(self, wanted: Iterable[str]) -> Iterable[Manifest]:
        """Of those digests, what is here."""
        for digest in sorted(wanted):
            if self.slots.has(digest) or digest in self.site.factory:
                yield self.artifact(digest).manifest

    def _fetch_manifest(
        self, repository: str, service: str, signed: SignedManifest, cancelled: Callable[[], bool]
    ) -> Manifest:
        wanted = _wanted(repository, manifest_path(service, signed.digest), signed.digest, signed.length)
        path = self.downloads.fetch(wanted, deadline_s=self.site.fetch_limit_s, cancelled=cancelled)
        manifest = parse_manifest(path.read_bytes())
        if (manifest.service, manifest.name, manifest.version) != (service, signed.name, signed.version):
            raise Incompatible(
                f"the manifest {signed.digest[:12]} is '{manifest.name}' version {manifest.version} of "
                f"'{manifest.service}', not what is signed about it"
            )
        self._check_fit(manifest)
        return manifest

    def _check_fit(self, manifest: Manifest) -> None:
        """Before its model is downloaded: is it for this class of device?"""
        classes = {budget.device_class for budget in manifest.budgets}
        if manifest.choice is not None:
            classes.add(manifest.choice.device_class)
        if self.site.device_class and classes and self.site.device_class not in classes:
            raise Incompatible(
                f"'{manifest.name}' version {manifest.version} is for {', '.join(sorted(classes))}, "
                f"this device is a {self.site.device_class}"
            )

    # --- verify and test ------------------------------------------------------------------------------------
    def verify(self, target: Target, *, installed: Selection) -> None:
        """Build the slots of what is new, read every byte, and hold them against what serves now.

        Raises:
            Corrupt, Unavailable: bytes are damaged or missing; fetch again.
            Incompatible: a service's clients could not talk to it as before. DiskFull, StorageError
        """
        for service, _, digest in self._new(target, installed):
            manifest = self.slots.build(digest).manifest
            for known in self._serving(service, installed):
                _check_same_signature(manifest, known)

    def _serving(self, service: str, installed: Selection) -> Iterable[Manifest]:
        """The engine clients of a service know now."""
        choice = installed.get(service)
        if choice is None or not choice.order:
            return ()
        return self._manifests([choice.artifacts[choice.order[0]]])

    def self_test(self, target: Target, *, installed: Selection) -> tuple[Trial, ...]:
        """Try what is new, one child each.

        Raises:
            GoldenMismatch, ResourceLimit, Crashed, Incompatible, EngineFailed, Corrupt, Unavailable
            Killed: a trial was ended from outside, which says nothing about the candidate.
        """
        self._trying = ""
        return tuple(self._try(service, digest) for service, _, digest in self._new(target, installed))

    def _try(self, service: str, digest: str) -> Trial:
        request = {
            "folder": str(self.slots.open(digest).folder), "limit_s": self.site.trial_limit_s,
            "runtime": asdict(self.site.runtimes.get(service, RuntimePlan())),
        }  # fmt: skip
        self._trying = digest
        answer = child.run("agent.ota.trial", request, self.site.trial_limits)
        return Trial(
            digest, int(answer["golden_rows"]), float(answer["difference"]), float(answer["p50_us"]),
            int(answer["peak_rss_bytes"]), int(answer["memory_bytes"]),
        )  # fmt: skip

    def _new(self, target: Target, installed: Selection) -> list[tuple[str, str, str]]:
        """(service, engine, digest) of what is neither installed nor from the factory."""
        known = digests(installed) | self.site.factory.keys()
        return [
            (service, engine, digest)
            for service, choice in sorted(target.services.items())
            for engine, digest in sorted(choice.artifacts.items())
            if digest not in known
        ]

    def statistics(self) -> dict[str, float]:
        """Flat numbers for status and metrics."""
        return {**self.downloads.statistics(), **self.slots.statistics(), **self.authority.statistics()}


def _blobs(repository: str, service: str, manifest: Manifest) -> dict[str, Wanted]:
    wanted: list[Blob] = [blob for role, blob in manifest.blobs.items() if role in FILES]
    return {
        blob.sha256: _wanted(repository, blob_path(service, blob.sha256), blob.sha256, blob.size) for blob in wanted
    }


def _wanted(repository: str, target: str, sha256: str, size: int) -> Wanted:
    return Wanted(f"{repository.rstrip('/')}/{TARGETS}/{stored_path(target, sha256)}", sha256, size)


def _check_same_signature(new: Manifest, known: Manifest) -> None:
    """Inputs and outputs by name, type and shape, and the labels clients read."""
    if _signature(new) != _signature(known):
        raise Incompatible(
            f"'{new.name}' version {new.version} takes or gives other tensors than '{known.name}' version "
            f"{known.version}, which serves '{known.service}'"
        )


def _signature(manifest: Manifest) -> Any:
    return (
        [(part.name, part.datatype, part.shape) for part in manifest.inputs],
        [(part.name, part.datatype, part.shape) for part in manifest.outputs],
        manifest.labels,
    )
