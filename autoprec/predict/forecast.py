"""What a step of a workload would take on a device that is not here: one model, batch and length, any plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.coefficients import coefficients
from autoprec.predict.memory import predict_memory, setup_of
from autoprec.predict.setup import Setup
from autoprec.predict.steptime import StepTime, predict_step
from autoprec.records import DeviceProfile, Estimate, Mode, ModelFacts, ModelProfile, Origin

__all__ = ["Forecast", "Forecasted", "speed_ratio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecasted:
    """The predicted figures of a plan."""

    step_ms: Estimate
    #: over FP32 with TF32 off
    speedup: Estimate
    peak_bytes: int
    #: of the time of matmuls and attention, what their kernels of 16, 8 or TF32 bits take
    low_share: Estimate
    step: StepTime


@dataclass(slots=True, kw_only=True)
class Forecast:
    """Predicts plans of one model at one batch size and length, each once.

    Steps are those that are measured where a device is here: eager, with transformers' default attention and AdamW.
    """

    device: DeviceProfile
    profile: ModelProfile
    facts: ModelFacts | None
    mode: Mode
    batch_size: int
    seq_len: int
    compiled: bool = False
    _steps: dict[str, StepTime] = field(default_factory=dict)

    def of(self, plan: Plan) -> Forecasted:
        """Return the predicted figures of a plan.

        Raises:
            DeviceError: the device lacks one of its formats.
        """
        step, reference = self._step(plan), self.reference
        return Forecasted(
            step_ms=step.step_ms,
            speedup=speed_ratio(reference, step),
            peak_bytes=predict_memory(self.profile, plan, self._setup(plan), self.facts).total_bytes,
            low_share=self._low_share(step),
            step=step,
        )

    @property
    def reference(self) -> StepTime:
        """The step in FP32 with TF32 off."""
        return self._step(self._uniform(Format.FP32))

    def unit_ms(self, choice: Format) -> Mapping[str, float]:
        """Return what each unit takes on the device where all are in one format."""
        return self._step(self._uniform(choice)).units_ms

    def _uniform(self, choice: Format) -> Plan:
        return Plan.uniform(self.profile, choice, device=self.device, mode=self.mode)

    def _step(self, plan: Plan) -> StepTime:
        settings = (plan.ambient, plan.stream, plan.tf32, plan.fp8_recipe)
        key = repr((settings, sorted((name, str(f)) for name, f in plan.assignment.items())))
        if key not in self._steps:
            self._steps[key] = predict_step(
                self.profile, plan, self.device, self._setup(plan), self.facts, compiled=self.compiled
            )
        return self._steps[key]

    def _setup(self, plan: Plan) -> Setup:
        return setup_of(plan, self.batch_size, self.seq_len, self.mode, device_kind=self.device.kind)

    def _low_share(self, step: StepTime) -> Estimate:
        """Return the share of low products; the odds of the two kinds are off by as much as two matmuls are."""
        total = sum(step.products_ms.values())
        wide = step.products_ms.get(str(Format.FP32), 0.0)
        low = total - wide
        if not low or not wide:
            share = 1.0 if low else 0.0
            return Estimate(share, share, share, Origin.PREDICTED)
        vendor = self.device.hardware.vendor if self.device.hardware else ""
        off = math.exp(math.sqrt(2) * coefficients().spread.gemm[f"{vendor}-large"])
        ends = (low / (low + wide * off), low / (low + wide / off))
        return Estimate(low / total, *ends, Origin.PREDICTED)


def speed_ratio(reference: StepTime, step: StepTime) -> Estimate:
    """Return how many times faster a step is than another: what is wrong about both alike cancels."""
    value = reference.step_ms.value / step.step_ms.value
    if step is reference:
        return Estimate(1.0, 1.0, 1.0, Origin.PREDICTED)
    both = math.log(step.step_ms.high / step.step_ms.value)
    width = min(both, coefficients().spread.ratio)
    return Estimate(value, value * math.exp(-width), value * math.exp(width), Origin.PREDICTED)
