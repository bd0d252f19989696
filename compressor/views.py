"""The monitor's view as nodes of the exported graph: the same numbers as agent.drift.views.window_features.

The median of the second differences is exact: TopK keeps the larger half, a second TopK the two smallest of it,
whose mean is the median. Unsorted TopK is the cheapest exact form (measured on one core, 126 values x 6
channels: 4.5 us; sorted TopK 6.5, full sort 10, counting ranks 50).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agent.drift.views import Combination

FLOOR = 1e-4  # as agent.drift.views.FLOOR: keeps a logarithm finite for a constant channel


def combine(x: Tensor, combinations: Sequence[Combination]) -> Tensor:
    """(rows, channels, length) raw -> (rows, channels + combinations, length): the channels, then what is made of
    them, as agent.drift.views.combined.
    """
    return torch.cat([x, *(_series(x, one) for one in combinations)], 1) if combinations else x


def choose(x: Tensor, combinations: Sequence[Combination], reads: Sequence[int]) -> Tensor:
    """What `combine` would have at the positions `reads`, and nothing made that is not read."""
    channels = x.shape[1]
    if max(reads) < channels:
        return _channels(x, reads)
    return torch.cat(
        [_series(x, combinations[at - channels]) if at >= channels else x[:, at : at + 1] for at in reads], 1
    )


def _series(x: Tensor, one: Combination) -> Tensor:
    """(rows, 1, length)"""
    left = _channels(x, one.left)
    if one.right:
        return (left * _channels(x, one.right)).sum(1, keepdim=True)
    return (left * left).sum(1, keepdim=True).sqrt()


def _channels(x: Tensor, channels: Sequence[int]) -> Tensor:
    first, last = channels[0], channels[-1]
    consecutive = list(channels) == list(range(first, last + 1))  # a slice is cheaper than a gather
    return x[:, first : last + 1] if consecutive else x[:, list(channels)]


class ChannelFeatures(nn.Module):
    """(rows, channels, length) raw -> (rows, 4 * channels): mean, log sd, log roughness, log spike of each."""

    def forward(self, x: Tensor) -> Tensor:
        before, here, after = x[..., :-2], x[..., 1:-1], x[..., 2:]
        # relative to the first sample: a channel that repeats one value must give exactly zero
        first = x[..., :1]
        moved = x - first
        shift = moved.mean(-1, keepdim=True)
        mean = first + shift
        deviation = moved - shift
        sd = (deviation * deviation).mean(-1, keepdim=True).sqrt()
        roughness = median((after - here - (here - before)).abs())
        low, high = torch.minimum(before, here), torch.maximum(before, here)
        middle = torch.maximum(low, torch.minimum(high, after))
        spike = (here - middle).abs().amax(-1, keepdim=True)
        logs = torch.log(torch.cat([sd, roughness, spike], -1) + FLOOR)
        return torch.cat([mean, logs], -1).flatten(1)


def median(values: Tensor) -> Tensor:
    """Exact median over the last axis, kept as an axis of one; equal to numpy.median."""
    count = values.shape[-1]
    upper = torch.topk(values, count // 2 + 1, dim=-1, sorted=False).values
    lowest = torch.topk(upper, 2 - count % 2, dim=-1, largest=False, sorted=False).values
    return lowest.mean(-1, keepdim=True)
