"""One-time tokens: made from the system's randomness, kept only as digests. Plain Python."""

from __future__ import annotations

import hashlib
import secrets


def hash_token(token: str) -> str:
    """How tokens are kept: who reads the database learns none."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token() -> str:
    return secrets.token_urlsafe(32)
