"""Drop, its percent and its interval, against SciPy and small hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from autoprec.probe.compare import compare, median_ci95, ratio_ci95, summarise
from autoprec.probe.readout import Readout, ReadoutKind


def readout(kind: ReadoutKind, values: Tensor, counted: Tensor | None = None, labels: Tensor | None = None) -> Readout:
    where = torch.ones(values.shape[:2], dtype=torch.bool) if counted is None else counted
    return Readout(kind, values, where, labels)


def test_kl_entropy_and_loss_agree_with_scipy() -> None:
    reference, plan = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    labels = torch.randint(0, 11, (3, 5))
    counted = torch.rand(3, 5) > 0.3
    found = compare(readout(ReadoutKind.LOGITS, reference, counted, labels), readout(ReadoutKind.LOGITS, plan, counted))
    summary = summarise(ReadoutKind.LOGITS, [found])
    p, q = reference.double().softmax(-1).numpy(), plan.double().softmax(-1).numpy()
    mask = counted.numpy()
    divergence = stats.entropy(p, q, axis=-1)[mask].mean()
    entropy = stats.entropy(p, axis=-1)[mask].mean()
    own = -np.log(np.take_along_axis(p, labels.numpy()[..., None], -1))[..., 0][mask].mean()
    rise = -np.log(np.take_along_axis(q, labels.numpy()[..., None], -1))[..., 0][mask].mean() - own
    # FP64 sums of 15 terms
    assert summary.drop.value == pytest.approx(divergence, rel=1e-12)
    assert summary.reference_entropy == pytest.approx(entropy, rel=1e-12)
    assert summary.reference_loss == pytest.approx(own, rel=1e-12)
    assert summary.loss_rise is not None and summary.loss_rise.value == pytest.approx(rise, rel=1e-10)
    assert summary.drop_percent == pytest.approx(100 * divergence / max(own, entropy), rel=1e-12)


def test_binary_is_the_kl_of_bernoullis() -> None:
    reference, plan = torch.tensor([[[0.3]], [[-2.0]]]), torch.tensor([[[0.5]], [[-1.0]]])
    found = compare(readout(ReadoutKind.BINARY, reference), readout(ReadoutKind.BINARY, plan))
    p, q = torch.sigmoid(reference.double()).flatten().numpy(), torch.sigmoid(plan.double()).flatten().numpy()
    expected = [stats.entropy([a, 1 - a], [b, 1 - b]) for a, b in zip(p, q, strict=True)]
    assert found.drop == pytest.approx(expected, rel=1e-12)


def test_values_are_relative_squared_error_over_counted_positions() -> None:
    reference, plan = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    counted = torch.tensor([[True, True, False], [True, False, False]])
    found = compare(readout(ReadoutKind.VALUES, reference, counted), readout(ReadoutKind.VALUES, plan, counted))
    summary = summarise(ReadoutKind.VALUES, [found])
    error = (plan.double() - reference.double())[counted].square().sum() / reference.double()[counted].square().sum()
    assert summary.drop.value == pytest.approx(float(error), rel=1e-12)
    assert summary.drop_percent == pytest.approx(100 * float(error), rel=1e-12)
    assert summary.loss_rise is None


def test_equal_outputs_drop_nothing_and_small_ones_are_not_lost_in_rounding() -> None:
    reference = torch.randn(2, 4, 1000) * 5
    same = compare(readout(ReadoutKind.LOGITS, reference), readout(ReadoutKind.LOGITS, reference))
    assert same.drop.tolist() == [0.0, 0.0]
    # KL of a shift of one logit by e is p(1-p)e**2/2 to second order: 1e-4 moves it by far less than FP32 could show
    shifted = reference.double().clone()
    shifted[..., 0] += 1e-4
    p = reference.double().softmax(-1)[..., 0]
    expected = (p * (1 - p) * 1e-8 / 2).sum(1)
    found = compare(readout(ReadoutKind.LOGITS, reference), readout(ReadoutKind.LOGITS, shifted))
    # what is left out is of third order, 1e-4 of it
    assert found.drop == pytest.approx(expected.numpy(), rel=1e-3)


def test_masked_classes_count_nothing_and_overflow_is_seen() -> None:
    reference, plan = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    reference[..., 0] = plan[..., 0] = -torch.inf
    assert compare(readout(ReadoutKind.LOGITS, reference), readout(ReadoutKind.LOGITS, plan)).finite
    plan[0, 0, 1] = torch.inf
    assert not compare(readout(ReadoutKind.LOGITS, reference), readout(ReadoutKind.LOGITS, plan)).finite


def test_interval_of_a_mean_is_students_for_equal_weights() -> None:
    samples = np.random.default_rng(0).normal(1.0, 0.2, 12)
    found = ratio_ci95(samples, np.ones(12))
    low, high = stats.t.interval(0.95, 11, loc=samples.mean(), scale=stats.sem(samples))
    assert found.ci95 == pytest.approx((low, high), rel=1e-9)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Sums and weights of unequal examples: 95 % of 600 intervals, give or take 4 standard deviations (0.9 %)."""
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(600):
        weights = generator.integers(5, 50, 24).astype(float)
        sums = weights * 0.3 + generator.normal(0, 1, 24) * np.sqrt(weights) * 0.1
        interval = ratio_ci95(sums, weights).ci95
        assert interval is not None
        hits += interval[0] <= 0.3 <= interval[1]
    assert 0.95 - 0.036 <= hits / 600 <= 0.95 + 0.036


def test_one_example_has_no_interval() -> None:
    assert ratio_ci95(np.array([2.0]), np.array([4.0])).ci95 is None


def test_median_interval_from_order_statistics() -> None:
    samples = list(range(1, 21))
    median, interval = median_ci95(samples)
    # ranks 6 and 15 of 20: P(5 < Binomial(20, 1/2) < 15) = 0.9586
    assert median == 10.5 and interval == (6.0, 15.0)
    assert median_ci95([1.0, 2.0, 3.0])[1] is None
    covered = stats.binom.cdf(14, 20, 0.5) - stats.binom.cdf(5, 20, 0.5)
    assert covered >= 0.95
    assert median_ci95(range(6))[1] == (0.0, 5.0)


def test_accuracy_and_its_paired_change() -> None:
    labels = torch.tensor([[0], [1], [2], [1]])
    reference = torch.nn.functional.one_hot(labels, 3).float()
    plan = reference.clone()
    plan[3] = torch.tensor([[5.0, 1.0, 0.0]])  # wrong about one of four
    found = compare(readout(ReadoutKind.LOGITS, reference, None, labels), readout(ReadoutKind.LOGITS, plan))
    metric = summarise(ReadoutKind.LOGITS, [found]).task_metric
    assert metric is not None and metric.name == "accuracy"
    assert (metric.reference, metric.value, metric.change) == (1.0, 0.75, -0.25)
    half = stats.t.ppf(0.975, 3) * np.std([0, 0, 0, -1], ddof=1) / 2
    assert metric.change_ci95 == pytest.approx((-0.25 - half, -0.25 + half))
    assert metric.ci95 is not None and metric.ci95[1] == 1.0


def test_no_changed_answer_is_not_certainty() -> None:
    labels = torch.zeros(100, 1, dtype=torch.long)
    logits = torch.tensor([1.0, 0.0]).expand(100, 1, 2)
    found = compare(readout(ReadoutKind.LOGITS, logits, None, labels), readout(ReadoutKind.LOGITS, logits + 0.1))
    metric = summarise(ReadoutKind.LOGITS, [found]).task_metric
    limit = stats.binomtest(0, 100).proportion_ci().high  # of 100 answers, none changed
    assert metric is not None and metric.change == 0.0 and metric.value == 1.0
    assert metric.change_ci95 == pytest.approx((-limit, limit)) and metric.ci95 == pytest.approx((1 - limit, 1.0))


def test_binary_accuracy_is_by_the_sign_of_the_logit() -> None:
    logits, labels = torch.tensor([[[0.3]], [[-2.0]], [[1.0]]]), torch.tensor([[1], [0], [0]])
    found = compare(readout(ReadoutKind.BINARY, logits, None, labels), readout(ReadoutKind.BINARY, -logits))
    metric = summarise(ReadoutKind.BINARY, [found]).task_metric
    assert metric is not None and metric.reference == pytest.approx(2 / 3) and metric.value == pytest.approx(1 / 3)


def test_perplexity_is_e_to_the_loss() -> None:
    reference, plan = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    labels = torch.randint(0, 11, (3, 5))
    found = compare(readout(ReadoutKind.LOGITS, reference, None, labels), readout(ReadoutKind.LOGITS, plan))
    metric = summarise(ReadoutKind.LOGITS, [found]).task_metric
    own, other = (
        torch.nn.functional.cross_entropy(side.double().flatten(0, 1), labels.flatten()).exp().item()
        for side in (reference, plan)
    )
    assert metric is not None and metric.name == "perplexity"
    assert metric.reference == pytest.approx(own, rel=1e-12) and metric.value == pytest.approx(other, rel=1e-12)
    assert metric.change == pytest.approx(other - own, rel=1e-9)
    unlabelled = compare(readout(ReadoutKind.LOGITS, reference), readout(ReadoutKind.LOGITS, plan))
    assert summarise(ReadoutKind.LOGITS, [unlabelled]).task_metric is None
