"""From the effects of many passes to a drop with an interval.

Two second-order estimators come out of every pass. The sum over positions of a² has little variance and is exact where
errors at different positions have nothing to do with each other. The square of the sum over a whole example is exact
whatever they have, and has a variance of twice its squared mean an example and draw. Their ratio ρ says how much the
errors of a unit go together. It is noisy for one unit and alike for units of one role, so each unit's log ρ is drawn
towards the mean of its role, by as much as its own noise asks for (empirical Bayes), and the estimate is
squares × ρ.

The interval holds the sampling of examples and directions, what is left open about ρ, and the error of the second order
itself, which direct measurements of some units tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Prediction", "Scores", "model_error", "predict"]

Array = npt.NDArray[np.float64]

#: standard deviation of log ρ between roles, and the least between units of a role (SmolLM2: 0.2, and 0.06 to 0.14)
_ROLE_SPREAD, _UNIT_SPREAD = 0.2, 0.1
#: prior standard deviation of log(true / estimate) that no sampling explains, and the units it is worth (SmolLM2: 0.1)
_MODEL_ERROR, _MODEL_WEIGHT = 0.12, 6
#: relative standard error where one example tells nothing of others; between windows of 128 tokens of SmolLM2 drops of
#: a unit spread by 0.20 (median over units and formats; a tenth of them by more than 0.44)
_ONE_EXAMPLE = 0.3
#: variance of log ρ where nothing is drawn
_LEAST_NOISE = 1e-4
#: spreads of log ρ that are weighed against each other
_GRID = np.geomspace(_UNIT_SPREAD, 2.0, 25)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One unit in one format: effects [examples] summed over draws, each already a drop times its weight.

    `weights` [examples] are counted positions (or squared values) times draws, `fourths` the sum of squared squares.
    """

    role: str
    squares: Array
    wholes: Array
    fourths: float
    weights: Array
    draws: float
    #: relative variance of an example's whole square in one draw: 2, or 0 where nothing is drawn
    spread: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """An estimate of a drop, its relative standard error by sampling, and that of ρ; `freedom` of the t interval."""

    value: float
    sampling: float
    ratio: float
    freedom: int

    def interval(self, model: float, extra: float = 0.0) -> tuple[float, float]:
        """Return the 95 % interval, given the relative errors of the second order and of interaction."""
        error = math.sqrt(self.sampling**2 + self.ratio**2 + model**2 + extra**2)
        reach = math.exp(float(stats.t.ppf(0.975, self.freedom)) * error)
        return self.value / reach, self.value * reach


def predict(scores: Mapping[str, Scores]) -> dict[str, Prediction]:
    """Return the prediction for each unit of one format; units of one role learn ρ from each other."""
    found: dict[str, Prediction] = {}
    roles: dict[str, list[str]] = {}
    for unit, score in scores.items():
        roles.setdefault(score.role if score.squares.sum() > 0 else "", []).append(unit)
    for role, units in roles.items():
        if not role:  # exactly representable: no effect at all
            found |= {unit: Prediction(0.0, 0.0, 0.0, 1) for unit in units}
            continue
        logs, noise = np.array([_log_ratio(scores[unit]) for unit in units]).T
        shrunk, left = _shrink(logs, noise)
        for unit, log_ratio, error in zip(units, shrunk.tolist(), left.tolist(), strict=True):
            score = scores[unit]
            mean = float(score.squares.sum() / score.weights.sum())
            freedom = max(2, int((score.weights > 0).sum()) - 1)
            found[unit] = Prediction(mean * math.exp(log_ratio), _sampling_error(score), error, freedom)
    return {unit: found[unit] for unit in scores}


def _sampling_error(score: Scores) -> float:
    """Return the relative standard error of the mean over examples, and over directions where examples are few.

    Where nothing is drawn, wholes are what the estimate rests on.
    """
    effects = score.squares if score.spread > 0 else score.wholes
    total = float(effects.sum())
    used = score.weights > 0
    count = int(used.sum())
    drawing = math.sqrt(score.fourths) / float(score.squares.sum()) if score.spread > 0 else 0.0
    if count < 2 or total <= 0:
        return max(drawing, _ONE_EXAMPLE)
    residual = effects - total / score.weights.sum() * score.weights
    return max(drawing, math.sqrt(count / (count - 1) * float((residual**2).sum())) / total)


def _log_ratio(score: Scores) -> tuple[float, float]:
    """Return log(Σ wholes / Σ squares), corrected for the bias of a logarithm, and the variance that drawing gives it.

    How the ratio varies from example to example is no noise: what is asked for is the mean over them.
    """
    squares, wholes = float(score.squares.sum()), float(score.wholes.sum())
    # the effective number of examples: one may carry all
    effective = squares**2 / max(float((score.squares**2).sum()), 1e-300)
    variance = score.spread / max(effective * score.draws, 1.0) + _LEAST_NOISE
    if wholes <= 0:
        return 0.0, max(variance, 4.0)
    return math.log(wholes / squares) + min(variance, 2.0) / 2, variance


def _shrink(logs: Array, noise: Array) -> tuple[Array, Array]:
    """Return each log ρ drawn towards the role's mean, and its standard error (normal-normal empirical Bayes).

    The spread between units is averaged over a grid by its marginal likelihood: with few units or much noise nothing
    much is known of it, and a point estimate would be nought or far too large.
    """
    means, errors, weights = [], [], []
    for spread in _GRID:
        total = noise + spread**2
        precision = (1 / total).sum() + 1 / _ROLE_SPREAD**2
        centre = (logs / total).sum() / precision
        pull = spread**2 / total
        value = centre + pull * (logs - centre)
        error = pull * noise + (1 - pull) ** 2 / precision
        # the role's mean has the prior N(0, _ROLE_SPREAD²); that of the spread falls as 1 / (1 + (spread / least)²)
        fit = -0.5 * (np.log(total).sum() + math.log(precision) + (logs**2 / total).sum() - centre**2 * precision)
        means.append(value)
        errors.append(error)
        weights.append(fit - math.log1p((spread / _UNIT_SPREAD) ** 2))
    scale = np.exp(np.array(weights) - max(weights))
    scale /= scale.sum()
    mean = scale @ np.array(means)
    variance = scale @ (np.array(errors) + (np.array(means) - mean) ** 2)
    return mean, np.sqrt(variance)


def model_error(residuals: Sequence[tuple[float, float]]) -> float:
    """Return the standard deviation of log(true / estimate) beyond its known variance, from (residual, variance).

    Units measured directly are those of which most was doubted, so they say how far the rest can be off, not to which
    side.
    """
    excess = sum(max(r * r - v, 0.0) for r, v in residuals)
    return math.sqrt((_MODEL_WEIGHT * _MODEL_ERROR**2 + excess) / (_MODEL_WEIGHT + len(residuals)))
