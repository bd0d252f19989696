"""From values a tensor took to the range an integer type must cover. Knows nothing of graphs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class Calibrator(StrEnum):
    MINMAX = "minmax"  # everything seen
    PERCENTILE = "percentile"  # all but 0.01 % at each end: a single odd sample does not set the scale


TAIL = 1e-4


@dataclass(frozen=True, slots=True)
class Scale:
    """real = scale * (integer - zero_point), integer in 0..255."""

    scale: float
    zero_point: int


def scale_for(values: Tensor, calibrator: Calibrator) -> Scale:
    """Asymmetric unsigned 8 bit scale; zero is always represented exactly, so that padding and ReLU stay exact."""
    flat = values.flatten().double()
    if calibrator is Calibrator.PERCENTILE:
        ordered = flat.sort().values
        cut = int(TAIL * len(ordered))
        low, high = float(ordered[cut]), float(ordered[len(ordered) - 1 - cut])
    else:
        low, high = float(flat.min()), float(flat.max())
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-8)
    return Scale(scale=float(torch.tensor(scale)), zero_point=min(255, max(0, round(-low / scale))))


def weight_scales(weight: Tensor) -> Tensor:
    """Symmetric signed 8 bit scale per output channel (first axis)."""
    largest: Tensor = weight.detach().flatten(1).abs().amax(1)
    return (largest / 127).clamp_min(1e-8)
