"""The fit of the scaling law recovers known constants, agrees with scipy's minimizer, and its intervals are reproducible."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from tinylm.scaling import law
from tinylm.scaling.law import HUBER_DELTA, PARAMETERS, Laws, Points, fit

CONSTANTS = {"E": 1.4, "A": 60.0, "alpha": 0.3, "B": 90.0, "beta": 0.26}
SIZES = [3e5 * 2.2**index for index in range(6)]
LENGTHS = [4e5 * 2.0**index for index in range(6)]
NO_REPETITION = 10**12


def loss(parameters: float, tokens: float) -> float:
    return CONSTANTS["E"] + CONSTANTS["A"] / parameters ** CONSTANTS["alpha"] + CONSTANTS["B"] / tokens ** CONSTANTS["beta"]


def points(
    noise: float = 0.0, *, sizes: Sequence[float] = SIZES[:4], lengths: Sequence[float] = LENGTHS[:4], unique: int = NO_REPETITION
) -> Points:
    """Return runs on a grid. `unique` must be at least the longest length, so that no text is repeated."""
    grid = [(size, length) for size in sizes for length in lengths]
    factors = np.exp(noise * np.random.default_rng(5).standard_normal(len(grid)))
    losses = np.array([loss(*run) for run in grid]) * factors
    return Points(*(np.array(column) for column in zip(*grid, strict=True)), losses, unique)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PARAMETERS)
def test_exact_losses_give_the_exact_constants(name: str) -> None:
    assert fit(points()).parameter(name).value == pytest.approx(CONSTANTS[name], rel=1e-6)


def test_noise_of_half_a_percent_changes_the_exponents_by_less_than_a_fifth_and_predictions_by_one_percent() -> None:
    fitted = fit(points(0.005, sizes=SIZES, lengths=LENGTHS))
    for name in ("alpha", "beta"):
        assert fitted.parameter(name).value == pytest.approx(CONSTANTS[name], rel=0.2)
        low, high = fitted.parameter(name).ci95
        assert low < CONSTANTS[name] < high
    predicted = fitted.predict(SIZES[-1], 4 * LENGTHS[-1])
    assert predicted.value == pytest.approx(loss(SIZES[-1], 4 * LENGTHS[-1]), rel=0.01)
    assert predicted.ci95[0] < loss(SIZES[-1], 4 * LENGTHS[-1]) < predicted.ci95[1]


def test_a_single_outlier_moves_the_prediction_less_than_least_squares_would() -> None:
    clean = points()
    losses = clean.losses.copy()
    losses[-1] *= 1.3
    fitted = fit(Points(clean.parameters, clean.tokens, losses, clean.unique_tokens))
    truth = loss(SIZES[3], 4 * LENGTHS[3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(law, "HUBER_DELTA", 1e9)
        squares = fit(Points(clean.parameters, clean.tokens, losses, clean.unique_tokens))
    errors = [abs(math.log(found.predict(SIZES[3], 4 * LENGTHS[3]).value / truth)) for found in (fitted, squares)]
    assert errors[0] < errors[1] / 3


def test_no_start_of_scipys_lbfgs_finds_a_lower_huber_loss() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    special = pytest.importorskip("scipy.special")
    runs = points(0.003)

    def objective(values: np.ndarray) -> float:  # the form of Hoffmann et al. 2022, equation 3
        a, b, e, alpha, beta = values
        terms = [a - alpha * np.log(runs.parameters), b - beta * np.log(runs.tokens), np.full(len(runs.losses), e)]
        residuals = special.logsumexp(terms, axis=0) - np.log(runs.losses)
        return float(special.huber(HUBER_DELTA, residuals).sum())

    values = fit(runs).best.values[0]
    ours = objective(np.array([*np.log(values[[1, 3, 0]]), values[2], values[4]]))
    starts = [(a, 5.0, e, 0.3, 0.3) for a in (2.0, 5.0) for e in (-0.5, 0.5)]
    theirs = min(optimize.minimize(objective, start, method="L-BFGS-B").fun for start in starts)
    assert ours <= theirs * (1 + 1e-6)


def test_repeated_tokens_count_as_the_published_formula_says() -> None:
    flat = Laws(np.array([[0.0, 1e-300, 1.0, 1.0, 1.0]]), np.array([4.0]), 1_000_000)  # the loss is 1 / D'
    # U = 1e6 and R = 2 repetitions: D' = 1e6 + 1e6 * 4 * (1 - exp(-2 / 4)) = 1e6 * (1 + 4 * 0.3934693) = 2,573,877
    [[log_loss]] = flat.log_losses(np.array([1e6]), np.array([3e6]))
    assert math.exp(-log_loss) == pytest.approx(2_573_877, abs=1)
    [[log_loss]] = flat.log_losses(np.array([1e6]), np.array([5e5]))
    assert math.exp(-log_loss) == pytest.approx(5e5), "less than one epoch repeats nothing"


def test_the_decay_of_repeated_text_is_fitted_only_if_runs_repeat_the_text() -> None:
    unique = int(LENGTHS[1])
    truth = Laws(np.array([list(CONSTANTS.values())]), np.array([4.0]), unique)
    grid = points()
    losses = np.exp(truth.log_losses(grid.parameters, grid.tokens)[0])
    repeated = fit(Points(grid.parameters, grid.tokens, losses, unique))
    assert repeated.fits_repetitions
    assert repeated.repetition_scale == 4.0
    assert repeated.parameter("beta").value == pytest.approx(CONSTANTS["beta"], rel=1e-4)
    assert not fit(points()).fits_repetitions
    assert fit(points()).repetition_scale == 15.39


def test_intervals_depend_only_on_the_seed() -> None:
    runs = points(0.005)
    first, again, other = (fit(runs, seed=seed).predict(1e6, 1e7) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.value == other.value


def test_the_optimal_size_matches_the_closed_form() -> None:
    compute = 1e14
    alpha, beta = CONSTANTS["alpha"], CONSTANTS["beta"]
    ratio = (alpha * CONSTANTS["A"] / (beta * CONSTANTS["B"])) ** (1 / (alpha + beta))  # Hoffmann et al. 2022, equation 4
    optimum = ratio * (compute / 6) ** (beta / (alpha + beta))
    sizes = np.geomspace(optimum / 30, optimum * 30, 2001)
    found = fit(points()).optimal_size(sizes, compute / (6 * sizes))
    assert found.value == pytest.approx(optimum, rel=0.01)


@pytest.mark.parametrize(("sizes", "lengths"), [(SIZES[:2], LENGTHS), (SIZES, LENGTHS[:2]), (SIZES[:1], LENGTHS[:1])])
def test_too_few_sizes_or_lengths_are_rejected(sizes: list[float], lengths: list[float]) -> None:
    with pytest.raises(ValueError, match="do not determine a scaling law"):
        fit(points(sizes=sizes, lengths=lengths))
