"""A mergeable log-histogram of latencies: any quantile within a stated relative error, from a few hundred integers.

    sketch = LogSketch(relative_error=0.02)
    sketch.add(812.4)                      # one value in us
    sketch.add_many(latencies_us)          # a numpy array
    sketch.quantile(0.95)                  # us, or None while empty
    LogSketch.from_fields(sketch.fields()) # the integer form that travels in a message; the merge is exact

Values are counted in buckets whose borders grow by the factor gamma = (1 + e) / (1 - e): bucket i holds
(gamma^(i-1), gamma^i] and answers 2 gamma^i / (gamma + 1), which is within e of every value in it.
Source: Masson, Rim, Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees",
PVLDB 12(12), 2019, section 2. Two sketches of equal `relative_error` merge by adding counts: the result is the
sketch of all values, bucket for bucket, in any order.

Not for values below 1 us (they share bucket 0) or above one hour (they share the last bucket).
Mutable, owned by one thread; leaves locking and time windows to its owner.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import MalformedMessage

LOWEST_US = 1.0  # finer than any clock reading around a request
HIGHEST_US = 3.6e9  # one hour: longer than any deadline a request may have
DEFAULT_RELATIVE_ERROR = 0.02  # a budget is judged in steps of 5 % and more; one hour then needs about 550 buckets
BUCKETS_PER_E = 1.0 / math.log((1.0 + DEFAULT_RELATIVE_ERROR) / (1.0 - DEFAULT_RELATIVE_ERROR))
BUCKETS = math.ceil(math.log(HIGHEST_US) * BUCKETS_PER_E) + 1
"""Of a sketch of the default accuracy: for who counts by bucket elsewhere, see `add_buckets`."""


class LogSketch:
    """Counts per bucket, plus exact count, sum (of whole us), minimum and maximum."""

    __slots__ = ("_log_gamma", "buckets", "count", "maximum_us", "minimum_us", "relative_error", "total_us")

    def __init__(self, relative_error: float = DEFAULT_RELATIVE_ERROR) -> None:
        if not 0.0 < relative_error < 1.0:
            raise ValueError(f"relative_error must lie between 0 and 1, not {relative_error}")
        self.relative_error = relative_error
        self._log_gamma = math.log((1.0 + relative_error) / (1.0 - relative_error))
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.total_us = 0
        self.minimum_us = 0
        self.maximum_us = 0

    def add(self, value_us: float, count: int = 1) -> None:
        """Count `value_us` `count` times. Raises: ValueError for NaN, a negative value or a negative count."""
        if not value_us >= 0.0 or count < 0:
            raise ValueError(f"cannot count {count} latencies of {value_us} us")
        if count == 0:
            return
        value_us = min(value_us, HIGHEST_US)
        bucket = self._bucket(value_us)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self._extend(math.floor(value_us), math.ceil(value_us), count, round(value_us) * count)

    def add_many(self, values_us: NDArray[np.floating[Any]]) -> None:
        """Count an array of any shape. Raises: ValueError when one is NaN or negative; then none is counted."""
        if values_us.size == 0:
            return
        values = np.minimum(values_us.astype(np.float64).ravel(), HIGHEST_US)
        if not bool((values >= 0.0).all()):
            raise ValueError("cannot count NaN or negative latencies")
        numbers = np.ceil(np.log(np.maximum(values, LOWEST_US)) / self._log_gamma).astype(np.int64)
        for bucket, count in zip(*(part.tolist() for part in np.unique(numbers, return_counts=True)), strict=True):
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        total_us = int(np.rint(values).astype(np.int64).sum())
        self._extend(math.floor(values.min()), math.ceil(values.max()), values.size, total_us)

    def add_buckets(self, counts: NDArray[np.int64], *, total_us: int) -> None:
        """Add counts by bucket number, made elsewhere with this sketch's accuracy; `total_us`: the exact sum.

        Smallest and largest are then known to the bucket only.
        """
        filled = np.flatnonzero(counts)
        if not len(filled):
            return
        for bucket, count in zip(filled.tolist(), counts[filled].tolist(), strict=True):
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        lowest_us = math.exp((int(filled[0]) - 1) * self._log_gamma) if filled[0] else 0.0
        highest_us = math.exp(int(filled[-1]) * self._log_gamma)
        self._extend(math.floor(lowest_us), math.ceil(highest_us), int(counts.sum()), total_us)

    def merge(self, other: LogSketch) -> None:
        """Add another sketch's counts. Raises: ValueError when the relative errors differ."""
        if other.relative_error != self.relative_error:
            raise ValueError(
                f"cannot merge sketches of relative error {other.relative_error} and {self.relative_error}"
            )
        if other.count == 0:
            return
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self._extend(other.minimum_us, other.maximum_us, other.count, other.total_us)

    def quantile(self, q: float) -> float | None:
        """The value of rank floor(q * (count - 1)), within `relative_error` of it; None while empty."""
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"a quantile lies between 0 and 1, not {q}")
        if self.count == 0:
            return None
        rank = math.floor(q * (self.count - 1))
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen > rank:
                break
        return min(max(self._middle_us(bucket), float(self.minimum_us)), float(self.maximum_us))

    def mean_us(self) -> float | None:
        return self.total_us / self.count if self.count else None

    def copy(self) -> LogSketch:
        twin = LogSketch(self.relative_error)
        twin.merge(self)
        return twin

    def fields(self) -> dict[str, Any]:
        """Integers only, named as in `contract.messages.LatencySketch`; bucket numbers are strings, as JSON wants."""
        return {
            "relative_error": self.relative_error,
            "count": self.count,
            "total_us": self.total_us,
            "minimum_us": self.minimum_us,
            "maximum_us": self.maximum_us,
            "buckets": {str(bucket): self.buckets[bucket] for bucket in sorted(self.buckets)},
        }

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """The sketch that `fields` describes.

        Raises:
            MalformedMessage: a field is missing or wrong, or the buckets do not add up to `count`.
        """
        try:
            sketch = cls(float(fields["relative_error"]))
            sketch.buckets = {int(bucket): int(count) for bucket, count in fields["buckets"].items() if count}
            sketch.count = int(fields["count"])
            sketch.total_us = int(fields["total_us"])
            sketch.minimum_us = int(fields["minimum_us"])
            sketch.maximum_us = int(fields["maximum_us"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedMessage(f"a latency sketch is malformed: {error!r}") from None
        last = sketch._bucket(HIGHEST_US)
        if any(count < 0 or not 0 <= bucket <= last for bucket, count in sketch.buckets.items()):
            raise MalformedMessage(f"a latency sketch has a bucket outside 0..{last} or a negative count")
        if sum(sketch.buckets.values()) != sketch.count:
            raise MalformedMessage(f"the buckets of a latency sketch do not add up to its count {sketch.count}")
        return sketch

    def _bucket(self, value_us: float) -> int:
        return math.ceil(math.log(max(value_us, LOWEST_US)) / self._log_gamma)

    def _middle_us(self, bucket: int) -> float:
        gamma = math.exp(self._log_gamma)
        return 2.0 * math.exp(bucket * self._log_gamma) / (gamma + 1.0)

    def _extend(self, minimum_us: int, maximum_us: int, count: int, total_us: int) -> None:
        self.minimum_us = min(self.minimum_us, minimum_us) if self.count else minimum_us
        self.maximum_us = max(self.maximum_us, maximum_us)
        self.count += count
        self.total_us += total_us
