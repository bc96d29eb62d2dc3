"""FrontSampler: Optuna's own contract, and what it promises about the plans it proposes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState

from autoprec import FrontSampler
from autoprec.errors import StudyError
from autoprec.records import Estimate, Origin
from autoprec.study.hypervolume import expected_gain, front_of, hypervolume

FORMATS = ["fp32", "bf16", "fp8"]
UNITS = {f"unit {i}": FORMATS for i in range(5)}
DISTRIBUTIONS = {name: CategoricalDistribution(FORMATS) for name in UNITS}
SIZES = dict(zip(UNITS, (1e-6, 3e-5, 1e-4, 2e-6, 5e-5), strict=True))
DROPS = {name: {"bf16": size, "fp8": 40 * size} for name, size in SIZES.items()}
TIMES = {name: {"fp32": 4.0, "bf16": 2.0, "fp8": 1.2} for name in UNITS}


class TestContract(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's own tests of samplers."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: FrontSampler({"a": ["fp32", "bf16"], "b": ["bf16", "fp8"]})


def values(params: Mapping[str, str]) -> tuple[float, float]:
    drop = sum(DROPS[name].get(choice, 0.0) for name, choice in params.items())
    return drop, 3.0 + sum(TIMES[name][choice] for name, choice in params.items())


def study_of(sampler: FrontSampler, **options: object) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler, **options)  # type: ignore[arg-type]


def go(study: optuna.Study, count: int) -> None:
    for _ in range(count):
        trial = study.ask(dict(DISTRIBUTIONS))
        study.tell(trial, values(trial.params))


def share(study: optuna.Study) -> float:
    """Return the share of the whole space's hypervolume that the study's trials have."""
    every = [dict(zip(UNITS, row, strict=True)) for row in itertools.product(FORMATS, repeat=len(UNITS))]

    def volume(points: Sequence[Sequence[float]]) -> float:
        logs = np.array([(math.log(max(d, 1e-9)), t) for d, t in points])
        return hypervolume(logs, np.array([math.log(0.02), 24.0]))

    done = [tuple(t.values) for t in study.get_trials(states=[TrialState.COMPLETE])]
    return volume(done) / volume([values(row) for row in every])


def test_fifteen_evaluations_find_the_front_whatever_the_prior_lacks() -> None:
    off = {n: {f: v * k for f, v in DROPS[n].items()} for n, k in zip(UNITS, (8, 0.2, 1, 5, 0.1), strict=True)}
    for prior in (DROPS, off):
        study = study_of(FrontSampler(UNITS, prior, TIMES, corner=(0.02, 24.0)))
        go(study, 15)
        assert share(study) > 0.95


def test_no_assignment_is_proposed_twice_until_all_are_seen() -> None:
    units = {"a": FORMATS, "b": ["fp32", "bf16"]}
    study = study_of(FrontSampler(units))
    distributions = {name: CategoricalDistribution(formats) for name, formats in units.items()}
    found = []
    for number in range(8):
        trial = study.ask(dict(distributions))
        found.append(tuple(trial.params.values()))
        study.tell(trial, (1e-4 * number, 10.0 - number))
    assert len(set(found[:6])) == 6
    assert set(found[6:]) <= set(found[:6])


def test_workers_do_not_propose_the_same() -> None:
    study = study_of(FrontSampler(UNITS, DROPS, TIMES))
    under_way = [tuple(study.ask(dict(DISTRIBUTIONS)).params.values()) for _ in range(12)]
    assert len(set(under_way)) == 12


def test_trials_of_other_samplers_and_processes_are_learnt_from() -> None:
    storage = optuna.storages.InMemoryStorage()
    first = study_of(optuna.samplers.RandomSampler(seed=1), storage=storage, study_name="s")  # type: ignore[arg-type]
    go(first, 40)
    second = optuna.load_study(study_name="s", storage=storage, sampler=FrontSampler(UNITS, corner=(0.02, 24.0)))
    before = share(second)
    go(second, 15)
    assert share(second) > max(before, 0.95)
    assert (
        len(
            {tuple(t.params.items()) for t in second.trials[40:]} & {tuple(t.params.items()) for t in first.trials[:40]}
        )
        == 0
    )


def test_what_only_failed_trials_had_is_avoided() -> None:
    study = study_of(FrontSampler(UNITS, DROPS, TIMES, corner=(0.02, 24.0)))
    failures = 0
    for _ in range(20):
        trial = study.ask(dict(DISTRIBUTIONS))
        if trial.params["unit 2"] == "fp8":
            failures += 1
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, values(trial.params))
    assert 1 <= failures <= 6


def test_what_is_barred_is_never_proposed_and_learnt_from() -> None:
    barred = {"unit 0": ["bf16"], "unit 1": ["fp8", "fp32"], "unit 4": {"fp8"}}
    left = 2 * 3 * 3 * 2  # unit 1 has one format
    study = study_of(FrontSampler(UNITS, DROPS, TIMES, seed=1, barred=barred))
    low = dict.fromkeys(UNITS, "fp8")
    known = optuna.trial.create_trial(params=low, distributions=dict(DISTRIBUTIONS), values=list(values(low)))
    study.add_trial(known)
    go(study, left)
    asked = [trial.params for trial in study.trials[1:]]
    assert all(row[name] not in formats for row in asked for name, formats in barred.items())
    assert len({tuple(row.items()) for row in asked}) == left
    go(study, 2)  # the space is exhausted: what may be proposed is proposed again
    assert all(
        row.params[name] not in formats for row in study.trials for name, formats in barred.items() if row.number
    )
    sampler = study.sampler
    assert isinstance(sampler, FrontSampler)
    cheapest = values({n: min(set(FORMATS) - set(barred.get(n, ())), key=TIMES[n].__getitem__) for n in UNITS})
    assert sampler.least_time(study, 1.0) == pytest.approx(cheapest[1], rel=0.01)


def test_trials_of_another_model_are_said_and_left_out() -> None:
    study = study_of(FrontSampler(UNITS, DROPS, TIMES))
    study.add_trial(
        optuna.trial.create_trial(
            params={"layer": "bf16"}, distributions={"layer": CategoricalDistribution(["bf16"])}, values=[1.0, 1.0]
        )
    )
    with pytest.warns(UserWarning, match="1 trials of the study set other parameters than the units unit 0"):
        study.ask(dict(DISTRIBUTIONS))


def test_a_study_of_one_objective_is_sampled_at_random() -> None:
    study = optuna.create_study(sampler=FrontSampler(UNITS, seed=3))
    assert {study.ask(dict(DISTRIBUTIONS)).params["unit 0"] for _ in range(30)} == set(FORMATS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": {}}, "needs units"),
        ({"units": {"a": []}}, "unit 'a' takes"),
        ({"units": {"a": ["fp64"]}}, "unit 'a'"),
        ({"units": UNITS, "drop_prior": {"unit 9": {"bf16": 1.0}}}, "names unit 'unit 9'"),
        ({"units": UNITS, "drop_prior": {"unit 1": {"bf16": math.nan}}}, "in bf16 is nan"),
        ({"units": UNITS, "time_prior": {"unit 1": {"bf16": -1.0}}}, "is -1.0; it is 0 or more"),
        ({"units": UNITS, "corner": (1e-12, 1.0)}, "holds no points"),
        ({"units": UNITS, "drop_floor": 0.0}, "drop_floor is 0.0"),
        ({"units": UNITS, "barred": {"unit 9": ["fp8"]}}, "barred names unit 'unit 9', which is not there"),
        (
            {"units": UNITS, "barred": {"unit 1": ["fp16"]}},
            "barred names fp16 of unit 'unit 1', which takes fp32, bf16",
        ),
        ({"units": UNITS, "barred": {"unit 1": FORMATS}}, "all formats of unit 'unit 1' are barred"),
    ],
)
def test_bad_input_is_said(options: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        FrontSampler(**options)  # type: ignore[arg-type]


def test_estimates_with_intervals_are_priors_too() -> None:
    prior = {n: {f: Estimate(v, v / 2, v * 2, Origin.PREDICTED) for f, v in own.items()} for n, own in DROPS.items()}
    study = study_of(FrontSampler(UNITS, prior, TIMES, corner=(0.02, 24.0)))
    go(study, 12)
    assert share(study) > 0.95


def test_the_expected_gain_is_the_mean_of_gains() -> None:
    draw = np.random.default_rng(0)
    points = draw.uniform(0, 1, (6, 2))
    corner = np.array([1.1, 1.1])
    mean, deviation = np.array([[0.3, 0.4], [0.8, 0.1]]), np.array([[0.2, 0.1], [0.05, 0.3]])
    for row in range(2):
        draws = draw.normal(mean[row], deviation[row], (4000, 2))
        gains = [hypervolume(np.vstack([points, d]), corner) - hypervolume(points, corner) for d in draws]
        # five standard errors of the mean of the draws
        assert expected_gain(mean, deviation, points, corner)[row] == pytest.approx(
            np.mean(gains), abs=5 * float(np.std(gains)) / math.sqrt(len(gains))
        )


def test_the_hypervolume_of_steps_is_their_area() -> None:
    points = np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 3.0], [5.0, 0.0]])
    assert hypervolume(points, np.array([3.0, 3.0])) == pytest.approx(3.0)
    assert front_of(points).tolist() == [[1.0, 2.0], [2.0, 1.0], [5.0, 0.0]]
