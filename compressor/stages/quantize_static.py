"""Static 8 bit: ranges from the calibrate role, own calibrator, own lowering; nothing is trained again.

Preprocessing, the monitor's view, the last linear layer and the softmax stay float.
"""

from __future__ import annotations

import torch
from torch import fx

from compressor.calibrators import Calibrator, Scale
from compressor.lowering import quantise
from compressor.stages.export import Served
from compressor.task import Rows

SOURCES = ("stages/quantize_static.py", "lowering.py", "calibrators.py")


def quantize_static(
    folded: fx.GraphModule, served: Served, rows: Rows, *, calibrator: Calibrator
) -> tuple[fx.GraphModule, dict[str, Scale]]:
    """The 8 bit form of a folded network and its activation scales; `served` knows how its input is normalised."""
    with torch.no_grad():
        normalised = served.normalise(torch.from_numpy(rows.windows).transpose(1, 2))
    return quantise(folded, normalised, calibrator=calibrator)
