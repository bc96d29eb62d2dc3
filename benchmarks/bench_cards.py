"""What owners of cards measured, predicted by the code as it is; and the host's two numbers, each card left out.

    python benchmarks/bench_cards.py

Reads profiles/measured/*.json, as `scripts/gpu_check.py` wrote them. Matmuls and steps are predicted twice: from the
datasheet, as for a card that is not here, and from what `autoprec probe` found on it. The errors are log(predicted over
measured). The host's numbers are what an eager operation takes over a bare launch, and what share of that one of FP8's
own operations takes: chosen for all cards but one, judged on that. Written to benchmarks/results/cards.json; seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import runpy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from record import ROOT, write_result

from autoprec import probe_units
from autoprec.catalog import find_device
from autoprec.files import from_json
from autoprec.predict import card, gemm_ms, step_time, workparts
from autoprec.records import DeviceProfile, Estimate, Origin

CHECK = runpy.run_path(str(ROOT / "scripts" / "gpu_check.py"))
#: µs, measured apart on the same machine, its interval not kept: the file is older than the probe of launches
LAUNCHES = {"h200-sxm-141gb": Estimate(20.0, 20.0, 20.0, Origin.MEASURED)}
#: products without their launches are in files from this date on
ALONE = "2026-11-28"
OPERATIONS, BARE = (1.6, 1.8, 2.0, 2.25), (0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Row:
    """A measured time beside its prediction."""

    name: str
    size: str
    ms: float
    predicted: Estimate

    @property
    def error(self) -> float:
        return math.log(self.predicted.value / self.ms)


def judged(rows: list[Row]) -> dict[str, Any]:
    """Return how far off predictions are, and how many intervals hold."""
    errors = [row.error for row in rows]
    return {
        "of": len(rows),
        "median |log error|": round(statistics.median(map(abs, errors)), 3),
        "largest": round(max(map(abs, errors)), 3),
        "mean log error": round(statistics.mean(errors), 3),
        "within their interval": sum(row.predicted.low <= row.ms <= row.predicted.high for row in rows),
    }


def products(found: dict[str, Any], device: DeviceProfile) -> Iterator[Row]:
    """Yield the matmuls of a card's file, predicted."""
    for row in found["matmuls"]:
        gflop = 2e-9 * row["m"] * row["n"] * row["k"]
        size = "100 GFLOP and more" if gflop >= 100 else "1 to 100 GFLOP" if gflop >= 1 else "less than a GFLOP"
        one = gemm_ms(device, row["m"], row["n"], row["k"], row["format"])
        yield Row(f"{row['format']} {row['m']}x{row['n']}x{row['k']}", size, row["ms"], one)


def steps(found: dict[str, Any], device: DeviceProfile, models: dict[str, Any]) -> Iterator[Row]:
    """Yield the steps of a card's file, predicted."""
    for row in found["steps"]:
        if "ms" not in row:
            continue
        model, units = models[row["model"]]
        plan = CHECK["_plan"](units, row["format"], row["mode"])
        one = step_time(model, device, plan, row["batch"], row["length"], row["mode"]).step_ms
        yield Row(f"{row['model']} {row['format']} {row['mode']}", row["format"], row["ms"], one)


def host_error(cards: list[tuple[dict[str, Any], DeviceProfile]], models: dict[str, Any]) -> float:
    """Return the root mean square of log errors of steps in 16 bits and FP8, which may wait for their host."""
    errors = [row.error for found, device in cards for row in steps(found, device, models) if row.size != "fp32"]
    return math.sqrt(statistics.fmean(error**2 for error in errors))


def chosen(cards: list[tuple[dict[str, Any], DeviceProfile]], models: dict[str, Any]) -> tuple[float, float]:
    """Return the host's two numbers that predict these cards' steps best."""
    table = {}
    for operation, bare in itertools.product(OPERATIONS, BARE):
        with patch.object(card, "_OPERATION", operation), patch.object(workparts, "_BARE", bare):
            table[operation, bare] = host_error(cards, models)
    return min(table, key=table.__getitem__)


def main() -> None:
    """Predict every measured card."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with torch.device("meta"):
        models = {name: (model, probe_units(model, model_id=name)) for name, model, *_ in CHECK["_models"](False)}
    cards, figures = [], {}
    for path in sorted((ROOT / "profiles" / "measured").glob("*.json")):
        found = json.loads(path.read_text())
        probed = from_json(DeviceProfile, found["device"], what=path.name)
        probed = dataclasses.replace(probed, launch_us=probed.launch_us or LAUNCHES.get(probed.name))
        cards.append((found, probed))
        own: dict[str, Any] = {}
        for source, device in (("datasheet", find_device(probed.name)), ("probed", probed)):
            alone = list(products(found, device)) if found["date"] >= ALONE else []
            for size in dict.fromkeys(row.size for row in alone):
                own[f"matmuls of {size}, {source}"] = judged([row for row in alone if row.size == size])
            rows = list(steps(found, device, models))
            own[f"steps in FP32, {source}"] = judged([row for row in rows if row.size == "fp32"])
            own[f"steps in 16 bits, {source}"] = judged([row for row in rows if row.size in ("bf16", "fp16")])
            own[f"steps in FP8, {source}"] = judged([row for row in rows if row.size == "fp8"])
            own[f"steps, {source}, predicted over measured"] = {r.name: round(math.exp(r.error), 2) for r in rows}
        figures[probed.name] = own
    for index, (found, probed) in enumerate(cards):
        operation, bare = chosen([*cards[:index], *cards[index + 1 :]], models)
        with patch.object(card, "_OPERATION", operation), patch.object(workparts, "_BARE", bare):
            figures[probed.name]["with the host's numbers of the other cards"] = {
                "operation": operation,
                "bare": bare,
                "root mean square of log errors, 16 bits and FP8": round(host_error([(found, probed)], models), 3),
            }
    print(json.dumps(figures, indent=1))
    print(write_result("cards", figures))


if __name__ == "__main__":
    main()
