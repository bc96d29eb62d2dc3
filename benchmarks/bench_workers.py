"""The same trials by one worker process and by two, each with one thread: what the second one saves.

    python benchmarks/bench_workers.py --trials 40 --rounds 3

The demo model is searched for a card that is not here: drops are emulated, times predicted, so that trials are all
drops. The space is that of the roles, and all its assignments are measured unless `--trials` says fewer; no assignment
is stopped early, for the limit is above every drop. Rounds alternate which comes first. Time runs from the end of the
last baseline to the end of the last trial: probes, baselines and confirmation are of one worker either way.

Written to benchmarks/results/workers.json: seconds by round, the ratio two / one of each, whether the trials were the
same, and whether their drops were. Needs two cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which start with this environment

import torch
from record import write_result

from autoprec import search
from autoprec.records import Progress
from autoprec.study.protocol import Loading
from autoprec.study.worker import Worker

#: of the time with one worker, what two may take
BAR = 0.65
#: above every drop, in % of the loss
_NO_LIMIT = "1000%"


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=None, help="fewer than all, which two workers may choose anew")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--card", default="h100-sxm-80gb")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rounds = []
    for number in range(given.rounds):
        found = {count: searched(count, given) for count in ((1, 2) if number % 2 == 0 else (2, 1))}
        seconds = {count: one[0] for count, one in found.items()}
        drops = {count: one[1] for count, one in found.items()}
        rounds.append(
            {
                "one s": round(seconds[1], 2),
                "two s": round(seconds[2], 2),
                "two / one": round(seconds[2] / seconds[1], 3),
                "trials": [len(drops[1]), len(drops[2])],
                "same assignments": drops[1].keys() == drops[2].keys(),
                "same drops": all(drops[2].get(key, drop) == drop for key, drop in drops[1].items()),
            }
        )
        print(rounds[-1], flush=True)
    ratio = statistics.median(one["two / one"] for one in rounds)
    figures = {"bar": BAR, "median two / one": ratio, "held": ratio <= BAR, "card": given.card, "rounds": rounds}
    print(f"two workers take {100 * ratio:.0f} % of the time of one ({write_result('workers', figures)})")


def searched(count: int, given: argparse.Namespace) -> tuple[float, dict[tuple[str, ...], str]]:
    """Search with so many workers; return what the trials took, and the drop of each assignment."""
    marks: list[float] = []

    def listen(progress: Progress) -> None:
        if progress.stage == "baselines" and progress.measurement is not None:
            marks[:] = [time.monotonic()]
        elif progress.trial is not None:
            marks.append(time.monotonic())

    loading = Loading(
        model="demo", device="cpu", mode="infer", batch_size=4, seq_len=given.seq_len, batches=given.batches
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(loading, 1)) for _ in range(count)]
        search(
            loading.load("cpu"),
            budget="2h",
            trials=given.trials or 10_000,  # until the space is seen
            max_drop=_NO_LIMIT,
            space="roles",
            device=given.card,
            out=Path(folder) / "run",
            progress=listen,
            learn=False,
            workers=workers,
        )
        return marks[-1] - marks[0], drops_of(Path(folder) / "run" / "trials.csv")


def drops_of(table: Path) -> dict[tuple[str, ...], str]:
    """Return the drop of each trial's assignment, as written."""
    rows: list[dict[str, Any]] = list(csv.DictReader(table.read_text().splitlines()))
    head = 8  # columns before the units
    return {tuple(list(row.values())[head:]): row["drop"] for row in rows if row["trial"]}


if __name__ == "__main__":
    main()
