"""Claims about speed, kernels and devices."""

from __future__ import annotations

from claims import (
    BATCH,
    LENGTH,
    MODEL,
    STEP,
    TIMES,
    Finding,
    Found,
    Verdict,
    baseline,
    claim,
    forecast,
    needed,
    ratio,
    result_source,
    uniform,
)

from autoprec import recommend
from autoprec.catalog import find_device
from autoprec.formats import Format
from autoprec.predict.kernels import Kind
from autoprec.records import Origin

__all__: list[str] = []

# speed

_CARDS = ("a100-sxm-80gb", "h100-sxm-80gb", "rtx-4090", "rtx-3090", "l4")


@claim("speed", "Training in BF16 is 2.3–2.8 times as fast as in FP32")
def _bf16_speed() -> Found:
    over = {card: uniform(forecast(card), "bf16").speedup for card in _CARDS}
    tf32 = {card: uniform(forecast(card), "tf32").speedup.value for card in _CARDS}
    inside = [card for card, found in over.items() if found.low <= 2.8 and found.high >= 2.3]
    cards = ", ".join(f"{card} {ratio(found)}" for card, found in over.items())
    beside = ", ".join(f"{card} {over[card].value / tf32[card]:.2g}" for card in _CARDS)
    here = baseline("uniform bf16")
    low, high = here["speedup_ci95"]
    findings = [
        Finding(f"GPT-2, over FP32 with TF32 off: {cards}", Origin.PREDICTED, f"{STEP}: {TIMES}"),
        Finding(f"over FP32 with TF32 on, which is what many baselines ran: {beside}", Origin.PREDICTED, "the same"),
        Finding(
            f"SmolLM2-135M, forward, on a CPU with BF16 units: {here['speedup']:.2f} ({low:.2f}–{high:.2f})",
            Origin.MEASURED,
            result_source("search-smollm2-infer"),
        ),
    ]
    verdict = Verdict.HOLDS if len(inside) == len(_CARDS) else Verdict.PART if inside else Verdict.NOT
    return verdict, findings


@claim("speed", "Mixed precision is 2–3 times as fast overall, though the peak of the matmul units is 16 times FP32's")
def _overall() -> Found:
    peaks, lines, inside = [], [], 0
    for card in ("a100-sxm-80gb", "h100-sxm-80gb", "rtx-4090"):
        tops, found = find_device(card).peak_tflops, uniform(forecast(card), "bf16")
        peaks.append(f"{card} {tops['bf16'] / tops['fp32']:.3g}")
        kinds = found.step.kinds_ms
        share = 100 * kinds.get(Kind.MATMUL, 0.0) / sum(kinds.values())
        inside += found.speedup.low <= 3.0 and found.speedup.high >= 2.0
        lines.append(f"{card} {ratio(found.speedup)}, matmuls being {share:.0f} % of the BF16 step")
    findings = [
        Finding(
            f"peak of BF16 over FP32's: {', '.join(peaks)}",
            Origin.DATASHEET,
            "`profiles/devices/*.toml`, a source each",
        ),
        Finding(f"GPT-2's step: {'; '.join(lines)}", Origin.PREDICTED, f"{STEP}: {TIMES}"),
    ]
    return (Verdict.HOLDS if inside == 3 else Verdict.PART if inside else Verdict.NOT), findings


@claim("speed", "On an H100: FP8")
def _fp8_speed() -> Found:
    rows = needed("predict")["figures"]["fp8_speedups"]["rows"]
    h100 = [row for row in rows if row["device"].startswith("H100")]
    published = sorted(row["published"] for row in h100)
    given = forecast("h100-sxm-80gb", compiled=True)
    own = uniform(given, "fp8").speedup.value / uniform(given, "bf16").speedup.value
    eager = forecast("h100-sxm-80gb")
    slow = uniform(eager, "fp8").speedup.value / uniform(eager, "bf16").speedup.value
    findings = [
        Finding(
            f"its peak is twice BF16's; {len(h100)} published steps of Llama 3 8B, GPT-2 XL and single layers took 1 / "
            f"{published[0]:.2f} to 1 / {published[-1]:.2f} of the time in BF16",
            Origin.RECORDED,
            "torchao, torchtitan, TransformerEngine, ROCm/TransformerEngine#72; listed in "
            "`benchmarks/results/predict.json`",
        ),
        Finding(
            f"GPT-2, {BATCH} × {LENGTH} tokens, over BF16: {own:.2g} compiled, {slow:.2g} eager, where casts cost more "
            "than matmuls save",
            Origin.PREDICTED,
            TIMES,
        ),
    ]
    return (Verdict.PART if min(published[0], own) < 1 else Verdict.HOLDS), findings


@claim("kernels", "More than 80 % of the time should be on tensor cores")
def _tensor_cores() -> Found:
    lines, whole = [], []
    for card in ("a100-sxm-80gb", "h100-sxm-80gb", "rtx-3090"):
        found = uniform(forecast(card), "bf16")
        kinds, low = found.step.kinds_ms, sum(ms for key, ms in found.step.products_ms.items() if key != "fp32")
        whole.append(low / sum(kinds.values()))
        lines.append(f"{card} {100 * found.low_share.value:.0f} % of matmul time, {100 * whole[-1]:.0f} % of the step")
    text = f"GPT-2 under BF16: {'; '.join(lines)}"
    source = f"{STEP}: {TIMES}; measured on your device by `autoprec compare`"
    verdict = Verdict.HOLDS if min(whole) > 0.8 else Verdict.PART  # of matmul time, and not of the step's
    return verdict, [Finding(text, Origin.PREDICTED, source)]


# devices

_TABLE = {
    "a100-sxm-80gb": "bf16",
    "h100-sxm-80gb": "bf16",
    "rtx-3090": "bf16",
    "rtx-4090": "bf16",
    "v100-sxm2-32gb": "fp16",
    "rtx-2080-ti": "fp16",
    "gtx-1080-ti": "fp32",
    "p100-pcie-16gb": "fp32",
}


@claim("devices", "A100, H100, 3090 and 4090: BF16; V100 and 2080: FP16; older cards: FP32; H100 also FP8")
def _devices() -> Found:
    chosen = {card: str(recommend(MODEL, card).plan.ambient) for card in _TABLE}
    large = recommend("meta-llama/Llama-3.1-8B", "h100-sxm-80gb", batch_size=4, seq_len=4096).plan
    fp8 = sum(unit.format is Format.FP8 for unit in large.units)
    text = ", ".join(f"{card} {choice}" for card, choice in chosen.items())
    findings = [
        Finding(f"for GPT-2: {text}", "by rule", "`autoprec recommend`, [devices.md](devices.md)"),
        Finding(
            f"Llama 3.1 8B at 4 × 4096 tokens on an H100: FP8 in {fp8} of {len(large.units)} units; for GPT-2 in "
            "none, as its "
            "matmuls are too small to pay for the casts",
            "by rule",
            "the same",
        ),
    ]
    return (Verdict.HOLDS if chosen == _TABLE and fp8 else Verdict.PART), findings


@claim("devices", "`torch.cuda.is_bf16_supported()` says whether BF16 can be used")
def _supported() -> Found:
    lines = []
    for card in ("t4", "v100-sxm2-32gb"):
        given = forecast(card)
        lines.append(
            f"{card}: BF16 {ratio(uniform(given, 'bf16').speedup)}, FP16 {ratio(uniform(given, 'fp16').speedup)}"
        )
    findings = [
        Finding(
            "True on a T4 and a V100, where BF16 is emulated; `including_emulation=False` asks for the units",
            Origin.RECORDED,
            "MakazhanAlpamys/Soup#387 (T4), pytorch/pytorch#124996 (V100), #148322",
        ),
        Finding(f"GPT-2's step over FP32: {'; '.join(lines)}", Origin.PREDICTED, f"{STEP}: {TIMES}"),
    ]
    return Verdict.NOT, findings


@claim("devices", "CPUs and AMD GPUs: no mixed precision")
def _cpus() -> Found:
    bf16, fp16 = baseline("uniform bf16"), baseline("uniform fp16")
    low, high = bf16["speedup_ci95"]
    text = (
        f"a CPU with AVX512-BF16, SmolLM2-135M forward: BF16 {bf16['speedup']:.2f} ({low:.2f}–{high:.2f}) times "
        "as fast as FP32; "
        f"FP16 {fp16['reason']}"
    )
    findings = [
        Finding(text, Origin.MEASURED, result_source("search-smollm2-infer")),
        Finding(
            "without AVX512-BF16 or AMX, BF16 is slower than FP32",
            Origin.RECORDED,
            "pytorch/pytorch#86270, #118499, #111456, #146508",
        ),
    ]
    amd = forecast("mi300x")
    text = f"GPT-2's step on an MI300X over FP32: BF16 {ratio(uniform(amd, 'bf16').speedup)}"
    findings.append(Finding(text, Origin.PREDICTED, f"{STEP}: {TIMES}"))
    return (Verdict.NOT if low > 1 else Verdict.HOLDS), findings


@claim("devices", "Dimensions should be multiples of 8, of 16 for FP8")
def _alignment() -> Found:
    findings = [
        Finding(
            "tensor cores want rows of 16 bytes on a V100 and 128 on an A100, 8 and 64 elements in 16 bits; an "
            "RTX 4090 loses "
            "speed where N is no multiple of 16; FP8 kernels refuse such sizes",
            Origin.RECORDED,
            "stas00/ml-engineering and arXiv:2401.14489; pytorch/pytorch#181718; torchao's layer filter",
        ),
        Finding(
            "the time model knows nothing of alignment, so no figure is predicted; on the device `autoprec probe "
            "MODEL` names such "
            "layers",
            "-",
            "[speed.md](speed.md)",
        ),
    ]
    return Verdict.HOLDS, findings
