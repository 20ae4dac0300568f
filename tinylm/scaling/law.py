"""Fit the scaling law L(N, D) = E + A / N^alpha + B / D^beta to the final losses of training runs, and predict other runs.

The law and its fit are approach 3 of Hoffmann et al. 2022: the Huber loss of the differences between log-losses, minimized from a
grid of starting points. D counts repeated tokens less than new ones (Muennighoff et al. 2023). Intervals come from a Bayesian
bootstrap over the runs.

Shapes: `R` runs, `P` fits that are computed at once. The parameters of a fit (P, 5) are the logarithms of E, a, alpha, b and beta,
where a and b are the values of the second and third term at the geometric means of N and D. In this form, they are less correlated
than with A and B.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tinylm.cost.plan import REPETITIONS_SCALE, effective_tokens

Array: TypeAlias = NDArray[np.float64]

PARAMETERS = ("E", "A", "alpha", "B", "beta")
MIN_RUNS, MIN_DISTINCT = 7, 3
"""The law has five parameters. With fewer than three sizes or three lengths, many combinations of them fit equally well."""
HUBER_DELTA = 0.01
"""Differences of log-losses above this value have a linear penalty. Hoffmann et al. use 0.001, which is below the noise of small
runs. In simulations of 16 runs with 0.3% noise, the root-mean-square error of the prediction for four times the compute was 0.8%
with 0.01 and 1.0% with 0.001."""
REPETITION_SCALES = (2.0, 4.0, 8.0, REPETITIONS_SCALE, 30.0)
"""The values of R* to choose from if the runs repeat the text often enough to distinguish them."""
MIN_REPEATED_RUNS, REPEATED_EPOCHS = 3, 2.0
"""Choose R* only if this many runs train for at least this many epochs."""
BOOTSTRAP_SAMPLES = 500
CONFIDENCE = 0.95

_STARTS = [
    (offset, share * (1 - offset), alpha, (1 - share) * (1 - offset), beta)
    for offset, share, alpha, beta in itertools.product((0.2, 0.5, 0.8), (0.3, 0.7), (0.2, 0.5), (0.2, 0.5))
]
"""Starting values of E, a, alpha, b and beta. E, a and b are fractions of the mean loss."""
_LOWEST = np.log([1e-3, 1e-4, 0.05, 1e-4, 0.05])
_HIGHEST = np.log([1.0, 2.0, 1.5, 2.0, 1.5])
_ITERATIONS, _RESAMPLED_ITERATIONS = 300, 60


@dataclass(frozen=True)
class Points:
    """The final losses of R training runs on the same text with `unique_tokens` tokens."""

    parameters: Array
    tokens: Array
    losses: Array
    unique_tokens: int

    @property
    def problem(self) -> str | None:
        """Why there are not enough runs to determine the law, or None if there are."""
        sizes, lengths = (len(set(values.tolist())) for values in (self.parameters, self.tokens))
        if len(self.losses) >= MIN_RUNS and min(sizes, lengths) >= MIN_DISTINCT:
            return None
        return (
            f"{len(self.losses)} usable runs with {sizes} model sizes and {lengths} training lengths do not determine a scaling "
            f"law, which needs {MIN_RUNS} runs with {MIN_DISTINCT} sizes and {MIN_DISTINCT} lengths"
        )

    @property
    def scales(self) -> tuple[float, ...]:
        """The values of R* to choose from: only the published one, unless enough runs repeat the text."""
        repeated = np.count_nonzero(self.tokens >= REPEATED_EPOCHS * self.unique_tokens)
        return REPETITION_SCALES if repeated >= MIN_REPEATED_RUNS else (REPETITIONS_SCALE,)


@dataclass(frozen=True)
class Laws:
    """One or more scaling laws for the same text. Each row of `values` (P, 5) is E, A, alpha, B and beta."""

    values: Array
    repetition_scales: Array
    unique_tokens: int

    def log_losses(self, parameters: Array, tokens: Array) -> Array:
        """Return the logarithms (P, R) of the losses that each law predicts for runs with these sizes and training lengths (R,)."""
        new_tokens = np.empty((len(self.values), len(tokens)))
        for scale in np.unique(self.repetition_scales):
            new_tokens[self.repetition_scales == scale] = _effective(tokens, self.unique_tokens, float(scale))
        offset, a, alpha, b, beta = (column[:, None] for column in self.values.T)
        return np.asarray(np.log(offset + a * parameters**-alpha + b * new_tokens**-beta), np.float64)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% confidence interval."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """A fitted law, and laws fitted to resampled runs."""

    points: Points
    best: Laws
    resampled: Laws
    seed: int

    @property
    def fits_repetitions(self) -> bool:
        """Whether R* was chosen from the runs. Otherwise, it is the published value."""
        return len(self.points.scales) > 1

    @property
    def repetition_scale(self) -> float:
        return float(self.best.repetition_scales[0])

    @cached_property
    def residuals(self) -> Array:
        """Log-loss minus fitted log-loss of each run (R,)."""
        fitted = self.best.log_losses(self.points.parameters, self.points.tokens)[0]
        return np.asarray(np.log(self.points.losses) - fitted, np.float64)

    @property
    def _inflation(self) -> float:
        """Corrects for the residuals being smaller than the noise, because the law was fitted to the same runs."""
        runs = len(self.points.losses)
        return float(np.sqrt(runs / (runs - len(PARAMETERS))))

    def parameter(self, name: str) -> Estimate:
        """Return one of `PARAMETERS` with its confidence interval."""
        column = PARAMETERS.index(name)
        best, resampled = np.log(self.best.values[0, column]), np.log(self.resampled.values[:, column])
        return _estimate(best, self._inflation * (resampled - best))

    def predict(self, parameters: float, tokens: float) -> Estimate:
        """Return the predicted loss of one run. The interval includes the uncertainty of the law and the noise of single runs."""
        run = np.array([parameters], float), np.array([tokens], float)
        best = self.best.log_losses(*run)[0, 0]
        noise = np.random.default_rng(self.seed).choice(self.residuals, BOOTSTRAP_SAMPLES)
        return _estimate(best, self._inflation * (self.resampled.log_losses(*run)[:, 0] - best + noise))

    def optimal_size(self, parameters: Array, tokens: Array) -> Estimate:
        """Return which of `parameters` (R,) has the lowest predicted loss if each is trained on its number of `tokens` (R,)."""
        best = np.log(parameters[self.best.log_losses(parameters, tokens)[0].argmin()])
        resampled = np.log(parameters[self.resampled.log_losses(parameters, tokens).argmin(1)])
        return _estimate(best, resampled - best)


def _estimate(log_value: float, deviations: Array) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.exp(log_value + np.quantile(deviations, (tail, 1 - tail)))
    return Estimate(float(np.exp(log_value)), (float(low), float(high)))


def _effective(tokens: Array, unique_tokens: int, scale: float) -> Array:
    return np.array([effective_tokens(round(count), unique_tokens, scale) for count in tokens.tolist()], float)


def fit(points: Points, *, seed: int = 0) -> Fit:
    """Fit a scaling law to the runs. Raises `ValueError` if they do not determine it.

    The bootstrap gives each run a random weight instead of drawing runs with replacement (Rubin 1981). Draws would often
    contain too few sizes or lengths to determine the law.
    """
    if points.problem is not None:
        raise ValueError(points.problem)
    runs, mean = len(points.losses), float(np.exp(np.log(points.losses).mean()))
    starts = np.log(_STARTS) + np.log([mean, mean, 1, mean, 1])
    weights = runs * np.random.default_rng(seed).dirichlet(np.ones(runs), BOOTSTRAP_SAMPLES)
    best, resampled = [], []
    for scale in points.scales:
        problem = _Problem.of(points, scale)
        logs, objectives = problem.minimize(starts, np.ones((len(starts), runs)), _ITERATIONS)
        lowest = logs[objectives.argmin()][None]
        best.append((problem, lowest, objectives.min()[None]))
        resampled.append((problem, *problem.minimize(np.repeat(lowest, BOOTSTRAP_SAMPLES, 0), weights, _RESAMPLED_ITERATIONS)))
    return Fit(points, _select(best, points), _select(resampled, points), seed)


@dataclass(frozen=True)
class _Problem:
    """The minimization for one value of R*. `log_sizes` and `log_lengths` (R,) are relative to their means."""

    scale: float
    log_sizes: Array
    log_lengths: Array
    log_losses: Array
    mean_size: float
    mean_length: float

    @classmethod
    def of(cls, points: Points, scale: float) -> _Problem:
        sizes, lengths = np.log(points.parameters), np.log(_effective(points.tokens, points.unique_tokens, scale))
        return cls(scale, sizes - sizes.mean(), lengths - lengths.mean(), np.log(points.losses), sizes.mean(), lengths.mean())

    def minimize(self, starts: Array, weights: Array, iterations: int) -> tuple[Array, Array]:
        """Return the parameters (P, 5) and the objectives (P,) that Levenberg-Marquardt reaches from each of the `starts` (P, 5).

        `weights` (P, R) multiply the Huber losses of the runs. Each iteration solves a weighted least-squares problem, with weights
        such that it has the same gradient as the Huber loss.
        """
        logs, damping = starts.copy(), np.full(len(starts), 1e-2)
        objectives = self._objectives(self._residuals(logs)[0], weights)
        for _ in range(iterations):
            residuals, jacobian = self._residuals(logs)
            robust = weights * np.minimum(1, HUBER_DELTA / np.maximum(np.abs(residuals), 1e-300))
            gradient = np.einsum("pri,pr->pi", jacobian, robust * residuals)
            curvature = np.einsum("pri,pr,prj->pij", jacobian, robust, jacobian)
            diagonal = np.einsum("pii->pi", curvature)
            damped = damping[:, None] * (diagonal + 1e-9 * diagonal.max(1, keepdims=True)) + 1e-15
            step = np.linalg.solve(curvature + damped[:, :, None] * np.eye(len(PARAMETERS)), gradient[:, :, None])[:, :, 0]
            moved = np.clip(logs - np.clip(step, -1, 1), *self._bounds)
            changed = self._objectives(self._residuals(moved)[0], weights)
            better = changed < objectives
            stalled = np.where(better, objectives - changed <= 1e-10 * objectives, damping > 1e6)
            logs[better], objectives[better] = moved[better], changed[better]
            damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e7)
            if stalled.all():
                break
        return logs, objectives

    @property
    def _bounds(self) -> tuple[Array, Array]:
        mean = np.exp(self.log_losses.mean())
        units = np.log([mean, mean, 1, mean, 1])
        return _LOWEST + units, _HIGHEST + units

    def _residuals(self, logs: Array) -> tuple[Array, Array]:
        """Return fitted log-loss minus log-loss (P, R), and its derivatives with respect to the parameters (P, R, 5)."""
        offset, a, alpha, b, beta = (column[:, None] for column in np.exp(logs).T)
        by_size, by_length = a * np.exp(-alpha * self.log_sizes), b * np.exp(-beta * self.log_lengths)
        loss = offset + by_size + by_length
        derivatives = (
            np.broadcast_to(offset, loss.shape),
            by_size,
            -by_size * self.log_sizes * alpha,
            by_length,
            -by_length * self.log_lengths * beta,
        )
        return np.log(loss) - self.log_losses, np.stack(derivatives, -1) / loss[:, :, None]

    @staticmethod
    def _objectives(residuals: Array, weights: Array) -> Array:
        size = np.abs(residuals)
        huber = np.where(size <= HUBER_DELTA, residuals**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
        return np.asarray((weights * huber).sum(1), np.float64)

    def values(self, logs: Array) -> Array:
        """Convert the parameters (P, 5) to E, A, alpha, B and beta."""
        values = np.exp(logs)
        values[:, 1] *= np.exp(values[:, 2] * self.mean_size)
        values[:, 3] *= np.exp(values[:, 4] * self.mean_length)
        return values


def _select(fits: Sequence[tuple[_Problem, Array, Array]], points: Points) -> Laws:
    """Return the fit with the lowest objective among the values of R*, for each of the P problems."""
    choice = np.stack([objectives for _, _, objectives in fits]).argmin(0)
    values = np.stack([problem.values(logs) for problem, logs, _ in fits])
    scales = np.array([problem.scale for problem, _, _ in fits])
    return Laws(values[choice, np.arange(len(choice))], scales[choice], points.unique_tokens)
