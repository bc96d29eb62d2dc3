"""Hand-made records for the tests of what is printed: small, complete, and with figures that are easy to find again."""

from __future__ import annotations

from autoprec.formats import Format
from autoprec.plan import Evidence, Plan
from autoprec.records import (
    ComparedPlan,
    DeviceProfile,
    Estimate,
    Figure,
    FormatSupport,
    GemmRate,
    Leaf,
    LeafKind,
    Measurement,
    MeasurementOrigins,
    Mode,
    ModelProfile,
    Origin,
    Pinned,
    PlanComparison,
    Removal,
    Role,
    SearchResult,
    Support,
    Target,
    TargetName,
    TargetOutcome,
    TrainedArm,
    TrainedFigures,
    TrainingConfirmation,
    TrainingCurve,
    TrainingVerdict,
    Unit,
    Verdict,
    VerdictDecision,
    role_formats,
)

BLOCKS = 3


def model_profile() -> ModelProfile:
    """Return a Llama of three equal blocks with a tied head."""
    units = [_unit("embed", Role.EMBEDDING, ("model.embed_tokens",))]
    leaves = [Leaf("model.embed_tokens", LeafKind.EMBEDDING, 4096, 64, 262144)]
    for i in range(BLOCKS):
        attention = tuple(f"model.layers.{i}.self_attn.{p}_proj" for p in "qkvo")
        ffn = tuple(f"model.layers.{i}.mlp.{p}_proj" for p in ("gate", "up", "down"))
        units += [_unit(f"blocks.{i}.attention", Role.ATTENTION, attention), _unit(f"blocks.{i}.ffn", Role.FFN, ffn)]
        leaves += [Leaf(module, LeafKind.LINEAR, 64, 64, 4096) for module in (*attention, *ffn)]
    units.append(_unit("lm_head", Role.LM_HEAD, ("lm_head",)))
    leaves.append(Leaf("lm_head", LeafKind.LINEAR, 64, 4096, 262144))
    return ModelProfile(
        model_id="org/tiny-llama",
        class_name="LlamaForCausalLM",
        fingerprint="0" * 64,
        units=tuple(units),
        pinned=(Pinned(("model.norm",), "norm: runs as the ambient autocast runs it"),),
        unassigned=(),
        leaves=tuple(leaves),
        tied=(("model.embed_tokens", "lm_head"),),
        parameters=348_160,
    )


def _unit(name: str, role: Role, modules: tuple[str, ...]) -> Unit:
    return Unit(name, role, modules, role_formats(role))


def device_profile() -> DeviceProfile:
    """Return a CPU with BF16 units, measured at three sizes."""
    tflops = {
        Format.FP32: (0.101, 0.112, 0.113),
        Format.BF16: (0.201, 0.412, 0.452),
        Format.FP16: (0.051, 0.052, 0.053),
    }
    rates = tuple(
        GemmRate(format=f, size=size, tflops=t, tflops_low=t * 0.9, tflops_high=t * 1.1)
        for f, row in tflops.items()
        for size, t in zip((256, 512, 1024), row, strict=True)
    )
    return DeviceProfile(
        name="sample-cpu",
        kind="cpu",
        origin=Origin.MEASURED,
        formats={
            Format.FP32: FormatSupport(Support.NATIVE, "the reference"),
            Format.BF16: FormatSupport(Support.NATIVE, "4.0x fp32's matmul rate at 1024"),
            Format.FP16: FormatSupport(Support.EMULATED, "0.47x fp32's matmul rate at 1024"),
            Format.FP8: FormatSupport(Support.ABSENT, "no FP8 matmul unit on this CPU"),
        },
        tf32=FormatSupport(Support.ABSENT, "TF32 is a format of CUDA devices"),
        memory_bytes=25_300_000_000,
        instructions=("avx2", "avx512_bf16"),
        threads=2,
        gemm_rates=rates,
        copy_gb_per_s=Estimate(6.61, 5.62, 7.6, Origin.MEASURED),
        notes=("measured beside other work",),
        versions={"torch": "2.13.0"},
    )


def plan(mode: Mode = Mode.TRAIN) -> Plan:
    """Return a mixed plan: BF16, the first block's FFN in FP32, with evidence."""
    built = Plan.uniform(model_profile(), "bf16", device=device_profile(), mode=mode)
    evidence = Evidence(
        drop=Figure(value=0.00123, ci95=(0.00113, 0.00133), unit="nats", origin=Origin.MEASURED),
        step_ms=Figure(value=12.3, ci95=(12.1, 12.9), unit="ms", origin=Origin.PREDICTED),
        peak_bytes=Figure(value=456_000_000, ci95=None, unit="bytes", origin=Origin.MEASURED),
        seed=0,
    )
    return built.replace({"blocks.0.ffn": "fp32"}).with_evidence(evidence)


def measurement(
    name: str, drop: float, step_ms: float, speedup: float, origin: Origin = Origin.MEASURED
) -> Measurement:
    """Return a measurement with intervals of 10 % (drop) and 2 % (times)."""
    return Measurement(
        name=name,
        assignment=plan().assignment,
        drop=drop,
        drop_ci95=(drop * 0.9, drop * 1.1),
        drop_percent=drop * 25,
        step_ms=step_ms,
        step_ms_ci95=(step_ms * 0.98, step_ms * 1.02),
        speedup=speedup,
        speedup_ci95=(speedup * 0.98, speedup * 1.02),
        peak_bytes=123_000_000,
        origin=MeasurementOrigins(drop=origin, step_ms=Origin.MEASURED, peak_bytes=Origin.MEASURED),
    )


def search_result() -> SearchResult:
    """Return a search whose choice is a plan of its own, with a stopped baseline and a removal."""
    stopped = Measurement(
        name="uniform fp16", assignment={}, reason="stopped: its first step took 3.4 times the reference's"
    )
    bf16 = measurement("uniform bf16", 0.00417, 12.3, 1.62)
    return SearchResult(
        model_id="org/tiny-llama",
        device="sample-cpu",
        mode=Mode.TRAIN,
        max_drop="0.25%",
        reference=measurement("reference", 0.0, 19.9, 1.0),
        baselines=(bf16, stopped),
        front=(bf16, measurement("trial 14", 0.000862, 13.7, 1.45, Origin.EMULATED)),
        chosen=1,
        verdict=Verdict(
            decision=VerdictDecision.USE_PLAN,
            text="The plan of trial 14 is within 0.25% and 1.45x as fast as FP32.",
            best_uniform="uniform bf16",
            break_even_hours=12.5,
        ),
        trials=14,
        evaluations=17,
        seconds=118.0,
        predicted_bound=None,
        removed=tuple(Removal(f"blocks.{i}.ffn", Format.FP8, "no FP8 matmul unit on this CPU") for i in range(BLOCKS)),
        folder="autoprec-runs/20250101-120000-tiny-llama",
        seed=0,
    )


def comparison(names: tuple[str, ...] = ("bf16", "fp16"), metric: str | None = "accuracy") -> PlanComparison:
    """Return plans of 1.6 times FP32's speed, each next one a tenth slower, trained over three seeds."""

    def figure(value: float, unit: str, origin: Origin = Origin.MEASURED) -> Figure:
        return Figure(value=value, ci95=(value * 0.98, value * 1.02), unit=unit, origin=origin)

    def row(name: str, place: int) -> ComparedPlan:
        gain = 1.0 if name == "fp32" else 1.6 - 0.1 * place
        drop = 0.0 if name == "fp32" else 0.00417 * place
        itself = name == "fp32"
        target = Target(name=TargetName.DROP, limit=0.5, unit="%", outcome=TargetOutcome.MET)
        return ComparedPlan(
            name=name,
            source="the reference" if itself else f"{name}.json",
            device="sample-cpu",
            measurement=measurement(name, drop, 20 / gain, gain),
            speedup=figure(gain, "x"),
            step_ms=figure(20 / gain, "ms"),
            peak_bytes=figure(123e6, "bytes", Origin.PREDICTED),
            memory_saved=None if itself else figure(12.0, "%", Origin.PREDICTED),
            drop=figure(25 * drop, "%", Origin.EMULATED if place > 1 else Origin.MEASURED),
            task_metric=figure(91.0, "%"),
            task_metric_change=None if itself else figure(-0.5, "%"),
            low_share=figure(80.0, "%"),
            targets=() if itself else (target,),
            trained=TrainedFigures(
                runs=3,
                failed=0,
                failed_share=figure(0.0, "%"),
                loss=figure(2.5 + 0.01 * place, ""),
                loss_change=None if itself else figure(0.01 * place, ""),
                metric=figure(90.0, "%"),
                metric_change=None if itself else figure(-0.2, "%"),
                verdict=None if itself else TrainingVerdict.NOT_WORSE,
                reason=None,
            ),
        )

    every = ("fp32", *names)
    curves = [
        TrainingCurve(
            name=name,
            seed=seed,
            losses=tuple(3.0 - 0.1 * step + 0.01 * seed for step in range(4)),
            final_loss=2.5 + 0.01 * seed,
            skipped_steps=0,
        )
        for name in every
        for seed in range(3)
    ]
    arms = [
        TrainedArm(name=name, gap=0.01, gap_ci95=(0.0, 0.02), verdict=TrainingVerdict.NOT_WORSE, reason="so said")
        for name in names
    ]
    training = TrainingConfirmation(
        steps=4,
        seeds=3,
        learning_rate=1e-4,
        reference_loss=2.5,
        seed_deviation=0.01,
        margin=0.01,
        arms=tuple(arms),
        curves=tuple(curves),
        metric=metric,
    )
    rows = [row(name, place) for place, name in enumerate(every)]
    return PlanComparison(
        model_id="org/tiny-llama",
        device="sample-cpu",
        mode=Mode.TRAIN,
        batches=4,
        metric=metric,
        reference=rows[0],
        plans=tuple(rows[1:]),
        training=training,
        command="autoprec compare bf16 fp16 org/tiny-llama",
        versions={"torch": "2.13.0"},
    )
