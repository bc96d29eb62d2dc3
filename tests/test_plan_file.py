"""Plan files: read whole or refused with the place, and written whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import LOOKUP, profile, written

from autoprec.errors import AutoprecError, PlanError
from autoprec.formats import Format, Fp8Recipe
from autoprec.plan import (
    SCHEMA,
    Evidence,
    GradScalerSettings,
    Plan,
    PlanDevice,
    PlanModel,
    PlanUnit,
)
from autoprec.records import (
    Figure,
    Mode,
    Origin,
    Pinned,
    Role,
    role_formats,
)

# plan -> file -> plan

NAMES = st.text(min_size=1, max_size=12)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
FIGURES = st.none() | st.builds(
    Figure,
    value=FLOATS,
    ci95=st.none() | st.tuples(FLOATS, FLOATS),
    unit=NAMES,
    origin=st.sampled_from(Origin),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that passes the checks: unique units, each module in one place, formats that roles can take."""
    modules = draw(st.lists(NAMES, min_size=2, max_size=12, unique=True))
    cuts = sorted(draw(st.sets(st.integers(1, len(modules) - 1), min_size=1, max_size=4)))
    groups = [modules[i:j] for i, j in zip([0, *cuts], [*cuts, len(modules)], strict=True)]
    names = draw(st.lists(NAMES, min_size=len(groups), max_size=len(groups), unique=True))
    units = []
    for name, group in zip(names[1:], groups[1:], strict=True):
        role = draw(st.sampled_from(Role))
        choice = draw(st.sampled_from(role_formats(role)))
        units.append(PlanUnit(name=name, role=role, modules=tuple(group), format=choice, reason=draw(NAMES)))
    fp8 = any(u.format is Format.FP8 for u in units)
    return Plan(
        model=PlanModel(id=draw(NAMES), class_name=draw(NAMES), fingerprint=draw(NAMES)),
        device=PlanDevice(name=draw(NAMES), kind=draw(NAMES), origin=draw(st.sampled_from(Origin))),
        mode=draw(st.sampled_from(Mode)),
        ambient=draw(st.sampled_from(LOOKUP)),
        stream=draw(st.sampled_from(LOOKUP)),
        units=tuple(units),
        pinned=(Pinned(tuple(groups[0]), draw(NAMES)),),
        fp8_recipe=draw(st.sampled_from(Fp8Recipe) if fp8 else st.none() | st.sampled_from(Fp8Recipe)),
        tf32=draw(st.booleans()),
        grad_scaler=draw(
            st.none()
            | st.builds(
                GradScalerSettings, init_scale=FLOATS, growth_interval=st.integers(1, 10**9), growth_factor=FLOATS
            )
        ),
        training_arguments=draw(st.dictionaries(NAMES, JSON, max_size=3)),
        evidence=draw(
            st.builds(
                Evidence,
                drop=FIGURES,
                step_ms=FIGURES,
                speedup=FIGURES,
                peak_bytes=FIGURES,
                weights_digest=st.none() | NAMES,
                versions=st.dictionaries(NAMES, NAMES, max_size=3),
                seed=st.none() | st.integers(),
            )
        ),
    )


@given(plan=plans())
def test_plan_to_file_to_plan_is_the_identity(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        plan.save(path)
        assert Plan.load(path) == plan
    assert Plan.from_json(written(plan)) == plan


def test_the_file_has_the_documented_fields() -> None:
    data = written(Plan.uniform(profile(), "fp16"))
    assert list(data) == [
        "schema",
        "model",
        "device",
        "mode",
        "ambient",
        "stream",
        "units",
        "pinned",
        "fp8_recipe",
        "tf32",
        "grad_scaler",
        "training_arguments",
        "evidence",
    ]
    assert data["schema"] == SCHEMA == "autoprec/plan@1"
    assert set(data["model"]) == {"id", "class", "fingerprint"}
    assert set(data["device"]) == {"name", "kind", "origin"}
    assert all(set(unit) == {"name", "role", "modules", "format", "reason"} for unit in data["units"])
    assert all(set(group) == {"modules", "reason"} for group in data["pinned"])
    assert set(data["grad_scaler"]) == {"init_scale", "growth_factor", "backoff_factor", "growth_interval"}
    assert set(data["evidence"]) == {
        "drop",
        "step_ms",
        "speedup",
        "peak_bytes",
        "weights_digest",
        "versions",
        "seed",
    }


# damage


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved plan with something in every field."""
    figure = Figure(value=0.0125, ci95=(0.01, 0.015), unit="nats", origin=Origin.MEASURED)
    plan = Plan.uniform(profile(), "fp8").replace({"lm_head": "fp16"})
    plan = plan.with_evidence(
        Evidence(drop=figure, weights_digest="ab12", versions={"torch": "2.13.0", "python": "3.11"}, seed=7)
    )
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


def outcome(path: Path) -> Plan | str:
    """Return the plan of a file, or the message of its PlanError; any other exception fails the test."""
    try:
        return Plan.load(path)
    except PlanError as error:
        return str(error)


def test_a_cut_off_file_is_refused_with_the_place(saved: Path) -> None:
    whole, plan = saved.read_bytes(), Plan.load(saved)
    for length in range(0, len(whole) - 1, 7):  # all but the last newline, which says nothing
        saved.write_bytes(whole[:length])
        message = outcome(saved)
        assert isinstance(message, str), f"cut to {length} of {len(whole)} bytes"
        assert str(saved) in message and "line" in message
    saved.write_bytes(whole.rstrip(b"\n"))
    assert outcome(saved) == plan


@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_damaged_byte_is_refused_or_read_as_it_stands(where: float, byte: int) -> None:
    """A changed letter inside a reason cannot be told from the truth; but nothing is guessed, dropped or defaulted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        Plan.uniform(profile(), "fp8").with_evidence(Evidence(seed=7, versions={"torch": "2.13.0"})).save(path)
        damaged = bytearray(path.read_bytes())
        damaged[int(where * len(damaged))] = byte
        path.write_bytes(damaged)
        found = outcome(path)
        if isinstance(found, Plan):
            assert found.to_json() == json.loads(bytes(damaged))
        else:
            assert str(path) in found


@given(data=JSON)
def test_foreign_json_is_refused(data: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(data)
    with pytest.raises(PlanError):
        Plan.from_json({"schema": SCHEMA, "model": data})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged or cut off: Expecting value at line 1 column 1"),
        ("[]", "no autoprec plan: it has no 'schema'"),
        ('{"format": "gguf"}', "no autoprec plan"),
        ('{"schema": "autoprec/search@1"}', r"'autoprec/search@1' is not known here; a plan\.json has schema"),
        ('{"schema": "autoprec/plan@2"}', "not valid at schema: 'autoprec/plan@2'.*install a newer autoprec"),
        ('{"schema": 1}', "not valid at schema: 1 is not known"),
        ('{"schema": "autoprec/plan@1"}', "not valid at model: Field required|missing"),
        ('{"schema": "autoprec/plan@1", "schema": "autoprec/plan@1"}', "the field 'schema' stands twice"),
        ("[" * 100_000, "damaged"),
        ('{"schema": ' + "9" * 5000 + "}", "damaged"),
        ('{"schema": "autoprec/plan@1", "model": {"id": "\\ud800"}}', "not valid"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\x93\x00\xff" * 10)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(path)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load("plan\0.json")


def put(data: Any, place: str, value: Any) -> None:
    """Set the value at a place such as `units.3.format`; the value `delete` removes it."""
    *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
    for step in way:
        data = data[step]
    if value is delete:
        del data[last]
    else:
        data[last] = value


delete = object()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("ambiance", "bf16"),
        ("model.revision", "main"),
        ("model.class_name", "TinyModel"),
        ("device.memory", 1),
        ("units.2.bits", 8),
        ("pinned.0.role", "norm"),
        ("grad_scaler.enabled", True),
        ("evidence.notes", "none"),
        ("evidence.drop.ci99", [0.0, 1.0]),
        ("mode", delete),
        ("units", delete),
        ("model.class", delete),
        ("model.fingerprint", delete),
        ("units.3.format", delete),
        ("units.0.modules", delete),
        ("pinned.0.reason", delete),
        ("evidence.drop.unit", delete),
        ("mode", "serve"),
        ("ambient", "int8"),
        ("ambient", None),
        ("stream", "BF16"),
        ("units", {}),
        ("units", None),
        ("units.3", "blocks.0.ffn"),
        ("units.3.format", "fp4"),
        ("units.3.format", 16),
        ("units.3.role", "mlp"),
        ("units.3.modules", "h.0.mlp.up"),
        ("units.3.modules.0", 5),
        ("units.3.name", None),
        ("units.3.reason", ["a"]),
        ("fp8_recipe", "blockwise"),
        ("tf32", "false"),
        ("tf32", 0),
        ("grad_scaler.init_scale", "65536"),
        ("grad_scaler.growth_interval", 2000.5),
        ("model", "tiny"),
        ("model.class", 5),
        ("model.id", 5),
        ("device.origin", "guessed"),
        ("training_arguments", []),
        ("evidence.drop.value", "0.01"),
        ("evidence.drop.value", float("nan")),
        ("evidence.drop.ci95", [0.0]),
        ("evidence.drop.ci95", [0.0, 1.0, 2.0]),
        ("evidence.drop.origin", "felt"),
        ("evidence.seed", "7"),
        ("evidence.versions.torch", 2),
    ],
)
def test_unknown_missing_and_ill_typed_fields_are_refused_at_their_place(saved: Path, place: str, value: Any) -> None:
    data = json.loads(saved.read_text())
    put(data, place, value)
    with pytest.raises(PlanError) as caught:
        Plan.from_json(data, what="plan x.json")
    assert str(caught.value).startswith("plan x.json is not valid")
    if value == value:  # NaN is found before places are known
        assert place in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("units", [], "no unit"),
        ("units.3.name", "blocks.0.attention", r"unit 'blocks\.0\.attention' stands 2 times"),
        ("units.3.modules.0", "h.0.attn.qkv", r"module 'h\.0\.attn\.qkv' is named by unit 'blocks\.0\.attention' and"),
        ("units.3.modules.0", "h.0.ln", r"module 'h\.0\.ln' is named by unit 'blocks\.0\.ffn' and by pinned"),
        (
            "units.3.modules.0",
            "h.0.mlp.down",
            r"module 'h\.0\.mlp\.down' is named by unit 'blocks\.0\.ffn' and by unit",
        ),
        ("units.0.format", "fp8", "unit 'embedding' cannot take fp8: embedding units take fp32, bf16, fp16"),
        ("units.1.format", "fp8", "unit 'stem' cannot take fp8: conv units take"),
        ("ambient", "fp8", "ambient and stream cannot be fp8"),
        ("stream", "fp8", "ambient and stream cannot be fp8"),
        ("fp8_recipe", None, "fp8 units and no fp8_recipe"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(saved: Path, place: str, value: Any, message: str) -> None:
    data = json.loads(saved.read_text())
    put(data, place, value)
    saved.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(saved)
    assert str(saved) in str(caught.value)


def test_values_that_are_no_json_are_refused_when_building_and_when_saving(tmp_path: Path) -> None:
    data = Plan.uniform(profile(), "bf16").to_json() | {"training_arguments": {"callback": object()}}
    with pytest.raises(PlanError, match="not valid"):
        Plan.from_json(data)
    plan = dataclasses.replace(Plan.uniform(profile(), "bf16"), training_arguments={"callback": object()})
    with pytest.raises(AutoprecError, match="cannot be written as JSON"):
        plan.save(tmp_path / "plan.json")
    figure = Figure(value=float("inf"), ci95=None, unit="nats", origin=Origin.MEASURED)
    with pytest.raises(AutoprecError, match="not JSON compliant"):
        plan = Plan.uniform(profile(), "bf16").with_evidence(Evidence(drop=figure))
        plan.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


# writing


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_plan(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(AutoprecError, match=r"No space left on device; the previous file is unchanged.*--out"):
        Plan.uniform(profile(), "fp32").save(saved)
    with pytest.raises(AutoprecError, match=r"No space left on device\. Free space"):
        Plan.uniform(profile(), "fp32").save(saved.with_name("new.json"))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
