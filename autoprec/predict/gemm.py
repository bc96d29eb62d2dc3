"""The time of one matrix product on a card, from its sizes.

A library cuts the result into tiles, one of a few sizes, and may split the inner dimension. A multiprocessor works
through one tile at a time; tiles come in waves of one a multiprocessor. A tile takes its arithmetic at the
multiprocessor's share of the sustained rate, longer the smaller it is (its edges are loaded, its area is computed), and
a fixed time to fill the pipeline and to write. Memory traffic is a second bound. The library is taken to choose the
best tile. This is NVIDIA's guide to matrix multiplication (tile and wave quantization) with five numbers an engine.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from autoprec.predict.coefficients import Engine, Family

__all__ = ["gemm_seconds"]

Array = npt.NDArray[np.float64]

#: sizes of tiles that cuBLAS, CUTLASS and rocBLAS ship, rows x columns
_TILES = (
    (256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128),
    (32, 32),
)  # fmt: skip
_SPLITS = (1, 2, 4, 8, 16)
_CONFIGS = np.array([(rows, columns, parts) for (rows, columns), parts in product(_TILES, _SPLITS)], dtype=np.float64)
#: the shortest inner dimension a part is worth having for
_SHORTEST_PART = 256
#: partial sums are written and read again in FP32
_PARTIAL_BYTES = 8
#: loading and arithmetic hide behind each other but not wholly: a norm of this order joins the two bounds
_OVERLAP = 4
_BEST_EDGE = 1 / 256 + 1 / 128


def gemm_seconds(
    family: Family,
    engine: Engine,
    *,
    m: Any,
    n: Any,
    k: Any,
    batch: Any,
    rate: Any,
    units: Any,
    bandwidth: Any,
    width: Any,
    out_width: Any,
    long_rows: Any = np.inf,
) -> Array:
    """Return the seconds of `batch` products [m, k] @ [k, n] on the device, each argument a number or an array.

    Args:
        rate: sustained FLOP/s of the card in the operands' format.
        units: its multiprocessors.
        bandwidth: of its memory, bytes a second.
        width: bytes an element of the operands.
        out_width: bytes an element of the result.
        long_rows: inner dimension at which a tile takes twice as long.
    """
    m, n, k, batch, rate, units, bandwidth, width, out_width, long_rows = (
        np.asarray(value, dtype=np.float64)[..., None]
        for value in (m, n, k, batch, rate, units, bandwidth, width, out_width, long_rows)
    )
    rows, columns, parts = _CONFIGS.T
    area = rows * columns
    inner = k / parts
    waves = batch * np.ceil(m / rows) * np.ceil(n / columns) * parts / units
    waves = engine.wave * np.ceil(waves) + (1 - engine.wave) * np.maximum(waves, 1)
    slower = (1 + engine.edge * (1 / rows + 1 / columns)) / (1 + engine.edge * _BEST_EDGE)
    slower = slower * (1 + k / long_rows)
    tile = 2 * area * inner / (rate * engine.reach / units) * slower + engine.tile_seconds
    again = np.where(parts > 1, parts * _PARTIAL_BYTES, 0)
    moved = batch * ((m * k + k * n) * width + m * n * (out_width + again))
    loads = moved / (bandwidth * family.matmul_bandwidth)
    seconds = ((waves * tile) ** _OVERLAP + loads**_OVERLAP) ** (1 / _OVERLAP)
    seconds = seconds + np.where(parts > 1, family.split_seconds, 0)
    seconds = np.where((parts > 1) & (inner < _SHORTEST_PART), np.inf, seconds)
    best: Array = seconds.min(axis=-1) + family.start_seconds
    return best
