import copy
import re
from typing import Any

import pytest

from agent.screen import Look, draw, duration, microseconds, size

SERVICE: dict[str, Any] = {
    "name": "wrist", "serving": "wrist-accel", "preferred": "wrist", "missing": "", "phase": "fallback",
    "why": "fault",
    "reason": "gx gy gz dead: wrist-accel 0.89, wrist 0.14", "since_s": 900.0, "next_check_in_s": 65.0,
    "health": "degraded", "complaints": ["gx, gy, gz no longer move"], "pin": "", "benched": {},
    "usable": ["wrist", "wrist-floor"], "problems": [],
    "engines": [
        {"engine": "wrist", "kind": "onnx", "version": 3, "accuracy": 0.95},
        {"engine": "wrist-accel", "kind": "onnx", "version": 1, "accuracy": None},
        {"engine": "wrist-floor", "kind": "floor", "version": 1, "accuracy": 0.14},
    ],
    "requests": 1234, "errors": 0, "counters": {"failed_over": 3},
    "latency_p50_us": 80.0, "latency_p95_us": 120.0, "latency_p99_us": 12_000.0, "budget_p95_us": 2000.0,
    "guards": {"dead": ["gx", "gy", "gz"]},
    "drift": {"raised": 0.0, "rows": 1234.0, "evidence": 0.34, "evidence:total": 0.3,
              "evidence:gx": 0.34, "evidence:ax": 0.1},
}  # fmt: skip
STATUS: dict[str, Any] = {
    "agent": {"version": "0.1.0", "uptime_s": 7500.0, "addresses": ["unix:/run/edgewarden/serve.sock", "[::1]:8500"]},
    "device": {"id": "gateway-1", "fleet": "demo", "system": "Linux 6.1", "machine": "aarch64", "cpus": 4},
    "clock": {"source": "wall", "now_s": 1000.0},
    "worker": {"phase": "serving", "generation": 2, "pid": 77, "losses": 1},
    "services": [SERVICE],
    "power": {"source": "estimate", "measured": False, "scope": "processes", "watts": 0.5,
              "joules_per_inference": 0.002},
    "thermal": {"temperature_c": None, "zone": "", "throttled": None},
    "memory": {"resident_bytes": 135e6, "available_bytes": 2e9},
    "disk": {"free_bytes": None},
    "cpu": {"share": 0.25},
    "link": {
        "state": "waiting", "broker": "b:1883", "tls": False, "published": 5, "in_flight": 0, "unheard": [],
        "error": "connection lost: Server shutting down",
    },
    "outbox": {"rows": 12, "bytes": 3000, "max_bytes": 16_000_000, "dropped": 0, "expired": 0, "refused": 0,
               "held": 0},
    "update": {
        "state": "deferred", "desired_version": 4, "code": "unavailable", "text": "cannot fetch: no route",
        "attempt": 2, "moved_bytes": 2_000_000, "from": {"wrist": "wrist v3"}, "to": {"wrist": "wrist v4"},
        "waiting": {"code": "", "text": ""}, "orders": {"refused": {"untrusted": 2}},
    },
    "faults": 0,
    "events": [
        {"at": 0.0, "severity": "error", "event": "link.lost", "service": "", "text": "the connection is lost"}
    ],
}  # fmt: skip


def changed(**parts: Any) -> dict[str, Any]:
    status = copy.deepcopy(STATUS)
    for name, part in parts.items():
        if name == "service":
            status["services"][0].update(part)
        else:
            status[name].update(part)
    return status


def test_the_screen_says_who_serves_and_why_and_what_is_wrong() -> None:
    screen = draw(STATUS, Look(width=120))
    for words in (
        "gateway-1 of fleet demo", "up 2 h 5 min", "ask on unix:/run/edgewarden/serve.sock, [::1]:8500",
        "generation 2, process 77, serving", "1 lost in the last minute",
        "wrist  degraded", "wrist-accel  a fallback since 1 min 40 s, next check in 1 min 5 s",
        "gx gy gz dead: wrist-accel 0.89, wrist 0.14", "gx, gy, gz no longer move", "wrist-accel v1 (not loaded)",
        "wrist-floor v1 0.14 (floor)", "1,234 · 3 failed over · 0 unanswered", "p95 120 µs", "p99 12.0 ms",
        "budget p95 2000 µs kept", "gx, gy, gz dead", "evidence 34 % of the threshold (most: gx 34 %, ax 10 %)",
        "0.50 W (estimate from CPU time, agent and worker only) · 2.00 mJ per inference",
        "- · throttling unknown · CPU 25 %", "135 MB of agent and worker", "disk - free",
        "waiting · b:1883 (no TLS)", "connection lost: Server shutting down", "12 waiting, 3 kB of 16 MB",
        "00:00:00 link.lost: the connection is lost",
        "desired version 4: deferred (wrist v3 -> wrist v4) · 2 MB moved · attempt 2",
        "unavailable: cannot fetch: no route", "refused documents: 2 untrusted",
    ):  # fmt: skip
        assert words in screen
    assert "\033" not in screen


def test_it_says_how_the_serving_engine_is_run_and_what_could_not_be_had() -> None:
    loaded = {
        "threads": 3, "placement": "thread", "provider": "CPUExecutionProvider", "p50_us": 2500.0,
        "note": "CUDAExecutionProvider was asked for, this runtime has CPUExecutionProvider",
    }  # fmt: skip
    engines = [dict(engine) for engine in SERVICE["engines"]]
    engines[1]["loaded"] = loaded
    screen = draw(changed(service={"engines": engines}), Look(width=0))
    assert "CPU, 3 threads, on a thread of its own, 2500 µs when warm" in screen
    assert "wrist-accel: CUDAExecutionProvider was asked for" in screen


def test_an_open_drift_is_told_by_feature_with_its_histogram() -> None:
    flat, peaked = [62] * 16, [0] * 15 + [1000]
    told = {
        "rows": 34, "looked_at": 34, "scope": "one sensor", "blamed": "gx", "relative": True, "changed_at_s": None,
        "changed_ago_s": 44.0, "channels": {"gx": 1.0},
        "features": [{"feature": "gx.mean", "channel": "gx", "share": 0.9, "how": "shift", "shift": 0.8,
                      "shift_sd": 4.2, "spread": 1.0, "unit": "rad/s"}],
        "pictures": [{"feature": "gx.mean", "low": -1.0, "high": 1.0, "reference": flat, "now": peaked}],
    }  # fmt: skip
    screen = draw(changed(service={"explanation": told}), Look(width=0))
    assert "one sensor (gx), for about 34 rows, 44 s" in screen
    assert "gx mean +0.8 rad/s (+4.2 sd), 90 % of the evidence" in screen
    assert "█" * 16 + " -> " + "·" * 15 + "█" in screen
    assert "of the evidence" not in draw(changed(service={"explanation": {}}), Look(width=0))


def test_it_fits_one_screen_and_keeps_its_width() -> None:
    long = changed(service={"reason": "x" * 500, "complaints": ["y" * 500]})
    lines = draw(long, Look(width=80)).splitlines()
    assert len(lines) <= 30
    assert all(len(line) <= 80 for line in lines)


def test_every_line_is_cut_alike_and_colours_take_no_room() -> None:
    plain = draw(STATUS, Look(width=50)).splitlines()
    coloured = draw(STATUS, Look(width=50, colour=True)).splitlines()
    assert max(map(len, plain)) == 50
    assert [re.sub("\033\\[[0-9;]*m", "", line) for line in coloured] == plain
    assert all(line.count("\033[") % 2 == 0 for line in coloured)  # what is begun is ended


def test_without_a_width_nothing_is_cut() -> None:
    assert "x" * 500 in draw(changed(service={"reason": "x" * 500}), Look(width=0))


def test_a_reason_is_told_once() -> None:
    reason = STATUS["services"][0]["reason"]
    complaints = [f"fallback: {reason}", f"only the floor answers ({reason})", "gx no longer moves"]
    screen = draw(changed(service={"complaints": complaints}), Look(width=0))
    assert screen.count(reason) == 1
    assert "only the floor answers\n" in screen
    assert "gx no longer moves" in screen


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"worker": {"phase": "none"}}, "no worker serves (none)"),
        ({"link": {"state": "off"}}, "off (link.enabled = false)"),
        ({"link": {"unheard": ["ew/1/f/d/tm"]}}, "nobody subscribes to this device's tm"),
        ({"outbox": {"held": 4}}, "the disk is full: 4 messages wait in memory"),
        ({"service": {"latency_p95_us": None}}, "- (no request yet)"),
        ({"service": {"latency_p95_us": 3000.0}}, "exceeded"),
        ({"service": {"budget_p95_us": None}}, "no budget"),
        ({"service": {"drift": {}}}, "not watched"),
        ({"service": {"guards": {}}}, "quiet"),
        ({"service": {"phase": "pinned", "next_check_in_s": None}}, "pinned by an operator"),
        ({"service": {"problems": ["an artifact is damaged"]}}, "an artifact is damaged"),
        ({"service": {"benched": {"wrist": "failed"}}}, "wrist v3 (resting)"),
        ({"power": {"measured": True, "source": "rapl", "scope": "package"}}, "measured by rapl, processor"),
        ({"thermal": {"temperature_c": 61.4, "zone": "cpu", "throttled": True}}, "61 °C (cpu) · throttled"),
        ({"service": {"phase": "preferred", "missing": "x is damaged"}}, "the best of what is here"),
        ({"update": {"state": "off"}}, "off (update.enabled = false)"),
        ({"update": {"code": "", "waiting": {"code": "clock_unknown", "text": "no time"}}}, "waits: no time"),
        ({"update": {"to": {"wrist": "wrist v3"}}}, "deferred (wrist v3)"),
        ({"clock": {"source": "data"}}, "a fallback, next check"),
    ],
)
def test_every_state_has_its_words(parts: dict[str, Any], words: str) -> None:
    assert words in draw(changed(**parts), Look())


def test_colours_are_used_only_when_asked_for() -> None:
    assert "\033[33mdegraded\033[0m" in draw(STATUS, Look(colour=True))


def test_numbers_in_words() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 3599, 7_260, 90_000, 86_400)] == [
        "0 s", "59 s", "1 min", "59 min 59 s", "2 h 1 min", "1 d 1 h", "1 d"
    ]  # fmt: skip
    assert [microseconds(v) for v in (None, 80, 12_345, 2_500_000)] == ["-", "80 µs", "12.3 ms", "2.50 s"]
    assert [size(v) for v in (None, 12, 2_000, 3.4e6, 5e9)] == ["-", "12 B", "2 kB", "3 MB", "5.0 GB"]


def test_of_several_services_an_event_says_whose_it_is() -> None:
    event = {"at": 0.0, "severity": "notice", "event": "event.health", "service": "wrist", "text": "all is well"}
    one = {**STATUS, "events": [*STATUS["events"], event]}
    assert "event.health: all is well" in draw(one, Look())
    screen = draw({**one, "services": [SERVICE, {**SERVICE, "name": "voice"}]}, Look())
    assert "event.health (wrist): all is well" in screen
    assert "link.lost: the connection is lost" in screen


def test_an_unknown_health_says_what_it_waits_for() -> None:
    assert "wrist  unknown until the first request" in draw(
        changed(service={"health": "unknown", "requests": 0}), Look()
    )
    assert "until" not in draw(changed(service={"health": "unknown"}), Look())
