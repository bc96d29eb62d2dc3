"""Plans measured side by side: each beside FP32 in alternating steps, audited, and trained over seeds where asked.

Steps, drops and metrics come from `measurement.evaluate`, training from `training.confirm_training`, memory from
`predict.memory`, what kernels ran from `verification.audited_step`: this file asks for them and puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from autoprec.comparison.figures import metric_figures, row_of, share_of, targets
from autoprec.comparison.names import Candidate
from autoprec.comparison.trained import trained_figures
from autoprec.errors import DeviceError, PlanError, UsageError
from autoprec.formats import Format
from autoprec.measurement import Request, evaluate
from autoprec.plan import Plan, PlanDevice
from autoprec.predict.forecast import Forecast
from autoprec.predict.memory import predict_memory, setup_of
from autoprec.probe.described import module_facts
from autoprec.probe.device import device_name
from autoprec.probe.steps import device_of
from autoprec.probe.units import probe_units
from autoprec.probe.versions import all_versions, device_versions
from autoprec.probe.workload import Workload
from autoprec.records import (
    ComparedPlan,
    Figure,
    Measurement,
    Mode,
    Origin,
    PlanComparison,
    Support,
    TrainingConfirmation,
)
from autoprec.training import REFERENCE, confirm_training
from autoprec.verification import audited_step

__all__ = ["compare_plans"]

#: steps audited for a share of time: the fewest from which an interval of the median can be told
_AUDITS = 6
#: compute capability of Ampere
_TF32_SINCE = (8, 0)
#: pairs of steps at most, in times of the fewest
_MOST_PAIRS = 3


def compare_plans(
    workload: Workload,
    candidates: Sequence[Candidate],
    *,
    emulate: bool = False,
    forecast: Forecast | None = None,
    train_steps: int = 0,
    seeds: int = 8,
    learning_rate: float = 1e-4,
    pairs: int = 20,
    tell: Callable[[str], None] = lambda text: None,
) -> PlanComparison:
    """Measure plans on one workload, each against FP32, and return their figures side by side.

    FP32 is measured against itself first: its speedup says what the timer can tell apart here. A plan that cannot be
    run has the reason in its place; the others go on.

    Args:
        workload: model and batches, on the device to measure on.
        candidates: with names of their own; one called `fp32` is the reference, which is there anyway.
        emulate: compute FP8 with its rounding and none of its speed where the device has none.
        forecast: of a device that is not here: formats are emulated, times and memory predicted.
        train_steps: also train every plan beside FP32 for so many steps (`confirm_training`), over `seeds`.
        learning_rate: in that.
        pairs: of steps timed for each plan, at least.
        tell: called with a sentence as each part begins.

    Raises:
        UsageError: no plan, two of one name, or training asked of a workload for inference.
        PlanError: a plan of another model.
        MeasurementError: the reference cannot be run, or its output is not finite.
    """
    _check(workload, candidates, train_steps)
    bench = _Bench(workload, emulate or forecast is not None, forecast, pairs, tell)
    reference = bench.reference()
    assert reference.measurement is not None
    compared, arms = [], {}
    for candidate in candidates:
        if candidate.name == REFERENCE:
            continue
        row, plan = bench.compared(candidate, reference)
        compared.append(row)
        if row.measurement is not None and row.measurement.drop is not None:
            arms[row.name] = plan
    training = None
    if train_steps:
        training = confirm_training(
            workload,
            arms,
            steps=train_steps,
            seeds=seeds,
            learning_rate=learning_rate,
            emulate=bench.emulate,
            tell=tell,
        )
        reference = bench.with_training(reference, training)
        compared = [bench.with_training(row, training) if row.name in arms else row for row in compared]
    return PlanComparison(
        model_id=workload.model_id,
        device=bench.device,
        mode=workload.mode,
        batches=len(workload.batches),
        metric=metric_figures(reference.measurement, reference.measurement)[0] if reference.measurement else None,
        reference=reference,
        plans=tuple(compared),
        training=training,
        notes=tuple(bench.notes(candidates)),
        versions={**all_versions(), **device_versions(bench.here)},
    )


def _check(workload: Workload, candidates: Sequence[Candidate], train_steps: int) -> None:
    names = [candidate.name for candidate in candidates]
    if not names:
        raise UsageError("there is no plan to compare; give two or more")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"two plans are called '{twice}'; a comparison shows each by its own name")
    if train_steps and workload.mode is Mode.INFER:
        raise UsageError(
            "training can be compared of plans for training, and these are for inference. Leave out --train-steps, or "
            "compare in mode train."
        )
    known = probe_units(workload.model).fingerprint
    for candidate in candidates:
        if candidate.plan.model.fingerprint != known:
            raise PlanError(
                f"{candidate.name} is a plan for {candidate.plan.model.id} ({candidate.plan.model.class_name}), and "
                f"{workload.model_id} is another model: its layers or their sizes differ. Plans can be compared on the "
                "model they were made for."
            )


@dataclass
class _Bench:
    """One workload, and how plans are measured on it."""

    workload: Workload
    emulate: bool
    forecast: Forecast | None
    pairs: int
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        model = self.workload.model
        self.here = device_of(model)
        self.device = device_name(self.here) if self.forecast is None else self.forecast.device.name
        self.profile, self.facts = probe_units(model, model_id=self.workload.model_id), module_facts(model)
        self.clock_ms: float | None = None

    def reference(self) -> ComparedPlan:
        """Return FP32 against itself."""
        self.tell("Measuring fp32 against itself")
        plan = self._there(Plan.uniform(self.profile, Format.FP32, mode=self.workload.mode))
        found = self._evaluate(REFERENCE, plan)
        self.clock_ms = found.reference_step_ms
        return self._row(REFERENCE, "the reference", plan, found, None)

    def compared(self, candidate: Candidate, reference: ComparedPlan) -> tuple[ComparedPlan, Plan]:
        """Return a plan's row and the plan as it was run; where the device cannot run it, the reason alone."""
        self.tell(f"Measuring {candidate.name} beside fp32")
        plan = self._there(candidate.plan)
        try:
            if plan.tf32 and (lacks := self._lacks_tf32()):
                raise DeviceError(lacks)
            found = self._evaluate(candidate.name, plan)
            row = self._row(candidate.name, candidate.source, plan, found, reference)
        except DeviceError as error:
            row = ComparedPlan(
                name=candidate.name,
                source=candidate.source,
                device=self.device,
                measurement=None,
                reasons=(f"it was not run: {error}",),
            )
        return replace(row, targets=targets(row)), plan

    def with_training(self, row: ComparedPlan, found: TrainingConfirmation) -> ComparedPlan:
        """Return a row with what its training came to."""
        emulated = row.measurement is not None and row.measurement.origin.drop is Origin.EMULATED
        origin = Origin.EMULATED if emulated else Origin.MEASURED
        return replace(row, trained=trained_figures(found, row.name, origin))

    def notes(self, candidates: Sequence[Candidate]) -> list[str]:
        """Return what to know about all figures at once."""
        found = []
        if self.forecast is not None:
            found.append(
                f"{self.device} is not here: drops, metrics and training are emulated on {self.here.type}, times, "
                "memory and shares are predicted"
            )
            found += self.forecast.reference.doubts
        for candidate in candidates:
            made_for = candidate.plan.device.name
            if made_for not in ("any", self.device):
                found.append(f"{candidate.name} was made for {made_for}; this is {self.device}")
            if candidate.plan.mode is not self.workload.mode:
                found.append(
                    f"{candidate.name} was made for mode {candidate.plan.mode}, and ran in {self.workload.mode}"
                )
        return found

    def _there(self, plan: Plan) -> Plan:
        """Return a plan as one for the device that is not here, where there is one."""
        if self.forecast is None:
            return plan
        device = self.forecast.device
        return replace(plan, device=PlanDevice(name=device.name, kind=device.kind, origin=device.origin))

    def _lacks_tf32(self) -> str | None:
        """Say why TF32's switch would change nothing; None where it does."""
        known = None if self.forecast is None else self.forecast.device.tf32
        if known is not None:
            return None if known.support is Support.NATIVE else f"{self.device} cannot run tf32: {known.reason}"
        if self.here.type == "cuda" and torch.cuda.get_device_capability(self.here) >= _TF32_SINCE:
            return None
        return f"{self.device} cannot run tf32: it is a format of NVIDIA GPUs since Ampere"

    def _evaluate(self, name: str, plan: Plan) -> Measurement:
        return evaluate(
            Request(
                workload=self.workload,
                plan=plan,
                name=name,
                emulate=self.emulate,
                forecast=self.forecast,
                reference_ms=self.clock_ms,
                min_pairs=self.pairs,
                max_pairs=_MOST_PAIRS * self.pairs,
            )
        )

    def _row(
        self, name: str, source: str, plan: Plan, found: Measurement, reference: ComparedPlan | None
    ) -> ComparedPlan:
        share, wrong = self._share(name, plan) if found.drop is not None else (None, ())
        row = row_of(
            found,
            # of FP32's own measurement that failed nothing is left to compare with but the plan itself
            None if reference is None else reference.measurement or found,
            self._peak(plan, found),
            None if reference is None else reference.peak_bytes,
            name=name,
            source=source,
            device=self.device,
        )
        return replace(row, low_share=share, reasons=(*row.reasons, *wrong))

    def _peak(self, plan: Plan, found: Measurement) -> Figure:
        """Return a step's peak: an accelerator's own count where it was measured, else predicted.

        A CPU's is not measured for this: its high-water mark is that of the whole process, Python and libraries too.
        """
        if self.here.type != "cpu" and found.origin.peak_bytes is Origin.MEASURED and found.peak_bytes is not None:
            return Figure(value=found.peak_bytes, ci95=None, unit="bytes", origin=Origin.MEASURED)
        if self.forecast is not None:
            peak = self.forecast.of(plan).peak_bytes
        else:
            rows, length = self.workload.batch_shape
            setup = setup_of(plan, rows, length, self.workload.mode, device_kind=self.here.type)
            peak = predict_memory(self.profile, plan, setup, self.facts).total_bytes
        return Figure(value=peak, ci95=None, unit="bytes", origin=Origin.PREDICTED)

    def _share(self, name: str, plan: Plan) -> tuple[Figure | None, tuple[str, ...]]:
        """Return the share of low-precision kernels, and what ran otherwise than planned."""
        if self.forecast is not None:
            share = self.forecast.of(plan).low_share
            ends = (100 * share.low, 100 * share.high)
            return Figure(value=100 * share.value, ci95=ends, unit="%", origin=share.origin), ()
        self.tell(f"Auditing steps of {name}")
        batches = self.workload.batches
        reports = [
            audited_step(self.workload, plan, batches[i % len(batches)], self.emulate) for i in range(_AUDITS + 1)
        ]
        wrong = reports[0].disagreements
        if self.emulate and Format.FP8 in plan.formats:
            return None, ("emulated FP8 runs on FP32 kernels: no share of low-precision time is measured", *wrong)
        return share_of(reports[1:]), wrong  # the first sets up kernels
