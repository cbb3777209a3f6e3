"""Data: from files, the Hub or memory to tokenised examples with labels.

`load` reads what a recipe's ``data:`` section names, `prepare` does the same for a dataset that
is already in memory, and `Collator` pads examples into batches.

Accepted formats, told apart by their columns (the first that fits):

* the column that ``data.text`` names, when it names another one than ``text``
* ``input_ids`` (with ``labels``, or every token is supervised; a position whose
  ``attention_mask`` is 0 is padding, and is removed)
* ``messages`` (chat template; the assistant's turns are supervised)
* ``prompt`` + ``completion`` (strings or lists of messages; the completion is supervised)
* ``text`` (every token is supervised)

A ``.txt`` file is one stream of text, cut into blocks of ``max_length`` tokens. Everything else is
one example per row, truncated at ``max_length``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from llm_distill.data.spec import Data

if TYPE_CHECKING:
    from llm_distill.data.collate import Collator
    from llm_distill.data.pipeline import load, prepare
    from llm_distill.data.report import Counter, Prepared, Report

__all__ = ["Collator", "Counter", "Data", "Prepared", "Report", "load", "prepare"]

_HOMES = {
    "Collator": "collate",
    "Counter": "report",
    "Prepared": "report",
    "Report": "report",
    "load": "pipeline",
    "prepare": "pipeline",
}


def __getattr__(name: str) -> object:
    """Import on first use: torch and datasets take seconds, and reading a recipe needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f"{__name__}.{_HOMES[name]}"))[name]
