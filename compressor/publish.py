"""The update repository: the only door to TUF's repository side. Devices trust what is signed here, nothing else.

    root 2 of 3, three years · targets (offline), one year · snapshot, seven days · timestamp, one day
    pipeline-<family> (delegated, terminating, bound to the family's paths), thirty days

Promises: a device sees the state before or after an operation, whatever interrupts it. Targets are written first,
then metadata under new names, `timestamp.json` last and atomically. Only a key rotation comes with a moment in which
devices wait: the new root precedes what is signed for it, and the next operation finishes the rest. What was read
is verified before it is signed again, so that a changed file in the folder is not made valid.
Leaves to others: when to publish (`fleet`), how it is served (`fleet.http`), where the keys lie (`keys`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from securesystemslib.exceptions import StorageError as ForeignStorageError
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined] # re-exported unsaid
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined] # re-exported unsaid
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from agent import clock
from agent.contract.artifact import FILES, MANIFEST, Artifact, canonical, open_artifact, sha256
from agent.contract.errors import ConfigError, StateLocked, Untrusted
from agent.contract.repository import (
    DIRECTOR_KEYS,
    METADATA,
    TARGETS,
    FamilyPolicy,
    approval_path,
    blob_path,
    manifest_path,
    parse_policy,
    pipeline_paths,
    pipeline_role,
    policy_path,
    stored_path,
)
from agent.contract.signed import key_id, public_bytes
from agent.contract.topics import check_identifier
from compressor.files import storage_error, write_file
from compressor.keys import ROOTS, KeyRing

DAY_S = 86_400.0
LIFETIME_S = {"root": 1095 * DAY_S, "targets": 365 * DAY_S, "snapshot": 7 * DAY_S, "timestamp": DAY_S}
PIPELINE_LIFETIME_S = 30 * DAY_S
ROOT_THRESHOLD = 2
KEPT_VERSIONS = 8  # per artifact name: a role's metadata stays small, a rollback stays possible
LOCK_WAIT_S = 10.0
RESERVED = frozenset({"approved", "director", "policy"})


@dataclass(frozen=True, slots=True)
class Published:
    """One manifest that devices can find."""

    digest: str
    family: str
    name: str
    version: int
    approved: bool


@dataclass(slots=True)
class _State:
    """The repository's metadata in memory, and which roles have to be signed anew."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    pipelines: dict[str, Metadata[Targets]]
    snapshot_version: int = 0
    timestamp_version: int = 0
    files: dict[str, MetaFile] = field(default_factory=dict)  # of the snapshot
    changed: set[str] = field(default_factory=set)
    expiry_s: dict[str, float] = field(default_factory=dict)


class Repository:
    """A repository folder and the keys that sign it. Safe to use from several processes: operations are locked."""

    def __init__(self, folder: Path, keys: KeyRing) -> None:
        self.folder = folder
        self.keys = keys

    @classmethod
    def init(
        cls, folder: Path, keys: KeyRing, families: Mapping[str, FamilyPolicy], *, now_s: float | None = None
    ) -> Repository:
        """Make an empty signed repository; needs every key.

        Raises:
            ConfigError: the folder holds one already, a key is missing, or a family cannot have that name.
            DiskFull, StorageError
        """
        repository = cls(folder, keys)
        with repository._locked():
            if cls.exists(folder):
                raise ConfigError(f"{folder} is a repository already")
            state = _State(Metadata(Root(consistent_snapshot=True)), Metadata(Targets()), {})
            for role, names in {"root": ROOTS, "targets": ("targets",)}.items():
                repository._name_keys(state, role, names)
            for role in ("snapshot", "timestamp"):
                repository._name_keys(state, role, (role,))
            state.root.signed.roles["root"].threshold = ROOT_THRESHOLD
            state.changed |= {"root", "targets"}
            for family, policy in families.items():
                repository._delegate(state, family)
                repository._put_document(state, policy_path(family), policy.document())
            director = {key_id(keys.public("director")): keys.public("director").hex()}
            repository._put_document(state, DIRECTOR_KEYS, {"keys": director})
            repository._commit(state, _now(now_s), new=True)
        return repository

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a repository was made there: its timestamp is written last."""
        return (folder / METADATA / "timestamp.json").exists()

    # --- what changes it ------------------------------------------------------------------------------------
    def publish(self, folders: Sequence[Path], *, now_s: float | None = None) -> list[str]:
        """Sign artifact folders with their family's pipeline key; returns their manifest digests.

        What is published already is left as it is. Devices of a family with policy `approve` wait for `approve`.

        Raises:
            Corrupt, TooLarge, UnsupportedVersion: an artifact is damaged.
            ConfigError: no such family, or a version that is taken or not the highest of its name.
            Untrusted: the folder's metadata was changed by somebody without keys.
            StateLocked, DiskFull, StorageError
        """
        artifacts = [open_artifact(folder) for folder in folders]
        with self._locked():
            state = self._load()
            for artifact in artifacts:
                self._add(state, artifact)
            if state.changed:
                self._commit(state, _now(now_s))
        return [artifact.digest for artifact in artifacts]

    def approve(self, digests: Sequence[str], *, now_s: float | None = None) -> None:
        """Confirm published manifests with the offline targets key.

        Raises:
            ConfigError: nothing with such a digest is published, or the targets key is not here.
            Untrusted, StateLocked, DiskFull, StorageError
        """
        now_s = _now(now_s)
        with self._locked():
            state = self._load()
            known = {published.digest: published for published in _published(state)}
            for digest in digests:
                if digest not in known:
                    raise ConfigError(f"no manifest {digest[:12]} is published", hint="Publish the artifact first.")
                found = known[digest]
                if not found.approved:
                    document = {"digest": digest, "name": found.name, "version": found.version, "approved_at": now_s}
                    self._put_document(state, approval_path(found.family, digest), document)
            if state.changed:
                self._commit(state, now_s)

    def set_policy(self, family: str, policy: FamilyPolicy, *, now_s: float | None = None) -> None:
        """Make or replace a family's policy with the offline targets key; a new family gets its delegation.

        Raises:
            ConfigError: a minimum version is lowered, or a key is not here.
            Untrusted, StateLocked, DiskFull, StorageError
        """
        with self._locked():
            state = self._load()
            if pipeline_role(family) not in state.pipelines:
                self._delegate(state, family)
            else:
                _check_minimum(family, self._policy(state, family), policy)
            self._put_document(state, policy_path(family), policy.document())
            self._commit(state, _now(now_s))

    def refresh_online(self, *, now_s: float | None = None) -> bool:
        """Sign snapshot, timestamp and pipeline roles again when half of their life is over; True = something was.

        Call at least every six hours. Offline roles cannot be refreshed here: see `days_left`.

        Raises:
            Untrusted, ConfigError, StateLocked, DiskFull, StorageError
        """
        now_s = _now(now_s)
        with self._locked():
            state = self._load()
            lives = {**LIFETIME_S, **dict.fromkeys(state.pipelines, PIPELINE_LIFETIME_S)}
            old = {role for role, expiry_s in state.expiry_s.items() if expiry_s - now_s < lives[role] / 2}
            stale = old - {"root", "targets"}
            if stale or state.changed:
                state.changed |= stale & set(state.pipelines)
                self._commit(state, now_s)
        return bool(stale)

    def rotate(self, name: str, *, now_s: float | None = None) -> None:
        """Replace one key everywhere it is named. Run again after an interruption: it goes on where it was.

        Raises:
            ConfigError: no such key, or one needed for signing is not here.
            Untrusted, StateLocked, DiskFull, StorageError
        """
        with self._locked():
            state = self._load()
            new = public_bytes(self.keys.prepare(name))
            if name == "director":
                self._put_document(state, DIRECTOR_KEYS, {"keys": {key_id(new): new.hex()}})
            else:
                self._replace_key(state, name, new)
            self._commit(state, _now(now_s))
            self.keys.promote(name)

    # --- what it says ---------------------------------------------------------------------------------------
    def trusted_root(self) -> bytes:
        """The newest root metadata: what a device embeds. Raises: ConfigError."""
        version = self._newest_root()
        if not version:
            raise ConfigError(
                f"{self.folder} is no repository", hint="Run `edgewarden-compressor publish` with --policy first."
            )
        return self._path(f"{version}.root").read_bytes()

    def published(self) -> list[Published]:
        """Every manifest devices can find, by family, name and version. Raises: Untrusted, ConfigError."""
        with self._locked():
            return _published(self._load())

    def policy(self, family: str) -> FamilyPolicy:
        """A family's signed policy. Raises: Untrusted, ConfigError."""
        with self._locked():
            return self._policy(self._load(), family)

    def days_left(self, *, now_s: float | None = None) -> dict[str, float]:
        """Days until each role expires; devices stop installing when one has. Raises: Untrusted, ConfigError."""
        with self._locked():
            state = self._load()
        return {role: (expiry_s - _now(now_s)) / DAY_S for role, expiry_s in sorted(state.expiry_s.items())}

    # --- reading --------------------------------------------------------------------------------------------
    def _load(self) -> _State:
        """Everything as devices see it now, verified role by role, by the keys of now."""
        self.keys.reload()
        try:
            return self._verified_state()
        except (RepositoryError, ForeignStorageError, OSError, KeyError, ValueError) as error:
            raise Untrusted(
                f"the metadata in {self.folder} cannot be trusted: {error}", hint="Restore the folder from a backup."
            ) from None

    def _verified_state(self) -> _State:
        root = Metadata[Root].from_bytes(self.trusted_root())
        root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
        self._check_ours(root.signed)
        trusted = [root.signed, *self._root_before(root)]
        timestamp: Metadata[Timestamp] = self._verified("timestamp", "timestamp", trusted)
        listed = timestamp.signed.snapshot_meta
        snapshot: Metadata[Snapshot] = self._verified(f"{listed.version}.snapshot", "snapshot", trusted, listed)
        files = snapshot.signed.meta
        targets = self._target_role("targets", files, trusted)
        roles = targets.signed.delegations.roles if targets.signed.delegations else None
        pipelines = {role: self._target_role(role, files, [targets.signed]) for role in roles or ()}
        state = _State(root, targets, pipelines, snapshot.signed.version, timestamp.signed.version, dict(files))
        if not _is_signed_for(root.signed, "targets", targets):  # left by an unfinished rotation: signed anew
            state.changed.add("targets")
        named: dict[str, Metadata[Any]] = {"root": root, "targets": targets, "snapshot": snapshot}
        named |= {"timestamp": timestamp, **pipelines}
        state.expiry_s = {role: metadata.signed.expires.timestamp() for role, metadata in named.items()}
        return state

    def _check_ours(self, root: Root) -> None:
        """Check that root names keys of this ring: one made by strangers would verify itself."""
        ours = {key_id(self.keys.public(name)) for name in ROOTS}
        ours |= {
            key_id(public_bytes(key)) for name in ROOTS if self.keys.is_rotating(name) for key in self.keys.held(name)
        }
        if not set(root.roles["root"].keyids) <= ours:
            raise RepositoryError(f"root is not signed by the keys in {self.keys.folder}")

    def _root_before(self, root: Metadata[Root]) -> list[Root]:
        """While a rotation is unfinished, roles may still be signed for the root before the newest."""
        if root.signed.version == 1 or not any(map(self.keys.is_rotating, ("targets", "snapshot", "timestamp"))):
            return []
        before: Root = Metadata[Root].from_bytes(self._path(f"{root.signed.version - 1}.root").read_bytes()).signed
        before.verify_delegate("root", root.signed_bytes, root.signatures)
        return [before]

    def _target_role(
        self, role: str, files: Mapping[str, MetaFile], delegators: Sequence[Root | Targets]
    ) -> Metadata[Targets]:
        listed = files[f"{role}.json"]
        metadata: Metadata[Targets] = self._verified(f"{listed.version}.{role}", role, delegators, listed)
        return metadata

    def _verified(
        self, file: str, role: str, delegators: Sequence[Root | Targets], listed: MetaFile | None = None
    ) -> Any:
        data = self._path(file).read_bytes()
        if listed is not None:
            listed.verify_length_and_hashes(data)
        metadata: Metadata[Any] = Metadata.from_bytes(data)
        if not any(_is_signed_for(delegator, role, metadata) for delegator in delegators):
            raise RepositoryError(f"{file}.json is not signed by the keys of {role}")
        return metadata

    def _policy(self, state: _State, family: str) -> FamilyPolicy:
        target = state.targets.signed.targets.get(policy_path(family))
        if target is None:
            raise ConfigError(f"the repository knows no family '{family[:60]}'")
        path = self.folder / TARGETS / stored_path(target.path, target.hashes["sha256"])
        return parse_policy(path.read_bytes())

    # --- changing -------------------------------------------------------------------------------------------
    def _add(self, state: _State, artifact: Artifact) -> None:
        manifest, family = artifact.manifest, artifact.manifest.service
        role = state.pipelines.get(pipeline_role(family))
        if role is None:
            raise ConfigError(
                f"the repository knows no family '{family}' (artifact '{manifest.name}')",
                hint=f"Give it a key and a policy first: `edgewarden-compressor keys add {family} ...`.",
            )
        path = manifest_path(family, artifact.digest)
        if path in role.signed.targets:
            return
        _check_version(state, artifact)
        blobs = {name: blob.sha256 for name, blob in manifest.blobs.items() if name in FILES}
        for name, digest in blobs.items():
            self._put_target(role, blob_path(family, digest), artifact.path(name).read_bytes(), {"role": name})
        custom = {"name": manifest.name, "version": manifest.version, "blobs": sorted(blobs.values())}
        self._put_target(role, path, (artifact.folder / MANIFEST).read_bytes(), custom)
        _forget_old(role.signed, family)
        state.changed.add(pipeline_role(family))

    def _delegate(self, state: _State, family: str) -> None:
        if check_identifier(family) in RESERVED:
            raise ConfigError(f"a family cannot be called '{family}'", hint=f"{sorted(RESERVED)} are reserved.")
        name = pipeline_role(family)
        delegations = state.targets.signed.delegations or Delegations({}, {})
        role = DelegatedRole(name, [], 1, terminating=True, paths=pipeline_paths(family))
        delegations.roles = {**(delegations.roles or {}), name: role}
        state.targets.signed.delegations = delegations
        state.pipelines[name] = Metadata(Targets())
        self._name_keys(state, name, (name,))
        state.changed |= {name, "targets"}

    def _name_keys(self, state: _State, role: str, names: Sequence[str]) -> None:
        for name in names:
            _delegator(state, role).add_key(_tuf_key(self.keys.public(name)), role)

    def _replace_key(self, state: _State, name: str, new: bytes) -> None:
        role = "root" if name in ROOTS else name
        delegator = _delegator(state, role)
        if key_id(new) not in delegator.get_delegated_role(role).keyids:
            delegator.revoke_key(key_id(self.keys.public(name)), role)
            delegator.add_key(_tuf_key(new), role)
            state.changed.add("targets" if isinstance(delegator, Targets) else "root")
        if role not in {"root", "snapshot", "timestamp"}:
            state.changed.add(role)

    def _put_document(self, state: _State, path: str, document: Any) -> None:
        self._put_target(state.targets, path, canonical(document), {})
        state.changed.add("targets")

    def _put_target(self, role: Metadata[Targets], path: str, data: bytes, custom: dict[str, Any]) -> None:
        target = TargetFile.from_data(path, data, ["sha256"])
        if custom:
            target.unrecognized_fields["custom"] = custom
        stored = self.folder / TARGETS / stored_path(path, sha256(data))
        if not stored.exists():
            write_file(stored, data)
        role.signed.targets[path] = target

    # --- signing and writing --------------------------------------------------------------------------------
    def _commit(self, state: _State, now_s: float, *, new: bool = False) -> None:
        """Sign what changed, write it, and let `timestamp.json` make it visible."""
        root = state.root.signed
        if "root" in state.changed:
            before = [] if new else [Metadata[Root].from_bytes(self.trusted_root()).signed]
            self._seal(state.root, "root", [root, *before], now_s, new=new)
        for role in sorted(state.changed - {"root"}, key=lambda role: role != "targets"):
            metadata = state.targets if role == "targets" else state.pipelines[role]
            data = self._seal(metadata, role, [_delegator(state, role)], now_s, new=f"{role}.json" not in state.files)
            state.files[f"{role}.json"] = MetaFile(metadata.signed.version, len(data), {"sha256": sha256(data)})
        snapshot = Metadata(Snapshot(version=max(state.snapshot_version, 1), meta=state.files))
        data = self._seal(snapshot, "snapshot", [root], now_s, new=state.snapshot_version == 0)
        listed = MetaFile(snapshot.signed.version, len(data), {"sha256": sha256(data)})
        timestamp = Metadata(Timestamp(version=max(state.timestamp_version, 1), snapshot_meta=listed))
        timestamp.signed.unrecognized_fields["signed_at"] = int(now_s)  # canonical JSON has no fractions
        self._seal(timestamp, "timestamp", [root], now_s, new=state.timestamp_version == 0)

    def _seal(
        self,
        metadata: Metadata[Any],
        role: str,
        delegators: Sequence[Root | Targets],
        now_s: float,
        *,
        new: bool = False,
    ) -> bytes:
        """Next version, expiry, signatures; checked the way a device will check it; then written."""
        if not new:
            metadata.signed.version += 1
        metadata.signed.expires = clock.utc(now_s + LIFETIME_S.get(role, PIPELINE_LIFETIME_S))
        metadata.signatures.clear()
        for key in self._keys_of(role, delegators):
            metadata.sign(CryptoSigner(key, _tuf_key(public_bytes(key))), append=True)
        data = metadata.to_bytes()
        try:
            for delegator in delegators:
                delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except RepositoryError as error:
            raise ConfigError(
                f"cannot sign {role} with the keys in {self.keys.folder}: {error}",
                hint="Bring the keys that root names into the folder.",
            ) from None
        write_file(self._path(role if role == "timestamp" else f"{metadata.signed.version}.{role}"), data)
        return data

    def _keys_of(self, role: str, delegators: Sequence[Root | Targets]) -> list[Any]:
        """The private keys we hold, of those that the delegators name for the role."""
        wanted = {keyid for delegator in delegators for keyid in delegator.get_delegated_role(role).keyids}
        names = ROOTS if role == "root" else (role,)
        held = [key for name in names for key in self.keys.held(name)]
        return [key for key in held if key_id(public_bytes(key)) in wanted]

    def _path(self, name: str) -> Path:
        return self.folder / METADATA / f"{name}.json"

    def _newest_root(self) -> int:
        """0 = there is none."""
        versions = (path.name.split(".")[0] for path in (self.folder / METADATA).glob("*.root.json"))
        return max((int(version) for version in versions if version.isdecimal()), default=0)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One operation at a time, over all processes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error(error, self.folder) from error
        try:
            _wait_for(descriptor, self.folder)
            yield
        finally:
            os.close(descriptor)


def _wait_for(descriptor: int, folder: Path) -> None:
    until_s = clock.monotonic_s() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if clock.monotonic_s() > until_s:
                raise StateLocked(f"another process is changing the repository {folder}") from None
            clock.sleep(0.02)
        else:
            return


def _now(now_s: float | None) -> float:
    return clock.wall_s() if now_s is None else now_s


def _is_signed_for(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> bool:
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except RepositoryError:
        return False
    return True


def _delegator(state: _State, role: str) -> Root | Targets:
    return state.targets.signed if role in state.pipelines else state.root.signed


def _tuf_key(public: bytes) -> SSlibKey:
    return SSlibKey(key_id(public), "ed25519", "ed25519", {"public": public.hex()})


def _published(state: _State) -> list[Published]:
    found = [
        Published(
            digest=path.rpartition("/")[2],
            family=role.removeprefix(pipeline_role("")),
            name=str(target.custom["name"]),
            version=int(target.custom["version"]),
            approved=approval_path(role.removeprefix(pipeline_role("")), path.rpartition("/")[2])
            in state.targets.signed.targets,
        )
        for role, metadata in state.pipelines.items()
        for path, target in metadata.signed.targets.items()
        if "/manifests/" in path
    ]
    return sorted(found, key=lambda entry: (entry.family, entry.name, entry.version))


def _check_version(state: _State, artifact: Artifact) -> None:
    manifest = artifact.manifest
    same = [entry for entry in _published(state) if (entry.family, entry.name) == (manifest.service, manifest.name)]
    highest = max((entry.version for entry in same), default=0)
    if manifest.version <= highest:
        raise ConfigError(
            f"'{manifest.name}' version {manifest.version} cannot be published: version {highest} is there already",
            hint=f"Build it as version {highest + 1}.",
        )


def _check_minimum(family: str, old: FamilyPolicy, new: FamilyPolicy) -> None:
    lowered = [name for name, version in old.minimum_version.items() if new.minimum_version.get(name, 0) < version]
    if lowered:
        raise ConfigError(
            f"the minimum version of {', '.join(lowered)} in family '{family}' cannot be lowered",
            hint="Devices refuse what lies below a minimum they have seen.",
        )


def _forget_old(role: Targets, family: str) -> None:
    """Drop all but the newest KEPT_VERSIONS of each name from the metadata; their files stay by digest."""
    manifests = {path: target.custom for path, target in role.targets.items() if "/manifests/" in path}
    for name in {custom["name"] for custom in manifests.values()}:
        paths = sorted(
            (path for path, custom in manifests.items() if custom["name"] == name),
            key=lambda path: int(manifests[path]["version"]),
        )
        for path in paths[:-KEPT_VERSIONS]:
            del role.targets[path], manifests[path]
    wanted = {blob_path(family, blob) for custom in manifests.values() for blob in custom["blobs"]}
    for path in [path for path in role.targets if "/blobs/" in path and path not in wanted]:
        del role.targets[path]
