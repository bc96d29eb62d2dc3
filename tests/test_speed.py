"""Times of units and steps: what is timed, what is predicted from it, and the clocks, CUDA's on stand-ins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import bert_classifier, gpt2

from autoprec import Plan, Workload, probe_speed, probe_units
from autoprec.errors import ModelError
from autoprec.files import as_json, from_json
from autoprec.formats import Format
from autoprec.probe.arrival import Part, Run, arrival
from autoprec.probe.breakeven import break_even
from autoprec.probe.calls import Call, record_calls
from autoprec.probe.device import device_name
from autoprec.probe.payoff import SETTLED, misfit, why_not
from autoprec.probe.shapecache import KeptRatio, ShapeCache
from autoprec.probe.sites import Site, find_sites
from autoprec.probe.timers import _Graph
from autoprec.records import Estimate, Leaf, LeafKind, Mode, Origin, SpeedProfile, UnitTime
from autoprec.runtime.identity import canonical_modules


def gpt2_workload(mode: str) -> Workload:
    torch.manual_seed(0)
    ids = torch.randint(3, 30, (2, 8))
    return Workload(gpt2(), [{"input_ids": ids, "labels": ids}], mode=mode)


def exact(value: float) -> Estimate:
    return Estimate(value, value, value, Origin.MEASURED)


def row(unit: str, choice: Format, ratio: float, wide: float = 10.0, spread: float = 0.0) -> UnitTime:
    own = Estimate(ratio, ratio - spread, ratio + spread, Origin.MEASURED)
    return UnitTime(unit=unit, format=choice, shape=unit[0], forward_ms=ratio * wide, backward_ms=None, ratio=own)


def profile(*times: UnitTime, runs: tuple[Run, ...] = ()) -> SpeedProfile:
    alone: dict[Part, Estimate] = {
        (r.shape, r.format): Estimate(r.ratio.value - 1, r.ratio.low - 1, r.ratio.high - 1, Origin.MEASURED)
        for r in times
        if r.format is not Format.FP32
    }
    return SpeedProfile(
        model_id="m",
        fingerprint="f",
        device="d",
        mode=Mode.INFER,
        ambient=Format.BF16,
        tokens=16,
        formats=(Format.BF16,),
        reference_ms=exact(100.0),
        times=times,
        arrival=arrival(alone, runs),
        seconds=1.0,
    )


def units(*names: str, spread: float = 0.0) -> list[UnitTime]:
    """Units of 10 ms in FP32 and 4 ms in BF16, their shapes named by their first letters."""
    return [row(u, f, r, spread=s) for u in names for f, r, s in ((Format.FP32, 1.0, 0.0), (Format.BF16, 0.4, spread))]


def test_without_whole_steps_a_step_is_the_reference_and_what_units_save_alone() -> None:
    known = profile(*units("a1", "a2", "b1"))
    assert known.step_ms({"a1": Format.FP32, "b1": Format.FP32}).value == pytest.approx(100.0)
    assert known.step_ms({"a1": Format.BF16, "b1": Format.BF16}).value == pytest.approx(100.0 - 2 * 6.0)
    assert known["a1", "bf16"].value == pytest.approx(4.0)
    assert known["a1", "fp32"].value == known["a1", "fp32"].high == pytest.approx(10.0)
    assert known.step_ms({"elsewhere": Format.BF16}).value == pytest.approx(100.0)
    with pytest.raises(KeyError):
        known["a1", "fp16"]


def test_whole_steps_tell_which_shape_saves_less_than_alone() -> None:
    """Of a, two units, a third of what they save alone arrives; of b all; and the ambient format adds 10 %."""
    a, b = ("a", Format.BF16), ("b", Format.BF16)
    runs = (
        Run({}, [1.1] * 9),
        Run({a: 0.2, b: 0.1}, [1.1 - 0.04 - 0.06] * 9),
        Run({a: 0.2}, [1.1 - 0.04] * 9),
        Run({b: 0.1}, [1.1 - 0.06] * 9),
    )
    known = profile(*units("a1", "a2", "b1"), runs=runs)
    assert known.arrival.mean[0] == pytest.approx(0.1, abs=0.002)
    assert known["a1", "bf16"].value == pytest.approx(8.0, abs=0.3)
    assert known["b1", "bf16"].value == pytest.approx(4.0, abs=0.3)
    half = known.step_ms({"a1": Format.BF16})
    assert half.value == pytest.approx(110.0 - 2.0, abs=0.3)
    assert half.low < 108.0 < half.high and half.high - half.low < 2.0
    wide = profile(*units("a1", "a2", "b1")).step_ms({"a1": Format.BF16})
    assert wide.high - wide.low > 10 * (half.high - half.low)


def test_noisy_steps_do_not_overrule_what_units_took_alone() -> None:
    a = ("a", Format.BF16)
    runs = (Run({}, [0.8, 1.2, 1.0, 1.4]), Run({a: 0.1}, [1.3, 0.9, 1.6, 1.1]))
    known = profile(*units("a1"), runs=runs)
    assert known["a1", "bf16"].value == pytest.approx(4.0, abs=1.0)


def test_errors_of_one_shape_go_together_and_others_do_not() -> None:
    """Two units of one shape are off by twice as much as one, two shapes by √2, beside what all steps share."""
    known = profile(*units("a1", "a2", "b1", spread=0.1))
    shared = known.step_ms({})

    def variance(*names: str) -> float:
        found = known.step_ms(dict.fromkeys(names, Format.BF16))
        return (found.high - found.low) ** 2 - (shared.high - shared.low) ** 2

    assert variance("a1", "a2") == pytest.approx(4 * variance("a1"))
    assert variance("a1", "b1") == pytest.approx(2 * variance("a1"))


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_every_unit_that_ran_has_its_times(mode: str) -> None:
    workload = gpt2_workload(mode)
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    known = probe_speed(workload, ("bf16", "fp8"), seconds=1.0)
    names = {unit.name for unit in probe_units(workload.model).units}
    assert {r.unit for r in known.times} == names
    assert known.device == device_name(torch.device("cpu")), "as the device's own profile names it"
    assert {r.format for r in known.times} == {Format.FP32, Format.BF16}
    assert any("fp8 is not timed" in note for note in known.notes) or torch.cuda.is_available()
    blocks = {r.shape for r in known.times if r.unit.startswith("blocks.") and r.unit.endswith("ffn")}
    assert len(blocks) == 1  # repeated blocks are timed once
    for r in known.times:
        assert r.forward_ms > 0 and (r.backward_ms is None) == (mode == "infer")
        assert r.ratio.low <= r.ratio.value <= r.ratio.high
    assert all(torch.equal(before[name], value) for name, value in workload.model.state_dict().items())
    assert all(p.grad is None for p in workload.model.parameters())
    assert from_json(SpeedProfile, as_json(known), what="speed profile") == known
    wide = Plan.uniform(workload.model, "bf16").assignment
    assert known.step_ms(wide).origin is Origin.PREDICTED


def test_calls_are_made_again_as_they_were() -> None:
    """Masks ask for no gradient in a step, and attention kernels look at that."""
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(3, 30, (2, 8)), "attention_mask": torch.ones(2, 8).long()}
    workload = Workload(bert_classifier(labels=2), [batch], mode="train")
    modules = canonical_modules(workload.model)
    known = probe_units(workload.model)
    sites = find_sites(known, modules, [Format.BF16], Format.BF16, emulated=False)
    calls = record_calls(workload, batch, sites, known, modules, gradients=True)
    attention = next(call for call in calls if call.site.unit == "blocks.0.attention")
    tensors = [v for v in (*attention.args, *attention.kwargs.values()) if isinstance(v, torch.Tensor)]
    assert tensors[0].requires_grad and not any(t.requires_grad for t in tensors[1:])
    assert attention.count == 1
    gradients = attention.both()
    assert gradients[0].shape == tensors[0].shape


def test_a_batch_that_the_model_does_not_take_is_an_error() -> None:
    workload = gpt2_workload("infer")
    broken = Workload(workload.model, [{"input_ids": torch.full((1, 4), 10_000)}], mode="infer")
    with pytest.raises(ModelError, match="does not take a batch"):
        probe_speed(broken, seconds=1.0)


# what was timed before


def test_a_format_that_was_timed_before_is_not_timed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    workload = gpt2_workload("infer")
    first = probe_speed(workload, ("bf16",), seconds=0.5)
    (path,) = (tmp_path / "autoprec" / "speed").iterdir()
    shapes = {row.shape for row in first.times}
    told = KeptRatio(Estimate(0.25, 0.24, 0.26, Origin.MEASURED), 0.2, (4, True))
    assert ShapeCache(path, {}).keep({shape: {Format.BF16: told} for shape in shapes}) is None
    again = probe_speed(workload, ("bf16", "fp16"), seconds=0.5)
    rows = {(r.unit, r.format): r for r in again.times}
    for (unit, choice), r in rows.items():
        if choice is Format.BF16 and " + " not in r.shape:
            assert r.ratio.value == pytest.approx(0.25)
            assert r.forward_ms == pytest.approx(min(0.2, 0.25) * rows[unit, Format.FP32].forward_ms, rel=0.3)
        if choice is Format.FP16:
            assert r.ratio.value != pytest.approx(0.25)  # the new format is timed
    alone = probe_speed(workload, ("bf16",), seconds=0.5, cache=False)
    assert all(r.ratio.value != 0.25 for r in alone.times)


@pytest.mark.parametrize("content", ["", "{", '{"ratios": {"a": {"bf16": {}}}}', '{"ratios": {"a": {"int3": 1}}}'])
def test_a_damaged_cache_is_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = ShapeCache.of(torch.device("cpu"), Mode.INFER, Format.BF16)
    cache.path.parent.mkdir(parents=True)
    cache.path.write_text(content)
    assert ShapeCache.of(torch.device("cpu"), Mode.INFER, Format.BF16).ratios == {}


def test_wide_spreads_are_not_kept_and_hopeless_ones_are() -> None:
    narrow, wide, slow = (
        KeptRatio(Estimate(v, v - r, v + r, Origin.MEASURED), v) for v, r in ((0.5, 0.01), (0.5, 0.2), (9.0, 5.0))
    )
    assert [r.is_settled(SETTLED) for r in (narrow, wide, slow)] == [True, False, True]


# from which size on a format pays


class Clocked:
    """Work whose seconds are told by format and rows, not by a clock."""

    def __init__(self, run: Any, around: Any) -> None:
        self.run, self.choice = run, around

    def seconds(self) -> float:
        rows: int = self.run().shape[0]
        return 1e-4 * rows if self.choice is Format.FP32 else 2.6e-4 + 0.5e-4 * rows


@pytest.mark.parametrize(("rows", "expected"), [(4, (2, True)), (1, (8, True))])
def test_the_batch_from_which_on_a_format_pays(rows: int, expected: tuple[int, bool]) -> None:
    """FP32 takes 0.1 ms a row, BF16 0.26 ms and 0.05 ms a row: even at 5.2 rows."""
    layer = torch.nn.Linear(3, 2)
    site = Site("u", "u", layer, True, {})
    call = Call(site, (torch.ones(rows, 3),), {}, 1, "s")
    found = break_even(call, Format.BF16, Clocked, lambda f: f, lambda: True, 1e-4, training=False)  # type: ignore[arg-type, return-value]
    assert found == expected


def test_a_lookup_has_no_such_batch() -> None:
    call = Call(Site("u", "u", torch.nn.Embedding(9, 2), True, {}), (torch.ones(2, 3).long(),), {}, 1, "s")
    assert break_even(call, Format.BF16, Clocked, lambda f: f, lambda: True, 1e-4, training=False) is None  # type: ignore[arg-type, return-value]


# reasons


def test_sizes_that_tensor_cores_do_not_take_are_named_with_the_padded_one() -> None:
    head = Leaf("lm_head", LeafKind.LINEAR, 768, 50257, 768 * 50257)
    assert misfit([head], Format.BF16) == "lm_head has 50257 outputs, no multiple of 8; pad to 50264"
    assert misfit([head], Format.FP8) == "lm_head has 50257 outputs, no multiple of 16; pad to 50272"
    assert misfit([Leaf("fc", LeafKind.LINEAR, 768, 3072, 768 * 3072)], Format.FP8) is None


def test_a_format_that_pays_needs_no_reason() -> None:
    model = gpt2()
    known = probe_units(model)
    ffn = known.unit("blocks.0.ffn")
    assert why_not(known, ffn, Format.BF16, Estimate(0.5, 0.4, 0.6, Origin.MEASURED), torch.device("cpu")) is None
    slow = why_not(known, ffn, Format.BF16, Estimate(1.2, 1.1, 1.3, Origin.MEASURED), torch.device("cpu"))
    assert slow is not None and "1.20 (1.10-1.30) times FP32's time" in slow
    doubtful = Estimate(1.2, 1.1, 1.3, Origin.MEASURED)
    small = why_not(known, ffn, Format.BF16, doubtful, torch.device("cpu"), (8, True), 16)
    assert small is not None and "pays from about 128 tokens a step on (16 here)" in small
    never = why_not(known, ffn, Format.BF16, doubtful, torch.device("cpu"), (32, False), 16)
    assert never is not None and "up to 512 tokens a step (16 here) it does not pay either" in never


# CUDA's clock, on stand-ins


class Cuda:
    """What a timer asks of torch.cuda, counting: a replay takes so many µs, a launched run 50."""

    def __init__(self, *, captures: bool, replay_us: float = 20.0) -> None:
        self.captures, self.replay_us, self.now_ms, self.capturing = captures, replay_us, 0.0, False

    def synchronize(self) -> None:
        """Done already."""

    def Stream(self) -> Any:
        return self

    current_stream = Stream

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def CUDAGraph(self) -> Any:
        cuda = self

        class Graph:
            def replay(self) -> None:
                cuda.now_ms += cuda.replay_us / 1e3

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def Event(self, enable_timing: bool) -> Any:
        cuda = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = cuda.now_ms

            def synchronize(self) -> None:
                """Done already."""

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)

        return Event()

    def run(self) -> None:
        if self.capturing and not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now_ms += 0.05


@pytest.mark.parametrize(
    ("captures", "replay_us", "seconds"),
    [(True, 20.0, 50e-6), (True, 80.0, 80e-6), (False, 80.0, 50e-6)],
    ids=["launching takes longer", "kernels take longer", "no graph"],
)
def test_a_run_takes_what_its_kernels_or_their_launches_take(captures: bool, replay_us: float, seconds: float) -> None:
    cuda, notes, entered = Cuda(captures=captures, replay_us=replay_us), list[str](), []

    def around() -> Any:
        entered.append(1)
        return contextlib.nullcontext()

    work = _Graph(cuda.run, around, cuda, notes, clock=lambda: cuda.now_ms / 1e3)
    assert work.seconds() == pytest.approx(seconds)
    assert work.launch_bound is (captures and replay_us < 50)
    assert bool(notes) is not captures
    assert len(entered) == 2  # what is launched again needs its formats again


def test_a_frozen_embedding_has_no_backward() -> None:
    """It is given ids, so there is nothing to derive: both ways are the forward alone."""
    workload = gpt2_workload("train")
    for name, parameter in workload.model.named_parameters():
        parameter.requires_grad_(".wte." not in name and ".wpe." not in name)
    modules = canonical_modules(workload.model)
    known = probe_units(workload.model)
    sites = find_sites(known, modules, [Format.BF16], Format.BF16, emulated=False)
    calls = record_calls(workload, workload.batches[0], sites, known, modules, gradients=True)
    lookup = next(call for call in calls if call.site.unit == "embeddings")
    assert torch.equal(lookup.both(), lookup.forward())
    assert any(r.unit == "embeddings" for r in probe_speed(workload, ("bf16",), seconds=1.0).times)
