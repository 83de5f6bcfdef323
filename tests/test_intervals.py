"""95 % intervals hold in 90 to 99 % of draws, of means, ratios, Fréchet distances and rates, or what they are."""

import math

import numpy as np
import pytest

from scores.compare import quick_frechet
from scores.detail import ratio_of_sums
from scores.intervals import bootstrap_rows, of_halves, wilson

DRAWS = 200


def distance_of(roots, means):
    """The Fréchet distance of two Gaussians, covariance root root'."""
    shared = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    return np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * shared


def gaussians(kind: str, d: int):
    """Roots of the covariances and means of two Gaussians in d dimensions, variances from 1 to 1/1000."""
    root, turn = np.diag(np.geomspace(1, 0.03, d)), np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    second = {"far": 1.3 * turn @ root @ turn.T, "near": 1.1 * root, "same": root}[kind]
    return (root, second), (np.zeros(d), np.full(d, {"far": 0.3, "near": 0.02, "same": 0}[kind]))


def draws_of(kind: str, d: int, n: int, m: int, draws: int = DRAWS):
    """FID, FID without bias and reach of each draw, and the known distance."""
    roots, means = gaussians(kind, d)
    rng, rows = np.random.default_rng(1), []
    for _ in range(draws):
        x, y = (rng.normal(size=(k, d)) @ root.T + mean for k, root, mean in zip((n, m), roots, means, strict=True))
        whole = quick_frechet(x, y)
        rows.append((whole, *of_halves(quick_frechet, [x, y], whole)))
    return *np.array(rows).T, distance_of(roots, means)


@pytest.mark.parametrize("kind, d, n, m, most", [("far", 8, 100, 100, 0.99), ("near", 16, 100, 150, 0.99),
                                                 ("same", 8, 40, 40, 1.00)])  # of equal sets too wide
def test_frechet_intervals_hold_the_known_distance_and_what_other_draws_give(kind, d, n, m, most):
    whole, unbiased, reach, known = draws_of(kind, d, n, m)
    assert 0.90 <= (np.abs(unbiased - known) < reach).mean() <= most
    assert 0.90 <= (np.abs(whole - whole.mean()) < reach).mean() <= most
    assert abs(unbiased.mean() - known) < abs(whole.mean() - known) / 5  # most of the bias is gone


def test_with_fewer_pictures_than_dimensions_the_interval_is_of_other_draws_and_the_bias_stays():
    whole, unbiased, reach, known = draws_of("far", 128, 40, 60, draws=50)
    assert 0.84 <= (np.abs(whole - whole.mean()) < reach).mean()
    assert (np.abs(unbiased - known) < reach).mean() < 0.5 and known < unbiased.mean() < whole.mean()


def test_percentiles_of_samples_with_replacement_would_not_hold_the_distance():
    """Why halves are taken: repeated pictures move sets apart."""
    roots, means = gaussians("near", 16)
    rng, held = np.random.default_rng(2), 0
    for _ in range(20):
        x, y = (rng.normal(size=(100, 16)) @ root.T + mean for root, mean in zip(roots, means, strict=True))
        low, _ = bootstrap_rows(lambda both: quick_frechet(both[:, :16], both[:, 16:]), np.hstack([x, y]), draws=50)
        held += low < distance_of(roots, means)
    assert held < 3


def test_patches_of_a_picture_stay_together():
    """Patches that repeat their picture add nothing: the interval is that of the pictures."""
    roots, means = gaussians("far", 4)
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(40, 4)) @ root.T + mean for root, mean in zip(roots, means, strict=True))

    def of_sets(a, b):
        return quick_frechet(a.reshape(-1, 4), b.reshape(-1, 4))
    once = of_halves(quick_frechet, [x, y], quick_frechet(x, y))
    sets = [np.repeat(side[:, None], 9, axis=1) for side in (x, y)]
    repeated = of_halves(of_sets, sets, of_sets(*sets))
    assert repeated.reach == pytest.approx(once.reach, rel=0.1)


@pytest.mark.parametrize("of_set, columns", [(np.mean, 1), (np.median, 1), (ratio_of_sums, 2)])
def test_bootstrap_intervals_of_means_medians_and_ratios_hold(of_set, columns):
    rng, held = np.random.default_rng(4), 0
    known = {np.mean: math.exp(0.125), np.median: 1.0, ratio_of_sums: 1.0}[of_set]
    for _ in range(DRAWS):
        rows = np.exp(rng.normal(0, 0.5, (60, columns)))
        low, high = bootstrap_rows(of_set, rows[:, 0] if columns == 1 else rows, draws=300)
        held += low < known < high
    assert 0.90 <= held / DRAWS <= 0.99
    assert math.isnan(bootstrap_rows(np.mean, [1.0])[0])


@pytest.mark.parametrize("rate, trials", [(0.5, 20), (0.9, 30), (0.98, 112)])
def test_intervals_of_win_rates_hold(rate, trials):
    wins = np.random.default_rng(5).binomial(trials, rate, 1000)
    held = np.mean([low <= rate <= high for low, high in (wilson(int(k), trials) for k in wins)])
    assert 0.90 <= held <= 0.995


def test_wilson_by_hand():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and math.isnan(wilson(0, 0)[0])


def test_a_set_beside_itself_has_no_interval_and_no_bias():
    x = np.random.default_rng(6).normal(size=(8, 3))
    halves = of_halves(lambda both: quick_frechet(both[:, 0], both[:, 1]), [np.stack([x, x], axis=1)], 0.0)
    assert halves == pytest.approx((0, 0), abs=1e-6)
