"""What a survey found, unit by unit: predictions, what the second anchor says of them, and what to measure directly."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autoprec.formats import FP16, Format
from autoprec.probe.compare import Ratio
from autoprec.probe.direct import Group
from autoprec.probe.estimation import Prediction, model_error, predict
from autoprec.probe.passes import Tally
from autoprec.probe.survey import Survey
from autoprec.records import Estimate, Method, ModelProfile, Origin, Removal, UnitDrop

__all__ = ["Finding", "Findings", "vetoes_of"]

#: beyond this many times the usual difference between the anchors, a unit does not behave as its square
_OUTLIER = 3.5
_FEWEST_FOR_OUTLIERS = 8
#: seen on small random mixtures of experts: now and then a unit has 10 times what its square says
_ROUTED = 0.8
#: seen on a classifier of which a third of the examples were drawn: how far whole sets of estimates lie off together
_UNSEEN = 0.2
#: other batches have larger values than those seen
_FP16_ROOM = 8


@dataclass(slots=True)
class Finding:
    """One unit in one format: its prediction, and what is known beside it."""

    unit: str
    format: Format
    prediction: Prediction
    #: relative error that the difference of the anchors stands for; 0 where it is no more than usual
    interaction: float = 0.0
    #: relative error where a small change may send tokens to other experts, which no derivative sees
    routed: float = 0.0
    #: relative error where examples that were not drawn may carry more than their curvature says
    unseen: float = 0.0
    marginal: float | None = None
    direct: Ratio | None = None

    @property
    def value(self) -> float:
        """The predicted drop; where the anchors differ by more than is usual, the mean of the two (of their logs)."""
        value = self.prediction.value
        if self.interaction and self.marginal is not None and self.marginal > 0:
            return math.sqrt(value * self.marginal)
        return value

    @property
    def doubt(self) -> float:
        """The relative standard error of what is not known, the model's own error left out."""
        p = self.prediction
        return math.sqrt(p.sampling**2 + p.ratio**2 + self.interaction**2 + self.routed**2 + self.unseen**2)


@dataclass(slots=True)
class Findings:
    """All units in one format."""

    format: Format
    rows: dict[str, Finding] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    #: of the units in groups
    weight_errors: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, survey: Survey, choice: Format) -> Findings:
        """Return the predictions of a survey in one format, compared with its second anchor."""
        rows = {unit: Finding(unit, choice, p) for unit, p in predict(survey.scores(choice)).items()}
        _compare_anchors(rows, survey.tally, choice)
        for unit in _before_routers(survey.profile):
            if unit in rows:
                rows[unit].routed = _ROUTED
        for row in rows.values():
            row.unseen = _UNSEEN if survey.tally.stands_for else 0.0
        return cls(choice, rows)

    def doubtful(self) -> list[Finding]:
        """Return those not measured yet, those first of which least is known and on which most depends."""
        left = [r for r in self.rows.values() if r.direct is None and r.value > 0]
        return sorted(left, key=self._weight, reverse=True)

    def _weight(self, row: Finding) -> float:
        total = sum(r.value for r in self.rows.values())
        return row.doubt * math.sqrt(row.value / total)

    def drops(self, survey: Survey, *, emulated: bool) -> list[UnitDrop]:
        """Return one row a unit, in no order; groups share their drop by their weights' rounding error."""
        measured = Origin.EMULATED if emulated else Origin.MEASURED
        error = self._model_error()
        found = []
        for row in self.rows.values():
            if row.direct is not None:
                low, high = row.direct.ci95 or (row.direct.value, row.direct.value)
                drop, method = Estimate(row.direct.value, max(low, 0.0), high, measured), Method.DIRECT
            elif row.value == 0.0:
                # no effect on any direction drawn
                drop, method = Estimate(0.0, 0.0, 0.0, Origin.PREDICTED), Method.REPLAY
            else:
                reach = row.value / row.prediction.value
                low, high = row.prediction.interval(error, math.hypot(row.interaction, row.routed, row.unseen))
                drop, method = Estimate(row.value, low * reach, high * reach, Origin.PREDICTED), Method.REPLAY
            found.append(
                UnitDrop(
                    unit=row.unit,
                    format=self.format,
                    drop=drop,
                    method=method,
                    share=0.0,
                    predicted=row.value,
                    sampling_error=row.prediction.sampling,
                    marginal=row.marginal,
                    by_batch=survey.tally.by_batch((row.unit, self.format)),
                    reason=_reason(row),
                )
            )
        return found + self._shared(measured)

    def _model_error(self) -> float:
        """Return the error of the method that direct measurements show, of those that nothing had set apart."""
        plain = [
            r
            for r in self.rows.values()
            if r.direct is not None and r.direct.value > 0 and not (r.interaction or r.routed)
        ]
        return model_error([(math.log(r.direct.value / r.value), r.doubt**2) for r in plain if r.direct])

    def _shared(self, measured: Origin) -> list[UnitDrop]:
        rows = []
        for group in self.groups:
            if group.drop is None:
                continue
            total = sum(self.weight_errors[u] for u in group.units)
            alone = len(group.units) == 1
            for unit in group.units:
                part = self.weight_errors[unit] / total if total > 0 else 1 / len(group.units)
                low, high = group.drop.ci95 or (group.drop.value, group.drop.value)
                rows.append(
                    UnitDrop(
                        unit=unit,
                        format=self.format,
                        # a unit may be the cause of all of its group's drop, or of none
                        drop=Estimate(part * group.drop.value, max(low, 0.0) if alone else 0.0, high, measured),
                        method=Method.DIRECT if alone else Method.GROUP,
                        share=0.0,
                        predicted=None,
                        sampling_error=None,
                        marginal=None,
                        by_batch=(),
                        reason=_group_reason(group),
                    )
                )
        return rows


def _group_reason(group: Group) -> str:
    if group.drop is not None and group.drop.value == 0.0:
        return "does not reach the output that is compared"
    others = len(group.units) - 1
    return "no gradient comes back to it: measured " + (f"together with {others} more" if others else "alone")


def _before_routers(profile: ModelProfile) -> list[str]:
    """Return the units from which something flows into a router of experts: all but those behind the last one."""
    routers = [m for p in profile.pinned if p.reason.startswith("router") for m in p.modules]
    if not routers:
        return []
    order = {leaf.module: i for i, leaf in enumerate(profile.leaves)}
    block = routers[-1].rpartition(".")[0].rpartition(".")[0]
    last = max((i for name, i in order.items() if name.startswith(f"{block}.")), default=len(order))
    return [u.name for u in profile.units if min(order[m] for m in u.modules) <= last]


def _compare_anchors(rows: Mapping[str, Finding], tally: Tally, choice: Format) -> None:
    """Set each unit's marginal effect at the low anchor, and mark those where it differs by more than is usual.

    At the low anchor the slope of the drop along a unit's error is twice its own square plus what it has in common
    with all other errors there. The latter is noise around nought of a size that goes with the square root of the
    unit's own; a unit far outside of it does not act as its square says.
    """
    seen: list[tuple[Finding, float, float]] = []
    batches = 1
    for row in rows.values():
        slopes = tally.slopes.get((row.unit, choice))
        if not slopes or row.prediction.value <= 0:
            continue
        batches, weight = len(slopes), tally.weight(slopes)
        squares = tally.squares[row.unit, choice]
        here = sum(float(squares[i].sum()) / tally.draws[i] for i in slopes if i in squares) / weight
        everywhere = sum(float(s.sum()) for s in squares.values()) / sum(
            float(tally.weights[i].sum()) * n for i, n in tally.draws.items()
        )
        own = here * row.prediction.value / everywhere
        slope = sum(slopes.values()) / weight
        # brought from these batches to all
        row.marginal = (slope - own) * everywhere / max(here, 1e-300)
        if own > 0:
            seen.append((row, slope - 2 * own, own))
    if len(seen) < _FEWEST_FOR_OUTLIERS:
        return
    # the median of absolute values of a normal variable is its standard deviation over 1.4826
    usual = 1.4826 * statistics.median(abs(d) / math.sqrt(own) for _, d, own in seen)
    passes = sum(tally.draws.values()) / batches
    for row, difference, own in seen:
        # `own` was drawn on these few batches alone
        drawn = 2 * own * row.prediction.sampling * math.sqrt(passes)
        if usual > 0 and abs(difference) > _OUTLIER * math.hypot(usual * math.sqrt(own), drawn):
            ratio = max(own + difference, own / 10) / own
            row.interaction = abs(math.log(ratio)) / 2


def _reason(row: Finding) -> str:
    if row.direct is not None:
        off = row.direct.value / row.value if row.value > 0 else 0.0
        return f"measured alone, {off:.2f} times what replay predicted"
    if row.value == 0.0:
        return "the format holds its values exactly"
    if row.interaction:
        return "replay; acts otherwise when all units are low"
    return "replay; may send tokens to other experts, which no gradient sees" if row.routed else "replay"


def vetoes_of(
    profile: ModelProfile, formats: Sequence[Format], tally: Tally, maxima: Mapping[str, float]
) -> list[Removal]:
    """Return formats that a unit must not be given, each with the reason."""
    found = []
    for unit in profile.units:
        largest = maxima.get(unit.name, 0.0)
        for choice in unit.formats:
            if (unit.name, choice) in tally.lost:
                batch = tally.lost[unit.name, choice]
                found.append(Removal(unit.name, choice, f"its result is not finite in {choice} (batch {batch})"))
            elif choice is Format.FP16 and largest > FP16.max / _FP16_ROOM:
                above = f"|activations| are above {FP16.max:.0f} / {_FP16_ROOM}: other data would overflow fp16"
                found.append(Removal(unit.name, choice, above))
    return found
