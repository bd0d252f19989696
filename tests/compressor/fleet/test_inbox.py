from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.fleet.inbox import (
    EventSeen,
    Refused,
    ReplySeen,
    ReportedSeen,
    Roster,
    StatusSeen,
    TelemetrySeen,
    read,
)

BASE = "ew/1/demo/wrist-1"
NOW = 1_764_000_000.0


def roster(**changes: Any) -> Roster:
    return Roster(**({"fleet": "demo", "prefix": "ew", "known": lambda device: device == "wrist-1"} | changes))


def window(**changes: Any) -> dict[str, Any]:
    fields = {
        "service": "wrist", "view": "channels", "reference": "cd" * 32, "first": 1, "last": 64, "rows": 64,
        "clip": 4.0, "fraction_bits": 10, "sums": [-1024, 0], "squares": [65536, 0], "classes": [60, 4],
        "counters": {"dead:gx": 3},
    }  # fmt: skip
    return fields | changes


def sketch(**changes: Any) -> dict[str, Any]:
    fields = {
        "service": "wrist", "engine": "wrist", "relative_error": 0.02, "count": 3, "total_us": 310,
        "minimum_us": 90, "maximum_us": 120, "buckets": {"112": 2, "119": 1},
    }  # fmt: skip
    return fields | changes


def telemetry(**changes: Any) -> dict[str, Any]:
    fields = {
        "v": 1, "device": "wrist-1", "boot": "b7f3", "seq": 12, "at": NOW, "from_s": NOW - 60, "to_s": NOW,
        "counters": {"wrist.requests": 640}, "latency": [sketch()], "drift": [window()],
        "gauges": {"temperature_c": None}, "health": {"wrist": "healthy"},
    }  # fmt: skip
    return fields | changes


def event(**changes: Any) -> dict[str, Any]:
    fields = {
        "v": 1, "device": "wrist-1", "boot": "b7f3", "seq": 13, "at": NOW, "severity": "warning", "kind": "drift",
        "service": "wrist", "text": "left every known regime", "channels": ["ax"], "numbers": {"rows": 64.0},
        "details": {"raised": True, "persisted_windows": 64},
    }  # fmt: skip
    return fields | changes


def ask(topic: str, document: Any, **changes: Any) -> Any:
    payload = document if isinstance(document, bytes) else json.dumps(document).encode()
    return read(topic, payload, roster(**changes), now_s=NOW)


def code(topic: str, document: Any, **changes: Any) -> str:
    refused = ask(topic, document, **changes)
    assert isinstance(refused, Refused), refused
    return refused.code


def test_telemetry_becomes_windows_sketches_and_vitals() -> None:
    seen = ask(f"{BASE}/tm", telemetry())
    assert isinstance(seen, TelemetrySeen)
    assert (seen.key.device, seen.key.boot, seen.key.seq) == ("wrist-1", "b7f3", 12)
    assert seen.windows[0]["body"]["sums"] == [-1024, 0]
    assert seen.sketches[0]["body"]["buckets"] == {"112": 2, "119": 1}
    assert seen.vitals["health"] == {"wrist": "healthy"}


def test_an_event_keeps_its_evidence() -> None:
    seen = ask(f"{BASE}/ev/warning/drift", event())
    assert isinstance(seen, EventSeen)
    assert (seen.about, seen.channels, seen.details["persisted_windows"]) == ("drift", ("ax",), 64)


def test_presence_and_reported_states_are_read() -> None:
    status = {"v": 1, "device": "wrist-1", "boot": "b", "state": "offline", "reason": "will", "at": NOW}
    assert ask(f"{BASE}/status", status) == StatusSeen("wrist-1", "b", "offline", "will")
    reported = {"device": "wrist-1", "boot": "b", "at": NOW, "desired_version": 2, "update_state": "selftest"}
    seen = ask(f"{BASE}/reported", reported)
    assert isinstance(seen, ReportedSeen)
    assert seen.document["update_state"] == "selftest"


def test_a_reply_names_the_command_it_answers() -> None:
    reply = {"id": "abc", "ok": False, "code": "not_allowed", "text": "samples.allow is false"}
    assert ask(f"{BASE}/res/sample", reply) == ReplySeen(
        "wrist-1", "sample", "abc", ok=False, code="not_allowed", text="samples.allow is false"
    )


@pytest.mark.parametrize(
    ("topic", "document", "expected"),
    [
        ("other/1/demo/wrist-1/tm", telemetry(), "topic"),
        ("ew/2/demo/wrist-1/tm", telemetry(), "topic"),
        ("ew/1/rival/wrist-1/tm", telemetry(), "topic"),
        ("ew/1/demo/wrist-1", telemetry(), "topic"),
        ("ew/1/demo/WRIST/tm", telemetry(), "topic"),
        (f"{BASE}/surprise", telemetry(), "topic"),
        ("ew/1/demo/stranger/tm", telemetry(device="stranger"), "unknown_device"),
        (f"{BASE}/tm", telemetry(device="wrist-2"), "foreign_device"),
        (f"{BASE}/res/sample", {"device": "wrist-2", "id": "x"}, "foreign_device"),
        (f"{BASE}/tm", telemetry(v=2), "unsupported_version"),
        (f"{BASE}/tm", b" " * (256 * 1024 + 1), "too_large"),
        (f"{BASE}/tm", b"", "malformed"),
        (f"{BASE}/tm", b"\xff\xfe", "malformed"),
        (f"{BASE}/tm", b"[" * 100_000, "malformed"),
        (f"{BASE}/res/sample", b"[" * 100_000, "malformed"),
        (f"{BASE}/res/sample", b"[]", "out_of_bounds"),
        (f"{BASE}/res/sample", rb'{"text": "\ud800"}', "malformed"),  # no database takes half a character
        (f"{BASE}/res/sample", rb'{"device": "\ud800"}', "malformed"),
        (f"{BASE}/res/sample", rb'{"\udc00": 1}', "malformed"),
        (f"{BASE}/ev/error/sensor", json.dumps(event(text="\ud800")).encode(), "malformed"),
        (f"{BASE}/ev/error/sensor", json.dumps(event(details={"\ud800": "\udc00"})).encode(), "malformed"),
        (f"{BASE}/tm", telemetry(seq="one"), "malformed"),
        (f"{BASE}/tm", telemetry(drift={"a": 1}), "malformed"),
        (f"{BASE}/tm", telemetry(seq=1 << 60), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(seq=0), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(boot="x" * 65), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(boot="a/b"), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(at=float("nan")), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(at=1e12), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window()] * 65), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(rows=0)]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(sums=[1] * 600, squares=[1] * 600)]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(squares=[1])]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(clip=float("inf"))]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(sums=[10**30, 0], squares=[10**12, 0])]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(sums=[200_000, 0], squares=[65536, 0])]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(squares=[-1, 0])]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(classes=[100, 4])]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(drift=[window(reference="../../etc")]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(latency=[sketch(relative_error=1e-12)]), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(latency=[sketch(count=4)]), "malformed"),
        (f"{BASE}/tm", telemetry(latency=[sketch(buckets={"-5": 3})]), "malformed"),
        (f"{BASE}/tm", telemetry(counters={"x" * 65: 1}), "out_of_bounds"),
        (f"{BASE}/tm", telemetry(counters={"x": -1}), "out_of_bounds"),
        (f"{BASE}/ev/warning/drift", event(numbers={"x": float("inf")}), "out_of_bounds"),
        (f"{BASE}/ev/warning/drift", event(details={"x": "y" * 20_000}), "out_of_bounds"),
        (f"{BASE}/ev/warning/drift", event(details={"x": float("nan")}), "malformed"),
        (f"{BASE}/ev/warning/drift", event(channels=["c"] * 300), "out_of_bounds"),
        (f"{BASE}/ev/warning/drift", event(service="../x"), "out_of_bounds"),
        (f"{BASE}/reported", {"device": "wrist-1", "boot": "b", "at": NOW, "moved_bytes": -1}, "out_of_bounds"),
        (f"{BASE}/birth", {"device": "wrist-1", "boot": "b", "at": NOW, "agent": "1", "runtime": "1", "machine": "m",
                           "system": "s", "extra": ["z" * 40_000]}, "out_of_bounds"),
    ],
)  # fmt: skip
def test_hostile_messages_are_refused_with_a_code(topic: str, document: Any, expected: str) -> None:
    assert code(topic, document) == expected


def test_a_device_that_talks_too_much_is_refused_until_the_next_day() -> None:
    talkative = roster(quota=2)
    payload = json.dumps(event()).encode()
    answers = [read(f"{BASE}/ev/warning/drift", payload, talkative, now_s=NOW) for _ in range(3)]
    assert [isinstance(answer, Refused) for answer in answers] == [False, False, True]
    assert isinstance(read(f"{BASE}/ev/warning/drift", payload, talkative, now_s=NOW + 86_400), EventSeen)


@settings(max_examples=200)
@given(st.text(max_size=60), st.binary(max_size=200))
def test_no_bytes_make_the_reader_raise(topic: str, payload: bytes) -> None:
    for name in (topic, f"{BASE}/{topic}", f"{BASE}/tm", f"{BASE}/res/sample"):
        read(name, payload, roster(), now_s=NOW)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(telemetry())), JSON)
def test_no_field_of_any_type_makes_the_reader_raise(name: str, value: Any) -> None:
    read(f"{BASE}/tm", json.dumps(telemetry() | {name: value}).encode(), roster(), now_s=NOW)
    read(f"{BASE}/tm", json.dumps(telemetry(drift=[window() | {name: value}])).encode(), roster(), now_s=NOW)
    read(f"{BASE}/ev/x/y", json.dumps(event() | {name: value}).encode(), roster(), now_s=NOW)


def test_golden_messages_of_the_contract_are_understood() -> None:
    from pathlib import Path

    golden = Path(__file__).parents[2] / "contract" / "golden"
    known = roster(fleet="demo", known=lambda device: device == "gateway-1")
    topics = {
        "status": "status",
        "birth": "birth",
        "reported": "reported",
        "tm": "tm",
        "event": "ev/warning/fallback",
    }
    for name, topic in topics.items():
        seen = read(f"ew/1/demo/gateway-1/{topic}", (golden / f"{name}.json").read_bytes(), known, now_s=NOW)
        assert not isinstance(seen, Refused), (name, seen)


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (event(severity="loud"), ("wrist-1", "b7f3", 13)),
        (event(device="wrist-2"), ("wrist-1", "b7f3", 13)),  # its sender's place, whoever it speaks for
        (event(v=2), ("wrist-1", "b7f3", 13)),
        (event(text="x" * 300_000), ("wrist-1", "b7f3", 13)),
        (event(seq=0), None),
        (event(seq=2**60), None),
        (event(seq="13", text=1), None),
        (event(boot="../../etc"), None),
        (b"[" * 100_000, None),
        (b'{"seq": 1, "boot": "b7f3"', None),
        (b'{"boot": "b7f3", "seq": ' + b"9" * 5000 + b"}", None),
        (b"\xff\xfe", None),
        ([], None),
    ],
)
def test_a_refused_message_says_where_it_stood_if_it_can(document: Any, place: tuple[str, str, int] | None) -> None:
    refused = ask(f"{BASE}/ev/warning/drift", document)
    assert isinstance(refused, Refused)
    key = refused.key
    assert (key if key is None else (key.device, key.boot, key.seq)) == place


def test_what_is_over_the_quota_is_settled_too_and_retained_documents_have_no_place() -> None:
    full = roster(quota=1)
    read(f"{BASE}/tm", json.dumps(telemetry()).encode(), full, now_s=NOW)
    refused = read(f"{BASE}/tm", json.dumps(telemetry()).encode(), full, now_s=NOW)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.key and refused.key.seq) == ("quota", 12)
    refused = ask(f"{BASE}/reported", {"device": "wrist-1", "boot": "b7f3", "seq": 4, "at": NOW, "attempt": -1})
    assert isinstance(refused, Refused)
    assert refused.key is None
    refused = ask(f"{BASE}/tm", telemetry(), known=lambda _: False)
    assert isinstance(refused, Refused)
    assert refused.key is None


@pytest.mark.parametrize(
    "kept_from",
    [{"b": 0}, {"b": -1}, {"b": 2**53 + 1}, {"b" * 65: 2}, {"": 2}, {str(n): 2 for n in range(17)}, {"b": "x"}, [1]],
)
def test_places_given_up_are_bounded(kept_from: Any) -> None:
    status = {"device": "wrist-1", "boot": "b7f3", "state": "online", "at": NOW}
    assert code(f"{BASE}/status", status | {"kept_from": kept_from}) in {"out_of_bounds", "malformed"}
    seen = ask(f"{BASE}/status", status | {"kept_from": {"b7f2": 41}})
    assert isinstance(seen, StatusSeen)
    assert seen.kept_from == {"b7f2": 41}
