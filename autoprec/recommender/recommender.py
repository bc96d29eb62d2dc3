"""A plan from facts alone: what the device can do, what the units are, and rules of practice. Nothing is run.

The plan's units carry their reasons; the recommendation adds what the training code around them must know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from autoprec.errors import ModelError, UsageError
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.memory import setup_of
from autoprec.predict.setup import Checkpointing, Optimizer, Setup, TrainMethod, choice_of
from autoprec.quantities import DropLimit
from autoprec.recommender.advice import Choice, Situation, base_choice, fp8_recipe, tf32_choice
from autoprec.recommender.arguments import training_arguments
from autoprec.recommender.changes import change_figures
from autoprec.recommender.choice import unit_choices
from autoprec.recommender.features import unit_facts
from autoprec.recommender.figures import expected_figures, memory_figures, step_figures
from autoprec.recommender.learned import current_tree
from autoprec.recommender.neighbours import Pricing, neighbour_figures
from autoprec.recommender.rule import Advice, Case
from autoprec.recommender.rules import advice_for
from autoprec.recommender.script import script_text
from autoprec.recommender.snippet import snippet_text
from autoprec.recommender.tree import Tree
from autoprec.records import DeviceProfile, Mode, ModelFacts, ModelProfile, Origin, Role, Shown

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SCHEMA", "Recommendation", "recommend", "recommend_plan"]

SCHEMA = "autoprec/recommendation@1"
_PROBE_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation(Shown):
    """A plan with the training arguments that go with it, the reasons, and what memory and speed to expect."""

    plan: Plan
    training_arguments: Mapping[str, Any]
    reasons: tuple[str, ...]
    memory: Mapping[str, Any]
    expected: Mapping[str, Any]
    #: the rules behind the reasons, with topic, weight and source
    advice: tuple[Advice, ...] = ()
    #: the next plan to either side: what changes, and the predicted cost or gain
    safer: Mapping[str, Any] = field(default_factory=dict)
    faster: Mapping[str, Any] = field(default_factory=dict)
    #: other conditions under which the answer would be another
    changes: tuple[Mapping[str, Any], ...] = ()
    #: code that puts the plan in force
    snippet: str = ""
    #: a program that runs beside plan.json and training_arguments.json
    script: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the recommendation as plain JSON data (schema `autoprec/recommendation@1`)."""
        return {
            "schema": SCHEMA,
            "plan": self.plan.to_json(),
            "training_arguments": dict(self.training_arguments),
            "reasons": list(self.reasons),
            "memory": dict(self.memory),
            "expected": dict(self.expected),
            "advice": [one.to_json() for one in self.advice],
            "safer": dict(self.safer),
            "faster": dict(self.faster),
            "changes": [dict(change) for change in self.changes],
            "snippet": self.snippet,
        }


def recommend(
    model_or_id: nn.Module | ModelProfile | str,
    device: str | DeviceProfile = "auto",
    mode: Mode | str = "train",
    batch_size: int = 8,
    seq_len: int = 512,
    method: TrainMethod | str = "full",
    max_drop: str | float | DropLimit = "0.25%",
) -> Recommendation:
    """Recommend a plan for a model on a device, in seconds, from facts and rules of practice.

    Args:
        model_or_id: a module, its profile, or a name (`demo`, a folder, a Hugging Face id), whose weights are not read;
            a catalogued model is not fetched either. Of a module they are: how far the largest stand out.
        device: as in `probe_device`; a device that is here is probed for about a second, unless its name is given and
            `autoprec probe` measured it before.
        mode: train or infer.
        batch_size: sequences a step.
        seq_len: tokens a sequence.
        method: full, lora or qlora.
        max_drop: the largest drop wanted; what the rules choose is not measured against it.

    Raises:
        UsageError: an argument that cannot be read.
        ModelError: the model cannot be found or placed in units.
        DeviceError: the device is not here, or no device is called so.
    """
    step, way = choice_of(Mode, mode, "mode"), choice_of(TrainMethod, method, "method")
    limit = DropLimit.parse(max_drop)
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise UsageError(f"{name} must be 1 or more, got {value}")
    profile, model_facts, note = _described(model_or_id)
    outliers = _outliers(model_or_id, profile)
    known = device if isinstance(device, DeviceProfile) else _device_profile(device)
    tree = current_tree()
    planner = partial(
        recommend_plan,
        profile,
        mode=step,
        seq_len=seq_len,
        method=way,
        model_facts=model_facts,
        tree=tree,
        outliers=outliers,
    )
    plan = planner(known, batch_size=batch_size, max_drop=limit)
    facts = unit_facts(profile, outliers)
    setup = setup_of(plan, batch_size, seq_len, step, method=way, device_kind=known.kind)
    memory = memory_figures(profile, plan, known, setup, model_facts)
    here = _situation(profile, known, step, batch_size * seq_len, limit, way)
    fitted = _stepped(setup, memory)
    expected = expected_figures(plan, facts, known, here.tokens)
    expected |= step_figures(profile, plan, known, fitted, model_facts)
    advice = advice_for(
        Case(
            plan=plan,
            facts=facts,
            device=known,
            method=way,
            batch_size=batch_size,
            seq_len=seq_len,
            memory=memory,
            expected=expected,
            model=model_facts,
        )
    )
    arguments = training_arguments(
        plan,
        batch_size=memory["micro_batch"] or batch_size,
        checkpointing=memory["checkpointing"] != "none",
        accumulation=memory["accumulation"] if memory["micro_batch"] else 1,
    )
    pricing = Pricing(profile=profile, facts=facts, device=known, setup=fitted, model_facts=model_facts)
    safer, faster = neighbour_figures(plan, pricing)
    again = partial(planner, device=known, batch_size=batch_size, max_drop=limit)
    longest = model_facts.max_positions if model_facts else None
    return Recommendation(
        plan=dataclasses.replace(plan, training_arguments=arguments),
        training_arguments=arguments,
        reasons=(
            *(base_choice(here).reason, tf32_choice(here)[1]),
            *(one.text for one in advice),
            *([note] if note else []),
            *tree.notes,
        ),
        memory=memory,
        expected=expected,
        advice=advice,
        safer=safer,
        faster=faster,
        changes=tuple(change_figures(plan, pricing, again, limit, batch_size)),
        snippet=snippet_text(plan, arguments, way),
        script=script_text(plan, way, batch_size=fitted.batch_size, seq_len=min(seq_len, longest or seq_len)),
    )


def recommend_plan(
    profile: ModelProfile,
    device: DeviceProfile,
    *,
    mode: Mode,
    batch_size: int,
    seq_len: int,
    method: str = "full",
    max_drop: str | float | DropLimit = "0.25%",
    model_facts: ModelFacts | None = None,
    tree: Tree | None = None,
    outliers: Mapping[str, float] | None = None,
) -> Plan:
    """Return the plan that rules of practice and the decision tree give, each unit with its reason.

    Args:
        model_facts: of the model's configuration; without it heads are taken to be 64 wide.
        tree: None: the one that counts here (`current_tree`). Given, this is a pure function of its arguments.
        outliers: by unit, how far the largest weights stand out (`weight_outliers`), of those that were seen.

    Raises:
        ModelError: some leaf of the model is in no unit.
        UsageError: an unknown method.
    """
    if profile.unassigned:
        raise ModelError(
            f"{profile.model_id} has leaves in no unit, the first of them '{profile.unassigned[0]}'; a plan must place "
            "every leaf. Please report the model's class."
        )
    way = choice_of(TrainMethod, method, "method")
    here = _situation(profile, device, mode, batch_size * seq_len, DropLimit.parse(max_drop), way)
    base = base_choice(here)
    setup = Setup(
        mode=mode,
        batch_size=batch_size,
        seq_len=seq_len,
        method=way,
        optimizer=Optimizer.ADAMW if mode is Mode.TRAIN else None,
        device_kind=device.kind,
    )
    facts = unit_facts(profile, outliers)
    choices = unit_choices(profile, facts, model_facts, setup, base, here, tree or current_tree())
    if way is not TrainMethod.FULL and device.kind != "cpu":  # there the base stays in fp32
        choices = {name: _as_stored(choice, profile.unit(name).role, base) for name, choice in choices.items()}
    formats = {name: choice.format for name, choice in choices.items()}
    return Plan.assign(
        profile,
        formats,
        ambient=base.format,
        device=device,
        mode=mode,
        tf32=tf32_choice(here)[0],
        fp8_recipe=fp8_recipe(device) if Format.FP8 in formats.values() else None,
        reason={name: choice.reason for name, choice in choices.items()},
    )


def _as_stored(choice: Choice, role: Role, base: Choice) -> Choice:
    """Return the format of a unit of a frozen base: what is stored in 16 bits has no more to give in FP32."""
    if role not in (Role.EMBEDDING, Role.ROUTER) or choice.format is not Format.FP32 or base.format is Format.FP32:
        return choice
    return Choice(base.format, f"the frozen base is stored in {base.format}: fp32 cannot bring lost bits back")


def _stepped(setup: Setup, memory: Mapping[str, Any]) -> Setup:
    """Return the setup of one micro-batch as it fits the device."""
    return dataclasses.replace(
        setup,
        batch_size=memory["micro_batch"] or setup.batch_size,
        checkpointing=Checkpointing(memory["checkpointing"]),
        accumulation=memory["accumulation"],
    )


def _situation(
    profile: ModelProfile, device: DeviceProfile, mode: Mode, tokens: int, limit: DropLimit, method: TrainMethod
) -> Situation:
    return Situation(
        device=device,
        mode=mode,
        tokens=tokens,
        class_name=profile.class_name,
        max_drop=limit,
        four_bit=method is TrainMethod.QLORA,
    )


def _described(model: nn.Module | ModelProfile | str) -> tuple[ModelProfile, ModelFacts | None, str | None]:
    """Return a model's units, the facts of its configuration, and what to know about them.

    Of a name only the configuration is read.
    """
    if isinstance(model, ModelProfile):
        return model, None, None
    from autoprec.probe.described import described_model, module_facts, named_facts

    if isinstance(model, str):
        profile, note = described_model(model)
        return profile, named_facts(model), note
    from autoprec.probe.units import probe_units

    return probe_units(model), module_facts(model), None


def _outliers(model: nn.Module | ModelProfile | str, profile: ModelProfile) -> dict[str, float] | None:
    if isinstance(model, ModelProfile | str):
        return None
    from autoprec.probe.outliers import weight_outliers

    return weight_outliers(model, profile)


def _device_profile(device: str) -> DeviceProfile:
    """Return what is known of a device: a measured profile that is kept, a probe of what is here, or a datasheet."""
    from autoprec.probe.known import certainly_absent, named_profile

    known = named_profile(device)
    if known is not None and (known.origin is Origin.MEASURED or certainly_absent(known)):
        return known
    from autoprec.probe.device import probe_device

    return probe_device(device, seconds=_PROBE_SECONDS)
