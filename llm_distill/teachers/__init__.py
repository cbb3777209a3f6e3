"""Teachers: who gives the signals. A teacher is a frozen spec; `open` makes a source of it once."""

from llm_distill.teachers.base import Source, Teacher
from llm_distill.teachers.cached import Cached
from llm_distill.teachers.local import Local
from llm_distill.teachers.remote import Remote

__all__ = ["Cached", "Local", "Remote", "Source", "Teacher"]
