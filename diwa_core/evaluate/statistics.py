"""Intervals for success rates: one rate, the paired difference of two policies on the same episodes, both over training seeds that share
their starts, the mean over skills; percentiles.

Letters: S training seeds, N starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval [low, high]."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def success_rate(successes: int, episodes: int, confidence: float = 0.95) -> Estimate:
    """successes / episodes with the Wilson score interval (Wilson 1927). Raises ValueError on impossible counts."""
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(f"expected 0 <= successes <= episodes and at least one episode, found {successes} of {episodes}")
    interval = stats.binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return Estimate(successes / episodes, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class PairedComparison:
    """Two policies on the same episodes: difference of success, episodes won and lost by the second, exact McNemar p-value."""

    difference: Estimate
    gained: int
    lost: int
    episodes: int
    p_value: float


def compare_paired(base: Sequence[bool], tuned: Sequence[bool], confidence: float = 0.95) -> PairedComparison:
    """Success of `tuned` minus success of `base`, outcomes [N] in the same order of starts, with Tango's score interval.

    Source: Tango 1998, Statistics in Medicine 17, 891-908; it holds its level for small N and where nothing differs.
    Raises ValueError on empty or unequal lengths.
    """
    first, second = np.asarray(base, dtype=bool), np.asarray(tuned, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise ValueError(f"expected two equally long lists of outcomes, found shapes {first.shape} and {second.shape}")
    gained, lost, n = int((second & ~first).sum()), int((first & ~second).sum()), len(first)
    p_value = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedComparison(_tango_interval(gained, lost, n, confidence), gained, lost, n, p_value)


def rate_over_seeds(outcomes: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Success rate of `outcomes` [S, N], all S on the same N starts: the Wilson interval at the effective number of episodes.

    A start that is hard for one training seed is hard for the others, so S * N episodes say less than as many independent ones.
    The design effect says how much less (Rao and Scott 1992, Biometrics 48, 577-585; here every start is a cluster). The interval is
    about other starts, for these training seeds. Raises ValueError on another shape or no outcomes.
    """
    values = _check_outcomes(outcomes).astype(float)
    rate, n, z = values.mean(), values.size / _design_effect(values), _normal_limit(confidence)
    centre, half = rate + z * z / (2 * n), z * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return Estimate(float(rate), float(low) if rate > 0 else 0.0, float(high) if rate < 1 else 1.0)


def gain_over_seeds(base: np.ndarray, tuned: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Success of `tuned` minus success of `base`, outcomes [S, N], all on the same N starts: Tango's interval at the effective number.

    As `rate_over_seeds`; with one seed it is `compare_paired`. Raises ValueError on unequal shapes.
    """
    first, second = _check_outcomes(base), _check_outcomes(tuned)
    if first.shape != second.shape:
        raise ValueError(f"expected outcomes of the same seeds and starts, found shapes {first.shape} and {second.shape}")
    effect = _design_effect(second.astype(float) - first)
    gained, lost = (second & ~first).sum() / effect, (first & ~second).sum() / effect
    return _tango_interval(float(gained), float(lost), first.size / effect, confidence)


def _check_outcomes(outcomes: np.ndarray) -> np.ndarray:
    found = np.asarray(outcomes, dtype=bool)
    if found.ndim != 2 or found.size == 0:
        raise ValueError(f"expected outcomes [seeds, starts], found shape {found.shape}")
    return found


def _design_effect(values: np.ndarray) -> float:
    """Variance of the mean of `values` [S, N], starts resampled whole, over what S * N independent values would have; within 1 and S.

    Where all values are equal nothing can be estimated, and the seeds of a start count once: S.
    """
    seeds, starts = values.shape
    independent = values.var() / values.size
    if seeds == 1 or starts == 1 or independent == 0:
        return float(seeds)
    clustered = values.mean(0).var(ddof=1) / starts
    return float(np.clip(clustered / independent, 1, seeds))


def _normal_limit(confidence: float) -> float:
    return float(stats.norm.ppf(0.5 + confidence / 2))


def _tango_interval(gained: float, lost: float, n: float, confidence: float) -> Estimate:
    limit, value = _normal_limit(confidence), (gained - lost) / n

    def excess(delta: float, sign: int) -> float:
        return sign * _tango_score(gained, lost, n, delta) - limit

    low = -1.0 if value <= -1 else optimize.brentq(excess, -1 + 1e-12, value, args=(1,))
    high = 1.0 if value >= 1 else optimize.brentq(excess, value, 1 - 1e-12, args=(-1,))
    return Estimate(value, low, high)


def _tango_score(gained: float, lost: float, n: float, delta: float) -> float:
    """Score statistic of the hypothesis that the difference is `delta`; the nuisance cell is its constrained maximum likelihood."""
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    cell = (math.sqrt(max(b * b - 8 * n * c, 0)) - b) / (4 * n)
    variance = n * (2 * cell + delta * (1 - delta))
    excess = gained - lost - n * delta
    return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0


def pool_mean(estimates: Mapping[str, Estimate]) -> Estimate:
    """Mean of independent estimates, each skill with equal weight; the interval is recovered from theirs (MOVER).

    Source: Zou and Donner 2008, Statistics in Medicine 27, 1693-1702. Serves rates and paired differences alike.
    """
    if not estimates:
        raise ValueError("expected at least one estimate, found none")
    parts = list(estimates.values())
    value = sum(part.value for part in parts) / len(parts)
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / len(parts)
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / len(parts)
    return Estimate(value, value - below, value + above)


@dataclass(frozen=True)
class Percentiles:
    """Of `count` measurements, in the unit they came in."""

    p50: float
    p95: float
    p99: float
    largest: float
    count: int


def summarise(values: Sequence[float]) -> Percentiles:
    """Percentiles with linear interpolation between order statistics. Raises ValueError on no values or on ones that are not finite."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"expected finite measurements, found {numbers.size} of which {int((~np.isfinite(numbers)).sum())} not finite")
    p50, p95, p99 = np.percentile(numbers, [50, 95, 99])
    return Percentiles(float(p50), float(p95), float(p99), float(numbers.max()), numbers.size)
