"""Fit the time model's numbers to public measurements and write them to profiles/timing.json.

    python benchmarks/fit_timing.py --data FOLDER

What is fitted: how matmuls come near their rate (per vendor, vector and matrix units), the share of the bandwidth of
elementwise kernels, what large matmuls reach of a peak where nobody measured it, the rates of fused attention, what
the host needs for an operation. The intervals are the errors of cards that were left out (`bench_predict.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from record import ROOT
from scipy.optimize import least_squares
from timing_fit import fit_family, fit_moves, fit_sustained
from timing_steps import both_steps
from timing_tables import SOURCES, data_folder, matmuls, moves

from autoprec.catalog import find_device
from autoprec.files import as_json
from autoprec.predict.card import card_of
from autoprec.predict.coefficients import SCHEMA, AttentionShares, Coefficients, read_coefficients

TABLE = ROOT / "profiles" / "timing.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of public measurements; by default $AUTOPREC_PUBLIC_DATA")
    options = parser.parse_args()
    folder = data_folder(options.data)
    if folder is None:
        parser.error("give --data, or set AUTOPREC_PUBLIC_DATA to a folder with gemm_dtype.csv and kernels.csv")
    # intervals are what bench_predict.py found
    write(dataclasses.replace(fit(folder, start()), spread=read_coefficients(json.loads(TABLE.read_text())).spread))


def start() -> Coefficients:
    """Return where every fit begins, left-out cards' too: round numbers that no card had a part in."""
    return read_coefficients(json.loads((ROOT / "benchmarks" / "timing_start.json").read_text()))


def fit(folder: Path, numbers: Coefficients, leave_out: str = "") -> Coefficients:
    """Return the numbers fitted on all cards but one, whose rows are not looked at."""
    table = matmuls(folder)
    table = table[table.device != leave_out]
    copies = moves(folder)
    copies = copies[copies.device != leave_out]
    families = dict(numbers.families)
    for vendor in families:
        base = dataclasses.replace(numbers, families=families)
        families[vendor] = fit_family(table, base, vendor)
        families[vendor] = fit_moves(copies, dataclasses.replace(numbers, families=families), vendor)
    rule = fit_sustained(numbers.sustained)
    numbers = dataclasses.replace(numbers, families=families, sustained=rule)
    return fit_attention(folder, numbers, leave_out)


def fit_attention(folder: Path, numbers: Coefficients, leave_out: str = "") -> Coefficients:
    """Return the numbers with the rates of fused attention that were published: Blackwell's, and MI300X's.

    Those of Ampere and Hopper are the FlashAttention papers' and stay as they are: version 2 reaches 50-73 % of the
    peak forward on A100, and 35 % on H100.
    """
    if leave_out != "gb200":
        numbers = _fit_blackwell(folder, numbers)
    return numbers if leave_out == "mi300x" else _fit_amd_attention(folder, numbers)


def _fit_blackwell(folder: Path, numbers: Coefficients) -> Coefficients:
    """Return the numbers with the rates of cuDNN's attention on GB200 by length, heads 128 wide."""
    table = pd.read_csv(folder / "attention.csv")
    table = table[(table.gpu == "GB200") & (table["dtype"] == "bfloat16") & table.window.isna() & (table.d_qk == 128)]
    rate = card_of(find_device("gb200"), numbers).rate("bf16").flops
    work = 4.0 * table.batch * table.q_heads * table.q_len * table.kv_len * table.d_qk
    work *= np.where(table["mask"] == "top_left", 0.5, 1.0) * np.where(table.direction == "bwd", 2.5, 1.0)
    seen = work / (1e-3 * table.ms) / rate
    back = (table.direction == "bwd").to_numpy()

    def errors(values: np.ndarray) -> np.ndarray:
        forward, backward, half = np.exp(values)
        return np.asarray(np.log(np.where(back, backward, forward) * table.q_len / (table.q_len + half) / seen))

    found = np.exp(least_squares(errors, np.log([0.8, 0.65, 800.0]), loss="soft_l1", f_scale=0.1).x)
    family = numbers.families["nvidia"]
    shares = AttentionShares(forward=float(found[0]), backward=float(found[1]), half_length=float(found[2]))
    family = dataclasses.replace(family, attention={**family.attention, "blackwell": shares})
    return dataclasses.replace(numbers, families={**numbers.families, "nvidia": family})


def _fit_amd_attention(folder: Path, numbers: Coefficients) -> Coefficients:
    """Return the numbers with the rate by which the BF16 step of Llama 3 8B on MI300X takes what torchao's docs say."""
    table = pd.read_csv(folder / "train_dtype.csv")
    seen = table[(table.gpu == "MI300X") & (table.model == "llama3-8b") & (table["dtype"] == "bf16")].iloc[0]
    row = {"model": "llama3-8b", "gpu": "MI300X", "mode": "fp8_rowwise", "conditions": seen["conditions"]}
    for _ in range(8):
        pair = both_steps(row, numbers)
        assert pair is not None
        factor = pair[0] * 1e-3 * seen["tokens_per_s_per_gpu"] / seen["seq"]
        numbers = _scaled_attention(numbers, "amd", "other", float(factor))
    return numbers


def _scaled_attention(numbers: Coefficients, vendor: str, kind: str, factor: float) -> Coefficients:
    family = numbers.families[vendor]
    old = family.attention[kind]
    new = dataclasses.replace(old, forward=old.forward * factor, backward=old.backward * factor)
    family = dataclasses.replace(family, attention={**family.attention, kind: new})
    return dataclasses.replace(numbers, families={**numbers.families, vendor: family})


def write(numbers: Coefficients) -> None:
    """Write the table with where its numbers come from."""
    document = {
        "schema": SCHEMA,
        "made_by": "benchmarks/fit_timing.py",
        "sources": SOURCES,
        "coefficients": _short(as_json(numbers)),
    }
    TABLE.write_text(json.dumps(document, indent=1) + "\n")


def _short(value: Any) -> Any:
    """Return data with numbers of four digits: they are known to two."""
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
