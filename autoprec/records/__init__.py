"""The frozen records that flow through the house. Units are in the field names; every figure has its origin."""

from __future__ import annotations

from autoprec.records.audited import AuditReport, AuditRow, BehindUse, CastRow, Direction, KernelRow, OpKind
from autoprec.records.compared import (
    ComparedPlan,
    PlanComparison,
    Target,
    TargetName,
    TargetOutcome,
    TrainedFigures,
)
from autoprec.records.device import DeviceProfile, FormatSupport, GemmRate, Hardware, Support
from autoprec.records.diagnosed import Diagnosis, Evidenced, Finding, Severity, TraceReport, UnitTrace
from autoprec.records.facts import Architecture, ModelFacts
from autoprec.records.figures import STRICT, Estimate, Figure, Origin
from autoprec.records.measured import Measurement, MeasurementOrigins, Mode, TaskMetric
from autoprec.records.memory import BatchFit, MemoryBreakdown, MemoryParts, Moment, Remedy, UnitMemory
from autoprec.records.model import (
    Leaf,
    LeafKind,
    ModelProfile,
    Pinned,
    Role,
    Task,
    Unit,
    role_formats,
    structure_fingerprint,
)
from autoprec.records.planned import Evidence, GradScalerSettings, PlanDevice, PlanDiff, PlanModel, PlanUnit
from autoprec.records.searched import (
    Confirmed,
    Explained,
    LargestBatch,
    Progress,
    Removal,
    SearchResult,
    SearchSetting,
    Standing,
    Step,
    Verdict,
    VerdictDecision,
)
from autoprec.records.sensitivity import Method, SensitivityProfile, UnitDrop, UnitNumerics
from autoprec.records.shown import Shown
from autoprec.records.speed import Arrival, SpeedProfile, UnitTime
from autoprec.records.trained import TrainedArm, TrainingConfirmation, TrainingCurve, TrainingPace, TrainingVerdict
from autoprec.records.verified import Check, CheckOutcome, Verification

__all__ = [
    "STRICT",
    "Architecture",
    "Arrival",
    "AuditReport",
    "AuditRow",
    "BatchFit",
    "BehindUse",
    "CastRow",
    "Check",
    "CheckOutcome",
    "ComparedPlan",
    "Confirmed",
    "DeviceProfile",
    "Diagnosis",
    "Direction",
    "Estimate",
    "Evidence",
    "Evidenced",
    "Explained",
    "Figure",
    "Finding",
    "FormatSupport",
    "GemmRate",
    "GradScalerSettings",
    "Hardware",
    "KernelRow",
    "LargestBatch",
    "Leaf",
    "LeafKind",
    "Measurement",
    "MeasurementOrigins",
    "MemoryBreakdown",
    "MemoryParts",
    "Method",
    "Mode",
    "ModelFacts",
    "ModelProfile",
    "Moment",
    "OpKind",
    "Origin",
    "Pinned",
    "PlanComparison",
    "PlanDevice",
    "PlanDiff",
    "PlanModel",
    "PlanUnit",
    "Progress",
    "Remedy",
    "Removal",
    "Role",
    "SearchResult",
    "SearchSetting",
    "SensitivityProfile",
    "Severity",
    "Shown",
    "SpeedProfile",
    "Standing",
    "Step",
    "Support",
    "Target",
    "TargetName",
    "TargetOutcome",
    "Task",
    "TaskMetric",
    "TraceReport",
    "TrainedArm",
    "TrainedFigures",
    "TrainingConfirmation",
    "TrainingCurve",
    "TrainingPace",
    "TrainingVerdict",
    "Unit",
    "UnitDrop",
    "UnitMemory",
    "UnitNumerics",
    "UnitTime",
    "UnitTrace",
    "Verdict",
    "VerdictDecision",
    "Verification",
    "role_formats",
    "structure_fingerprint",
]
