"""Objectives: what the student should match; specs whose `build` binds them to terms."""

from llm_distill.objectives.base import (
    MEASURES,
    Evidence,
    HeadTerm,
    Objective,
    QueryPlan,
    Term,
    check_objectives,
    named,
)
from llm_distill.objectives.hidden import HiddenStates
from llm_distill.objectives.logits import CrossEntropy, Logits, row_wise
from llm_distill.objectives.maps import AttentionMaps
from llm_distill.objectives.moving import Taid

__all__ = [
    "MEASURES",
    "AttentionMaps",
    "CrossEntropy",
    "Evidence",
    "HeadTerm",
    "HiddenStates",
    "Logits",
    "Objective",
    "QueryPlan",
    "Taid",
    "Term",
    "check_objectives",
    "named",
    "row_wise",
]
