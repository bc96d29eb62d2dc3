"""Passes over the batches of a workload, and what they add up to for each unit and format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from autoprec.errors import MeasurementError
from autoprec.formats import Format
from autoprec.probe.batches import Batch
from autoprec.probe.compare import Comparison, compare
from autoprec.probe.directions import divergence_slope, draw_direction, second_order_factor, spread_of_squares
from autoprec.probe.estimation import Scores
from autoprec.probe.readout import Readout, ReadoutKind
from autoprec.probe.replay import Effects, Key, Replayer
from autoprec.probe.scales import BatchScales
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.runtime.identity import canonical_modules

__all__ = ["Tally", "check_finite", "first_bad_unit"]

Array = npt.NDArray[np.float64]


@dataclass(slots=True)
class Tally:
    """Sums over passes: per (unit, format) and batch, effects by example; per batch, weights, loss and draws."""

    squares: dict[Key, dict[int, Array]] = field(default_factory=dict)
    wholes: dict[Key, dict[int, Array]] = field(default_factory=dict)
    fourths: dict[Key, float] = field(default_factory=dict)
    #: counted positions (or squared values) of each example of the batches replayed
    weights: dict[int, Array] = field(default_factory=dict)
    #: what an example of a batch stands for, where not all are replayed
    stands_for: dict[int, Array] = field(default_factory=dict)
    #: of batches that are not as given, what FP8 scales their examples by
    scales: dict[int, BatchScales] = field(default_factory=dict)
    #: loss and entropy of the reference
    comparisons: dict[int, Comparison] = field(default_factory=dict)
    draws: dict[int, int] = field(default_factory=dict)
    slopes: dict[Key, dict[int, float]] = field(default_factory=dict)
    lost: dict[Key, int] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    kind: ReadoutKind = ReadoutKind.LOGITS
    factor: float = 0.5
    spread: float = 2.0
    passes: int = 0
    #: counted, of the batches seen
    positions: int = 0

    def draw(self, replayer: Replayer, workload: Workload, index: int, formats: Sequence[Format], seed: int) -> None:
        """Run one batch of the reference with a fresh direction and add what it gives."""
        batch, number = workload.batches[index], self.draws.get(index, 0)
        effects, read = replayer.run(
            batch,
            formats,
            lambda read: _checked_direction(read, workload, batch, index, seed + index, number),
            scales=self.scales.get(index, BatchScales()),
        )
        self.kind, self.factor, self.spread = read.kind, second_order_factor(read.kind), spread_of_squares(read)
        if number == 0:
            self.positions += int(read.counted.sum())
        if index not in self.weights:
            self.comparisons[index] = compare(read, read)
            self.weights[index] = self.comparisons[index].weight
        self.draws[index] = number + 1
        self.passes += 1
        self._note(effects, index)
        for key, squares in effects.squares.items():
            times = self.factor * self.stands_for.get(index, np.ones(len(squares)))
            _add(self.squares, key, index, times * squares.numpy())
            _add(self.wholes, key, index, times * effects.wholes[key].square().numpy())
            fourth = float((times**2 * effects.fourths[key].numpy()).sum())
            self.fourths[key] = self.fourths.get(key, 0.0) + fourth

    def slope(self, replayer: Replayer, workload: Workload, index: int, choice: Format) -> None:
        """Run one batch at the low anchor of a format and add the slope of the drop along every unit's error."""
        batch = workload.batches[index]
        with torch.no_grad():
            reference = workload.readout(batch, workload.forward(batch)).predictions
        effects, _ = replayer.run(
            batch,
            [choice],
            lambda read: divergence_slope(reference, read),
            anchor=choice,
            scales=self.scales.get(index, BatchScales()),
        )
        self._note(effects, index)
        for key, whole in effects.wholes.items():
            times = self.stands_for.get(index, np.ones(len(whole)))
            self.slopes.setdefault(key, {})[index] = float((times * whole.numpy()).sum())

    def _note(self, effects: Effects, index: int) -> None:
        self.ran |= effects.ran
        self.reached |= effects.reached
        for key in effects.lost:
            self.lost.setdefault(key, index)

    def scores(self, choice: Format, roles: Mapping[str, str]) -> dict[str, Scores]:
        """Return the scores of all units replayed in a format, without those it made infinite."""
        order = sorted(self.draws)
        weights = np.concatenate([self.weights[i] * self.draws[i] for i in order]) if order else np.empty(0)
        draws = float(np.mean([self.draws[i] for i in order])) if order else 0.0
        found = {}
        for (unit, own), by_batch in self.squares.items():
            if own is choice and (unit, own) not in self.lost:
                found[unit] = Scores(
                    role=roles[unit],
                    squares=np.concatenate([self._of(by_batch, i) for i in order]),
                    wholes=np.concatenate([self._of(self.wholes[unit, own], i) for i in order]),
                    fourths=self.fourths[unit, own],
                    weights=weights,
                    draws=draws,
                    spread=self.spread,
                )
        return found

    def _of(self, by_batch: Mapping[int, Array], index: int) -> Array:
        """Return a unit's sums of a batch; where it did not run there, nought."""
        return by_batch.get(index, np.zeros_like(self.weights[index]))

    def by_batch(self, key: Key) -> tuple[float, ...]:
        """Return a unit's mean square, as a drop, of each batch that was replayed."""
        return tuple(
            float(self._of(self.squares[key], i).sum() / (self.weights[i].sum() * self.draws[i]))
            if self.weights[i].sum() > 0
            else 0.0
            for i in sorted(self.draws)
        )

    def weight(self, batches: Iterable[int]) -> float:
        """Return the counted positions (or squared values) of some batches."""
        return float(sum(self.weights[i].sum() for i in batches))


def _add(sums: dict[Key, dict[int, Array]], key: Key, index: int, value: Array) -> None:
    by_batch = sums.setdefault(key, {})
    by_batch[index] = by_batch[index] + value if index in by_batch else value


def _checked_direction(
    read: Readout, workload: Workload, batch: Batch, index: int, seed: int, turn: int
) -> torch.Tensor:
    check_finite(read, lambda: first_bad_unit(workload, batch), index)
    return draw_direction(read, seed, turn)


def check_finite(read: Readout, culprit: Callable[[], str], index: int) -> None:
    """Raise a MeasurementError where the reference's counted output is not finite; `culprit` says where it began."""
    if not read.is_finite():
        raise MeasurementError(
            f"the FP32 reference's output is not finite on batch {index}: {culprit()}. Check the weights and this "
            "batch; autoprec changes neither."
        )


def first_bad_unit(workload: Workload, batch: Batch) -> str:
    """Run a batch once more and say at which unit values stop being finite."""
    owner = {module: unit.name for unit in probe_units(workload.model).units for module in unit.modules}
    modules = canonical_modules(workload.model)
    bad: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: torch.nn.Module, args: tuple[object, ...], output: object) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if not bad and isinstance(values, torch.Tensor) and not bool(values.isfinite().all()):
                bad.append(name)

        return look

    handles = [modules[name].register_forward_hook(hook(name)) for name in owner]
    try:
        with torch.no_grad():
            workload.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not bad:
        return "every unit's own result is finite, so what stands between or behind them is the cause"
    return f"values stop being finite in unit '{owner[bad[0]]}' ({bad[0]})"
