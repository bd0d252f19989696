"""Generated streams and changes of them. Needs numpy alone: the peers' environments import it too.

A `Source` is one population: `take` continues its stream, `fork` begins another, independent realisation of the
same population from the moment it stands at. Rows are made in units of each feature's own standard deviation,
changed there if at all, and only then given the feature's unit: no detector may count on standardised input.

Seeds: a population (units, season, levels) follows from `seed` alone, a realisation from `seed` and `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Change = Callable[[Array, np.random.Generator], Array]
"""Rows in units of their sd (n, d), changed ones out; the input is not altered."""

ACROSS = 0.7  # correlation of neighbouring features in `correlated`
LOGNORMAL_SIGMA = 0.75
LEVELS = (2, 3, 4, 6, 8)
NAN_SHARE = 0.01
GAP_SHARE = 0.002  # of rows after which the clock jumps
GAP_STEPS = 50
SEASON_STEP_S = 300.0
DAY_S = 86_400.0
KINDS = ("gauss", "t3", "lognormal", "correlated", "ar0.5", "ar0.9", "season", "categorical", "gaps")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """features: (n, d); times_s: (n,), seconds of the data."""

    features: Array
    times_s: Array

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.features[part], self.times_s[part])


@dataclass(eq=False)
class Source:
    """Rows without end. One of KINDS, `d` features; `now_s` is the time of the last row."""

    kind: str
    d: int
    seed: int
    run: int = 0
    now_s: float = 0.0
    _generator: np.random.Generator = field(init=False, repr=False)
    _last: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is none of {', '.join(KINDS)}")
        population = np.random.default_rng([KINDS.index(self.kind), self.d, self.seed])
        self.centre = population.normal(0.0, 5.0, self.d)
        self.scale = np.exp(population.normal(0.0, 1.0, self.d))
        self.phase = population.uniform(0.0, 2 * np.pi, self.d)
        self.levels = population.choice(LEVELS, self.d)
        self.weights = [population.dirichlet(np.full(count, 4.0)) for count in self.levels]
        self.categorical = np.zeros(self.d, bool)
        if self.kind == "categorical":
            self.categorical[self.d // 2 :] = True
            self.centre[self.categorical], self.scale[self.categorical] = 0.0, 1.0
        self._root = np.linalg.cholesky(_toeplitz(ACROSS, self.d)).T if self.kind == "correlated" else None
        self._phi = {"ar0.5": 0.5, "ar0.9": 0.9, "season": 0.5}.get(self.kind, 0.0)
        self._generator = np.random.default_rng([KINDS.index(self.kind), self.d, self.seed, 1 + self.run])
        self._last = self._generator.standard_normal(self.d)

    def fork(self, run: int) -> Source:
        """The same population, another realisation, at this moment. `run` from 1."""
        return Source(self.kind, self.d, self.seed, run, self.now_s)

    def take(self, count: int, change: Change | None = None) -> Rows:
        """The next `count` rows, with `change` in them if one is given."""
        times_s = self._times(count)
        z = self._innovations(count)
        if self._phi:
            z = self._autoregressive(z)
        if self.kind == "season":
            z = (np.cos(2 * np.pi * times_s[:, None] / DAY_S + self.phase) + z) / np.sqrt(1.5)
        if self.kind == "gaps":
            z[self._generator.random(z.shape) < NAN_SHARE] = np.nan
        if change is not None:
            z = change(z, self._generator)
        return Rows(self.centre + self.scale * z, times_s)

    def _times(self, count: int) -> Array:
        step = SEASON_STEP_S if self.kind == "season" else 1.0
        steps = np.ones(count)
        if self.kind == "gaps":
            steps[self._generator.random(count) < GAP_SHARE] = GAP_STEPS
        times_s = self.now_s + step * np.cumsum(steps)
        self.now_s = float(times_s[-1]) if count else self.now_s
        return np.asarray(times_s, np.float64)

    def _innovations(self, count: int) -> Array:
        generator, shape = self._generator, (count, self.d)
        if self.kind == "t3":
            return generator.standard_t(3, shape) / np.sqrt(3.0)
        z = generator.standard_normal(shape)
        if self.kind == "lognormal":
            spread = LOGNORMAL_SIGMA**2
            return (np.exp(LOGNORMAL_SIGMA * z) - np.exp(spread / 2)) / np.sqrt(np.expm1(spread) * np.exp(spread))
        if self._root is not None:
            return np.asarray(z @ self._root, np.float64)
        for feature in np.flatnonzero(self.categorical):
            z[:, feature] = generator.choice(self.levels[feature], count, p=self.weights[feature])
        return z

    def _autoregressive(self, innovations: Array) -> Array:
        phi, spread, last = self._phi, np.sqrt(1 - self._phi**2), self._last
        z = np.empty_like(innovations)
        for row, innovation in enumerate(innovations):
            last = phi * last + spread * innovation
            z[row] = last
        self._last = last
        return z


def _toeplitz(rho: float, d: int) -> Array:
    place = np.arange(d)
    return np.asarray(rho ** np.abs(place[:, None] - place[None, :]), np.float64)


# --- changes: each names the features it touches; sizes in the feature's sd -------------------------------------


def mean_shift(features: slice | int, size: float) -> Change:
    def apply(z: Array, _: np.random.Generator) -> Array:
        out = z.copy()
        out[:, features] += size
        return out

    return apply


def wider(features: slice | int, factor: float) -> Change:
    def apply(z: Array, _: np.random.Generator) -> Array:
        out = z.copy()
        out[:, features] *= factor
        return out

    return apply


def correlate(pairs: int, rho: float) -> Change:
    """Features 0 and 1, 2 and 3, ... of `pairs` pairs get the correlation; theirs stay (Gaussian)."""

    def apply(z: Array, _: np.random.Generator) -> Array:
        out = z.copy()
        for first in range(0, 2 * pairs, 2):
            out[:, first + 1] = rho * z[:, first] + np.sqrt(1 - rho**2) * z[:, first + 1]
        return out

    return apply


def stuck(feature: int) -> Change:
    """It repeats one ordinary value, the same in every later piece of the stream."""
    frozen: list[float] = []

    def apply(z: Array, _: np.random.Generator) -> Array:
        out = z.copy()
        if not frozen:
            frozen.append(float(np.nan_to_num(z[0, feature])))
        out[:, feature] = frozen[0]
        return out

    return apply


def not_a_number(feature: int, share: float) -> Change:
    def apply(z: Array, generator: np.random.Generator) -> Array:
        out = z.copy()
        out[generator.random(len(z)) < share, feature] = np.nan
        return out

    return apply


def category(feature: int, level: int, share: float) -> Change:
    """A `share` of the rows has this level instead of what they had."""

    def apply(z: Array, generator: np.random.Generator) -> Array:
        out = z.copy()
        out[generator.random(len(z)) < share, feature] = level
        return out

    return apply


@dataclass(frozen=True, slots=True)
class Case:
    """A change by name, for streams of one kind. `make(d, generator)`: it, on features drawn anew."""

    name: str
    kind: str
    make: Callable[[int, np.random.Generator], Change]


def _one(change: Callable[[int], Change]) -> Callable[[int, np.random.Generator], Change]:
    return lambda d, generator: change(int(generator.integers(d)))


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("one_0.25", "gauss", _one(lambda feature: mean_shift(feature, 0.25))),
        Case("one_0.5", "gauss", _one(lambda feature: mean_shift(feature, 0.5))),
        Case("one_1", "gauss", _one(lambda feature: mean_shift(feature, 1.0))),
        Case("all_0.25", "gauss", lambda _d, _g: mean_shift(slice(None), 0.25)),
        Case("sd_1.5", "gauss", _one(lambda feature: wider(feature, 1.5))),
        Case("sd_all_1.2", "gauss", lambda _d, _g: wider(slice(None), 1.2)),
        Case("correlation", "gauss", lambda d, _: correlate(min(4, d // 2), 0.5)),
        Case("stuck", "gauss", _one(stuck)),
        Case("nan", "gauss", _one(lambda feature: not_a_number(feature, 0.2))),
        Case("category", "categorical", lambda d, g: category(int(g.integers(d // 2, d)), 0, 0.3)),
    )
}


def describe() -> dict[str, Any]:
    """The constants of this page, for the document."""
    return {
        "across": ACROSS, "lognormal_sigma": LOGNORMAL_SIGMA, "nan_share": NAN_SHARE, "gap_share": GAP_SHARE,
        "season_step_s": SEASON_STEP_S, "cases": list(CASES),
    }  # fmt: skip
