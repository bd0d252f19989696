"""Signed documents outside TUF: one JSON envelope, Ed25519 over the canonical bytes of what it carries.

    {"signed": {...}, "signatures": [{"keyid": "<sha256 of the public key>", "sig": "<hex>"}]}

What `verify` returns is what was signed: the bytes are parsed once, made canonical again and checked. A document
says what it is in its own field `type`, so that one signed for one purpose cannot be used for another
(`agent.contract.desired`). Which keys count is the caller's business.

cryptography is imported by the first signature: a device without updates or commands is spared 5 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from agent.contract.artifact import canonical
from agent.contract.errors import MalformedMessage, Untrusted

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_ENVELOPE_BYTES = 256 * 1024
MAX_SIGNATURES = 8
KEY_BYTES = 32


def key_id(public: bytes) -> str:
    """Name of a raw Ed25519 public key."""
    return hashlib.sha256(public).hexdigest()


def public_bytes(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """The 32 raw bytes of the public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes_raw()


def sign(document: Mapping[str, Any], private: Ed25519PrivateKey) -> bytes:
    """The envelope of a JSON-able document. NaN and infinity raise ValueError."""
    signed = dict(document)
    signature = {"keyid": key_id(public_bytes(private)), "sig": private.sign(canonical(signed)).hex()}
    return canonical({"signed": signed, "signatures": [signature]})


def verify(envelope: bytes, keys: Mapping[str, str]) -> dict[str, Any]:
    """The signed document, if at least one of `keys` (key id -> public key, hex) signed it.

    Raises:
        MalformedMessage: too large, not JSON, or not an envelope.
        Untrusted: no signature by one of `keys`.
    """
    document, signatures = _opened(envelope)
    if not _signers(document, signatures, keys):
        named = ", ".join(str(signature.get("keyid", "?"))[:12] for signature in signatures) or "nobody"
        raise Untrusted(
            f"a document signed by {named} is not signed by a known key",
            hint="If the signing key was rotated, refresh the repository first.",
        )
    return document


def signers(envelope: bytes, keys: Mapping[str, str]) -> tuple[str, ...]:
    """Ids of those `keys` that signed; () = nobody known did. Raises: MalformedMessage."""
    return _signers(*_opened(envelope), keys)


def _signers(document: dict[str, Any], signatures: list[dict[str, Any]], keys: Mapping[str, str]) -> tuple[str, ...]:
    signed = _canonical(document)
    return tuple(str(signature["keyid"]) for signature in signatures if _is_valid(signature, signed, keys))


def _opened(envelope: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise MalformedMessage(f"a signed document of {len(envelope)} bytes is over {MAX_ENVELOPE_BYTES}")
    try:
        outer = json.loads(envelope)
    except (ValueError, RecursionError):
        raise MalformedMessage("a signed document is not JSON") from None
    match outer:
        case {"signed": dict(document), "signatures": list(signatures)} if len(signatures) <= MAX_SIGNATURES:
            if all(isinstance(signature, dict) for signature in signatures):
                return document, signatures
    raise MalformedMessage("a signed document needs 'signed' and up to eight 'signatures'")


def _canonical(document: dict[str, Any]) -> bytes:
    try:
        return canonical(document)
    except (ValueError, RecursionError):  # NaN, infinity, lone surrogates
        raise MalformedMessage("a signed document has numbers or text that JSON does not know") from None


def _is_valid(signature: dict[str, Any], signed: bytes, keys: Mapping[str, str]) -> bool:
    return any(_is_signed_by(public, signature, signed) for public in _named(signature, keys))


def _named(signature: dict[str, Any], keys: Mapping[str, str]) -> Iterator[bytes]:
    """The key a signature names, if we know it and it is what its id says."""
    text = keys.get(str(signature.get("keyid", "")))
    if text is not None and len(text) == 2 * KEY_BYTES:
        public = bytes.fromhex(text)
        if key_id(public) == signature["keyid"]:
            yield public


def _is_signed_by(public: bytes, signature: dict[str, Any], signed: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        raw = bytes.fromhex(str(signature.get("sig", "")))
        Ed25519PublicKey.from_public_bytes(public).verify(raw, signed)
    except (InvalidSignature, ValueError):
        return False
    return True
