"""Signed envelopes, the desired document and commands: every way to lie about who said what to whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from agent.contract import signed
from agent.contract.desired import Desired, ServiceChoice, SignedCommand, open_command, open_desired, seal
from agent.contract.errors import MalformedMessage, UnsupportedVersion, Untrusted

DIRECTOR = Ed25519PrivateKey.from_private_bytes(b"d" * 32)
THIEF = Ed25519PrivateKey.from_private_bytes(b"t" * 32)
KEYS = {signed.key_id(signed.public_bytes(DIRECTOR)): signed.public_bytes(DIRECTOR).hex()}
DESIRED = Desired(
    device="gateway-1",
    version=4,
    issued_at=1764000000.0,
    rollout="r-1",
    services={"wrist": ServiceChoice(artifacts={"wrist": "ab" * 32}, order=["wrist"])},
    repository="http://127.0.0.1:8080/repository",
)
COMMAND = SignedCommand(device="gateway-1", op="ping", seq=5, not_after=1764000000.0, nonce="12345678")

_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=12,
)


@given(document=st.dictionaries(_TEXT, _JSON, max_size=5))
def test_what_was_signed_is_what_is_read(document: dict[str, Any]) -> None:
    assert signed.verify(signed.sign(document, DIRECTOR), KEYS) == document


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_one_flipped_bit_is_never_accepted_as_another_document(at: int, bit: int) -> None:
    envelope = bytearray(seal(DESIRED, DIRECTOR))
    envelope[at % len(envelope)] ^= 1 << bit
    try:
        document = signed.verify(bytes(envelope), KEYS)
    except (MalformedMessage, Untrusted):
        return
    assert document == DESIRED.model_dump(mode="json")  # the flip hit white space or the case of a hex digit


def test_a_document_signed_by_an_unknown_key_is_untrusted() -> None:
    with pytest.raises(Untrusted, match="not signed by a known key"):
        open_desired(seal(DESIRED, THIEF), KEYS, device="gateway-1")


def test_a_signature_under_a_borrowed_key_name_is_untrusted() -> None:
    envelope = json.loads(seal(DESIRED, THIEF))
    envelope["signatures"][0]["keyid"] = next(iter(KEYS))
    with pytest.raises(Untrusted):
        open_desired(json.dumps(envelope).encode(), KEYS, device="gateway-1")


def test_a_key_that_is_not_what_its_id_says_does_not_count() -> None:
    keys = {next(iter(KEYS)): signed.public_bytes(THIEF).hex()}
    envelope = json.loads(seal(DESIRED, THIEF))
    envelope["signatures"][0]["keyid"] = next(iter(KEYS))
    with pytest.raises(Untrusted):
        signed.verify(json.dumps(envelope).encode(), keys)


def test_a_thiefs_signature_beside_a_good_one_harms_nothing() -> None:
    envelope = json.loads(seal(DESIRED, DIRECTOR))
    envelope["signatures"].insert(0, json.loads(seal(DESIRED, THIEF))["signatures"][0])
    data = json.dumps(envelope).encode()
    assert open_desired(data, KEYS, device="gateway-1") == DESIRED
    assert signed.signers(data, KEYS) == tuple(KEYS)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'{"signed": {}}', b'{"signed": [], "signatures": []}', b"[" * 100_000,
        b'{"signed": {"x": NaN}, "signatures": []}', b'{"signed": {"x": "\\ud800"}, "signatures": []}',
        b'{"signed": {}, "signatures": [1]}', b'{"signed": {}, "signatures": [{},{},{},{},{},{},{},{},{}]}',
        b" " * (signed.MAX_ENVELOPE_BYTES + 1),
    ],
)  # fmt: skip
def test_what_is_no_envelope_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        signed.verify(data, KEYS)


@pytest.mark.parametrize("signature", [{}, {"keyid": 1, "sig": 2}, {"keyid": next(iter(KEYS)), "sig": "zz"}])
def test_a_nonsense_signature_is_no_signature(signature: dict[str, Any]) -> None:
    with pytest.raises(Untrusted):
        signed.verify(json.dumps({"signed": {}, "signatures": [signature]}).encode(), KEYS)


def test_a_desired_document_for_another_device_is_untrusted() -> None:
    with pytest.raises(Untrusted, match="gateway-1"):
        open_desired(seal(DESIRED, DIRECTOR), KEYS, device="gateway-2")


def test_a_command_cannot_be_replayed_as_a_desired_document_nor_the_other_way_round() -> None:
    with pytest.raises(MalformedMessage, match="is no desired"):
        open_desired(seal(COMMAND, DIRECTOR), KEYS, device="gateway-1")
    untyped = DESIRED.model_dump(mode="json")
    del untyped["type"]
    with pytest.raises(MalformedMessage, match="is no desired"):
        open_desired(signed.sign(untyped, DIRECTOR), KEYS, device="gateway-1")
    with pytest.raises(MalformedMessage, match="is no command"):
        open_command(seal(DESIRED, DIRECTOR), KEYS, device="gateway-1", topic_op="ping", last_seq=0, now_s=0)


def _wrong(**changes: Any) -> bytes:
    return signed.sign({**DESIRED.model_dump(mode="json"), **changes}, DIRECTOR)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 0}, {"version": 2**60}, {"services": {}}, {"repository": "file:///etc/passwd"},
        {"repository": "http://host/?query"}, {"repository": "ftp://host/"}, {"device": "../x"},
        {"services": {"wrist": {"artifacts": {"wrist": "short"}, "order": ["wrist"]}}},
        {"services": {"wrist": {"artifacts": {"wrist": "ab" * 32}, "order": []}}},
        {"services": {"wrist": {"artifacts": {"wrist": "ab" * 32}, "order": ["wrist", "other"]}}},
        {"services": {"../../x": {"artifacts": {"wrist": "ab" * 32}, "order": ["wrist"]}}},
    ],
)  # fmt: skip
def test_a_signed_desired_document_still_has_to_keep_the_contract(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        open_desired(_wrong(**changes), KEYS, device="gateway-1")


def test_a_newer_format_says_so() -> None:
    with pytest.raises(UnsupportedVersion):
        open_desired(_wrong(v=2), KEYS, device="gateway-1")


def test_unknown_fields_of_a_newer_director_are_kept() -> None:
    assert open_desired(_wrong(window="night"), KEYS, device="gateway-1").model_dump()["window"] == "night"


def _obey(command: SignedCommand = COMMAND, **changes: Any) -> SignedCommand:
    arguments: dict[str, Any] = {"device": "gateway-1", "topic_op": "ping", "last_seq": 4, "now_s": 1764000000.0}
    return open_command(seal(command, DIRECTOR), KEYS, **{**arguments, **changes})


def test_a_command_is_obeyed_once_in_time_on_its_own_topic() -> None:
    assert _obey() == COMMAND


@pytest.mark.parametrize(
    "changes", [{"device": "gateway-2"}, {"topic_op": "rollback"}, {"last_seq": 5}, {"now_s": 1764000301.0}]
)
def test_a_command_that_is_misrouted_replayed_or_late_is_untrusted(changes: dict[str, Any]) -> None:
    with pytest.raises(Untrusted):
        _obey(**changes)


@pytest.mark.parametrize("make", [lambda: seal(DESIRED, DIRECTOR), lambda: seal(COMMAND, DIRECTOR)])
def test_the_same_document_and_key_give_the_same_bytes(make: Callable[[], bytes]) -> None:
    assert make() == make()
