"""How soon is a change found, everybody at the same ACTUAL run length?

A delay means nothing without the run length it was bought with, and a claimed one is not an actual one. So each
detector is first tuned by its own knob until its run length on unchanged rows is WANTED_ROWS, and what cannot be
tuned there is "unreachable". The same rows go to all. Ours is shown twice: at the run length it is shipped with (as a
user sees it), and tuned like the others.

`over_oracle` is taken against the oracle that knows the size of the shift and that the reference is exact, and looks
at every feature in both directions, as all must: at 10,000 rows no detector without the feature's name comes nearer
than 1.8 to 2.1 times to the oracle that was told it (oracle.py), which stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.drift_bench.bounds import run_length
from scripts.drift_bench.oracle import Oracle
from scripts.drift_bench.ours import CLAIM_ROWS
from scripts.drift_bench.simple import StabilityIndex
from scripts.drift_bench.streams import CASES, Source
from scripts.drift_bench.trials import Deadline, Length, delays, false_alarms, summary, tune
from scripts.drift_bench.workers import PEERS, Peer, Worker, open_ours, open_peer
from scripts.lib.environments import Failed
from scripts.lib.goals import median

WANTED_ROWS = 10_000
D = 32
N_REF = 20_000
NULL_ROWS = 300_000  # to tune on: 30 alarms at the run length wanted
SINGLE = {"one_0.25": 0.25, "one_0.5": 0.5}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything: `seconds` are each peer detector's."""

    null_rows: int
    references: int
    runs: int
    seconds: float


FULL = Size(NULL_ROWS, 8, 8, 120.0)
QUICK = Size(60_000, 2, 4, 15.0)
# detector, title, the setting shown where it cannot be tuned
DETECTORS = {
    "river": (("adwin", "ADWIN", 0.002), ("page_hinkley", "Page-Hinkley", 50.0), ("kswin", "KSWIN", 0.005)),
    "frouros": (("cusum", "CUSUM", 50.0), ("page_hinkley", "Page-Hinkley", 50.0)),
    "alibi": (("mmd", "online MMD", 500.0),),
}


def oracles(actual_rows: float, d: int = D) -> dict[str, dict[str, float]]:
    """Per single-feature shift: delay of the oracle, and of the one that was told the feature, at this run length."""
    return {
        name: {
            "oracle": round(Oracle.tuned(size, actual_rows, places=2 * d).delay(), 1),
            "told_feature": round(Oracle.tuned(size, actual_rows).delay(), 1),
        }
        for name, size in SINGLE.items()
    }


def over(found: Mapping[str, Any], against: Mapping[str, Mapping[str, float]], which: str = "oracle") -> float | None:
    """Median over the single-feature shifts of the median delay over the oracle's."""
    ratios = [found[name]["median"] / against[name][which] for name in SINGLE if found[name]["median"] is not None]
    return round(median(ratios), 3) if len(ratios) == len(SINGLE) else None


def ours(build: Path, size: Size, say: Say) -> dict[str, Any]:
    """The section `delay`, and our lines of the table."""
    with open_ours(build) as worker:
        say("ours at the run length it claims")
        shipped = _measured(worker, "suite", float(CLAIM_ROWS), size, 4 * size.seconds)
        say("ours at an actual run length as all")
        tuned = _ask_tune(worker, "suite", size, 4 * size.seconds)
        found = _measured(worker, "suite", tuned["knob"], size, 4 * size.seconds)
    actual, _ = run_length(tuned["alarms"], tuned["rows"])
    against = oracles(actual)
    lines = {"shipped": shipped, "tuned": {**_told(tuned), **found}}
    at_claim = shipped["delays"]
    return {
        "delay": {
            "over_oracle": over(found["delays"], against),
            "correlation_rows": at_claim["correlation"]["median"],
            "variance_rows": at_claim["sd_1.5"]["median"],
            "stuck_rows": at_claim["stuck"]["median"],
        },
        "details": {
            "d": D, "n_ref": N_REF, "claim_rows": CLAIM_ROWS, "ours": lines, "oracle": against,
            "over_told_feature": over(found["delays"], against, "told_feature"),
        },
    }  # fmt: skip


def peers(build: Path, size: Size, say: Say) -> dict[str, Any]:
    """Every peer's line; what cannot be had or tuned says why."""
    lines: dict[str, Any] = simple(size)
    versions: dict[str, Any] = {}
    for peer in PEERS:
        for detector, title, usual in DETECTORS[peer.name]:
            name = f"{peer.name} {title}"
            say(name)
            try:
                lines[name], versions[peer.name] = _peer_line(peer, build, detector, usual, size)
            except Failed as error:
                lines[name] = {"unreachable": str(error)}
    return {"details": {"versions": versions, "wanted_rows": WANTED_ROWS, "lines": lines}}


def _peer_line(
    peer: Peer, build: Path, detector: str, usual: float, size: Size
) -> tuple[dict[str, Any], dict[str, str]]:
    """Tuned; or, where that fails, as it is usually set, at the run length it then has, and marked unreachable."""
    worker, versions = open_peer(peer, build)
    with worker:
        try:
            tuned = _ask_tune(worker, detector, size, size.seconds)
            line, knob = _told(tuned), tuned["knob"]
        except Failed as error:
            line, knob = {"why": f"tuning: {error}"}, usual
    worker, versions = open_peer(peer, build)
    with worker:
        asked = {"detector": detector, "knob": knob, "d": D, "n_ref": N_REF, "seconds": size.seconds}
        within_s = 2 * size.seconds + 180
        if "run_length" not in line:
            line |= _told({**worker.ask(within_s, do="length", **asked, rows=size.null_rows), **line, "knob": knob})
        found = worker.ask(within_s, do="delays", **asked, cases=list(CASES), references=2, runs=max(2, size.runs))
    return {**line, "delays": summary(found), **({"unreachable": line["why"]} if line["why"] else {})}, versions


def simple(size: Size) -> dict[str, Any]:
    """The alarm every so many rows, which finds a change after half of them, and PSI by its rule of thumb."""
    dummy = {"run_length": WANTED_ROWS, "delays": {case: {"median": WANTED_ROWS / 2} for case in CASES}}
    return {
        "an alarm every 10,000 rows": dummy,
        "PSI, 0.1 rule": _stability_index(0.1, size),
        "PSI, 0.2 rule": _stability_index(0.2, size),
    }


def _stability_index(limit: float, size: Size) -> dict[str, Any]:
    """At the window where it runs as long as wanted."""
    source = Source("gauss", D, 0)
    reference = source.take(N_REF)

    def length(windows: float) -> Length:
        index = StabilityIndex(reference, round(WANTED_ROWS / windows), limit)
        return false_alarms(index, source.fork(1), size.null_rows)

    tuned = tune(length, 4.0, 200.0, WANTED_ROWS, until=Deadline(size.seconds))
    window = round(WANTED_ROWS / tuned.knob)
    found = delays(
        lambda rows: StabilityIndex(rows, window, limit), list(CASES), d=D, n_ref=N_REF, references=2,
        runs=size.runs, until=Deadline(size.seconds),
    )  # fmt: skip
    told = _told({"knob": window, "rows": tuned.length.rows, "alarms": tuned.length.alarms, "why": tuned.why})
    return {**told, "delays": summary(found), **({"unreachable": tuned.why} if tuned.why else {})}


def _ask_tune(worker: Worker, detector: str, size: Size, seconds: float) -> dict[str, Any]:
    return worker.ask(
        2 * seconds + 60, do="tune", detector=detector, d=D, n_ref=N_REF, wanted=WANTED_ROWS, rows=size.null_rows,
        seconds=seconds,
    )  # fmt: skip


def _measured(worker: Worker, detector: str, knob: float, size: Size, seconds: float) -> dict[str, Any]:
    """Actual run length and delays at one knob."""
    at = {"detector": detector, "knob": knob, "d": D, "n_ref": N_REF}
    null = worker.ask(seconds + 240, do="length", **at, rows=size.null_rows, seconds=seconds)
    found = worker.ask(
        seconds + 240, do="delays", **at, cases=list(CASES), references=size.references, runs=size.runs,
        seconds=seconds,
    )  # fmt: skip
    length, bound = run_length(null["alarms"], null["rows"])
    return {"knob": knob, "run_length": round(length), "bound": bound, "delays": summary(found)}


def _told(tuned: Mapping[str, Any]) -> dict[str, Any]:
    length, bound = run_length(tuned["alarms"], tuned["rows"])
    return {"knob": round(tuned["knob"], 6), "run_length": round(length), "bound": bound, "why": tuned["why"]}


def table(lines: Mapping[str, Any], cases: Sequence[str] = tuple(CASES)) -> list[str]:
    """Rows for the terminal: name, run length, median delays; - = never within the cap."""
    rows = [f"{'':30}{'run length':>12}" + "".join(f"{case:>12}" for case in cases)]
    for name, line in lines.items():
        if "delays" not in line:
            rows.append(f"{name:30}{'unreachable: ' + line.get('unreachable', '')[:90]}")
            continue
        medians = [line["delays"].get(case, {}).get("median") for case in cases]
        shown = "".join(f"{'-' if value is None else format(value, '.0f'):>12}" for value in medians)
        length = f"{'> ' if line.get('bound') else ''}{line.get('run_length', math.nan):,.0f}"
        rows.append(f"{name:30}{length:>12}{shown}{'  (unreachable)' if line.get('unreachable') else ''}")
    return rows
