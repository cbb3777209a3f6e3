"""Which blocks of its teacher a student was cut from, kept in its config."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KEY = "llm_distill"
"""The one key of ours in a config; transformers keeps keys that it does not know."""


@dataclass(frozen=True)
class Provenance:
    """Where the blocks of a student come from.

    Attributes:
        blocks: For each block of the student the teacher's, 1..of, ascending.
        of: Blocks of the teacher.
        teacher: Its Hub id, the last part of its path, or its kind.
    """

    blocks: tuple[int, ...]
    of: int
    teacher: str

    def write(self, config: PreTrainedConfig) -> None:
        """Put it into a config, where `save_pretrained` and `AutoConfig` keep it."""
        setattr(config, KEY, asdict(self) | {"blocks": list(self.blocks)})

    @classmethod
    def read(cls, config: PreTrainedConfig) -> Provenance | None:
        """What stands in a config; None where there is nothing, or nothing that fits its depth."""
        found = getattr(config, KEY, None)
        if not isinstance(found, dict):
            return None
        blocks: Any = found.get("blocks")
        of = found.get("of")
        depth = config.get_text_config(decoder=True).num_hidden_layers
        if not isinstance(of, int) or not _ascending(blocks, of) or len(blocks) != depth:
            return None
        return cls(tuple(blocks), of, str(found.get("teacher", "")))


def _ascending(blocks: Any, of: int) -> bool:  # noqa: ANN401  what a file says
    """Whether a value is a list of block numbers in 1..of, each larger than the one before."""
    if not isinstance(blocks, list | tuple) or not blocks:
        return False
    if not all(isinstance(block, int) and 1 <= block <= of for block in blocks):
        return False
    return all(one < other for one, other in pairwise(blocks))
