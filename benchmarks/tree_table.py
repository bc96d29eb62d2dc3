"""Make the table that the recommender's decision tree is fitted on, and the tree.

    python benchmarks/tree_table.py [NAME ...]

Solves fronts (`fronts.py`) of every model with known drops on every catalogued device, in modes, sizes and allowances
drawn with a fixed seed, and writes `profiles/runs/<name>.csv`, a row a unit, and `profiles/tree.json`. About ten
minutes on one core.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fronts import LIMITS, RELATIVES, SIZES, Sample, Solved, samples, situation, solved

from autoprec.catalog import device_names, find_device
from autoprec.files import as_json, write_json
from autoprec.formats import Format
from autoprec.recommender.advice import fp8_recipe
from autoprec.recommender.choice import fp8_barrier
from autoprec.recommender.gains import gains
from autoprec.recommender.lessons import unit_rows
from autoprec.recommender.table import as_csv, read_tables, shipped_texts, table_digest
from autoprec.recommender.tree import fit_tree, tree_lines
from autoprec.records import Mode, Support

PROFILES = Path(__file__).resolve().parent.parent / "profiles"
#: units a front, of more drawn ones: eager, and compiled where FP8 is native, of several allowances
_EAGER_UNITS, _COMPILED_UNITS, _ALLOWANCES = 4, 8, 3
#: every so many rows one is left out, which keeps the table under 2 MB
_THINNED = 3
_LOWEST = 0.25  #: allowances below have no FP8 without a measurement


def rows_of(found: Solved, limit: float, count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Yield a row for some of the units of a solved front."""
    sample = found.sample
    _, best, _ = found.best(limit)
    here = situation(sample, found.device, found.setup, max(limit, _LOWEST))
    may_fp8 = {n for n, fact in sample.units.items() if found.compiled and not fp8_barrier(fact, here)}
    known = gains(
        sample.profile,
        sample.units,
        found.device,
        found.setup,
        sample.facts,
        half=found.half,
        recipe=fp8_recipe(found.device) if found.compiled else None,
        tf32=found.tf32,
        compiled=found.compiled,
    )
    rows = unit_rows(
        sample.units,
        known,
        found.device,
        found.setup,
        limit,
        best,
        sample.drops,
        may_fp8,
        origin="solved",
        group=sample.source,
    )
    yield from (rows[name] for name in draw.sample(sorted(rows), min(count, len(rows))))


def table(source: str) -> Iterator[dict[str, Any]]:
    """Yield all rows of a trained model and its relatives."""
    for sample in samples(source):
        print(sample.name, file=sys.stderr, flush=True)
        yield from _rows(sample)


def _rows(sample: Sample) -> Iterator[dict[str, Any]]:
    for device in device_names():
        draw = random.Random(f"{sample.name} {device}")
        mode, size = draw.choice(list(Mode)), draw.choice(SIZES)
        if (eager := solved(sample, device, mode, size, compiled=False, barred=True)) is None:
            continue
        yield from rows_of(eager, draw.choice(LIMITS), _EAGER_UNITS, draw)
        if find_device(device).supports(Format.FP8) is not Support.NATIVE:
            continue
        compiled = solved(sample, device, mode, size, compiled=True, barred=True)
        assert compiled is not None
        for limit in draw.sample([x for x in LIMITS if x >= _LOWEST], _ALLOWANCES):
            yield from rows_of(compiled, limit, _COMPILED_UNITS, draw)


def main() -> None:
    """Write the tables and the tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *RELATIVES], metavar="NAME", help=", ".join(RELATIVES))
    (PROFILES / "runs").mkdir(exist_ok=True)
    for source in parser.parse_args().names or RELATIVES:
        kept = [row for index, row in enumerate(table(source)) if index % _THINNED]
        (PROFILES / "runs" / f"{source}.csv").write_text(as_csv(kept), encoding="utf-8")
    texts = shipped_texts()
    tables = read_tables(texts)
    tree = fit_tree(tables.rows, table_digest(texts), tables.notes)
    write_json(PROFILES / "tree.json", as_json(tree))
    print("\n".join(tree_lines(tree)))


if __name__ == "__main__":
    main()
