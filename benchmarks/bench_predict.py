"""The time model against public measurements of GPUs, each card left out of the fit that predicts it.

    python benchmarks/bench_predict.py [--data FOLDER] [--write-intervals]

Errors are |log(predicted / published)|, the median of each card and format. A card that is left out brings its
single-number peaks and nothing else. Beside it on the same rows: a roofline at a fixed share of the peaks, torchao's
roofline and its rule for FP8, and the nearest published shape scaled by peaks. Without the folder
($AUTOPREC_PUBLIC_DATA or --data) the recorded tables are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fit_timing import fit, start, write
from record import RESULTS, write_result
from scipy.spatial import cKDTree
from timing_fit import predicted_ms, sustained_errors
from timing_steps import NOT_COMPARED, predict_row, reason_out, speedup
from timing_tables import LEFT_OUT, data_folder, matmuls, published_steps

from autoprec.catalog import find_device
from autoprec.predict.card import LOW_POWER_WATTS
from autoprec.predict.coefficients import Coefficients, Spread, coefficients

#: shapes that users wait for
LARGE_GFLOP = 1.0
#: intervals hold this share of the errors of left-out cards: a little more than the 95 % they stand for, because the
#: cards are few and the next is another
COVERED = 0.97
#: two formats whose times differ by less are not told apart
APART = 1.25
#: NeuSight's heuristic roofline takes this share of the peak for every shape
ROOFLINE_SHARE = 0.705


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of public measurements; by default $AUTOPREC_PUBLIC_DATA")
    parser.add_argument("--write-intervals", action="store_true", help="write the intervals to profiles/timing.json")
    options = parser.parse_args()
    folder = data_folder(options.data)
    if folder is None:
        print("No folder of public measurements (--data, $AUTOPREC_PUBLIC_DATA): these are the recorded tables.\n")
        show(json.loads((RESULTS / "predict.json").read_text())["figures"])
        return
    figures, spread = run(folder)
    show(figures)
    if options.write_intervals:
        write(dataclasses.replace(coefficients(), spread=spread))
    print("wrote", write_result("predict", figures))


def run(folder: Path) -> tuple[dict[str, Any], Spread]:
    """Return all tables, and the intervals that follow from them."""
    whole = coefficients()
    table = matmuls(folder)
    left_out = {device: fit(folder, start(), leave_out=device) for device in sorted(table.device.unique())}
    table["error"] = np.nan
    for device, numbers in left_out.items():
        rows = table.device == device
        table.loc[rows, "error"] = np.log(predicted_ms(table[rows], numbers) / table.ms[rows])
    rivals(table)
    gemm = gemm_figures(table)
    steps = step_errors(folder, left_out, whole)
    rule = sustained_errors(start())
    pairs = speedups(folder, left_out, whole)
    spread = spread_of(table, steps, rule, [row["error"] for row in pairs["rows"]], whole)
    figures = {
        "gemm": gemm,
        "faster_of_two": {name: wrong_order(table, name) for name in ("error", *RIVALS)},
        "fp8_rule": auto_filter(table),
        "steps": step_figures(steps),
        "fp8_speedups": pairs,
        "sustained": {
            "cards": int(rule.device.nunique()),
            "median_error": _round(rule.error.abs().median()),
            "p90_error": _round(rule.error.abs().quantile(0.9)),
        },
        "coverage": coverage(table, steps),
        "left_out_rows": LEFT_OUT,
    }
    return figures, spread


# matmuls

RIVALS = ("roofline", "torchao", "nearest")


def rivals(table: pd.DataFrame) -> None:
    """Add the errors of other ways to predict."""
    peak = np.array([_peak(d, f) for d, f in zip(table.device, table["dtype"], strict=True)]) * 1e12
    bandwidth = table.device.map(lambda d: 1e9 * (find_device(d).bandwidth_gb_per_s or 0)).to_numpy()
    work = 1e9 * table.gflop
    moved = table.batch * ((table.M * table.K + table.K * table.N) * table.width + table.M * table.N * table.out_width)
    seen = 1e-3 * table.ms
    table["roofline"] = np.log(np.maximum(work / (ROOFLINE_SHARE * peak), moved / bandwidth) / seen)
    # testing/training/roofline_utils.py: 78 % of the peak, 92 % of the bandwidth, 2 us at least
    torchao = np.maximum.reduce([work / (0.78 * peak), moved / (0.92 * bandwidth), np.full(len(table), 2e-6)])
    table["torchao"] = np.log(torchao / seen)
    table["nearest"] = nearest(table, peak)


def nearest(table: pd.DataFrame, peak: np.ndarray) -> np.ndarray:
    """Return the errors of taking the nearest shape of another card in the format, scaled by arithmetic and peak."""
    places = np.log2(table[["batch", "M", "N", "K"]].to_numpy(float))
    out = np.full(len(table), np.nan)
    share = (1e9 * table.gflop / (1e-3 * table.ms) / peak).to_numpy()
    for (device, key), rows in table.groupby(["device", "dtype"]).groups.items():
        others = np.flatnonzero(((table.device != device) & (table["dtype"] == key)).to_numpy())
        if not len(others):  # a format that no other card has: the nearest of any
            others = np.flatnonzero((table.device != device).to_numpy())
        _, found = cKDTree(places[others]).query(places[rows])
        out[rows] = np.log(share[rows] / share[others[found]])
    return out


def _peak(device: str, key: str) -> float:
    profile = find_device(device)
    matrix = profile.hardware.fp32_matrix_tflops if profile.hardware and key == "fp32" else None
    return matrix or profile.peak_tflops[key]


def gemm_figures(table: pd.DataFrame) -> dict[str, Any]:
    rows = []
    for (device, key), part in table.groupby(["device", "dtype"]):
        large, small = part[part.gflop >= LARGE_GFLOP], part[part.gflop < LARGE_GFLOP]
        rows.append(
            {
                "device": device,
                "format": key,
                "vendor": part.vendor.iloc[0],
                "large": len(large),
                "error": _round(large.error.abs().median()),
                "p90": _round(large.error.abs().quantile(0.9)),
                "bias": _round(large.error.median()),
                **{name: _round(large[name].abs().median()) for name in RIVALS},
                "small": len(small),
                "small_error": _round(small.error.abs().median()) if len(small) else None,
            }
        )
    frame = pd.DataFrame(rows)
    nvidia = frame[frame.vendor == "nvidia"]
    means = {
        scope: {name: _round(part[name].mean()) for name in ("error", *RIVALS)}
        for scope, part in (("nvidia", nvidia), ("all", frame))
    }
    return {"rows": rows, "mean_of_medians": means, "small_mean": _round(frame.small_error.dropna().mean())}


def wrong_order(table: pd.DataFrame, name: str) -> dict[str, Any]:
    """Return how often a predictor is wrong about which of two formats is faster, where they differ."""
    pairs, wrong = Counter(), Counter()
    shape = ["device", "src", "batch", "M", "N", "K"]
    firsts = table.groupby([*shape, "dtype"]).first().reset_index()
    for _, part in firsts.groupby(shape):
        for one, two in itertools.combinations(part.itertuples(), 2):
            seen = np.log(one.ms / two.ms)
            if abs(seen) > np.log(APART):
                pairs[one.vendor] += 1
                guess = seen + getattr(one, name) - getattr(two, name)
                wrong[one.vendor] += bool(np.sign(guess) != np.sign(seen))
    found = {v: {"pairs": n, "wrong": wrong[v], "share": _round(wrong[v] / n)} for v, n in pairs.items()}
    every, bad = pairs.total(), wrong.total()
    return {"pairs": every, "wrong": bad, "share": _round(bad / max(1, every)), "by_vendor": found}


def auto_filter(table: pd.DataFrame) -> dict[str, Any]:
    """Compare torchao's rule for tensorwise FP8 with ours on pairs of BF16 and FP8 that differ."""
    shape = ["device", "src", "batch", "M", "N", "K"]
    wide = table[table["dtype"].isin(["bf16", "fp8"])].groupby([*shape, "dtype"]).first()[["ms", "error"]].unstack()
    wide = wide.dropna().reset_index()
    seen = np.log(wide.ms.bf16 / wide.ms.fp8)
    apart = np.abs(seen) > np.log(APART)
    faster = seen > 0
    # _auto_filter_for_recipe: sizes divide by 16, and not (K <= 4096 and N <= 1024)
    rule = ~((wide.K <= 4096) & (wide.N <= 1024)) & (wide.K % 16 == 0) & (wide.N % 16 == 0)
    ours = seen + wide.error.bf16 - wide.error.fp8 > 0
    return {
        "pairs": int(apart.sum()),
        "torchao_rule_wrong": _round((rule != faster)[apart].mean()),
        "ours_wrong": _round((ours != faster)[apart].mean()),
        "note": "matmuls alone: the rule also reckons with casts, so it is stricter than these rows need",
    }


# steps


def step_errors(folder: Path, left_out: dict[str, Coefficients], whole: Coefficients) -> pd.DataFrame:
    rows = []
    for _, row in published_steps(folder).iterrows():
        why = reason_out(row)
        found: dict[str, Any] = {"device": row["device"], "table": row["table"], "model": row["model"], "why": why}
        found |= {"format": row["dtype"], "variant": row.get("variant"), "mode": row.get("mode")}
        if why is None:
            predicted, seen, step = predict_row(row, left_out.get(row["device"], whole))
            found |= {"error": float(np.log(predicted / seen)), "predicted_ms": predicted, "published_ms": seen}
            found |= {"vendor": find_device(row["device"]).hardware.vendor, "doubts": len(step.doubts)}
        rows.append(found)
    return pd.DataFrame(rows)


def step_figures(steps: pd.DataFrame) -> dict[str, Any]:
    good = steps[steps.why.isna()]
    rows = [
        {
            "table": name,
            "device": device,
            "format": key,
            "rows": len(part),
            "mean_error": _round(part.error.abs().mean()),
            "bias": _round(part.error.median()),
        }
        for (name, device, key), part in good.groupby(["table", "device", "format"])
    ]
    means = {name: _round(part.error.abs().mean()) for name, part in good.groupby("table")}
    by_card = {
        name: _round(part.groupby(["device", "format"]).error.apply(lambda e: e.abs().mean()).mean())
        for name, part in good.groupby("table")
    }
    return {
        "rows": rows,
        "mean_error": means,
        "mean_of_cards": by_card,
        "all": _round(good.error.abs().mean()),
        "not_predicted": steps.why.dropna().value_counts().to_dict(),
        "published": "NeuSight's own tables: plain roofline 16-47 %, NeuSight with data of each card 7-9 %",
    }


def speedups(folder: Path, left_out: dict[str, Coefficients], whole: Coefficients) -> dict[str, Any]:
    rows = []
    for _, row in pd.read_csv(folder / "speedups.csv").iterrows():
        device = {"MI300X": "mi300x"}.get(row["gpu"], "h100-sxm-80gb")
        predicted = speedup(row, left_out.get(device, whole))
        if predicted is not None:
            error = abs(float(np.log(predicted / row["ratio"])))
            rows.append(
                {
                    "device": row["gpu"], "model": row["model"], "mode": row["mode"], "published": row["ratio"],
                    "predicted": _round(predicted), "error": _round(error),
                }
            )  # fmt: skip
    return {
        "rows": rows,
        "mean_error": _round(float(np.mean([row["error"] for row in rows]))),
        "not_compared": NOT_COMPARED,
    }


# intervals


def spread_of(
    table: pd.DataFrame, steps: pd.DataFrame, rule: pd.DataFrame, fp8: Sequence[float], numbers: Coefficients
) -> Spread:
    """Return half-widths that hold COVERED of the errors of left-out cards, every card and format counted alike.

    Args:
        fp8: errors of speedups of FP8 over BF16.
    """
    good = steps[steps.why.isna()].rename(columns={"format": "dtype"})
    weak = {d for d in (*table.device, *good.device) if is_low_power(d)}
    heat = _width(good[good.device.isin(weak)]) if weak else 0.0
    table, good = table[~table.device.isin(weak)], good[~good.device.isin(weak)]
    gemm: dict[str, float] = {}
    for vendor, part in table.groupby("vendor"):
        for size, rows in (("large", part[part.gflop >= LARGE_GFLOP]), ("small", part[part.gflop < LARGE_GFLOP])):
            gemm[f"{vendor}-{size}"] = _width(rows)
    step = dict(numbers.spread.step)
    eager = good[good.table == "fp32"]
    for vendor in ("nvidia", "amd"):
        step[f"{vendor}-fp32"] = _width(eager[eager.vendor == vendor])
    # these are steps of two families of models; others are not surer than FP32's
    low = max(_width(good[good.table == "format"]), step["nvidia-fp32"])
    step["nvidia-low"] = low
    # nobody published steps of these by card; the widest of what is known, and a third more
    step["amd-low"] = _round(4 / 3 * max(low, step["amd-fp32"]))
    step["nvidia-fp8"], step["amd-fp8"] = _round(4 / 3 * low), _round(4 / 3 * max(low, step["amd-fp32"]))
    return dataclasses.replace(
        numbers.spread,
        gemm=gemm,
        step=step,
        ratio=_ratio_width(good, fp8),
        unmeasured=_round(float(rule.error.abs().quantile(0.9))),
        low_power=_round(max(0.0, heat**2 - step["nvidia-fp32"] ** 2) ** 0.5),
    )


def is_low_power(device: str) -> bool:
    """Say whether a board lives on what its slot gives."""
    hardware = find_device(device).hardware
    return hardware is not None and hardware.power_watts is not None and hardware.power_watts <= LOW_POWER_WATTS


def _ratio_width(good: pd.DataFrame, fp8: Sequence[float]) -> float:
    """Return the COVERED quantile of errors of one format's step over another's, on one card and model."""
    errors = list(fp8)
    for _, part in good[good.table == "format"].groupby(["device", "model"]):
        middles = part.groupby("dtype").error.median()
        errors += [abs(one - two) for one, two in itertools.combinations(middles, 2)]
    return _round(float(np.quantile(errors, COVERED)))


def _width(rows: pd.DataFrame) -> float:
    """Return the COVERED quantile of the absolute errors, each card and format weighing the same."""
    size = rows.groupby(["device", "dtype"]).error.transform("size").to_numpy()
    order = np.argsort(rows.error.abs().to_numpy())
    weight = (1 / size)[order]
    at = np.searchsorted(np.cumsum(weight) / weight.sum(), COVERED)
    return _round(float(rows.error.abs().to_numpy()[order][min(at, len(order) - 1)]))


def coverage(table: pd.DataFrame, steps: pd.DataFrame) -> dict[str, Any]:
    """Return the shares of figures within intervals that the *other* cards' errors give: of rows, and mean over cards.

    A card alone in its kind is held against intervals that nothing like it has widened: the P4 is the one board that
    lives on 75 W, and is listed apart.
    """
    found = {}
    good = steps[steps.why.isna()].rename(columns={"format": "dtype"})
    large, small = table[table.gflop >= LARGE_GFLOP], table[table.gflop < LARGE_GFLOP]
    for name, frame in (
        ("gemm large", large), ("gemm small", small), ("steps fp32", good[good.table == "fp32"]),
        ("steps by format", good[good.table == "format"]),
    ):  # fmt: skip
        shares: dict[str, tuple[float, int]] = {}
        for (vendor, device, key), rows in frame.groupby(["vendor", "device", "dtype"]):
            others = frame[(frame.vendor == vendor) & (frame.device != device) & ~frame.device.map(is_low_power)]
            if not others.empty:
                shares[f"{device} {key}"] = float((rows.error.abs() <= _width(others)).mean()), len(rows)
        weak = {card: share for card, share in shares.items() if is_low_power(card.split()[0])}
        plain = {card: share for card, share in shares.items() if card not in weak}
        found[name] = {
            "rows": _round(sum(s * n for s, n in plain.values()) / sum(n for _, n in plain.values())),
            "cards": _round(float(np.mean([s for s, _ in plain.values()]))),
            "boards of 75 W": {card: _round(share) for card, (share, _) in weak.items()},
        }
    return found


def _round(value: float) -> float:
    return float(f"{value:.3g}")


# printing


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    gemm = figures["gemm"]
    print("Matmuls, each card left out; median |log(predicted / published)| of products of a GFLOP and more")
    print(pd.DataFrame(gemm["rows"]).to_string(index=False))
    for scope, means in gemm["mean_of_medians"].items():
        print(
            f"mean of medians, {scope}: " + ", ".join(f"{'ours' if k == 'error' else k} {v}" for k, v in means.items())
        )
    print(f"smaller products, mean of medians: {gemm['small_mean']}")
    print("\nWrong about which of two formats is faster, of pairs that differ by more than 25 %")
    for name, row in figures["faster_of_two"].items():
        print(
            f"  {'ours' if name == 'error' else name}: {row['wrong']} of {row['pairs']} ({row['share']:.1%}); "
            + ", ".join(f"{v} {one['wrong']} of {one['pairs']}" for v, one in row["by_vendor"].items())
        )
    print(f"  FP8 or BF16, torchao's rule against ours: {figures['fp8_rule']}")
    steps = figures["steps"]
    print("\nWhole steps, each card left out")
    print(pd.DataFrame(steps["rows"]).to_string(index=False))
    print(f"mean |error|: {steps['mean_error']}, of cards: {steps['mean_of_cards']}, all rows {steps['all']}")
    print(f"  not predicted: {steps['not_predicted']}\n  {steps['published']}")
    print("\nFP8 over BF16")
    print(pd.DataFrame(figures["fp8_speedups"]["rows"]).to_string(index=False))
    print(f"mean |error|: {figures['fp8_speedups']['mean_error']}")
    for name, why in figures["fp8_speedups"]["not_compared"].items():
        print(f"  not compared, {name}: {why}")
    print(f"\nWhat large matmuls reach of a peak, by the rule, card left out: {figures['sustained']}")
    print("Share of figures within the intervals that the other cards give")
    for name, shares in figures["coverage"].items():
        print(f"  {name}: {shares}")


if __name__ == "__main__":
    main()
