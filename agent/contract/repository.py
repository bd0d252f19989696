"""Where things lie in the update repository, and what its small documents say. Plain Python.

    metadata/*.json                                    TUF metadata, consistent snapshots
    targets/<folder>/<sha256>.<name>                   what they sign
    <family>/manifests/<manifest digest>               signed by pipeline-<family>
    <family>/blobs/<sha256>                            signed by pipeline-<family>
    director/keys.json  policy/<family>.json  approved/<family>/<manifest digest>      signed by targets

A family is a service's name. `compressor.publish` writes, `agent.ota` reads.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.contract.errors import Corrupt

METADATA = "metadata"
TARGETS = "targets"
DIRECTOR_KEYS = "director/keys.json"
MAX_DOCUMENT_BYTES = 64 * 1024
MAX_CANARIES = 1000
_DIGEST = re.compile(r"[0-9a-f]{64}")


def pipeline_role(family: str) -> str:
    """The delegated role that signs what a pipeline built for this family."""
    return f"pipeline-{family}"


def pipeline_paths(family: str) -> list[str]:
    """The only places that role may sign."""
    return [f"{family}/manifests/*", f"{family}/blobs/*"]


def manifest_path(family: str, digest: str) -> str:
    return f"{family}/manifests/{digest}"


def blob_path(family: str, sha256: str) -> str:
    return f"{family}/blobs/{sha256}"


def approval_path(family: str, digest: str) -> str:
    return f"approved/{family}/{digest}"


def policy_path(family: str) -> str:
    return f"policy/{family}.json"


def stored_path(target: str, sha256: str) -> str:
    """Path below `targets/` of a target whose content has this digest (consistent snapshots)."""
    folder, _, name = target.rpartition("/")
    return f"{folder}/{sha256}.{name}" if folder else f"{sha256}.{name}"


def is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class FamilyPolicy:
    """Signed by the offline targets key. `auto`: canaries may run what the pipeline signed, unapproved."""

    policy: Literal["approve", "auto"] = "approve"
    canary: tuple[str, ...] = ()
    minimum_version: dict[str, int] = field(default_factory=dict)  # artifact name -> lowest version ever allowed

    def document(self) -> dict[str, Any]:
        return {
            "policy": self.policy, "canary": sorted(self.canary), "minimum_version": dict(self.minimum_version)
        }  # fmt: skip


def parse_policy(data: bytes) -> FamilyPolicy:
    """A family's policy. Raises: Corrupt."""
    match _json(data, "policy"):
        case {"policy": ("approve" | "auto") as policy, "canary": list(canary), "minimum_version": dict(minimum)} if (
            len(canary) <= MAX_CANARIES
            and all(isinstance(device, str) for device in canary)
            and all(type(version) is int for version in minimum.values())
        ):
            return FamilyPolicy(policy, tuple(canary), minimum)
    raise Corrupt("a policy document needs policy, canary and minimum_version")


def parse_director_keys(data: bytes) -> dict[str, str]:
    """Key id -> public key (hex) of every director. Raises: Corrupt."""
    match _json(data, "list of director keys"):
        case {"keys": dict(keys)} if keys and all(is_digest(id_) and is_digest(key) for id_, key in keys.items()):
            return dict(keys)
    raise Corrupt("a list of director keys needs key ids with public keys")


def _json(data: bytes, what: str) -> Any:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise Corrupt(f"a {what} of {len(data)} bytes is over {MAX_DOCUMENT_BYTES}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Corrupt(f"a {what} is not JSON") from None
