"""autoprec: find, by measuring, the number format each layer of a transformer should compute in.

Names are loaded on first use, so `import autoprec` brings in neither torch nor optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprec.errors import AutoprecError
    from autoprec.exporters import export
    from autoprec.measurement import measure
    from autoprec.plan import Plan
    from autoprec.probe.device import probe_device
    from autoprec.probe.sensitivity import probe_sensitivity
    from autoprec.probe.speed import probe_speed
    from autoprec.probe.units import probe_units
    from autoprec.probe.workload import Workload
    from autoprec.recommender.recommender import Recommendation, recommend
    from autoprec.records import SearchResult
    from autoprec.runtime.attach import Applied, applied, apply
    from autoprec.runtime.audit import audit
    from autoprec.study.run import search
    from autoprec.study.sampler import FrontSampler

__version__ = "0.1.0"

_HOMES = {
    "Applied": "autoprec.runtime.attach",
    "AutoprecError": "autoprec.errors",
    "FrontSampler": "autoprec.study.sampler",
    "Plan": "autoprec.plan",
    "Recommendation": "autoprec.recommender.recommender",
    "SearchResult": "autoprec.records",
    "Workload": "autoprec.probe.workload",
    "applied": "autoprec.runtime.attach",
    "apply": "autoprec.runtime.attach",
    "audit": "autoprec.runtime.audit",
    "export": "autoprec.exporters",
    "measure": "autoprec.measurement",
    "probe_device": "autoprec.probe.device",
    "probe_sensitivity": "autoprec.probe.sensitivity",
    "probe_speed": "autoprec.probe.speed",
    "probe_units": "autoprec.probe.units",
    "recommend": "autoprec.recommender.recommender",
    "search": "autoprec.study.run",
}

__all__ = [
    "Applied",
    "AutoprecError",
    "FrontSampler",
    "Plan",
    "Recommendation",
    "SearchResult",
    "Workload",
    "applied",
    "apply",
    "audit",
    "export",
    "measure",
    "probe_device",
    "probe_sensitivity",
    "probe_speed",
    "probe_units",
    "recommend",
    "search",
]


#: packages that are used by their own name, as in `autoprec.predict.memory_bytes`
_PACKAGES = ("predict",)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"autoprec.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprec' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


def _teach_plans() -> None:
    """Let `Plan.uniform(model, …)` take an nn.Module: plans are below probes, so the package joins the two."""
    from autoprec.plan import set_profiler

    def profile(model: Any) -> Any:
        from autoprec.probe.units import probe_units

        return probe_units(model)

    set_profiler(profile)


def _teach_predictions() -> None:
    """Let `predict` take an nn.Module or a name: it is below the probes as well."""
    from autoprec.predict.describing import set_describer

    def describe(model: Any) -> Any:
        from autoprec.probe.described import describe

        return describe(model)

    set_describer(describe)


def _teach_records() -> None:
    """Let records show themselves in a notebook: pages are above them."""
    from autoprec.records.shown import set_page

    def page(record: Any) -> str:
        from autoprec.report.notebook import record_html

        return record_html(record)

    set_page(page)


_teach_plans()
_teach_records()
_teach_predictions()
