"""river: one univariate detector a feature. Runs in river's environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from river import drift

from scripts.drift_bench.peers.worker import Offer, PerFeature, serve
from scripts.drift_bench.streams import Rows


def _each(make: Callable[[], Any], count: int) -> Callable[[list[float]], bool]:
    detectors = [make() for _ in range(count)]

    def step(row: list[float]) -> bool:
        alarmed = False
        for detector, value in zip(detectors, row, strict=True):
            detector.update(value)
            alarmed |= detector.drift_detected
        return alarmed

    return step


def _offer(make: Callable[[float], Any], tight: float, loose: float) -> Offer:
    def detector(reference: Rows, knob: float) -> PerFeature:
        return PerFeature(reference, lambda: _each(lambda: make(knob), reference.features.shape[1]))

    return Offer(detector, tight, loose)


OFFERS = {
    "adwin": _offer(lambda delta: drift.ADWIN(delta=delta), 1e-4, 0.5),
    "page_hinkley": _offer(lambda threshold: drift.PageHinkley(threshold=threshold), 800.0, 10.0),
    "kswin": _offer(lambda alpha: drift.KSWIN(alpha=alpha, seed=1), 1e-9, 0.005),
}

if __name__ == "__main__":
    serve(OFFERS)
