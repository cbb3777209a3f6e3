"""Teachers: who gives the signals. A teacher is a frozen spec; `open` makes a source of it once."""

from llm_distill.teachers.base import Source, Teacher
from llm_distill.teachers.ensemble import Ensemble
from llm_distill.teachers.local import Local
from llm_distill.teachers.members import leaves

__all__ = ["Ensemble", "Local", "Source", "Teacher", "leaves"]
