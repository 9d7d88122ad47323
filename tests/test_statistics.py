"""Intervals against scipy, against a brute-force score test and against simulated coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from diwa_core.evaluate.statistics import Estimate, compare_paired, gain_over_seeds, pool_mean, rate_over_seeds, success_rate, summarise


def outcomes(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    base = [True] * both + [False] * gained + [True] * lost + [False] * neither
    tuned = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return base, tuned


@given(n=st.integers(1, 500), share=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_wilson_interval_inverts_the_score_test(n: int, share: float) -> None:
    k = round(n * share)
    found = success_rate(k, n)
    z = stats.norm.ppf(0.975)
    for limit in (found.low, found.high):
        assert 0 <= limit <= 1
        if limit not in (0.0, 1.0):
            assert abs(k / n - limit) / np.sqrt(limit * (1 - limit) / n) == pytest.approx(z, rel=1e-4)
    assert found.low <= found.value == k / n <= found.high


def test_wilson_known_values() -> None:
    # textbook form: (p + z^2/2n -+ z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2/n), here 81 of 263 (Newcombe 1998, Table I: .2553 to .3662)
    found = success_rate(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert success_rate(0, 20).low == 0 and success_rate(20, 20).high == 1


@pytest.mark.parametrize("counts", [(3, 2), (-1, 2), (0, 0)])
def test_impossible_counts(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= successes"):
        success_rate(*counts)


def brute_force_score(gained: int, lost: int, n: int, delta: float) -> float:
    """The same statistic from its definition: maximise the trinomial likelihood over the lost cell with gained = lost + delta."""

    def negative(lost_cell: float) -> float:
        cells = np.array([lost_cell + delta, lost_cell, 1 - 2 * lost_cell - delta])
        counts = np.array([gained, lost, n - gained - lost])
        return -np.sum(np.where(counts > 0, counts * np.log(np.maximum(cells, 1e-300)), 0))

    low, high = max(0.0, -delta), (1 - delta) / 2
    cell = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    variance = (2 * cell + delta - delta**2) / n
    return ((gained - lost) / n - delta) / np.sqrt(variance)


@pytest.mark.parametrize("cells", [(36, 12, 2, 0), (40, 20, 5, 35), (10, 3, 1, 6), (90, 8, 2, 0), (0, 9, 1, 10), (50, 0, 7, 43)])
def test_tango_interval_inverts_a_brute_force_score_test(cells: tuple[int, int, int, int]) -> None:
    found = compare_paired(*outcomes(*cells))
    _, gained, lost, _ = cells
    assert (found.gained, found.lost, found.episodes) == (gained, lost, sum(cells))
    assert found.difference.value == pytest.approx((gained - lost) / sum(cells))
    assert brute_force_score(gained, lost, sum(cells), found.difference.low) == pytest.approx(1.95996, abs=2e-3)
    assert brute_force_score(gained, lost, sum(cells), found.difference.high) == pytest.approx(-1.95996, abs=2e-3)


@given(cells=st.tuples(*[st.integers(0, 30)] * 4).filter(lambda cells: sum(cells) > 0))
@settings(max_examples=200, deadline=None)
def test_paired_interval_is_sane_and_antisymmetric(cells: tuple[int, int, int, int]) -> None:
    base, tuned = outcomes(*cells)
    forward, backward = compare_paired(base, tuned).difference, compare_paired(tuned, base).difference
    assert -1 <= forward.low <= forward.value <= forward.high <= 1
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low), abs=1e-6)


def test_paired_interval_without_any_difference_is_closed_form() -> None:
    found = compare_paired([True] * 30 + [False] * 20, [True] * 30 + [False] * 20)
    z2 = stats.norm.ppf(0.975) ** 2
    assert (found.difference.low, found.difference.high) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-9)
    assert found.p_value == 1


def test_mcnemar_p_value() -> None:
    assert compare_paired(*outcomes(50, 12, 3, 35)).p_value == pytest.approx(2 * stats.binom.cdf(3, 15, 0.5))


def test_unequal_outcomes_are_refused() -> None:
    for base, tuned in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="equally long"):
            compare_paired(base, tuned)


def test_coverage_of_paired_and_pooled_intervals() -> None:
    random = np.random.default_rng(0)
    cells, n, paired = np.array([0.45, 0.25, 0.05, 0.25]), 60, 0
    rates, pooled = np.array([0.5, 0.9, 0.98, 0.7]), 0
    for _ in range(600):
        found = compare_paired(*outcomes(*random.multinomial(n, cells))).difference
        paired += found.low <= 0.2 <= found.high
        mean = pool_mean({str(i): success_rate(int(random.binomial(40, rate)), 40) for i, rate in enumerate(rates)})
        pooled += mean.low <= rates.mean() <= mean.high
    assert 0.92 <= paired / 600 <= 0.98 and 0.92 <= pooled / 600 <= 0.99


def test_pooled_interval_agrees_with_a_stratified_bootstrap() -> None:
    random = np.random.default_rng(1)
    counts = {"a": (120, 300), "b": (210, 300), "c": (150, 300)}
    found = pool_mean({name: success_rate(*count) for name, count in counts.items()})
    draws = np.mean([random.binomial(n, k / n, 20_000) / n for k, n in counts.values()], axis=0)
    assert found.value == pytest.approx(160 / 300)
    assert (found.low, found.high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.003)
    assert pool_mean({"a": Estimate(0.5, 0.4, 0.7)}) == Estimate(0.5, pytest.approx(0.4), pytest.approx(0.7))


def shared_starts(random: np.random.Generator, seeds: int, starts: int, easier: float) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes [S, N] of base and tuned policies where a start is about as hard for every seed; `easier`: by how much for the tuned."""
    hard = random.beta(0.7, 0.7, starts)
    base = random.random((seeds, starts)) < hard
    tuned = random.random((seeds, starts)) < (1 - easier) * hard + easier
    return base, tuned


def bounds(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def test_one_seed_over_seeds_is_the_plain_interval() -> None:
    (base,), (tuned,) = shared_starts(np.random.default_rng(2), 1, 80, 0.4)
    assert bounds(rate_over_seeds(tuned[None])) == pytest.approx(bounds(success_rate(tuned.sum(), 80)), abs=1e-9)
    assert bounds(gain_over_seeds(base[None], tuned[None])) == pytest.approx(bounds(compare_paired(base, tuned).difference), abs=1e-9)


def test_seeds_that_repeat_each_other_add_nothing() -> None:
    base, tuned = shared_starts(np.random.default_rng(3), 1, 60, 0.4)
    repeated = gain_over_seeds(base.repeat(3, 0), tuned.repeat(3, 0)), rate_over_seeds(tuned.repeat(3, 0))
    plain = compare_paired(base[0], tuned[0]).difference, success_rate(tuned.sum(), 60)
    for found, expected in zip(repeated, plain, strict=True):
        assert bounds(found) == pytest.approx(bounds(expected), abs=1e-9)
    assert rate_over_seeds(np.ones((3, 50), bool)).low == pytest.approx(success_rate(50, 50).low)  # nothing to estimate: the safe side


def test_intervals_over_seeds_agree_with_a_bootstrap_over_starts() -> None:
    random = np.random.default_rng(4)
    base, tuned = shared_starts(random, 3, 200, 0.5)
    rows = random.integers(200, size=(10_000, 200))
    gains = (tuned.mean(0) - base.mean(0))[rows].mean(1)
    found = gain_over_seeds(base, tuned)
    assert found.value == pytest.approx(tuned.mean() - base.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(gains, [2.5, 97.5]), abs=0.008)
    rate = rate_over_seeds(base)
    assert (rate.low, rate.high) == pytest.approx(np.percentile(base.mean(0)[rows].mean(1), [2.5, 97.5]), abs=0.008)
    independent = success_rate(base.sum(), base.size)
    assert rate.high - rate.low > 1.2 * (independent.high - independent.low)  # what sharing the starts costs


def test_coverage_over_seeds_that_share_their_starts() -> None:
    random, trials, covered = np.random.default_rng(5), 400, np.zeros(3)
    for _ in range(trials):
        base, tuned = shared_starts(random, 3, 60, 0.4)
        found = rate_over_seeds(base), gain_over_seeds(base, tuned), success_rate(base.sum(), base.size)
        covered += [estimate.low <= truth <= estimate.high for estimate, truth in zip(found, (0.5, 0.2, 0.5), strict=True)]
    rates, gains, independent = covered / trials
    assert 0.92 <= rates <= 0.985 and 0.92 <= gains <= 0.985
    assert independent < rates - 0.02  # as if 180 starts had been tried


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 0)])
def test_outcomes_over_seeds_have_two_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected outcomes \[seeds, starts\]"):
        rate_over_seeds(np.zeros(shape, bool))


def test_percentiles() -> None:
    found = summarise(list(range(101)))
    assert (found.p50, found.p95, found.p99, found.largest, found.count) == (50, 95, 99, 100, 101)
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite measurements"):
            summarise(bad)
