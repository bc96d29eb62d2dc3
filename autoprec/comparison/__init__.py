"""Plans side by side on one model and data: measured here, emulated and predicted, or read from runs."""

from __future__ import annotations

from autoprec.comparison.measured import compare_plans
from autoprec.comparison.names import BY_NAME, Candidate, plan_by_name
from autoprec.comparison.recorded import Recorded, recorded_plans

__all__ = ["BY_NAME", "Candidate", "Recorded", "compare_plans", "plan_by_name", "recorded_plans"]
