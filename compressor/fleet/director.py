"""Signs what devices obey, with the director key as it is at that moment.

The key is read for every signature: signing is rare, and a rotation (`edgewarden-compressor keys rotate director`)
happens in another process while the host runs. Leaves to others: what is desired (`offers`), when to sign anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.contract.desired import Desired, SignedCommand, seal
from agent.contract.signed import key_id, public_bytes, sign
from compressor.keys import KeyRing

KEY = "director"


class KeyDirector:
    """The director key of a ring. Every method raises ConfigError when the key cannot be read."""

    def __init__(self, ring: KeyRing) -> None:
        """A missing key is told now rather than at the first update. Raises: ConfigError."""
        self._ring = ring
        self.key_id()

    def key_id(self) -> str:
        """Name of the key that signs now."""
        return key_id(public_bytes(self._ring.private(KEY)))

    def desired(self, **fields: Any) -> bytes:
        """The envelope of a desired document."""
        return seal(Desired(**fields), self._ring.private(KEY))

    def command(self, **fields: Any) -> bytes:
        """The envelope of a command."""
        return seal(SignedCommand(**fields), self._ring.private(KEY))

    def renewed(self, envelope: Mapping[str, Any]) -> bytes:
        """The same document as in a stored envelope, signed with the present key alone."""
        return sign(envelope["signed"], self._ring.private(KEY))
