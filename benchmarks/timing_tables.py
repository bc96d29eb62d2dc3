"""Public measurements of GPUs as the time model takes them: matmuls and whole steps, with what is left out and why.

The rows are not part of the project. They are read from a folder given by --data or $AUTOPREC_PUBLIC_DATA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from autoprec.catalog import find_device
from autoprec.predict.card import card_of
from autoprec.predict.coefficients import Coefficients
from autoprec.records import DeviceProfile

__all__ = ["DEVICES", "LEFT_OUT", "SOURCES", "data_folder", "matmuls", "moves", "published_steps"]

#: names of the tables, as the catalogue has them
DEVICES = {
    "A10": "a10", "A100": "a100-sxm-40gb", "A100-PCIE-40GB": "a100-pcie-40gb", "A100-PCIE-80GB": "a100-pcie-80gb",
    "A100-SXM4-40GB": "a100-sxm-40gb", "A100-SXM4-80GB": "a100-sxm-80gb", "A40": "a40", "B200": "b200",
    "GTX1080Ti": "gtx-1080-ti", "H100": "h100-sxm-80gb", "H100-PCIE": "h100-pcie-80gb", "H100-SXM": "h100-sxm-80gb",
    "H100-SXM5-80GB": "h100-sxm-80gb", "H800-SXM": "h800-sxm-80gb", "MI100": "mi100", "MI210": "mi210",
    "MI250": "mi250", "MI300X": "mi300x", "MI325X": "mi325x", "MI355X": "mi355x", "P100": "p100-pcie-16gb",
    "P100-PCIE-16GB": "p100-pcie-16gb", "P4": "p4", "RTX3090": "rtx-3090", "RTX3090Ti": "rtx-3090-ti",
    "RTX8000": "quadro-rtx-8000", "RTXA6000": "rtx-a6000", "V100-PCIE-32GB": "v100-pcie-32gb",
    "V100-SXM2-16GB": "v100-sxm2-16gb", "V100-SXM2-16GB(DGX-1)": "v100-sxm2-16gb", "V100-SXM2-32GB": "v100-sxm2-32gb",
}  # fmt: skip
SOURCES = (
    {"name": "NeuSight (sitar-lab/NeuSight)", "licence": "MIT", "used": "FP32 matmuls, elementwise kernels, steps"},
    {"name": "XLA matmul tables (openxla/xla, ROCm/xla)", "licence": "Apache-2.0", "used": "matmuls by format"},
    {"name": "DeepBench (baidu-research/DeepBench)", "licence": "Apache-2.0", "used": "matmuls, FP32 and FP16"},
    {"name": "vLLM pull requests", "licence": "Apache-2.0", "used": "matmuls, BF16 and FP8"},
    {"name": "DeepGEMM (deepseek-ai/DeepGEMM)", "licence": "MIT", "used": "FP8 matmuls"},
    {"name": "Triton issues (triton-lang/triton)", "licence": "MIT", "used": "FP16 and FP32 matmuls of cuBLAS"},
    {"name": "mli/transformers-benchmarks", "licence": "Apache-2.0", "used": "matmuls and layers of an RTX 3090 Ti"},
    {"name": "llm-foundry (mosaicml/llm-foundry)", "licence": "Apache-2.0", "used": "steps of MPT"},
    {
        "name": "Lambda (lambdal/deeplearning-benchmark)",
        "licence": "none, quoted with attribution",
        "used": "BERT steps",
    },
    {"name": "NVIDIA DeepLearningExamples", "licence": "Apache-2.0, BSD-3", "used": "BERT steps"},
    {"name": "cudnn-frontend (NVIDIA)", "licence": "MIT", "used": "fused attention of GB200"},
    {"name": "torchao, torchtitan (pytorch)", "licence": "BSD-3-Clause", "used": "FP8 speedups, checked only"},
)
#: rows of matmuls that are no figure of a library's matmul alone
LEFT_OUT = {
    "flag selected_max": "the best shape of a scan: a ceiling, used as the card's single number",
    "flag launch_bound": "host time, not kernel time",
    "flag power_limited": "a board held below its power",
    "variant with quantisation": "casts are in it",
    "variant of Triton": "a tutorial's kernel, no library",
    "s43 s53": "other prototypes",
    "s44": "20-40 % slower than s45 on the same shapes: the card was another",
}
_WIDTHS = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_NOT_ALONE = "incl_quant|triton|selected|mxfp8|incl_scale|torch_w16a16"


def data_folder(given: str | None) -> Path | None:
    """Return the folder of public tables; None where there is none."""
    name = given or os.environ.get("AUTOPREC_PUBLIC_DATA", "")
    return Path(name) if name and (Path(name) / "gemm_dtype.csv").is_file() else None


def matmuls(folder: Path) -> pd.DataFrame:
    """Return the matmuls of libraries, forward ones, with the catalogue's name of each device and its vendor."""
    kernels = pd.read_csv(folder / "kernels.csv", low_memory=False)
    kernels = kernels[kernels.op.isin(["linear", "bmm"])].assign(src="neusight", flag="")
    kernels["variant"] = kernels.op
    formats = pd.read_csv(folder / "gemm_dtype.csv")
    flag = formats.flag.fillna("").astype(str)
    formats = formats[
        ~flag.str.contains("selected_max|launch_bound|power_limited")
        & ~formats.variant.str.contains(_NOT_ALONE)
        & ~formats.src.isin(["s43", "s44", "s53"])
    ]
    columns = ["gpu", "dtype", "variant", "direction", "batch", "M", "N", "K", "ms", "src"]
    table = pd.concat([kernels[columns], formats[columns]], ignore_index=True)
    table = table[(table.direction == "fwd") & table.gpu.isin(DEVICES) & table.dtype.isin(_WIDTHS)].copy()
    table["device"] = table.gpu.map(DEVICES)
    table["gflop"] = 2e-9 * table.batch * table.M * table.N * table.K
    table["width"] = table.dtype.map(_WIDTHS)
    table["out_width"] = table.width.clip(lower=2)
    # NeuSight times one eager call between two events; the other tables have kernels alone
    table["by_events"] = (table.src == "neusight").astype(float)
    profiles = {name: find_device(name) for name in table.device.unique()}
    table["vendor"] = table.device.map(lambda name: profiles[name].hardware.vendor)
    table["architecture"] = table.device.map(lambda name: profiles[name].architecture)
    # formats a card only widens, and those whose support nobody states, are no library matmuls of that format
    native = [f"{f}" in {*profiles[d].peak_tflops, "fp32"} for d, f in zip(table.device, table.dtype, strict=True)]
    return table[np.array(native)].reset_index(drop=True)


def with_cards(table: pd.DataFrame, numbers: Coefficients) -> pd.DataFrame:
    """Return the table with each row's rate, multiprocessors and bandwidth, as the model sees its card."""
    cards = {name: card_of(find_device(name), numbers) for name in table.device.unique()}
    rates = [cards[d].rate(f) for d, f in zip(table.device, table.dtype, strict=True)]
    return table.assign(
        rate=[rate.flops for rate in rates],
        matrix=[rate.units == "matrix" for rate in rates],
        units=table.device.map(lambda name: cards[name].units),
        bandwidth=table.device.map(lambda name: cards[name].bandwidth),
    )


def moves(folder: Path) -> pd.DataFrame:
    """Return elementwise kernels that move more than a cache holds, with the share of the bandwidth they reach."""
    table = pd.read_csv(folder / "kernels.csv", low_memory=False)
    passes = {"add": 3, "mul": 3, "div": 3, "addu": 2, "mulu": 2, "divu": 2, "relu": 2, "tanh": 2, "gelu": 2}
    table = table[table.op.isin(passes) & (table.direction == "fwd") & table.gpu.isin(DEVICES)].copy()
    table["moved"] = 4.0 * table.M * table.N * table.batch.clip(lower=1) * table.op.map(passes)
    table = table[table.moved > 2e8]
    profiles: Mapping[str, DeviceProfile] = {g: find_device(DEVICES[g]) for g in table.gpu.unique()}
    peak = table.gpu.map(lambda g: 1e9 * (profiles[g].bandwidth_gb_per_s or 0))
    table["vendor"] = table.gpu.map(lambda g: profiles[g].hardware.vendor)
    table["device"] = table.gpu.map(DEVICES)
    return table.assign(share=table.moved / (1e-3 * table.ms) / peak)


def published_steps(folder: Path) -> pd.DataFrame:
    """Return whole steps: the FP32 eager ones of one GPU, those by format, and single layers in FP16."""
    eager = pd.read_csv(folder / "e2e.csv")
    eager = eager[eager.gpus == 1].assign(table="fp32", device=lambda t: t.gpu.map(DEVICES))
    by_format = pd.read_csv(folder / "train_dtype.csv").assign(table="format")
    by_format["device"] = by_format.gpu.map(DEVICES)
    layers = pd.read_csv(folder / "layers_fp16.csv").rename(columns={"layer": "model", "ms": "total_ms"})
    layers = layers.assign(table="layer", device=layers.gpu.map(DEVICES))
    return pd.concat([eager, by_format[by_format.device.notna()], layers], ignore_index=True)
