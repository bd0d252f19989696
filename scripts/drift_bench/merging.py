"""Windows of devices merged in any order and grouping: bit for bit the one window of all their rows?"""

from __future__ import annotations

from typing import Any

import numpy as np

from agent.drift import MomentWindow, Reference
from compressor.reference import ViewRows

TRIALS = 100
DEVICES = 12


def bit_equal(reference: Reference, rows: ViewRows, trials: int = TRIALS, seed: int = 0) -> dict[str, Any]:
    """`rows` dealt to devices and cut into windows at random, merged pairwise in random order, `trials` times."""
    generator = np.random.default_rng(seed)
    classes = len(reference.labels)
    pooled = MomentWindow.empty(reference.fixed_point(), classes=classes).add(rows.features, rows.predicted)
    equal = 0
    for _ in range(trials):
        order = generator.permutation(len(rows))
        cuts = np.sort(generator.choice(np.arange(1, len(rows)), 4 * DEVICES - 1, replace=False))
        windows = [
            MomentWindow.empty(reference.fixed_point(), classes=classes).add(
                rows.features[part], rows.predicted[part]
            )
            for part in np.split(order, cuts)
        ]
        while len(windows) > 1:
            first, second = sorted(generator.choice(len(windows), 2, replace=False), reverse=True)
            windows.append(windows.pop(first).merge(windows.pop(second)))
        equal += windows[0] == pooled
    return {"equal": equal, "trials": trials, "windows": 4 * DEVICES, "rows": len(rows)}
