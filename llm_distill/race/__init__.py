"""The race between layer maps that `layers: auto_race` asks for."""

from llm_distill.race.halving import Arm, Result, race
from llm_distill.race.heats import Opened
from llm_distill.race.runs import check, decided

__all__ = ["Arm", "Opened", "Result", "check", "decided", "race"]
