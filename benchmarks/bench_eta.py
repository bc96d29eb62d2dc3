"""How right a search of the demo model is about its own end, told by what it says after each trial.

    python benchmarks/bench_eta.py [--device NAME]

Searches with a budget and with a number of trials, for inference and for training. Of what is said once a third of the
time is gone, and of what was said last before: the end it names (time gone plus time left) over the real one. Where it
says "at most" that is the budget's end, and the real one may come before: where nothing is left to gain.

Written to benchmarks/results/eta.json. Needs two cores that nothing else uses. On a CPU without a low format of its own
there is nothing to search for but a card: --device t4, say.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from record import write_result

from autoprec import search
from autoprec.probe.workload import workload_from
from autoprec.records import Progress

#: of the ratio of ends, from one
BAR = 0.2
SEARCHES: dict[str, dict[str, Any]] = {
    "infer, 1 min": {"mode": "infer", "budget": "60s"},
    "infer, 12 trials": {"mode": "infer", "budget": "20m", "trials": 12},
    "train, 2 min": {"mode": "train", "budget": "2m"},
    "train, 6 trials": {"mode": "train", "budget": "20m", "trials": 6},
}


def ends(asked: dict[str, Any], device: str) -> dict[str, Any]:
    """Search, and return the ratios of the ends that were named to the real one."""
    said: list[Progress] = []
    with tempfile.TemporaryDirectory() as folder:
        workload = workload_from("demo", mode=asked.pop("mode"))
        result = search(workload, out=folder, progress=said.append, learn=False, device=device, **asked)
    total = said[-1].elapsed_seconds
    named = [
        (p.elapsed_seconds, p.at_most, (p.elapsed_seconds + p.eta_seconds) / total)
        for p in said
        if p.stage in ("baselines", "search", "confirmation") and p.eta_seconds is not None
    ]
    early = sum(elapsed < total / 3 for elapsed, *_ in named)
    told = [(most, round(ratio, 3)) for _, most, ratio in named[max(0, early - 1) :]]
    about, most = ([ratio for at_most, ratio in told if at_most is which] for which in (False, True))
    return {
        "seconds": total,
        "trials": result.trials,
        "ended early": any("nothing left to gain" in p.message for p in said),
        "named end over real end": about,
        "within 20 %": sum(abs(ratio - 1) <= BAR for ratio in about),
        "of": len(about),
        "latest end over real end": most,
        "latest end within 20 %": sum(abs(ratio - 1) <= BAR for ratio in most),
        "latest end passed by more": sum(ratio < 1 - BAR for ratio in most),
    }


def main() -> None:
    """Search each way and write what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="a card that is not here is emulated")
    device = parser.parse_args().device
    found = {name: ends(asked, device) for name, asked in SEARCHES.items()}
    for name, row in found.items():
        print(name, row)
    print(write_result("eta", {"bar": BAR, "device searched for": device, "searches": found}))


if __name__ == "__main__":
    main()
