"""Errors of an update beyond `agent.contract.errors`, and the way back from a child's `code` to the error.

ArtifactError
|- Untrusted
|  |- NotApproved     signed by a pipeline, but neither approved nor allowed for this device
|  |- Downgrade       not newer than what is installed, and no rollback was signed
|  `- BelowMinimum    below the lowest version the family's policy allows
|- Unavailable
|  |- MetadataStale   the repository's metadata has expired
|  |- ClockUnknown    this device does not know the time well enough to judge that
|  `- Killed          the child that looked at it was ended from outside
|- GoldenMismatch     a candidate answers its golden inputs wrongly
|- ResourceLimit      a candidate needs more memory or time than it may have
`- Crashed            the child that looked at it died of it
"""

from __future__ import annotations

from agent.contract import errors
from agent.contract.errors import ArtifactError, EdgewardenError, Unavailable, Untrusted


class NotApproved(Untrusted):
    code = "not_approved"


class Downgrade(Untrusted):
    code = "downgrade"


class BelowMinimum(Untrusted):
    code = "below_minimum"


class MetadataStale(Unavailable):
    code = "metadata_stale"


class ClockUnknown(Unavailable):
    code = "clock_unknown"


class Killed(Unavailable):
    code = "killed"


class GoldenMismatch(ArtifactError):
    code = "golden_mismatch"


class ResourceLimit(ArtifactError):
    code = "resource_limit"


class Crashed(ArtifactError):
    code = "crashed"


_BY_CODE: dict[str, type[EdgewardenError]] = {
    kind.code: kind
    for kind in (
        errors.Untrusted, errors.Incompatible, errors.Corrupt, errors.TooLarge, errors.Unavailable,
        errors.UnsupportedVersion, errors.EngineFailed, errors.DiskFull, errors.StorageError,
        NotApproved, Downgrade, BelowMinimum, MetadataStale, ClockUnknown, Killed, GoldenMismatch, ResourceLimit,
        Crashed,
    )
}  # fmt: skip


def from_code(code: str, text: str, hint: str = "") -> EdgewardenError:
    """The error a child reported."""
    return _BY_CODE.get(code, ArtifactError)(text, hint=hint)
