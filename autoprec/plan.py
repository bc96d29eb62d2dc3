"""A plan: which format each unit computes in, and what the training code around it needs to know.

A plan is a frozen value. It is read and checked without torch, so plans can be shown and compared anywhere.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from autoprec.errors import PlanError, closest
from autoprec.files import as_json, from_json, read_json, write_json
from autoprec.formats import Format, Fp8Recipe
from autoprec.records import (
    STRICT,
    DeviceProfile,
    Evidence,
    GradScalerSettings,
    Mode,
    ModelProfile,
    Origin,
    Pinned,
    PlanDevice,
    PlanDiff,
    PlanModel,
    PlanUnit,
    Role,
    Shown,
    Support,
    role_formats,
)

__all__ = [
    "SCHEMA",
    "Evidence",
    "GradScalerSettings",
    "Plan",
    "PlanDevice",
    "PlanDiff",
    "PlanModel",
    "PlanUnit",
    "check_modules",
    "set_profiler",
    "support_of",
]

SCHEMA = "autoprec/plan@1"
#: the training arguments that follow from the formats; others are the user's own
_MANAGED = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32")

_profiler: Callable[[Any], ModelProfile] | None = None


def set_profiler(profiler: Callable[[Any], ModelProfile]) -> None:
    """Tell plans how to turn an `nn.Module` into a `ModelProfile` (done once by the package)."""
    global _profiler
    _profiler = profiler


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Shown):
    """A format for every unit of a model, with ambient, stream and what training needs.

    Build one with `Plan.uniform`, `Plan.cast` or `Plan.load`, change it with `replace`, write it with `save`.
    A plan does not promise to run on a device that lacks one of its formats: `apply` raises there.
    """

    __pydantic_config__: ClassVar = STRICT

    schema: str = SCHEMA
    model: PlanModel
    device: PlanDevice
    mode: Mode
    ambient: Format
    stream: Format
    units: tuple[PlanUnit, ...]
    pinned: tuple[Pinned, ...]
    fp8_recipe: Fp8Recipe | None
    tf32: bool
    grad_scaler: GradScalerSettings | None
    training_arguments: Mapping[str, Any]
    evidence: Evidence

    def __post_init__(self) -> None:
        _check(self)

    # building

    @classmethod
    def uniform(cls, model: Any, choice: Format | str, **options: Any) -> Plan:
        """Return the plan of blanket autocast: GEMM units in `choice`, lookups and stream as autocast leaves them.

        Args:
            model: an `nn.Module` or a `ModelProfile`.
            choice: `fp32`, `bf16`, `fp16` or `fp8` (FP8 inside a bf16 ambient, fp16 where `device` lacks native bf16).
            options: `device` (a `DeviceProfile`), `mode`, `tf32`, `fp8_recipe`, `reason`.

        Raises:
            PlanError: no such format, or the model has no unit.
        """
        wanted = _format(choice)
        profile, device = _profile(model), options.get("device")
        low = device.ambient if isinstance(device, DeviceProfile) else Format.BF16
        if low is Format.FP32:
            low = Format.BF16  # nothing is native; FP8's result still needs a 16-bit home
        ambient = low if wanted is Format.FP8 else wanted
        formats = {
            u.name: (wanted if wanted in u.formats and u.role is not Role.EMBEDDING else _leave(u.role, ambient))
            for u in profile.units
        }
        options.setdefault("reason", f"uniform {wanted}, as torch.autocast does")
        return cls.assign(profile, formats, ambient=ambient, **options)

    @classmethod
    def cast(cls, model: Any, choice: Format | str, **options: Any) -> Plan:
        """Return the plan of `model.to(dtype)`: everything stored and computed in `choice`.

        Raises:
            PlanError: FP8, in which nothing can be stored whole.
        """
        wanted = _format(choice)
        if wanted is Format.FP8:
            raise PlanError("a model cannot be stored in fp8 as a whole; use Plan.uniform(model, 'fp8')")
        profile = _profile(model)
        options.setdefault("reason", f"cast to {wanted}, as model.to() does")
        formats = {u.name: wanted for u in profile.units}
        return cls.assign(profile, formats, ambient=wanted, stream=wanted, **options)

    @classmethod
    def assign(
        cls,
        model: Any,
        formats: Mapping[str, Format | str],
        *,
        ambient: Format | str = Format.BF16,
        stream: Format | str = Format.FP32,
        device: DeviceProfile | None = None,
        mode: Mode | str = Mode.TRAIN,
        tf32: bool = False,
        fp8_recipe: Fp8Recipe | str | None = None,
        reason: str | Mapping[str, str] = "",
    ) -> Plan:
        """Return a plan with the given format for each unit by name; a unit not named takes the ambient's.

        Raises:
            PlanError: an unknown unit, or a format the unit cannot take.
        """
        profile = _profile(model)
        names = {u.name for u in profile.units}
        for name in formats:
            if name not in names:
                raise PlanError(f"the model has no unit '{name}'{closest(name, names)}")
        around, recipe = _format(ambient), _choice(Fp8Recipe, fp8_recipe) if fp8_recipe else None
        units = tuple(
            PlanUnit(
                name=u.name,
                role=u.role,
                modules=u.modules,
                format=_format(formats.get(u.name, _leave(u.role, around))),
                reason=reason if isinstance(reason, str) else reason.get(u.name, ""),
            )
            for u in profile.units
        )
        for given, unit in zip(profile.units, units, strict=True):
            if unit.format not in given.formats:
                raise PlanError(
                    f"unit '{unit.name}' cannot take {unit.format}: it takes {', '.join(given.formats)}"
                    f"{_why_not(unit.role, unit.format)}"
                )
        if recipe is None and any(u.format is Format.FP8 for u in units):
            recipe = Fp8Recipe.TENSORWISE
        where = PlanDevice(
            name=device.name if device else "any",
            kind=device.kind if device else "any",
            origin=device.origin if device else Origin.PREDICTED,
        )
        plan = cls(
            model=PlanModel(id=profile.model_id, class_name=profile.class_name, fingerprint=profile.fingerprint),
            device=where,
            mode=_choice(Mode, mode),
            ambient=around,
            stream=_format(stream),
            units=units,
            pinned=profile.pinned,
            fp8_recipe=recipe,
            tf32=tf32,
            grad_scaler=None,
            training_arguments={},
            evidence=Evidence(),
        )
        return plan.with_training_needs()

    # changing

    def replace(self, formats: Mapping[str, Format | str]) -> Plan:
        """Return this plan with other formats for some units; ambient and stream stay, evidence is dropped.

        Raises:
            PlanError: an unknown unit, or a format the unit cannot take.
        """
        names = {u.name for u in self.units}
        for name in formats:
            if name not in names:
                raise PlanError(f"the plan has no unit '{name}'{closest(name, names)}")
        units = tuple(
            dataclasses.replace(u, format=_format(formats[u.name]), reason="set by replace")
            if u.name in formats and _format(formats[u.name]) is not u.format
            else u
            for u in self.units
        )
        if units == self.units:
            return self
        recipe = self.fp8_recipe
        if recipe is None and any(u.format is Format.FP8 for u in units):
            recipe = Fp8Recipe.TENSORWISE
        changed = dataclasses.replace(self, units=units, fp8_recipe=recipe, evidence=Evidence())
        return changed.with_training_needs()

    def refit(self, model: Any) -> Plan:
        """Return this plan for another form of its model: with adapters, or with weights packed in 4 bits.

        Formats by unit and settings stay, evidence is dropped: a plan made from a name does not know such layers.

        Raises:
            PlanError: the model has other units, or one cannot take its format.
        """
        profile, mine = _profile(model), self.assignment
        if other := set(mine).symmetric_difference(u.name for u in profile.units):
            raise PlanError(
                f"the model is not another form of {self.model.id}: unit '{min(other)}' is in one of the two only"
            )
        fresh = Plan.assign(
            profile, mine, ambient=self.ambient, mode=self.mode, reason={u.name: u.reason for u in self.units}
        )
        where = dataclasses.replace(fresh.model, id=self.model.id)
        return dataclasses.replace(self, model=where, units=fresh.units, pinned=fresh.pinned, evidence=Evidence())

    def with_evidence(self, evidence: Evidence) -> Plan:
        """Return this plan with other evidence."""
        return dataclasses.replace(self, evidence=evidence)

    def with_training_needs(self) -> Plan:
        """Set the gradient scaler and TrainingArguments that the formats ask for."""
        fp16 = Format.FP16 in {self.ambient, self.stream, *(u.format for u in self.units)}
        scaler = (self.grad_scaler or GradScalerSettings()) if fp16 and self.mode is Mode.TRAIN else None
        others = {k: v for k, v in self.training_arguments.items() if k not in _MANAGED}
        return dataclasses.replace(
            self, grad_scaler=scaler, training_arguments=others | _training_arguments(self, fp16)
        )

    # reading

    @property
    def assignment(self) -> dict[str, Format]:
        """The format of each unit by name."""
        return {u.name: u.format for u in self.units}

    @property
    def formats(self) -> frozenset[Format]:
        """All formats that units of this plan compute in."""
        return frozenset(u.format for u in self.units)

    def unit(self, name: str) -> PlanUnit:
        """Return the unit called `name`; raises PlanError with the closest names where there is none."""
        for unit in self.units:
            if unit.name == name:
                return unit
        raise PlanError(f"the plan has no unit '{name}'{closest(name, (u.name for u in self.units))}")

    def diff(self, other: Plan) -> PlanDiff:
        """Return what differs between this plan and another: formats by unit, and settings (not evidence)."""
        mine, theirs = self.assignment, other.assignment
        units = {
            n: (mine.get(n), theirs.get(n)) for n in dict.fromkeys((*mine, *theirs)) if mine.get(n) != theirs.get(n)
        }
        keys = ("ambient", "stream", "mode", "fp8_recipe", "tf32", "grad_scaler")
        settings = {k: (getattr(self, k), getattr(other, k)) for k in keys if getattr(self, k) != getattr(other, k)}
        if self.model.fingerprint != other.model.fingerprint:
            settings["model"] = (self.model.id, other.model.id)
        return PlanDiff(units, settings)

    # files

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON data (schema `autoprec/plan@1`)."""
        data: dict[str, Any] = as_json(self)
        data["model"]["class"] = data["model"].pop("class_name")
        return data

    @classmethod
    def from_json(cls, data: Any, *, what: str = "the plan") -> Plan:
        """Build a plan from JSON data; the inverse of `to_json`.

        Raises:
            PlanError: another schema, or an unknown, missing or ill-typed field, with its place.
        """
        if not isinstance(data, dict) or "schema" not in data:
            raise PlanError(f"{what} is no autoprec plan: it has no 'schema'; a plan.json has schema '{SCHEMA}'")
        if data["schema"] != SCHEMA:
            newer = str(data["schema"]).startswith("autoprec/plan@")
            advice = "install a newer autoprec to read it" if newer else f"a plan.json has schema '{SCHEMA}'"
            raise PlanError(f"{what} is not valid at schema: {data['schema']!r} is not known here; {advice}")
        model = data.get("model")
        if isinstance(model, dict):
            if "class_name" in model:
                raise PlanError(f"{what} is not valid at model.class_name: the field is called 'class'")
            if not isinstance(model.get("class"), str):
                raise PlanError(f"{what} is not valid at model.class: it must be a text (got {model.get('class')!r})")
            data = data | {"model": {("class_name" if k == "class" else k): v for k, v in model.items()}}
        return from_json(cls, data, what=what, error=PlanError)

    def save(self, path: str | Path) -> None:
        """Write the plan atomically; on failure the previous file stays."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: missing, damaged, cut off, foreign or of a newer schema, with the place.
        """
        return cls.from_json(read_json(path, what="plan", error=PlanError), what=f"plan {path}")


def check_modules(plan: Plan, modules: Collection[str]) -> None:
    """Check that every module the plan names is among `modules` (fully qualified names).

    Raises:
        PlanError: names the unit, the module and the closest names.
    """
    known = set(modules)
    for unit in plan.units:
        for name in unit.modules:
            if name not in known:
                raise PlanError(
                    f"the plan's unit '{unit.name}' names module '{name}', which the model does not have"
                    f"{closest(name, known)}. The plan was made for {plan.model.id} ({plan.model.class_name})."
                )


def _profile(model: Any) -> ModelProfile:
    if isinstance(model, ModelProfile):
        return model
    if _profiler is None:
        raise PlanError("give a ModelProfile (autoprec.probe_units(model)); no module profiler is set")
    return _profiler(model)


def _format(value: Format | str) -> Format:
    try:
        return Format(str(value).lower())
    except ValueError:
        raise PlanError(f"'{value}' is no format; choose one of {', '.join(Format)}") from None


_Choice = TypeVar("_Choice", bound=StrEnum)


def _choice(kind: type[_Choice], value: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        raise PlanError(f"'{value}' is not known; choose one of {', '.join(kind)}") from None


def _leave(role: Role, ambient: Format) -> Format:
    """Return what autocast leaves a unit in: lookups keep their weight's FP32, GEMMs and convolutions go low."""
    return Format.FP32 if role is Role.EMBEDDING else ambient


def _check(plan: Plan) -> None:
    """Check what types cannot: unique names, modules placed once, formats a role can take."""
    if not plan.units:
        raise PlanError("the plan has no unit, so it decides nothing")
    for name, count in Counter(u.name for u in plan.units).items():
        if count > 1:
            raise PlanError(f"unit '{name}' stands {count} times in the plan; a unit has one format")
    seen: dict[str, str] = {}
    groups = [(f"unit '{u.name}'", u.modules) for u in plan.units] + [("pinned", p.modules) for p in plan.pinned]
    for owner, modules in groups:
        for module in modules:
            if module in seen:
                raise PlanError(f"module '{module}' is named by {seen[module]} and by {owner}; it can be in one only")
            seen[module] = owner
    for unit in plan.units:
        if unit.format not in role_formats(unit.role):
            raise PlanError(
                f"unit '{unit.name}' cannot take {unit.format}: {unit.role} units take "
                f"{', '.join(role_formats(unit.role))}{_why_not(unit.role, unit.format)}"
            )
    if plan.ambient is Format.FP8 or plan.stream is Format.FP8:
        raise PlanError("ambient and stream cannot be fp8: FP8 results and the residual stream need 16 bits or more")
    if plan.fp8_recipe is None and Format.FP8 in plan.formats:
        raise PlanError("the plan has fp8 units and no fp8_recipe; set 'tensorwise' or 'rowwise'")


def _why_not(role: Role, choice: Format) -> str:
    if choice is not Format.FP8:
        return ""
    why = {Role.EMBEDDING: "a lookup has no matmul", Role.CONV: "no FP8 convolution kernel exists in PyTorch"}
    return f" ({why[role]})" if role in why else ""


def _training_arguments(plan: Plan, fp16: bool) -> dict[str, Any]:
    """Return the global flags of `transformers.TrainingArguments` that go with the plan.

    `*_full_eval` would cast the whole model with `model.to` and destroy a mixed plan, so both are off.
    FP16 anywhere asks for fp16=True, which is what makes the Trainer scale and unscale gradients.
    """
    if plan.mode is not Mode.TRAIN:
        return {}
    low = plan.formats - {Format.FP32} or plan.ambient is not Format.FP32
    arguments: dict[str, Any] = {
        "bf16": bool(low) and not fp16,
        "fp16": fp16,
        "bf16_full_eval": False,
        "fp16_full_eval": False,
    }
    if plan.device.kind == "cuda":
        arguments["tf32"] = plan.tf32
    if plan.device.kind == "cpu":
        arguments["use_cpu"] = True  # bf16 without a GPU raises otherwise
    return arguments


def support_of(plan: Plan, device: DeviceProfile) -> tuple[str, ...]:
    """Return what the plan asks for and the device lacks, one sentence each; empty when it has all."""
    missing = []
    for choice in Format:
        used = [u.name for u in plan.units if u.format is choice]
        if used and device.supports(choice) is Support.ABSENT:
            why = device.formats[choice].reason if choice in device.formats else "not known to this device"
            missing.append(f"{choice} in {len(used)} units (first {used[0]}): {device.name} lacks it ({why})")
    return tuple(missing)
