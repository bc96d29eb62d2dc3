"""Solved fronts: for a model with known drops, on a device, the fastest assignment within each allowance.

Times are those of `predict`, made additive by tangents (`predict/additive.py`): each solve gives an assignment, whose
own tangent the next uses, and a time that no assignment can beat; where both meet, the front is exact. Drops are those
that units cause alone, emulated (`benchmarks/small_models.py`), and they add up.

Catalogued models have no weights here. Each stands on a trained relative: a unit's drop is that of the relative's unit
of the same role at the same depth, unchanged, so deeper models drop more in sum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from small_models import FOLDER

from autoprec.catalog import find_device
from autoprec.errors import DeviceError
from autoprec.files import from_json
from autoprec.formats import Format
from autoprec.models import catalogued_facts, catalogued_profile
from autoprec.predict.additive import StepPrices, step_prices
from autoprec.predict.setup import Optimizer, Setup
from autoprec.quantities import DropLimit
from autoprec.recommender.advice import Situation as Here
from autoprec.recommender.advice import base_choice, family_overflow, tf32_choice
from autoprec.recommender.choice import fp8_barrier
from autoprec.recommender.features import UnitFacts, unit_facts
from autoprec.records import DeviceProfile, Mode, ModelFacts, ModelProfile, Role, Support
from autoprec.study.front import ChainUnit, Choice, PredictedFront, predicted_front
from autoprec.study.space import fp8_fault

__all__ = ["LIMITS", "RELATIVES", "SIZES", "Sample", "Solved", "samples", "situation", "solved"]

#: allowances in percent
LIMITS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
#: sequences and tokens a sequence
SIZES = ((1, 128), (8, 512), (4, 2048), (64, 512))
#: partial assignments kept (`Chain.states`): enough for a bound within a thousandth
_STATES = 200
_TANGENTS = 3
#: trained models, and the catalogued ones that take their drops
RELATIVES: Mapping[str, tuple[str, ...]] = {
    "demo": ("gpt2-medium",),
    "gpt2": ("gpt2-large", "gpt2-xl"),
    "llama": ("llama-3.2-1b", "llama-3.1-8b"),
    "smollm2": ("smollm2-1.7b", "llama-2-13b"),
    "qwen2": ("qwen2.5-1.5b", "qwen2.5-7b"),
    "gemma": ("gemma-2b", "gemma-7b"),
    "opt": ("opt-1.3b", "opt-6.7b"),
    "neox": ("pythia-1.4b", "gpt-neox-20b"),
    "bloom": ("bloom-560m",),
    "mixtral": ("mixtral-8x7b",),
    "bert": ("bert-base-uncased", "bert-large-uncased"),
    "minilm": ("roberta-large",),
    "t5": ("t5-base", "t5-large"),
    "vit": ("vit-base-patch16-224", "vit-large-patch16-224"),
}
_DECIDED = (Role.ATTENTION, Role.FFN, Role.LM_HEAD, Role.OTHER)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """A model's shapes with the drop of each unit in each format, in percent; `source`: whose drops they are."""

    name: str
    source: str
    profile: ModelProfile
    facts: ModelFacts | None
    units: Mapping[str, UnitFacts]
    drops: Mapping[str, Mapping[Format, float]]

    @property
    def own(self) -> bool:
        """Whether the drops are the model's own."""
        return self.name == self.source

    def drop(self, assignment: Mapping[str, Format], *, tf32: bool) -> float:
        """Return the sum of drops in percent; TF32 rounds operands to FP16's mantissa."""
        total = 0.0
        for name, choice in assignment.items():
            given = Format.FP16 if choice is Format.FP32 and tf32 and name in self.drops else choice
            total += self.drops.get(name, {}).get(given, 0.0)
        return total


@cache
def samples(only: str | None = None) -> tuple[Sample, ...]:
    """Return all samples, or those of one trained model: each is followed by its catalogued relatives."""
    found = []
    for name, relatives in RELATIVES.items():
        if only not in (None, name):
            continue
        data = json.loads((FOLDER / f"{name}.json").read_text())
        profile = from_json(ModelProfile, data["profile"], what=name)
        facts = None if data["facts"] is None else from_json(ModelFacts, data["facts"], what=name)
        drops = {u: {Format(f): row[0] for f, row in own.items()} for u, own in data["drop_percent"].items()}
        units = unit_facts(profile, data.get("outliers"))
        own = Sample(name=name, source=name, profile=profile, facts=facts, units=units, drops=drops)
        found += [own, *(_relative(own, other) for other in relatives)]
    return tuple(found)


def _relative(own: Sample, stem: str) -> Sample:
    model = _catalogued(stem)
    profile = catalogued_profile(model)
    units = unit_facts(profile)
    drops = {}
    for name, fact in units.items():
        if fact.unit.role is Role.EMBEDDING:
            continue
        near = min(
            (n for n in own.drops if own.units[n].unit.role is not Role.EMBEDDING),
            key=lambda n: (
                own.units[n].unit.role is not fact.unit.role,
                own.units[n].stack_end != fact.stack_end,
                abs(own.units[n].depth - fact.depth),
            ),
        )
        drops[name] = own.drops[near]
    return Sample(name=stem, source=own.name, profile=profile, facts=catalogued_facts(model), units=units, drops=drops)


@cache
def _catalogued(stem: str) -> str:
    from autoprec.models import models

    return models()[stem].id


@dataclass(slots=True, kw_only=True, eq=False)
class Solved:
    """The fronts of one model on one device in one mode, size and way to run."""

    sample: Sample
    device: DeviceProfile
    setup: Setup
    compiled: bool
    half: Format
    tf32: bool
    prices: StepPrices
    choices: Mapping[str, tuple[Format, ...]]
    _fronts: dict[tuple[Format, ...], tuple[PredictedFront, float]]

    def seconds(self, assignment: Mapping[str, Format]) -> float:
        """Return the predicted step."""
        return self.prices.seconds(assignment)

    def uniform(self, choice: Format) -> dict[str, Format]:
        """Return a format wherever a unit may have it, else the 16-bit one, else FP32; lookups in FP32."""
        order = (choice, self.half, Format.FP32) if choice is not Format.FP32 else (Format.FP32,)
        order = (*order, Format.FP32, self.half)
        return {name: next(f for f in order if f in own) for name, own in self.choices.items()}

    def best(self, limit: float) -> tuple[float, dict[str, Format], float]:
        """Return the least seconds within an allowance in percent, the assignment, and a bound from below."""
        start = self.uniform(self.half)
        found, least = (float("inf"), start), 0.0
        for _ in range(_TANGENTS):
            front, rest = self._front(start)
            bound = front.least_ms(limit) + rest
            least = max(least, bound) if bound < float("inf") else least
            at = front.within(limit)
            if at is None:
                return self.seconds(self.uniform(Format.FP32)), self.uniform(Format.FP32), least
            start = front.assignment(at)
            mine = self.seconds(start)
            if mine >= found[0] * (1 - 1e-6):
                break
            found = (mine, start)
        return found[0], found[1], least

    def _front(self, start: Mapping[str, Format]) -> tuple[PredictedFront, float]:
        key = tuple(start.values())
        if key not in self._fronts:
            tangent = self.prices.tangent(start)
            units = []
            for name, formats in self.choices.items():
                drops = self.sample.drops.get(name, {})
                row = []
                for f in formats:
                    given = Format.FP16 if f is Format.FP32 and self.tf32 else f
                    row.append(Choice(f, drops.get(given, 0.0), self.prices.unit_seconds(name, f, tangent)))
                units.append(ChainUnit(name, tuple(row)))
            self._fronts[key] = (
                predicted_front(units, max_states=_STATES),
                self.prices.rest_seconds(tangent),
            )
        return self._fronts[key]


def solved(
    sample: Sample, device: str, mode: Mode, size: tuple[int, int], *, compiled: bool, barred: bool = False
) -> Solved | None:
    """Return the fronts of a situation; None where nothing can be predicted for the device, or nothing is native.

    `barred`: units have no FP8 that rules of practice keep it from (`fp8_barrier`), as the tree is fitted; else no FP16
    that a family is known to overflow in, as the tree is judged.
    """
    known = find_device(device)
    setup = Setup(
        mode=mode, batch_size=size[0], seq_len=size[1], optimizer=Optimizer.ADAMW if mode is Mode.TRAIN else None
    )
    tokens = size[0] * size[1]
    here = situation(sample, known, setup, 1.0)
    half = base_choice(here).format
    if half is Format.FP32:
        return None
    tf32 = tf32_choice(here)[0]
    try:
        prices = step_prices(sample.profile, known, setup, sample.facts, tf32=tf32, compiled=compiled)
    except DeviceError:
        return None
    choices = {}
    for unit in sample.profile.units:
        own = [
            f
            for f in Format
            if f in prices.units[unit.name]
            and known.supports(f) is Support.NATIVE
            and (f is Format.FP32 or unit.name in sample.drops)
            and (unit.role in _DECIDED or f in (Format.FP32, half))
            and (f is not Format.FP8 or _fp8_runs(sample.profile, unit.name, tokens))
            and not (barred and f is Format.FP8 and fp8_barrier(sample.units[unit.name], here))
            and not (not barred and f is Format.FP16 and _overflows(unit.role, here.class_name))
        ]
        if unit.role in (Role.EMBEDDING, Role.ROUTER):
            own = [f for f in own if f is Format.FP32] or own
        if not own:
            return None
        choices[unit.name] = tuple(own)
    return Solved(
        sample=sample, device=known, setup=setup, compiled=compiled, half=half, tf32=tf32, prices=prices,
        choices=choices, _fronts={},
    )  # fmt: skip


def situation(sample: Sample, device: DeviceProfile, setup: Setup, limit: float) -> Here:
    """Return what the rules of practice look at, for an allowance in percent."""
    return Here(
        device=device,
        mode=setup.mode,
        tokens=setup.tokens,
        class_name=sample.profile.class_name,
        max_drop=DropLimit(limit, percent=True),
    )


def _overflows(role: Role, class_name: str) -> bool:
    """Say whether a family is known to leave FP16's range here, as a search on its weights would find."""
    return bool(family_overflow(role, class_name) or family_overflow(None, class_name))


def _fp8_runs(profile: ModelProfile, unit: str, tokens: int) -> bool:
    return tokens % 16 == 0 and fp8_fault(profile.unit(unit), profile) is None
