"""The signed repository as the steward sees it: publishing, and whether devices would take what is published.

Leaves to others: what is signed and how (`compressor.publish`); the devices' own rule (`agent.ota.acceptance`).
"""

from __future__ import annotations

from collections.abc import Sequence

from compressor.publish import Repository


class SignedRepository(Repository):
    """A repository that also answers for its families' policies."""

    def unapproved(self, family: str, digests: Sequence[str], devices: Sequence[str]) -> list[str]:
        """Those that some of the devices would refuse as not approved; policy `auto` lets its canaries try all.

        Raises:
            Untrusted, ConfigError, StateLocked, StorageError
        """
        policy = self.policy(family)
        if policy.policy == "auto" and set(devices) <= set(policy.canary):
            return []
        approved = {entry.digest for entry in self.published() if entry.approved}
        return [digest for digest in digests if digest not in approved]
