"""A tripwire finds the unit that leaves its format's range, widens it in place, and leaves healthy training alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import arguments, data_of, history, model_of
from torch import nn

from autoprec import Plan, applied, apply
from autoprec.errors import PlanError, TrainingError, UsageError
from autoprec.formats import Format
from autoprec.integrations.transformers import PrecisionCallback, PrecisionTrainer
from autoprec.runtime.tripwire import Tripwire, TripwireLimits


def plan_of(model: nn.Module, choice: str, **options: Any) -> Plan:
    return Plan.uniform(model, choice, **options)


def unit_of(plan: Plan, module: str) -> str:
    return next(u.name for u in plan.units if module in u.modules)


def loud(model: Any, factor: float = 1e9) -> Any:
    """Let block 1's FFN hand on values `factor` times as large, and its second layer's input that much smaller."""
    mlp = model.transformer.h[1].mlp
    with torch.no_grad():
        mlp.c_proj.weight *= factor
        mlp.c_fc.weight *= 1e-3
        mlp.c_fc.bias *= 1e-3
    return model


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    rows = data_of(2 * count)
    return [{k: torch.stack([a[k], b[k]]) for k in a} for a, b in zip(rows[::2], rows[1::2], strict=True)]


def train(model: Any, wire: Tripwire, steps: int, scaler: Any = None, call: Any = None) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for index, batch in enumerate(batches(steps)):
        with wire.step(index, scaler=scaler):
            loss = (model if call is None else call)(**batch).loss
            scaler.scale(loss).backward()
        if wire.step_is_sound:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("choice", ["fp32", "bf16", "fp16", "fp8"])
def test_healthy_training_crosses_nothing(choice: str) -> None:
    model = model_of()
    with applied(model, plan_of(model, choice), emulate=True) as handle:
        wire = Tripwire(handle, every=1)
        train(model, wire, 10, torch.amp.GradScaler("cpu") if choice == "fp16" else None)
        assert wire.crossings == [] and handle.plan == plan_of(model, choice)
        assert {r.unit for r in wire.readings} == {u.name for u in handle.plan.units}
        assert all(0 < r.largest_output < 100 and r.largest_gradient for r in wire.readings)
        assert all(r.underflow is not None and r.underflow < 0.01 and r.overflow == 0 for r in wire.readings)


def test_the_readings_are_what_came_out_and_back() -> None:
    model = model_of().eval()
    plan = plan_of(model, "bf16")
    name = "transformer.h.0.mlp.c_proj"
    seen: dict[str, torch.Tensor] = {}

    def look(module: nn.Module, args: Any, y: torch.Tensor) -> None:
        seen["y"] = y.detach()
        y.register_hook(lambda g: seen.update(g=g))

    model.get_submodule(name).register_forward_hook(look)
    with applied(model, plan) as handle:
        wire = Tripwire(handle)
        with wire.step(0):
            model(**batches(1)[0]).loss.backward()
    reading = next(r for r in wire.readings if r.unit == unit_of(plan, name))
    assert reading.largest_output >= float(seen["y"].abs().max())
    assert reading.largest_gradient is not None and reading.largest_gradient >= float(seen["g"].abs().max())
    assert reading.order == -1


def test_a_unit_that_overflows_fp16_is_widened_alone_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = loud(model_of())
    plan = plan_of(model, "fp16")
    unit = unit_of(plan, "transformer.h.1.mlp.c_fc")
    saved: list[Plan] = []
    with applied(model, plan) as handle:
        wire = Tripwire(handle, every=50, changed=saved.append)
        losses = train(model, wire, 4, torch.amp.GradScaler("cpu"))
        assert [(step, c.unit) for step, c in wire.crossings][0] == (0, unit)
        assert handle.plan.assignment[unit] is Format.BF16
        assert "promoted from fp16 at step 0: a result is not finite" in handle.plan.unit(unit).reason
        assert saved[0] == handle.plan or saved[-1] == handle.plan
    assert f"unit '{unit}' (fp16): a result is not finite; it computes in bf16" in caplog.text
    assert losses[0] != losses[0]  # NaN
    assert all(loss == loss for loss in losses[-2:])


def test_a_result_near_the_end_of_the_range_is_enough() -> None:
    model = model_of()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] = 10_000.0
        model.transformer.h[0].mlp.c_proj.weight[0] = 0.0
    plan = plan_of(model, "fp16")
    unit = unit_of(plan, "transformer.h.0.mlp.c_fc")
    with applied(model, plan) as handle:
        wire = Tripwire(handle)
        (loss,) = train(model, wire, 1, torch.amp.GradScaler("cpu"))
        assert loss == loss
        assert [c.what for _, c in wire.crossings] == ["a result of 10000 is over 1/8 of 65504"]
        assert handle.plan.assignment[unit] is Format.BF16
    with applied(model, plan) as handle:
        wire = Tripwire(handle, limits=TripwireLimits(range_part=0.5))
        train(model, wire, 1, torch.amp.GradScaler("cpu"))
        assert wire.crossings == []


def test_gradients_that_vanish_in_fp16_are_seen() -> None:
    model = model_of()
    with applied(model, plan_of(model, "fp16")) as handle:
        wire = Tripwire(handle)
        with wire.step(0):  # no scaler, and a loss as small as that of a long accumulation
            (model(**batches(1)[0]).loss * 1e-4).backward()
        assert wire.crossings and all("lies under the normal range" in c.what for _, c in wire.crossings)
        assert Format.BF16 in handle.plan.formats


def test_a_wider_unit_computes_as_if_the_plan_had_been_so() -> None:
    model = loud(model_of().eval())
    fresh = copy.deepcopy(model)
    with applied(model, plan_of(model, "fp16")) as handle:
        wire = Tripwire(handle)
        with wire.step(0):
            model(**batches(1)[0]).loss.backward()
        changed = handle.plan
        after = model(**batches(1)[0]).logits
    apply(fresh, changed)
    assert torch.equal(after, fresh(**batches(1)[0]).logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
def test_compiled_code_is_watched_and_follows_the_change() -> None:
    model = loud(model_of())
    compiled = torch.compile(model, backend="aot_eager")
    with applied(model, plan_of(model, "fp16")) as handle:
        wire = Tripwire(handle, every=2)
        losses = train(model, wire, 6, torch.amp.GradScaler("cpu"), call=compiled)
        assert len(wire.crossings) >= 1 and all(loss == loss for loss in losses[-2:])
    torch.compiler.reset()


def test_it_can_stop_instead() -> None:
    model = loud(model_of())
    with applied(model, plan_of(model, "fp16")) as handle:
        wire = Tripwire(handle, then="stop")
        with pytest.raises(TrainingError, match=r"step 0: unit '.*' \(fp16\): a result is not finite"):
            train(model, wire, 1)
        assert handle.plan == plan_of(model, "fp16")
    with pytest.raises(UsageError, match="every must be 1"):
        Tripwire(handle, every=0)


def test_weights_that_are_spoiled_already_are_no_formats_fault() -> None:
    model = model_of()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with applied(model, plan_of(model, "bf16")) as handle:
        with pytest.raises(TrainingError, match=r"c_fc.weight' holds values that are not finite.*last checkpoint"):
            train(model, Tripwire(handle), 1)


def test_values_that_fp32_does_not_hold_either_end_the_run() -> None:
    model = loud(model_of(), factor=3e38)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight *= 1e6
    with applied(model, plan_of(model, "fp32")) as handle:
        with pytest.raises(TrainingError, match=r"no format is wider.*learning rate"):
            train(model, Tripwire(handle), 1)


def test_an_exception_in_a_watched_step_leaves_no_hook() -> None:
    model = model_of()
    with applied(model, plan_of(model, "bf16")) as handle:
        wire = Tripwire(handle)
        with pytest.raises(ZeroDivisionError), wire.step(0):
            raise ZeroDivisionError
        assert not any(module._forward_hooks for module in model.modules()) and not wire.watching


# a plan changed in place


def test_a_change_is_all_or_nothing() -> None:
    model = model_of()
    plan = plan_of(model, "bf16")
    handle = apply(model, plan)
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(PlanError, match="the plan in force is of"):
        handle.change(plan_of(model_of(vocab_size=8), "bf16"))
    with pytest.raises(Exception, match="emulate=True"):
        handle.change(plan_of(model, "fp8"))
    assert handle.plan == plan and {name: type(m) for name, m in model.named_modules()} == before
    handle.remove()
    with pytest.raises(PlanError, match="removed before"):
        handle.change(plan)


# in the Trainer


def test_what_is_wrong_from_the_first_step_is_said_and_not_mended(tmp_path: Path) -> None:
    model = loud(model_of())
    plan = plan_of(model, "fp16")
    plan = plan.replace({u.name: "bf16" for u in plan.units if u.name != unit_of(plan, "transformer.h.1.mlp.c_fc")})
    trainer = PrecisionTrainer(
        model,
        arguments(tmp_path),
        train_dataset=data_of(),
        precision=PrecisionCallback(plan, watch_every=2),
    )
    with pytest.raises(TrainingError, match="first step"):
        trainer.train()
    assert not any(module._forward_hooks for module in model.modules())
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_unit_that_goes_wrong_while_training_is_widened_in_a_trainer(tmp_path: Path) -> None:
    model = model_of()
    plan = plan_of(model, "fp16")
    unit = unit_of(plan, "transformer.h.1.mlp.c_fc")
    callback = PrecisionCallback(plan, watch_every=2)
    trainer = PrecisionTrainer(
        model,
        arguments(tmp_path, save_strategy="steps", save_steps=3, learning_rate=0.0),
        train_dataset=data_of(),
        precision=callback,
    )
    original = trainer.training_step

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:  # a feature that a step has driven off, and that nothing reads
            with torch.no_grad():
                model.transformer.h[1].mlp.c_fc.bias[0] = 60_000.0
                model.transformer.h[1].mlp.c_proj.weight[0] = 0.0
        return original(*args, **kwargs)

    trainer.training_step = spoiled  # type: ignore[method-assign]
    trainer.train()
    assert callback.tripwire is not None
    assert [(step, c.unit) for step, c in callback.tripwire.crossings] == [(2, unit)]
    assert trainer.plan.assignment == plan.assignment | {unit: Format.BF16}
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        assert Plan.load(folder / "plan.json") == trainer.plan
    assert len(history(trainer)) == 6
