"""Windows of a view as integer sums: merging two is exact, in any order, on any machine.

Floating-point sums depend on the order of addition, so two hosts that pool the same devices would disagree
in the last digits. Here each number is clipped, scaled and rounded once to fixed point; everything after
that is integer addition. What is lost is the rounding, at most half a step of 2**-fraction_bits reference
standard deviations per row, and whatever lay beyond the clip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import ContractError

MAX_FRACTION_BITS = 20


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How a feature becomes an integer: round(clip((x - centre) / scale, -clip, clip) * 2**fraction_bits).

    centre, scale: one number per feature, those of the reference.
    """

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    clip: float = 4.0
    fraction_bits: int = 10

    def __post_init__(self) -> None:
        if len(self.centre) != len(self.scale) or not self.scale:
            raise ContractError(f"{len(self.centre)} centres and {len(self.scale)} scales do not fit together")
        if min(self.scale) <= 0 or self.clip <= 0 or not 0 <= self.fraction_bits <= MAX_FRACTION_BITS:
            raise ContractError("scale and clip must be positive and fraction_bits 0 to 20")

    @property
    def width(self) -> int:
        return len(self.centre)

    def quantize(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        """rows: (rows, features), finite. Returns the integers, same shape."""
        z = (np.asarray(rows, dtype=np.float64) - np.array(self.centre)) / np.array(self.scale)
        steps: NDArray[np.int64] = np.rint(np.clip(z, -self.clip, self.clip) * (1 << self.fraction_bits)).astype(
            np.int64
        )
        return steps


@dataclass(frozen=True, slots=True)
class MomentWindow:
    """Sums over `rows` rows of one view; a value, never changed: `add` and `merge` return a new one.

    `sums`, `squares`: per feature, of the integers of `fixed`. `classes`: rows per predicted class.
    `counters`: rows that were odd, by name (not_finite, dead:gx, gap, ...). A row that is not finite adds to
    `counters["not_finite"]` only. `products`: of each pair of features, the upper triangle row by row (0*1, 0*2, ...,
    1*2, ...), for views whose relations a host wants to see; () = not carried.
    """

    fixed: FixedPoint
    rows: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]
    classes: tuple[int, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)
    products: tuple[int, ...] = ()

    @classmethod
    def empty(cls, fixed: FixedPoint, *, classes: int = 0, with_products: bool = False) -> MomentWindow:
        zeros = (0,) * fixed.width
        pairs = fixed.width * (fixed.width - 1) // 2 if with_products else 0
        return cls(fixed, 0, zeros, zeros, (0,) * classes, products=(0,) * pairs)

    def add(
        self, features: NDArray[Any], predicted: NDArray[Any], counted: Mapping[str, int] | None = None
    ) -> MomentWindow:
        """With more rows. features: (rows, features); predicted: (rows,) class numbers, -1 = none."""
        finite = np.isfinite(features).all(axis=1)
        numbers = self.fixed.quantize(features[finite])
        labels = np.asarray(predicted, dtype=np.int64)[finite]
        known = labels[(labels >= 0) & (labels < len(self.classes))]
        odd = Counter(counted or {})
        odd["not_finite"] += int((~finite).sum())
        return self.merge(
            MomentWindow(
                self.fixed,
                len(numbers),
                tuple(numbers.sum(axis=0).tolist()),
                tuple((numbers * numbers).sum(axis=0).tolist()),
                tuple(np.bincount(known, minlength=len(self.classes)).tolist()) if self.classes else (),
                {name: count for name, count in odd.items() if count},
                _products(numbers) if self.products else (),
            )
        )

    def merge(self, other: MomentWindow) -> MomentWindow:
        """The window of all rows of both, bit for bit the one a single pass would have made.

        Raises:
            ContractError: the two were not made with the same reference, or not both carry products.
        """
        alike = len(self.classes) == len(other.classes) and len(self.products) == len(other.products)
        if self.fixed != other.fixed or not alike:
            raise ContractError(
                "two drift windows of different references were merged", hint="Merge per reference digest."
            )
        return MomentWindow(
            self.fixed,
            self.rows + other.rows,
            _plus(self.sums, other.sums),
            _plus(self.squares, other.squares),
            _plus(self.classes, other.classes),
            dict(sorted((Counter(self.counters) + Counter(other.counters)).items())),
            _plus(self.products, other.products),
        )

    def mean(self) -> NDArray[np.float64]:
        """Per feature, in the view's own unit; NaN without rows."""
        return np.array(self.fixed.centre) + np.array(self.fixed.scale) * self._moment(self.sums, 1)

    def sd(self) -> NDArray[np.float64]:
        """Per feature, of the clipped numbers, in the view's own unit; NaN without rows."""
        variance = self._moment(self.squares, 2) - self._moment(self.sums, 1) ** 2
        return np.array(self.fixed.scale) * np.sqrt(np.maximum(variance, 0.0))

    def correlation(self) -> NDArray[np.float64]:
        """(features, features), of the clipped numbers; NaN without rows or products, and where nothing varies."""
        width = self.fixed.width
        if not self.rows or not self.products:
            return np.full((width, width), np.nan)
        mean = self._moment(self.sums, 1)
        second = np.diag(self._moment(self.squares, 2))
        second[np.triu_indices(width, 1)] = self._moment(self.products, 2)
        covariance = second + np.triu(second, 1).T - np.outer(mean, mean)
        sd = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            correlation: NDArray[np.float64] = covariance / np.outer(sd, sd)
        return correlation

    def _moment(self, sums: tuple[int, ...], power: int) -> NDArray[np.float64]:
        if not self.rows:
            return np.full(self.fixed.width, np.nan)
        return np.array(sums, dtype=np.float64) / (self.rows * float(1 << self.fixed.fraction_bits) ** power)


def _products(numbers: NDArray[np.int64]) -> tuple[int, ...]:
    # exact: |number| <= 4 * 2**20 by the limits of FixedPoint, so 2**19 rows are far from overflowing an int64
    full = numbers.T @ numbers
    return tuple(full[np.triu_indices(len(full), 1)].tolist())


def _plus(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
