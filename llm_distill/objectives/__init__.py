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
from llm_distill.objectives.contrastive import Contrastive
from llm_distill.objectives.hidden import HiddenStates
from llm_distill.objectives.logits import CrossEntropy, Logits, row_wise
from llm_distill.objectives.mapped import Mapped
from llm_distill.objectives.maps import AttentionMaps
from llm_distill.objectives.moving import Taid
from llm_distill.objectives.relations import Relations

__all__ = [
    "MEASURES",
    "AttentionMaps",
    "Contrastive",
    "CrossEntropy",
    "Evidence",
    "HeadTerm",
    "HiddenStates",
    "Logits",
    "Mapped",
    "Objective",
    "QueryPlan",
    "Relations",
    "Taid",
    "Term",
    "check_objectives",
    "named",
    "row_wise",
]
