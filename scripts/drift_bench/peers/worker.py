"""The loop of a peer's process: one JSON request a line on stdin, one JSON answer a line on stdout.

    {"do": "tune", "detector", "d", "n_ref", "wanted", "rows", "seconds"}     -> knob, rows, alarms, why
    {"do": "length", "detector", "knob", "d", "n_ref", "rows", "seconds"}     -> rows, alarms
    {"do": "delays", "detector", "knob", "d", "n_ref", "cases", "references", "runs", "seconds"} -> case: delays
    {"do": "prepare", "detector", "knob", "d", "n_ref"}                       -> seconds, rss_mb
    {"do": "cost", "rows", "batch"}                                           -> us (of what was prepared)

An answer {"error": text} says that the peer cannot do it. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.drift_bench import trials
from scripts.drift_bench.streams import Rows, Source

SOURCE_SEED = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """`make(reference, knob)`; `tight`: the knob with the longest run length, `loose`: with the shortest."""

    make: Callable[[Rows, float], trials.Detector]
    tight: float
    loose: float


class PerFeature:
    """One detector a feature (or two), fed standardised values; a missing value is the reference's mean.

    step(values): all features' detectors take one row; whether one of them alarms. renew(): all new. A new set is
    given the newest `known` reference rows first: these detectors have no other reference.
    """

    def __init__(
        self, reference: Rows, renew: Callable[[], Callable[[list[float]], bool]], known: int = 1_000
    ) -> None:
        features = reference.features
        self._centre, self._scale = np.nanmean(features, axis=0), np.maximum(np.nanstd(features, axis=0), 1e-9)
        self._known = self._standardised(features[-known:])
        self._renew = renew
        self.reset()

    def reset(self) -> None:
        self._step = self._renew()
        for row in self._known:
            if self._step(row):
                self._step = self._renew()

    def first_alarm(self, rows: Rows) -> int | None:
        for number, row in enumerate(self._standardised(rows.features), 1):
            if self._step(row):
                return number
        return None

    def _standardised(self, features: NDArray[np.float64]) -> list[list[float]]:
        z: list[list[float]] = np.nan_to_num((features - self._centre) / self._scale).tolist()
        return z


def serve(offers: Mapping[str, Offer]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints on stdout
    prepared: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            told = _answer(offers, asked, prepared)
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way; its text is the result
            told = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def _answer(offers: Mapping[str, Offer], asked: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    if asked["do"] == "cost":
        rows = prepared["source"].take(asked["rows"])
        return {"us": trials.timed_us(prepared["detector"], rows, asked["batch"])}
    offer = offers[asked["detector"]]
    if asked["do"] == "prepare":
        began_s = monotonic()
        source = Source("gauss", asked["d"], SOURCE_SEED)
        prepared["detector"] = offer.make(source.take(asked["n_ref"]), asked["knob"])
        prepared["source"] = source
        return {"seconds": round(monotonic() - began_s, 2), "rss_mb": _rss_mb()}
    until = trials.Deadline(asked["seconds"])
    if asked["do"] == "delays":
        return trials.delays(
            lambda reference: offer.make(reference, asked["knob"]), asked["cases"], d=asked["d"],
            n_ref=asked["n_ref"], references=asked["references"], runs=asked["runs"], until=until,
        )  # fmt: skip

    def length(knob: float, seconds: float) -> trials.Length:
        source = Source("gauss", asked["d"], SOURCE_SEED)
        detector = offer.make(source.take(asked["n_ref"]), knob)
        return trials.false_alarms(detector, source, asked["rows"], until=trials.Deadline(seconds))

    if asked["do"] == "length":
        found = length(asked["knob"], asked["seconds"])
        return {"rows": found.rows, "alarms": found.alarms}
    tuned = trials.tune(
        lambda knob: length(knob, asked["seconds"] / 4), offer.tight, offer.loose, asked["wanted"], until=until
    )
    return {"knob": tuned.knob, "rows": tuned.length.rows, "alarms": tuned.length.alarms, "why": tuned.why}


def _rss_mb() -> float:
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # noqa: PTH123 - nothing else is needed
        return round(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
    return 0.0
