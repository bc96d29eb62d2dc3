"""The worker process of a search: it loads the workload once, then measures what it is asked to, until told to end.

What fails a request is said in its answer. After what may have left the process in any state (no memory, a failed
device, an error nobody foresaw) it says so and ends; a fresh worker then takes its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from autoprec.errors import AutoprecError, first_line
from autoprec.files import as_json, from_json
from autoprec.measurement import DeviceFailed, Request, evaluate
from autoprec.plan import Plan
from autoprec.predict.forecast import Forecast
from autoprec.probe.device import probe_device
from autoprec.probe.pairs import out_of_memory
from autoprec.probe.sensitivity import probe_sensitivity
from autoprec.probe.speed import probe_speed
from autoprec.probe.units import probe_units
from autoprec.probe.workload import Workload
from autoprec.records import DeviceProfile, ModelProfile, Progress
from autoprec.runtime.identity import weights_digest
from autoprec.study.away import forecast_of
from autoprec.study.budget import first_look
from autoprec.study.protocol import Loading, Opened, Order
from autoprec.training import confirm_training, training_pace

__all__ = ["main"]

#: a worker is ended before its search where the kernel lacks memory (proc(5): -1000 never, 1000 first)
_OOM_SCORE = "700"
_PR_SET_PDEATHSIG = 1  # prctl(2)


class _Bench:
    """What a worker holds, and what it can be asked to do with it: the methods without underscore."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._whole: Workload | None = None
        self._forecast: Forecast | None = None

    def open(self, loading: Any, threads: int, away: Any) -> Any:
        torch.set_num_threads(threads)
        self._whole = whole = from_json(Loading, loading, what="loading").load()
        if away is not None:
            device = from_json(DeviceProfile, away, what="device")
            self._forecast = forecast_of(whole, probe_units(whole.model, model_id=whole.model_id), device)
        return as_json(Opened(weights=weights_digest(whole.model), data=whole.data_digest()))

    def look(self, batches: list[int]) -> Any:
        return as_json(first_look(self._on(batches)))

    def device(self, seconds: float) -> Any:
        return as_json(probe_device(str(next(self._workload.model.parameters()).device), seconds=seconds))

    def evaluate(self, order: Any) -> Any:
        wanted = from_json(Order, order, what="order")
        return as_json(evaluate(self._request(wanted)))

    def sensitivity(self, batches: list[int], formats: list[str], seconds: float, seed: int, units: Any) -> Any:
        profile = from_json(ModelProfile, units, what="units")
        work = self._on(batches)
        return as_json(
            probe_sensitivity(work, formats, seconds=seconds, seed=seed, units=profile, progress=self._progress)
        )

    def speed(self, batches: list[int], formats: list[str], seconds: float) -> Any:
        return as_json(probe_speed(self._on(batches), formats, seconds=seconds, progress=self._progress))

    def train(self, plans: Mapping[str, Any], steps: int, seeds: int, emulate: bool) -> Any:
        known = {name: Plan.from_json(plan) for name, plan in plans.items()}

        def tell(text: str) -> None:
            self._progress(Progress(stage="confirmation", message=text, elapsed_seconds=0.0))

        return as_json(confirm_training(self._workload, known, steps=steps, seeds=seeds, emulate=emulate, tell=tell))

    def pace(self, plan: Any, emulate: bool) -> Any:
        return as_json(training_pace(self._workload, Plan.from_json(plan), emulate=emulate))

    @property
    def _workload(self) -> Workload:
        assert self._whole is not None, "opened first"
        return self._whole

    def _on(self, batches: list[int] | tuple[int, ...]) -> Workload:
        return self._workload.with_batches([self._workload.batches[index] for index in batches])

    def _request(self, order: Order) -> Request:
        return Request(
            workload=self._on(order.batches),
            plan=Plan.from_json(order.plan),
            name=order.name,
            emulate=order.emulate,
            forecast=self._forecast if order.forecast else None,
            reference_ms=order.reference_ms,
            timing_seconds=order.timing_seconds,
            stop_slower=order.stop_slower,
            deadline=float("inf") if order.left_seconds is None else time.monotonic() + order.left_seconds,
            is_hopeless=order.hopeless,
            drop_only=order.drop_only,
            beat=partial(self._say, beat=True),
        )

    def _progress(self, progress: Progress) -> None:
        self._say(news=as_json(progress))


def _answer(bench: _Bench, asked: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Do what is asked; return the answer, and whether this process can go on."""
    begun = time.monotonic()
    try:
        done = getattr(bench, asked["do"])(**asked["with"])
    except DeviceFailed as error:
        return {"lost": str(error)}, False
    except AutoprecError as error:
        return {"error": {"kind": type(error).__name__, "message": str(error)}}, True
    except MemoryError as error:
        return {"lost": f"out of memory on the host: {first_line(error)}"}, False
    except Exception as error:
        lacking = isinstance(error, RuntimeError) and out_of_memory(error)
        what = "out of memory" if lacking else f"unexpected {type(error).__name__}"
        return {"lost": f"{what}: {first_line(error)}"}, False
    reason = str(done.get("reason") or "") if isinstance(done, dict) else ""
    # what a failed allocation of the host's memory left behind cannot be told
    alive = not reason.startswith("out of memory on the host")
    return {"done": done, "seconds": time.monotonic() - begun, "ends": not alive}, alive


def main(arguments: list[str]) -> None:
    """Serve requests from one pipe and answer by the other, given by their numbers, until the search goes away."""
    _die_with(int(arguments[2]))
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
    source, sink = os.fdopen(int(arguments[0]), "rb"), os.fdopen(int(arguments[1]), "wb")
    threading.Thread(target=_listen, args=(source, requests), daemon=True).start()
    current = 0

    def say(**parts: Any) -> None:
        # NaN and infinities are figures here, and judged where they arrive
        sink.write(json.dumps({"id": current, **parts}).encode() + b"\n")
        sink.flush()

    bench, alive = _Bench(say), True
    try:
        while alive:
            asked = requests.get()
            current = asked["id"]
            answer, alive = _answer(bench, asked)
            say(**answer)
    except BaseException:
        traceback.print_exc()
    finally:  # at once: an ordinary exit would wait for the thread that reads, and run what a broken process has left
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _listen(source: Any, requests: SimpleQueue[dict[str, Any]]) -> None:
    """Take requests in; the end of the pipe is the end of the search, and of this process whatever it is doing."""
    for line in source:
        requests.put(json.loads(line))
    os._exit(0)


def _die_with(parent: int) -> None:
    """Be ended by the kernel as the search ends, be the first to go where memory lacks, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    if os.getppid() != parent:  # it went before that was set
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
