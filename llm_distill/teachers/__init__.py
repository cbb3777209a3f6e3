"""Teachers: who gives the signals. A teacher is a frozen spec; `open` makes a source of it once."""

from llm_distill.teachers.base import Source, Teacher
from llm_distill.teachers.cached import Cached
from llm_distill.teachers.ensemble import Ensemble
from llm_distill.teachers.forms import cut
from llm_distill.teachers.itself import AdapterOff, BornAgain, DeepToShallow, Ema, Itself
from llm_distill.teachers.local import Local
from llm_distill.teachers.members import has_device_map, leaves
from llm_distill.teachers.remote import Remote
from llm_distill.teachers.routed import Routed, columns_of, routers
from llm_distill.teachers.within import Within

__all__ = [
    "AdapterOff",
    "BornAgain",
    "Cached",
    "DeepToShallow",
    "Ema",
    "Ensemble",
    "Itself",
    "Local",
    "Remote",
    "Routed",
    "Source",
    "Teacher",
    "Within",
    "columns_of",
    "cut",
    "has_device_map",
    "leaves",
    "routers",
]
