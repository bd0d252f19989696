"""alibi-detect: MMDDriftOnline, whose knob is the run length it is asked for. Runs in alibi-detect's environment.

Its documentation asks for a number of bootstraps an order of magnitude over that run length.
"""

from __future__ import annotations

import numpy as np
import torch
from alibi_detect.cd import MMDDriftOnline

from scripts.drift_bench.peers.worker import Offer, serve
from scripts.drift_bench.streams import Rows

WINDOW = 64
REFERENCE_ROWS = 1_500
BOOTSTRAPS_PER_ROW = 5

torch.set_num_threads(1)


class Mmd:
    def __init__(self, reference: Rows, run_length: float) -> None:
        features = reference.features[-REFERENCE_ROWS:]
        self._centre, self._scale = features.mean(axis=0), features.std(axis=0)
        self._detector = MMDDriftOnline(
            self._standardised(features), ert=run_length, window_size=WINDOW, backend="pytorch",
            n_bootstraps=int(BOOTSTRAPS_PER_ROW * run_length), verbose=False,
        )  # fmt: skip

    def first_alarm(self, rows: Rows) -> int | None:
        for number, row in enumerate(self._standardised(rows.features), 1):
            if self._detector.predict(row, return_test_stat=False)["data"]["is_drift"]:
                return number
        return None

    def reset(self) -> None:
        self._detector.reset_state()

    def _standardised(self, features: np.ndarray) -> np.ndarray:
        return np.nan_to_num((features - self._centre) / self._scale).astype(np.float32)


OFFERS = {"mmd": Offer(Mmd, 10_000.0, 500.0)}

if __name__ == "__main__":
    serve(OFFERS)
