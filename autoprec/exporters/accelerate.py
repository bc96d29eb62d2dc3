"""Target `accelerate`: the configuration file of `accelerate launch` that goes with a plan.

accelerate has one `mixed_precision` for all: it puts autocast around the model's forward and turns its outputs into
FP32. A plan's own scopes stand inside and decide. What is left for the flag: FP16 anywhere needs `fp16`, which is
what makes accelerate scale and unscale gradients; `fp8` would convert layers by a filter of its own, so it is never
written. Keys are those that the launcher reads; it refuses others.
"""

from __future__ import annotations

from autoprec.exporters.limits import Limits
from autoprec.exporters.summary import literal, one_line, summary
from autoprec.formats import Format
from autoprec.plan import GradScalerSettings, Plan

__all__ = ["LIMITS", "accelerate_config"]

LIMITS = Limits(inference="it launches training; use 'python' or 'transformers'")

_TEXT = """\
# accelerate launch --config_file THIS_FILE train.py
#
# The plan of {model}:
{summary}
#
# accelerate has one format for the whole model; the plan decides unit by unit, inside it. In train.py, before prepare:
#
#     autoprec.apply(model, autoprec.Plan.load({plan_path}))
#     model, optimizer, loader = accelerator.prepare(model, optimizer, loader){scaler}
#
# mixed_precision below is what accelerate does around the model. Do not set it to fp8: accelerate would convert
# layers by a filter of its own. With FSDP, where it would cast all weights, use autoprec export --to fsdp2.
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
machine_rank: 0
main_training_function: main
mixed_precision: '{mixed}'
num_machines: 1
num_processes: 1
use_cpu: {use_cpu}
"""


def accelerate_config(plan: Plan, plan_path: str) -> str:
    """Return the YAML that `accelerate launch --config_file` reads."""
    return _TEXT.format(
        model=one_line(plan.model.id),
        summary="\n".join(f"# {line}" for line in summary(plan).splitlines()),
        plan_path=literal(one_line(plan_path)),
        scaler=_scaler(plan.grad_scaler),
        mixed=_mixed(plan),
        use_cpu="true" if plan.device.kind == "cpu" else "false",
    )


def _mixed(plan: Plan) -> str:
    if plan.grad_scaler is not None:
        return "fp16"
    return "bf16" if plan.ambient is Format.BF16 else "no"


def _scaler(settings: GradScalerSettings | None) -> str:
    if settings is None:
        return ""
    text = "\n#\n# The plan has FP16 in it: accelerate scales the loss on CUDA devices, and not on a CPU."
    if settings != GradScalerSettings():
        text += (
            f"\n# Accelerator(kwargs_handlers=[GradScalerKwargs(init_scale={settings.init_scale!r}, "
            f"growth_factor={settings.growth_factor!r},\n#     backoff_factor={settings.backoff_factor!r}, "
            f"growth_interval={settings.growth_interval!r})]) gives the scale the plan asks for."
        )
    return text
