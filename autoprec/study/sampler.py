"""An Optuna sampler that knows what it searches: sums over units, whose best trade-offs can be computed.

Each unit's drop and time in each format is believed to be normal (`belief`); finished trials, whoever proposed them,
sharpen the belief; the exact front of what is believed (`front`) is where the next trial is looked for: the point that
is expected to add most to the hypervolume of log drop × time.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from autoprec.errors import StudyError
from autoprec.formats import Format
from autoprec.records import Estimate, Origin
from autoprec.study.belief import Posterior
from autoprec.study.chain import Border, Chain, ChainUnit, Choice, distinct
from autoprec.study.front import predicted_front
from autoprec.study.hypervolume import expected_gain, front_of
from autoprec.study.priors import Names, Prior, drop_belief, time_belief

__all__ = ["Believed", "FrontSampler"]

Array = npt.NDArray[np.float64]
Picks = npt.NDArray[np.int8]

#: trials that a belief is built from at most: the front's, and the latest
_MOST_TRIALS = 200
#: units up to which the front is looked at, with so many partial assignments kept for each state, and a second one of
#: a draw of the belief; of more units the hull, whose corners are then as many as trials
_FEW_UNITS, _STATES = 64, 48
#: assignments next to the fronts that are looked at where the fronts have nothing left
_NEIGHBOURS = 512
#: gains below this share of the hypervolume had are not worth a trial; learning is
_LITTLE = 1e-5
#: random assignments tried before a space counts as exhausted
_TRIES = 200


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """Trials as picks [N, units]: `measured` with log drop and time [M, 2], `failed`, and those under way."""

    measured: Picks
    values: Array
    failed: Picks
    running: Picks

    @property
    def keys(self) -> set[bytes]:
        """All assignments that need no further trial."""
        return {row.tobytes() for part in (self.measured, self.failed, self.running) for row in part}


@dataclass(frozen=True, slots=True)
class Believed:
    """What one unit in one format adds: a drop, and a time beside the unit in FP32, learnt from trials."""

    drop: Estimate
    time: Estimate

    def on_clock(self, factor: float) -> Believed:
        """Return it with the time in another unit."""
        return Believed(self.drop, self.time.scaled(factor))


class FrontSampler(BaseSampler):
    """Proposes formats of units for a study that minimises (drop, time).

    Args:
        units: the formats each unit may take, by name, in the order in which the units run; the study's parameters
            are categorical, named as the units.
        drop_prior: a `SensitivityProfile`, or for each unit and format a value or `Estimate` in the study's unit of
            drop; None: nothing is known.
        time_prior: likewise, in the study's unit of time, of one unit in a format (only differences count).
        border_ms: time where two neighbours differ, or per pair of neighbours a table by formats.
        log_drop: judge points by the logarithm of their drop, as their hypervolume is judged.
        drop_floor: drops below it count as it.
        corner: (drop, time) up to which points count; None: the worst values seen.
        seed: of what is drawn.
        barred: by unit, formats that are never proposed; trials that have them are learnt from.

    Parameters that are no units, and studies of other objectives, are sampled at random. Not promised: that drops add
    up, which the sampler takes for granted up to a noise that it learns.

    Raises:
        StudyError: a unit without formats or with all of them barred, a prior or bar of a unit or format that is not
            there, or a corner below the floor.
    """

    def __init__(
        self,
        units: Mapping[str, Sequence[str]],
        drop_prior: Prior = None,
        time_prior: Prior = None,
        border_ms: Border = 0.0,
        log_drop: bool = True,
        drop_floor: float = 1e-9,
        corner: tuple[float, float] | None = None,
        seed: int = 0,
        barred: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self._names = Names.of(units, barred or {})
        self._log, self._floor = log_drop, drop_floor
        if not drop_floor > 0:
            raise StudyError(f"drop_floor is {drop_floor}; it is a drop below which none matters, such as 1e-9")
        if corner is not None and not (corner[0] > drop_floor and corner[1] > 0):
            raise StudyError(f"corner {corner} holds no points: it is the largest drop and time that count")
        self._corner = corner
        self._drop = drop_belief(self._names, drop_prior, drop_floor)
        self._time_prior = time_prior
        time_belief(self._names, time_prior, 1.0)  # a slip in the prior is told now, not at the first trial
        self._border = border_ms
        flat = [ChainUnit(n, tuple(Choice(f, 0.0, 0.0) for f in fs)) for n, fs in self._names.formats.items()]
        self._casts = Chain(tuple(flat), border_ms)
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution([str(f) for f in formats]) for name, formats in self._names.formats.items()
        }
        #: what the last proposal was expected to add, as a share of the area up to the corner; None before the first
        self.gain: float | None = None
        self._random, self._generator = RandomSampler(seed=seed), np.random.default_rng(seed)
        #: finished trials do not change: their picks and values, by study and number
        self._known: dict[tuple[str, int], tuple[bytes, float, float] | None] = {}
        self._lock = threading.Lock()

    # what Optuna calls

    def reseed_rng(self) -> None:
        """Draw otherwise from here on, as Optuna asks of samplers copied to workers."""
        self._random.reseed_rng()
        self._generator = np.random.default_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the units' distributions, or none where the study does not minimise two objectives."""
        if study.directions != [optuna.study.StudyDirection.MINIMIZE] * 2:
            return {}
        fixed = trial.system_attrs.get("fixed_params", {})
        return {} if set(fixed) >= set(self._distributions) else dict(self._distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a format for each unit; of other parameters, values at random."""
        found = {
            name: self._random.sample_independent(study, trial, name, distribution)
            for name, distribution in search_space.items()
            if name not in self._distributions
        }
        if not set(search_space) >= set(self._distributions):
            return found
        with self._lock:
            picks = self._propose(self._look(study, trial.number))
        chosen = {n: fs[k].value for (n, fs), k in zip(self._names.formats.items(), picks, strict=True)}
        return found | chosen

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a value at random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def least_time(self, study: optuna.Study, drop: float) -> float:
        """Return a time that no assignment of at most this drop beats, as believed after the study's trials.

        Infinite where no assignment is believed to have so small a drop.
        """
        level, time = self._learn(self._look(study, -1))
        front = predicted_front(self._names.chain(level.mean, time.mean[1:]), border_ms=self._border)
        if not len(front):
            return math.inf
        # a chain counts times from each unit's least: what that leaves out is the same for all assignments
        first = self._names.of_chain(front.picks[:1])
        offset = float(self._predict(first, level, time)[0][0, 1]) - float(front.time_ms[0])
        return front.least_ms(drop) + offset

    def believed(self, study: optuna.Study) -> dict[str, dict[Format, Believed]]:
        """Return what is believed of each unit in each format after the study's trials, with 95 % intervals."""
        drop, time = self._learn(self._look(study, -1))
        found: dict[str, dict[Format, Believed]] = {n: {} for n in self._names.formats}
        level, doubt = drop.mean, np.sqrt(np.square(drop.root).sum(axis=1))
        taken, spread = time.mean[1:], np.sqrt(np.square(time.root[1:]).sum(axis=1))
        index = 0
        for (name, choice), costly in zip(self._names.parts, self._names.costly, strict=True):
            nothing = Estimate(0.0, 0.0, 0.0, Origin.MEASURED)
            found[name][choice] = Believed(nothing, nothing)
            if costly:
                low, high = (float(np.exp(level[index] + side * 1.96 * doubt[index])) for side in (-1, 1))
                around = 1.96 * float(spread[index])
                middle = float(taken[index])
                found[name][choice] = Believed(
                    Estimate(float(np.exp(level[index])), low, high, Origin.PREDICTED),
                    Estimate(middle, middle - around, middle + around, Origin.PREDICTED),
                )
                index += 1
        return found

    # what the study knows

    def _look(self, study: optuna.Study, own: int) -> _Seen:
        measured, values, failed, running = [], [], [], []
        foreign = 0
        for trial in study.get_trials(deepcopy=False):
            row = self._row(study.study_name, trial)
            if row is None:
                foreign += trial.state.is_finished()
            elif not trial.state.is_finished():
                if trial.number != own:
                    running.append(row[0])
            elif math.isnan(row[1]):
                failed.append(row[0])
            else:
                measured.append(row[0])
                values.append(row[1:])
        if foreign and not measured:
            warnings.warn(
                f"{foreign} trials of the study set other parameters than the units {', '.join(self._names.few())}, "
                "or formats that these do not take; nothing is learnt from them",
                stacklevel=2,
            )
        return _Seen(self._table(measured), np.array(values).reshape(-1, 2), self._table(failed), self._table(running))

    def _table(self, rows: Sequence[bytes]) -> Picks:
        table: Picks = np.frombuffer(b"".join(rows), dtype=np.int8).reshape(len(rows), len(self._names.formats))
        return table

    def _row(self, study: str, trial: FrozenTrial) -> tuple[bytes, float, float] | None:
        """Return a trial's picks and values, NaN where it failed; None where it is not one of these units."""
        key = (study, trial.number)
        if key in self._known:
            return self._known[key]
        params = trial.params if trial.params else trial.system_attrs.get("fixed_params", {})
        picks = self._names.picks(params)
        row = None
        if picks is not None:
            drop, time = trial.values if trial.state is TrialState.COMPLETE and trial.values else (math.nan, math.nan)
            good = math.isfinite(drop) and math.isfinite(time)
            level = max(drop, self._floor)
            row = (picks, math.log(level) if good else math.nan, time)
        if trial.state.is_finished():
            self._known[key] = row
        return row

    # what comes next

    def _propose(self, seen: _Seen) -> Sequence[int]:
        """Return the picks of the most promising assignment not seen yet."""
        drop, time = self._learn(seen)
        fronts = self._fronts(drop, time)
        candidates = self._unseen(fronts, seen)
        gain = self._gains(candidates, seen, drop, time)
        if not len(candidates) or gain.max() <= _LITTLE:
            near = self._unseen(self._neighbours(fronts, seen), seen)
            more = self._gains(near, seen, drop, time)
            candidates, gain = np.concatenate([candidates, near]), np.concatenate([gain, more])
        if not len(candidates):
            self.gain = 0.0
            return self._anything(seen, drop, time)
        self.gain = float(gain.max())
        if self.gain <= _LITTLE:  # nothing left to gain, as far as is believed: see what is least certain
            gain = self._doubt(candidates, drop, time)
        best: list[int] = candidates[int(np.argmax(gain * self._chance(candidates, seen)))].tolist()
        return best

    def _learn(self, seen: _Seen) -> tuple[Posterior, Posterior]:
        chosen = self._telling(seen)
        rows, values = self._names.hot(seen.measured[chosen]), seen.values[chosen]
        casts = self._casts.cost(seen.measured[chosen].astype(np.intp))[1]
        scale = float(np.median(seen.values[:, 1])) if len(seen.values) else 1.0
        time = time_belief(self._names, self._time_prior, scale)
        constant = np.ones((len(rows), 1))
        return (
            self._drop.given(rows[:, self._names.costly], values[:, 0]),
            time.given(np.concatenate([constant, rows[:, self._names.costly]], axis=1), values[:, 1] - casts),
        )

    def _telling(self, seen: _Seen) -> npt.NDArray[np.intp]:
        """Return the indices of the trials to learn from: where there are many, some of the front's and the latest."""
        every = np.arange(len(seen.measured))
        if len(every) <= _MOST_TRIALS:
            return every
        best = every[np.isin(seen.values[:, 0], front_of(seen.values)[:, 0])]
        spaced = np.linspace(0, len(best) - 1, min(len(best), _MOST_TRIALS // 2)).astype(np.intp)
        return np.unique(np.concatenate([best[np.argsort(seen.values[best, 0])][spaced], every[-_MOST_TRIALS // 2 :]]))

    def _predict(self, picks: Picks, drop: Posterior, time: Posterior) -> tuple[Array, Array]:
        """Return mean and standard deviation [N, 2] of log drop (or drop) and time."""
        rows = self._names.hot(picks)[:, self._names.costly]
        level, doubt = drop.predict(rows, noisy=True)
        if not self._log:
            level = np.exp(level)
            doubt = level * doubt
        steps, spread = time.predict(np.concatenate([np.ones((len(rows), 1)), rows], axis=1))
        casts = self._casts.cost(picks.astype(np.intp))[1] if len(picks) else np.zeros(0)
        return np.stack([level, steps + casts], axis=1), np.stack([doubt, spread], axis=1)

    def _fronts(self, drop: Posterior, time: Posterior) -> Picks:
        """Return the points of the front of what is believed, and of one draw of it."""
        draws, states = [(drop.mean, time.mean[1:])], 0
        if len(self._names.formats) <= _FEW_UNITS:
            draws.append((drop.draw(self._generator), time.draw(self._generator)[1:]))
            states = _STATES
        found = [
            predicted_front(self._names.chain(*draw), border_ms=self._border, max_states=states).picks for draw in draws
        ]
        return self._names.of_chain(distinct(np.concatenate(found)))

    def _gains(self, candidates: Picks, seen: _Seen, drop: Posterior, time: Posterior) -> Array:
        """Return the expected gains of hypervolume as shares of what the corner allows."""
        if not len(candidates):
            return np.zeros(0)
        mean, deviation = self._predict(candidates, drop, time)
        points = seen.values.copy() if self._log else np.stack([np.exp(seen.values[:, 0]), seen.values[:, 1]], axis=1)
        waiting, _ = self._predict(seen.running, drop, time)  # taken for what they are believed to give
        points = np.concatenate([points, waiting])
        corner, least = self._bounds(points, mean)
        area = float(np.prod(corner - least))
        return expected_gain(mean, deviation, points, corner) / max(area, 1e-300)

    def _bounds(self, points: Array, mean: Array) -> tuple[Array, Array]:
        every = np.concatenate([points, mean])
        if self._corner is None:
            corner = every.max(axis=0)
        else:
            level = self._corner[0]
            corner = np.array([math.log(level) if self._log else level, self._corner[1]])
        return corner, np.minimum(every.min(axis=0), corner - 1e-12)

    def _doubt(self, candidates: Picks, drop: Posterior, time: Posterior) -> Array:
        """Return how uncertain candidates are, each axis in units of what is usual."""
        _, deviation = self._predict(candidates, drop, time)
        doubt: Array = (deviation / np.maximum(np.median(deviation, axis=0), 1e-300)).sum(axis=1)
        return doubt

    def _chance(self, candidates: Picks, seen: _Seen) -> Array:
        """Return the chance that a candidate does not fail: what only failed trials had is suspected in equal parts."""
        chance: Array = np.ones(len(candidates))
        if not len(seen.failed):
            return chance
        good = self._names.hot(seen.measured).any(axis=0)
        rows = self._names.hot(candidates)
        for row in self._names.hot(seen.failed):
            suspects = np.flatnonzero((row > 0) & ~good)
            if len(suspects):
                chance *= (1 - 1 / len(suspects)) ** rows[:, suspects].sum(axis=1) + 1e-9
        return chance

    def _neighbours(self, fronts: Picks, seen: _Seen) -> Picks:
        """Return what differs in one unit from points of the fronts, believed and measured; a sample where many."""
        base = fronts
        if len(seen.values):
            best = front_of(seen.values)
            on = (seen.values[:, None] == best[None]).all(axis=2).any(axis=1)
            base = np.concatenate([base, self._allowed(seen.measured[on])])
        pairs = [(i, k) for i, free in enumerate(self._names.free.values()) for k in free]
        every = len(base) * len(pairs)
        chosen = self._generator.choice(every, min(every, _NEIGHBOURS), replace=False)
        found = base[chosen // len(pairs)].copy()
        unit, pick = np.array(pairs)[chosen % len(pairs)].T
        found[np.arange(len(found)), unit] = pick
        return distinct(found)

    def _unseen(self, picks: Picks, seen: _Seen) -> Picks:
        keys = seen.keys
        left: Picks = picks[np.array([row.tobytes() not in keys for row in picks], dtype=bool)]
        return left

    def _anything(self, seen: _Seen, drop: Posterior, time: Posterior) -> Sequence[int]:
        """Return an assignment not seen, at random; where the space is exhausted, the least certain of the measured."""
        keys = seen.keys
        for picks in self._random_picks():
            if picks.tobytes() not in keys:
                random: list[int] = picks.tolist()
                return random
        again = self._allowed(seen.measured)
        if not len(again):
            first: list[int] = next(self._random_picks()).tolist()
            return first
        least_known: list[int] = again[int(np.argmax(self._doubt(again, drop, time)))].tolist()
        return least_known

    def _allowed(self, picks: Picks) -> Picks:
        """Return the picks that have nothing barred."""
        good = np.ones(len(picks), dtype=bool)
        for column, free in zip(picks.T, self._names.free.values(), strict=True):
            good &= np.isin(column, free)
        left: Picks = picks[good]
        return left

    def _random_picks(self) -> Iterator[Picks]:
        sizes = [len(free) for free in self._names.free.values()]
        if math.prod(sizes) <= _TRIES:
            yield from self._names.of_chain(np.array(list(np.ndindex(*sizes)), dtype=np.int8))
        else:
            for _ in range(_TRIES):
                yield self._names.of_chain(self._generator.integers(sizes).astype(np.int8)[None])[0]
