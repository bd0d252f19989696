"""frouros: its one-sided detectors, for concept drift of an error rate, fed each feature with both signs.
Runs in frouros' environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frouros.detectors.concept_drift import CUSUM, CUSUMConfig, PageHinkley, PageHinkleyConfig

from scripts.drift_bench.peers.worker import Offer, PerFeature, serve
from scripts.drift_bench.streams import Rows


def _both_signs(make: Callable[[], Any], count: int) -> Callable[[list[float]], bool]:
    upper, lower = [make() for _ in range(count)], [make() for _ in range(count)]

    def step(row: list[float]) -> bool:
        alarmed = False
        for up, down, value in zip(upper, lower, row, strict=True):
            up.update(value=value)
            down.update(value=-value)
            alarmed |= up.drift or down.drift
        return alarmed

    return step


def _offer(make: Callable[[float], Any], tight: float, loose: float) -> Offer:
    def detector(reference: Rows, knob: float) -> PerFeature:
        return PerFeature(reference, lambda: _both_signs(lambda: make(knob), reference.features.shape[1]))

    return Offer(detector, tight, loose)


OFFERS = {
    "cusum": _offer(lambda limit: CUSUM(config=CUSUMConfig(lambda_=limit)), 800.0, 10.0),
    "page_hinkley": _offer(lambda limit: PageHinkley(config=PageHinkleyConfig(lambda_=limit)), 800.0, 10.0),
}

if __name__ == "__main__":
    serve(OFFERS)
