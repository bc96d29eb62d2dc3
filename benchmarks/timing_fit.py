"""Fitting the time model's few numbers to public measurements, and leaving a card out of the fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from timing_tables import with_cards

from autoprec.catalog import device_names, find_device
from autoprec.predict.card import sustained_share
from autoprec.predict.coefficients import Coefficients, Engine, Family, Sustained
from autoprec.predict.gemm import gemm_seconds

__all__ = ["fit_family", "fit_moves", "fit_sustained", "predicted_ms", "sustained_errors"]

#: rows a device, format and source: more change nothing, and take longer
_SAMPLE = 250
#: small products count less: what users wait for is large
_SMALL_WEIGHT = 0.4
_ENGINE = ("reach", "edge", "tile_seconds", "wave")
_SHARED = ("matmul_bandwidth", "start_seconds", "split_seconds", "event_seconds")
_SHARES = ("wave",)  #: fitted as logits; all others as logarithms


def fit_family(table: pd.DataFrame, numbers: Coefficients, vendor: str) -> Family:
    """Return a vendor's family with the matmul numbers that fit the table best; others stay."""
    start = numbers.families[vendor]
    rows = with_cards(_sampled(table[table.vendor == vendor]), numbers)
    if rows.empty:
        return start
    slow = tuple(a for a in start.long_rows if (rows.architecture == a).any())
    names = [(engine, n) for engine in ("vector", "matrix") for n in _ENGINE] + [("", n) for n in _SHARED]
    names += [("long", a) for a in slow]
    weights = _weights(rows)
    seen = np.log(rows.ms.to_numpy() * 1e-3)
    first = np.array([_packed(_get(start, name), name[1]) for name in names])

    def errors(values: np.ndarray) -> np.ndarray:
        family = _with(start, names, values)
        return np.asarray((np.log(family_seconds(rows, family)) - seen) * weights)

    # each number stays near where it began unless the rows speak: some cards have no row of an engine
    def residuals(values: np.ndarray) -> np.ndarray:
        return np.concatenate([errors(values), 0.3 * (values - first)])

    found = least_squares(residuals, first, loss="soft_l1", f_scale=0.15, max_nfev=60)
    return _with(start, names, found.x)


def family_seconds(rows: pd.DataFrame, family: Family) -> np.ndarray:
    """Return the predicted seconds of rows, with the time that events around an eager call add."""
    matrix = rows.matrix.to_numpy()
    seconds = np.empty(len(rows))
    long_rows = rows.architecture.map(lambda a: family.long_rows.get(a, np.inf)).to_numpy()
    for engine, chosen in ((family.matrix, matrix), (family.vector, ~matrix)):
        part = rows[chosen]
        if not part.empty:
            seconds[chosen] = gemm_seconds(
                family, engine, m=part.M, n=part.N, k=part.K, batch=part.batch, rate=part.rate, units=part.units,
                bandwidth=part.bandwidth, width=part.width, out_width=part.out_width, long_rows=long_rows[chosen],
            )  # fmt: skip
    return seconds + family.event_seconds * rows.by_events.to_numpy()


def predicted_ms(table: pd.DataFrame, numbers: Coefficients) -> np.ndarray:
    """Return the predicted milliseconds of a table of matmuls."""
    rows = with_cards(table, numbers)
    out = np.empty(len(rows))
    for vendor, part in rows.groupby("vendor"):
        out[(rows.vendor == vendor).to_numpy()] = 1e3 * family_seconds(part, numbers.families[vendor])
    return out


def fit_moves(table: pd.DataFrame, numbers: Coefficients, vendor: str) -> Family:
    """Return a vendor's family with the share of the bandwidth that elementwise kernels reach: the middle card's."""
    part = table[table.vendor == vendor]
    share = float(part.groupby("device").share.median().median())
    return dataclasses.replace(numbers.families[vendor], move_bandwidth=round(share, 4))


# what large matmuls reach of a peak


def fit_sustained(start: Sustained, leave_out: str | None = None) -> Sustained:
    """Return the shares and the work a watt that fit the best matmuls on record, near where they began."""
    names = [("share", k) for k in start.share] + [("matrix_per_watt", k) for k in start.matrix_per_watt]
    names += [("vector_per_watt", k) for k in start.vector_per_watt] + [("exponent", "")]
    first = np.log([getattr(start, a)[k] if k else getattr(start, a) for a, k in names])
    cases = [case for case in _recorded() if case[0] != leave_out]

    def model(values: np.ndarray) -> Sustained:
        fields: dict[str, object] = {}
        for (field, key), value in zip(names, np.exp(values), strict=True):
            if key:
                fields.setdefault(field, {})[key] = float(value)  # type: ignore[index]
            else:
                fields[field] = float(value)
        return dataclasses.replace(start, **fields)

    def residuals(values: np.ndarray) -> np.ndarray:
        rule = model(values)
        return np.concatenate([_sustained_errors(rule, cases) / 0.1, (values - first) / 0.3])

    return model(least_squares(residuals, first, loss="soft_l1", max_nfev=40).x)


def sustained_errors(numbers: Coefficients) -> pd.DataFrame:
    """Return the error of the rule on each recorded card that was left out of its fit."""
    rows = []
    for device in sorted({case[0] for case in _recorded()}):
        rule = fit_sustained(numbers.sustained, leave_out=device)
        cases = [case for case in _recorded() if case[0] == device]
        rows += [(*case, e) for case, e in zip(cases, _sustained_errors(rule, cases), strict=True)]
    return pd.DataFrame(rows, columns=["device", "format", "share", "error"])


@cache
def _recorded() -> list[tuple[str, str, float]]:
    """Return (device, format, share of the peak) of all best matmuls of the catalogue."""
    return [
        (name, key, share)
        for name in device_names()
        if (hardware := find_device(name).hardware) is not None and hardware.power_watts
        for key, share in hardware.achieved_fraction.items()
    ]


def _sustained_errors(rule: Sustained, cases: Sequence[tuple[str, str, float]]) -> np.ndarray:
    found = []
    for device, key, share in cases:
        profile = find_device(device)
        found.append(np.log(sustained_share(profile, key, profile.peak_tflops[key], rule) / share))
    return np.array(found)


# packing


def _sampled(table: pd.DataFrame) -> pd.DataFrame:
    parts = [part.sample(min(_SAMPLE, len(part)), random_state=0) for _, part in _groups(table)]
    return pd.concat(parts).reset_index(drop=True) if parts else table


def _groups(table: pd.DataFrame) -> Sequence[tuple[object, pd.DataFrame]]:
    return list(table.groupby(["device", "dtype", "src"], sort=True))


def _weights(rows: pd.DataFrame) -> np.ndarray:
    """Return weights by which each device, format and source counts alike."""
    size = rows.groupby(["device", "dtype", "src"]).ms.transform("size").clip(lower=20)
    return np.asarray(10 / np.sqrt(size.to_numpy()) * np.where(rows.gflop >= 1, 1.0, _SMALL_WEIGHT))


def _get(family: Family, name: tuple[str, str]) -> float:
    part, field = name
    if part == "long":
        return family.long_rows[field]
    return float(getattr(getattr(family, part) if part else family, field))


def _packed(value: float, field: str) -> float:
    value = min(max(value, 1e-9), 1 - 1e-4) if field in _SHARES else value
    return float(np.log(value / (1 - value)) if field in _SHARES else np.log(value))


def _unpacked(value: float, field: str) -> float:
    plain: Callable[[float], float] = (lambda x: 1 / (1 + np.exp(-x))) if field in _SHARES else np.exp
    return float(plain(value))


def _with(start: Family, names: Sequence[tuple[str, str]], values: np.ndarray) -> Family:
    engines: dict[str, dict[str, float]] = {part: {} for part, _ in names if part not in ("", "long")}
    shared: dict[str, float] = {}
    slow = dict(start.long_rows)
    for (part, field), value in zip(names, values, strict=True):
        target = slow if part == "long" else engines[part] if part else shared
        target[field] = _unpacked(value, field)
    made = {part: Engine(**numbers) for part, numbers in engines.items()}
    return dataclasses.replace(start, long_rows=slow, **made, **shared)
