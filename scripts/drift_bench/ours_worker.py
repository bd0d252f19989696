"""Our suite as a worker like its peers (peers/worker.py): the knob is the run length it claims."""

from __future__ import annotations

from scripts.drift_bench.ours import make
from scripts.drift_bench.peers.worker import Offer, serve
from scripts.drift_bench.streams import Rows
from scripts.drift_bench.trials import Detector


def _suite(reference: Rows, claim_rows: float) -> Detector:
    return make(reference, round(claim_rows))


OFFERS = {"suite": Offer(_suite, 20_000.0, 250.0)}

if __name__ == "__main__":
    serve(OFFERS)
