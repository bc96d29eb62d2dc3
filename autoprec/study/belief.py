"""Gaussian beliefs about what each unit's format adds to a plan's drop and time, learnt from sums of them.

A finished trial tells one sum over units. For times the sum is linear. Drops span orders of magnitude, so what is
believed is the logarithm φ of each unit's drop: a trial then tells log Σ exp φ, to which a Gauss-Newton step fits a
Gaussian (an iterated extended Kalman update). Nothing turns negative, and an error of a prior is a factor.

How far priors are to be trusted is itself learnt: their spread may be widened, and the noise of a sum chosen, by what
makes the trials seen most likely (type-II maximum likelihood on a small grid).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import linalg

__all__ = ["Belief", "Posterior"]

Array = npt.NDArray[np.float64]

#: Gauss-Newton steps, and the change of a logarithm at which one is cut short
_STEPS, _LONGEST = 12, 2.0
#: the latest sums, by which widths and noises are chosen
_MOST_FOR_CHOICE = 48
#: a change below which the steps have come to rest
_AT_REST = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """What is believed after some trials: `mean` [P], and a root of the covariance [P, K] (covariance = root rootᵀ)."""

    mean: Array
    root: Array
    noise: float
    floor: float | None

    def predict(self, rows: Array, *, noisy: bool = False) -> tuple[Array, Array]:
        """Return mean and standard deviation of the sums that rows [N, P] of 0 and 1 choose, in the link's scale.

        `noisy` adds what a sum has beside its parts.
        """
        value, slope = _link(rows, self.mean, self.floor)
        variance = np.square(slope @ self.root).sum(axis=1)
        return value, np.sqrt(variance + (self.noise**2 if noisy else 0.0))

    def draw(self, generator: np.random.Generator) -> Array:
        """Return one draw [P] of what each part may be."""
        return self.mean + self.root @ generator.standard_normal(self.root.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Belief:
    """A prior: `mean` [P], own standard deviations `spread` [P], and errors that parts share, `shared` [P, S].

    `floor` None: sums are linear. Else parts are logarithms, and a sum is log(floor + Σ exp). `widths` are factors of
    `spread` and `noises` standard deviations of a sum to choose from.
    """

    mean: Array
    spread: Array
    shared: Array
    floor: float | None
    widths: Sequence[float]
    noises: Sequence[float]

    def given(self, rows: Array, sums: Array) -> Posterior:
        """Return the belief after sums [N] over what rows [N, P] of 0 and 1 choose."""
        if rows.size == 0:  # no sums, or no parts: a space without a choice
            root = np.concatenate([np.diag(self.spread), self.shared], axis=1)
            return Posterior(self.mean, root, self.noises[-1], self.floor)
        few = slice(-_MOST_FOR_CHOICE, None)
        options = itertools.product(self.widths, self.noises)
        width, noise = max(
            options, key=lambda option: _evidence(*self._fit(rows[few], sums[few], *option)[1:], option[1])
        )
        z, features, _ = self._fit(rows, sums, width, noise)
        axes, shrink = _seen(features, noise)
        root = np.concatenate([np.diag(width * self.spread), self.shared], axis=1)
        root -= (self._rooted(axes, width) * (1 - shrink)) @ axes.T
        return Posterior(self.mean + self._rooted(z, width), root, noise, self.floor)

    def _rooted(self, z: Array, width: float) -> Array:
        """Return root @ z, of a root whose first part is diagonal."""
        own, shared = z[: len(self.spread)], z[len(self.spread) :]
        return (own.T * (width * self.spread)).T + self.shared @ shared

    def _fit(self, rows: Array, sums: Array, width: float, noise: float) -> tuple[Array, Array, Array]:
        """Return z, of which parts are mean + root z, and the linearised problem there: features z = target."""
        z = np.zeros(len(self.spread) + self.shared.shape[1])
        longest = np.inf if self.floor is None else _LONGEST
        for _ in range(_STEPS):
            value, slope = _link(rows, self.mean + self._rooted(z, width), self.floor)
            features = np.concatenate([slope * (width * self.spread), slope @ self.shared], axis=1)
            target = sums - value + features @ z
            step = _ridge(features, target, noise) - z
            z = z + step / max(1.0, float(np.abs(self._rooted(step, width)).max()) / longest)
            if self.floor is None or float(np.abs(step).max()) < _AT_REST:
                break
        return z, features, target


def _link(rows: Array, parts: Array, floor: float | None) -> tuple[Array, Array]:
    """Return the sums of rows, and their slopes in the parts [N, P]."""
    if floor is None:
        return rows @ parts, rows
    sizes = np.exp(parts)
    total = rows @ sizes + floor
    return np.log(total), rows * sizes / total[:, None]


def _ridge(features: Array, target: Array, noise: float) -> Array:
    """Return the mean of z ~ N(0, I) given target = features z + noise, in the smaller of both spaces."""
    count, width = features.shape
    if count <= width:
        gram = features @ features.T + noise**2 * np.eye(count)
        found: Array = features.T @ linalg.solve(gram, target, assume_a="pos")
    else:
        gram = features.T @ features + noise**2 * np.eye(width)
        found = linalg.solve(gram, features.T @ target, assume_a="pos")
    return found


def _seen(features: Array, noise: float) -> tuple[Array, Array]:
    """Return the directions of z [K, D] that features tell of, and to what share each one's deviation falls."""
    squares, left = linalg.eigh(features @ features.T)
    seen = squares > 1e-10 * squares[-1]  # at most as many as there are sums
    squares, axes = squares[seen], (features.T @ left[:, seen]) / np.sqrt(squares[seen])
    return axes, noise / np.sqrt(squares + noise**2)


def _evidence(features: Array, target: Array, noise: float) -> float:
    """Return the log likelihood of target ~ N(0, features featuresᵀ + noise²), up to a constant."""
    root = linalg.cholesky(features @ features.T + noise**2 * np.eye(len(target)), lower=True)
    scaled = linalg.solve_triangular(root, target, lower=True)
    return -float(np.log(np.diag(root)).sum()) - 0.5 * float(scaled @ scaled)
