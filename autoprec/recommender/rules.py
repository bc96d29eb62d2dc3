"""All rules of practice, and what they say in a case: R1 to R46, each with its condition and source."""

from __future__ import annotations

from autoprec.recommender.rule import Advice, Case, Rule
from autoprec.recommender.rules_batch import BATCH_RULES
from autoprec.recommender.rules_formats import FORMAT_RULES
from autoprec.recommender.rules_speed import SPEED_RULES
from autoprec.recommender.rules_storage import STORAGE_RULES

__all__ = ["RULES", "advice_for"]

RULES: tuple[Rule, ...] = (*FORMAT_RULES, *STORAGE_RULES, *SPEED_RULES, *BATCH_RULES)


def advice_for(case: Case) -> tuple[Advice, ...]:
    """Return what the rules say in a case, what matters most first."""
    said = (rule.advice(case) for rule in RULES if rule.applies(case))
    return tuple(sorted(said, key=lambda advice: advice.level))
