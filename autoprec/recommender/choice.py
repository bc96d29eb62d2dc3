"""The format of each unit: what rules of practice fix, what the decision tree says of the rest, and a joint allowance.

A tree looks at one unit; an allowance is for all of them. So what units of its leaves drop, nine in ten of them at
most, is summed, and units are promoted in order of least time lost for the drop it saves until the sum is within.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from autoprec.formats import Format, Fp8Recipe
from autoprec.predict.setup import Setup
from autoprec.quantities import DropLimit
from autoprec.recommender.advice import Choice, Situation, family_overflow, fp8_recipe, tf32_choice
from autoprec.recommender.features import UnitFacts
from autoprec.recommender.gains import Gains, gains
from autoprec.recommender.measures import limit_percent, unit_measures
from autoprec.recommender.tree import Leaf, Tree
from autoprec.records import DeviceProfile, Mode, ModelFacts, ModelProfile, Role, Support
from autoprec.records import Leaf as Layer

__all__ = ["Within", "decide", "fp8_barrier", "too_small", "unit_choices", "within"]

#: a plan whose low formats gain less than this over one without them is not worth them: what counts as the same of two
#: measured times (design: ratios within 2 %)
_SAME = 1.02
#: FP32 where the 16-bit format does not pay, as where a step waits for its launches, must gain this much over 16 bits
#: everywhere: of a ratio between two plans the time model knows no more (half of its 95 % interval)
_LEAVE_HALF = 1.15
#: below this, a gain is not told from the spread between GPUs of one kind (stas00/ml-engineering: 5 % and more)
_LEAST_GAIN = 1.10
#: matmuls that torchao's filter finds too small for FP8 may do at most this share of a unit's work: the k and v
#: projections of grouped queries (a fifth of Llama's attention) do not keep q and o from it
_SMALL_SHARE = 0.2
#: published FP8 training stays within this of the BF16 loss (DeepSeek-V3, section 3.3)
_FP8_DROP = DropLimit(0.25, percent=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What the tree says of a unit."""

    leaf: Leaf
    path: str
    measures: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """An assignment within an allowance, the drop counted for it in percent, and the units that were promoted."""

    assignment: Mapping[str, Format]
    drop: float
    promoted: frozenset[str]


def unit_choices(
    profile: ModelProfile,
    facts: Mapping[str, UnitFacts],
    model_facts: ModelFacts | None,
    setup: Setup,
    base: Choice,
    here: Situation,
    tree: Tree,
) -> dict[str, Choice]:
    """Return the format of every unit with its reason.

    FP8 is looked at as it is worth having, compiled; where none comes of it, the step is eager.
    """
    fixed = {name: choice for name, fact in facts.items() if (choice := _fixed(fact, base, here)) is not None}
    free = {name: fact for name, fact in facts.items() if name not in fixed}
    if not free:
        return fixed
    bars = {name: fp8_barrier(fact, here) for name, fact in free.items()}
    may_fp8 = {name for name, why in bars.items() if not why}
    for compiled in (True, False) if may_fp8 else (False,):
        found = gains(
            profile,
            facts,
            here.device,
            setup,
            model_facts,
            half=base.format,
            recipe=fp8_recipe(here.device) if compiled else None,
            tf32=tf32_choice(here)[0],
            compiled=compiled,
        )
        start = {name: choice.format for name, choice in fixed.items()}
        done, answers = decide(free, start, found, here.device, setup, here.max_drop, tree, may_fp8 if compiled else ())
        if compiled and Format.FP8 not in done.assignment.values():
            tried = answers
            continue
        if not compiled and may_fp8:
            bars |= {name: _no_fp8(tried[name], base.format, here) for name in may_fp8}
        break
    reasons = {name: _reason(name, done, answers[name], bars[name], base, here) for name in free}
    return {name: fixed.get(name) or Choice(done.assignment[name], reasons[name]) for name in facts}


def decide(
    free: Mapping[str, UnitFacts],
    fixed: Mapping[str, Format],
    found: Gains,
    device: DeviceProfile,
    setup: Setup,
    limit: DropLimit,
    tree: Tree,
    may_fp8: Collection[str],
) -> tuple[Within, dict[str, _Said]]:
    """Return the assignment that the tree and the allowance give, and what the tree said of each free unit."""
    allowed = limit_percent(limit)
    measures = unit_measures(free, found, device, setup, allowed, may_fp8)
    answers = {}
    for name, own in measures.items():
        leaf, path = tree.follow(own)
        answers[name] = _Said(leaf=leaf, path=path, measures=own)
    wanted, half = dict(fixed), dict(fixed)
    for name, fact in free.items():
        label = answers[name].leaf.label
        usual = found.half if found.half in fact.unit.formats else Format.FP32
        low = Format.FP8 if label == "fp8" and name in may_fp8 and Format.FP8 in found.seconds[name] else usual
        half[name] = usual if low is usual or label == "fp32" else low
        priced = fact.gemms or found.prices is not None  # experts have no plain matmul, and a price
        wanted[name] = Format.FP32 if label == "fp32" and priced else low
    if found.total(half) < _LEAVE_HALF * found.total(wanted):
        wanted = half
    counted = {name: _counted(answers[name].leaf, fact) for name, fact in free.items()}
    done = within(wanted, counted, found, allowed)
    plain = {name: found.half if choice is Format.FP8 else choice for name, choice in done.assignment.items()}
    if plain != done.assignment and found.total(plain) < _SAME * found.total(done.assignment):
        done = within(plain, counted, found, allowed)
    return done, answers


def within(
    assignment: Mapping[str, Format], counted: Mapping[str, Mapping[Format, float]], found: Gains, allowed: float
) -> Within:
    """Promote units, FP8 to 16 bits and 16 bits to FP32, until the counted drops are within an allowance in percent."""
    chosen = dict(assignment)
    total = sum(own.get(chosen[name], 0.0) for name, own in counted.items())
    promoted = set()
    while total > allowed:
        best, least = None, float("inf")
        for name, wider in _promotions(chosen, counted, found.half):
            own = counted[name]
            saved = own.get(chosen[name], 0.0) - own.get(wider, 0.0)
            lost = found.seconds[name].get(wider, 0.0) - found.seconds[name].get(chosen[name], 0.0)
            if saved > 0 and lost / saved < least:
                best, least = (name, wider, saved), lost / saved
        if best is None:
            break
        chosen[best[0]], total = best[1], total - best[2]
        promoted.add(best[0])
    return Within(assignment=chosen, drop=max(total, 0.0), promoted=frozenset(promoted))


def _promotions(chosen: Mapping[str, Format], counted: Collection[str], half: Format) -> Iterator[tuple[str, Format]]:
    """Yield every unit that could be promoted, with each wider format."""
    for name in counted:
        if chosen[name] is Format.FP8:
            yield name, half
        if chosen[name] is not Format.FP32:
            yield name, Format.FP32


def fp8_barrier(fact: UnitFacts, here: Situation) -> str:
    """Return why FP8 is no choice for a unit, whatever it would gain; '' where it is one."""
    if fact.unit.role not in (Role.ATTENTION, Role.FFN):
        return _outside(fact.unit.role)
    device, recipe = here.device, fp8_recipe(here.device)
    if device.supports(Format.FP8) is not Support.NATIVE or recipe is None:
        known = device.formats.get(Format.FP8)
        return f"fp8 is not native ({known.reason if known else 'not known here'})"
    if here.four_bit:
        return f"weights held in 4 bits are widened to {device.ambient} before their matmul, so fp8 does not apply"
    if limit_percent(here.max_drop) < _FP8_DROP.value:
        return f"fp8 needs measuring for a limit of {here.max_drop}: published runs stay within {_FP8_DROP} only"
    if fact.block is None or fact.edge:
        # Nemotron-H keeps the first and last matmuls in BF16 (arXiv:2504.03624); Megatron: --first-last-layers-bf16
        return "no fp8 in the first and last block, as long FP8 runs have it"
    if not fact.gemms:
        return "no matmul here for fp8"
    if odd := _odd_dimension(fact, here):
        return odd
    small = [leaf for leaf in fact.gemms if too_small(leaf, recipe)]
    if sum(leaf.inputs * leaf.outputs for leaf in small) > _SMALL_SHARE * fact.parameters:
        first = small[0]
        return f"too small for fp8: {_short(first)} is {first.inputs}x{first.outputs} (torchao's {recipe} limits)"
    return ""


def _fixed(fact: UnitFacts, base: Choice, here: Situation) -> Choice | None:
    """Return what rules of practice fix about a unit; None where the tree is asked."""
    role = fact.unit.role
    if role is Role.EMBEDDING:
        return Choice(
            Format.FP32, "a lookup has no matmul to speed up, and fp32 keeps the values the stream starts from"
        )
    if role is Role.ROUTER:
        # torchtitan models/common/moe.py; Switch Transformers: only the router in fp32
        return Choice(Format.FP32, "routers decide discretely: fp32 gates against unstable routing")
    if base.format is Format.FP32:
        return base
    if base.format is Format.FP16 and (hazard := family_overflow(role, here.class_name)):
        return Choice(Format.FP32, hazard)
    return None


def _counted(leaf: Leaf, fact: UnitFacts) -> dict[Format, float]:
    """Return the drop in percent that is counted for a unit in each format."""
    return {f: leaf.drop(f, fact.unit.role) for f in Format if f is not Format.FP32}


def _reason(name: str, done: Within, answer: _Said, bar: str, base: Choice, here: Situation) -> str:
    """Return why a unit has its format: the device, the tree's path in words, and what speaks against going lower."""
    choice, label = done.assignment[name], answer.leaf.label
    path = f"tree: {answer.path} → {label if label != 'half' else base.format}"
    if choice is Format.FP8:
        gain = answer.measures["fp8_gain"]
        return (
            f"fp8 is native on {here.device.name}: {gain:.2f}x over {base.format} predicted at {here.tokens} tokens, "
            f"casts counted; {path}"
        )
    if name in done.promoted:
        return f"{path}, promoted to {choice}: all units together must stay within {here.max_drop}"
    if choice is Format.FP32:
        return f"16 bits do not pay here; {path}"
    return f"{base.reason}; {bar}; {path}" if bar else f"{base.reason}; {path}"


def _no_fp8(tried: _Said, half: Format, here: Situation) -> str:
    """Return why a unit that could be FP8 is not."""
    gain = tried.measures["fp8_gain"]
    if not gain:
        return "fp8's gain cannot be told: no rate or bandwidth is known"
    what = f"fp8 would give {gain:.2f}x over {half} at {here.tokens} tokens, casts counted"
    return f"{what}: too little" if gain < _LEAST_GAIN else f"{what}, but too little of the step within {here.max_drop}"


def _outside(role: Role) -> str:
    if role is Role.LM_HEAD:
        # DeepSeek-V3 3.3.1, torchtitan (`output`), ModelOpt's base_disabled_layers
        return "never fp8 in the output head, where rounding goes straight into the logits"
    return f"fp8 is for the matmuls of blocks, and this unit is {role}"


def _odd_dimension(fact: UnitFacts, here: Situation) -> str:
    """Return why torch._scaled_mm would refuse: every dimension it sums over or stores must divide by 16."""
    for leaf in fact.gemms:
        for size in (leaf.inputs, leaf.outputs):
            if size % 16:
                return (
                    f"fp8 needs dimensions that divide by 16: {_short(leaf)} has {size} (pad to {-(-size // 16) * 16})"
                )
    if here.mode is Mode.TRAIN and here.tokens % 16:
        return f"fp8 needs tokens a step that divide by 16 for weight gradients, and {here.tokens} do not"
    return ""


def too_small(leaf: Layer, recipe: Fp8Recipe) -> bool:
    """Say whether torchao's filter (`_auto_filter_for_recipe`, fitted on H100) leaves a layer out."""
    k, n = leaf.inputs, leaf.outputs
    if recipe is Fp8Recipe.TENSORWISE:
        return k <= 4096 and n <= 1024
    return n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048)


def _short(leaf: Layer) -> str:
    """Return a leaf's own name, so that equal units of other blocks have the same reason."""
    return leaf.module.rpartition(".")[2]
