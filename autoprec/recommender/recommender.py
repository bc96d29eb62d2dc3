"""A plan from facts alone: what the device can do, what the units are, and rules of practice. Nothing is run.

The plan's units carry their reasons; the recommendation adds what the training code around them must know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoprec.errors import ModelError, UsageError
from autoprec.formats import Format
from autoprec.plan import Plan
from autoprec.predict.memory import setup_of
from autoprec.predict.setup import Checkpointing, Optimizer, Setup, TrainMethod, choice_of
from autoprec.quantities import DropLimit
from autoprec.recommender.advice import Situation, base_choice, fp8_recipe, tf32_choice
from autoprec.recommender.arguments import training_arguments
from autoprec.recommender.choice import unit_choices
from autoprec.recommender.features import unit_facts
from autoprec.recommender.figures import expected_figures, memory_figures, step_figures
from autoprec.recommender.learned import current_tree
from autoprec.recommender.notes import around_the_plan
from autoprec.recommender.tree import Tree
from autoprec.records import DeviceProfile, Mode, ModelFacts, ModelProfile, Origin, Shown

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

    def to_json(self) -> dict[str, Any]:
        """Return the recommendation as plain JSON data (schema `autoprec/recommendation@1`)."""
        return {
            "schema": SCHEMA,
            "plan": self.plan.to_json(),
            "training_arguments": dict(self.training_arguments),
            "reasons": list(self.reasons),
            "memory": dict(self.memory),
            "expected": dict(self.expected),
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
            a catalogued model is not fetched either.
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
    known = device if isinstance(device, DeviceProfile) else _device_profile(device)
    tree = current_tree()
    plan = recommend_plan(
        profile,
        known,
        mode=step,
        batch_size=batch_size,
        seq_len=seq_len,
        method=way,
        max_drop=limit,
        model_facts=model_facts,
        tree=tree,
    )
    facts = unit_facts(profile)
    setup = setup_of(plan, batch_size, seq_len, step, method=way, device_kind=known.kind)
    memory = memory_figures(profile, plan, known, setup, model_facts)
    checkpointing = memory["checkpointing"] != "none"
    here = _situation(profile, known, step, batch_size * seq_len, limit, way)
    reasons = (
        base_choice(here).reason,
        tf32_choice(here)[1],
        *around_the_plan(plan, facts, known, memory, way, here.tokens, checkpointing),
        *([note] if note else []),
        *tree.notes,
    )
    arguments = training_arguments(
        plan,
        batch_size=memory["micro_batch"] or batch_size,
        checkpointing=checkpointing,
        accumulation=memory["accumulation"],
    )
    return Recommendation(
        plan=dataclasses.replace(plan, training_arguments=arguments),
        training_arguments=arguments,
        reasons=reasons,
        memory=memory,
        expected=expected_figures(plan, facts, known, here.tokens)
        | step_figures(profile, plan, known, _stepped(setup, memory), model_facts),
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
) -> Plan:
    """Return the plan that rules of practice and the decision tree give, each unit with its reason.

    Args:
        model_facts: of the model's configuration; without it heads are taken to be 64 wide.
        tree: None: the one that counts here (`current_tree`). Given, this is a pure function of its arguments.

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
    choices = unit_choices(profile, unit_facts(profile), model_facts, setup, base, here, tree or current_tree())
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


def _device_profile(device: str) -> DeviceProfile:
    """Return what is known of a device: a measured profile that is kept, a probe of what is here, or a datasheet."""
    from autoprec.probe.known import certainly_absent, named_profile

    known = named_profile(device)
    if known is not None and (known.origin is Origin.MEASURED or certainly_absent(known)):
        return known
    from autoprec.probe.device import probe_device

    return probe_device(device, seconds=_PROBE_SECONDS)
