"""Students cut from their teacher: embeddings, norms, head, and some of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast, get_args

from llm_distill import loading
from llm_distill.errors import InputError
from llm_distill.provenance import Provenance
from llm_distill.students.blocks import cut
from llm_distill.students.copying import copied
from llm_distill.teachers.local import Local

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llm_distill.teachers.base import Teacher

Choice = Literal["ends", "uniform", "first"]
"""Ways of choosing blocks by their number."""


@dataclass(frozen=True)
class FromTeacher:
    """A student that copies some blocks of its teacher, and everything around them.

    The config says which (`llm_distill: {blocks: [1, 4, 8, 12], of: 12, teacher: …}`), so that
    layers can be mapped by where they come from.

    Attributes:
        depth: Blocks of the student; may be left out where the blocks are named.
        layers: Which blocks of the teacher, 1..its depth. `ends`: the first, the last, and the rest
            evenly between; `uniform`: the last of each of `depth` equal segments; `first`: from the
            first on; or their numbers, ascending, negative ones counted from the end.
        dtype: Of the weights.

    Raises:
        InputError: For what can be no choice of blocks, or an unknown dtype.

    Source: Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, section 3, starts from every second
    block. That `ends` is the default is our own measurement.

    >>> FromTeacher(4).blocks(12), FromTeacher(4, "uniform").blocks(12)
    ((1, 4, 8, 12), (3, 6, 9, 12))
    >>> FromTeacher(layers=[1, 2, -1]).blocks(12)
    (1, 2, 12)
    """

    depth: int | None = None
    layers: Choice | Sequence[int] = "ends"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what no teacher could give."""
        object.__setattr__(self, "dtype", loading.dtype_name(self.dtype, "FromTeacher"))
        if isinstance(self.layers, str):
            _check_word(self.layers)
            _check_depth(self.depth)
            return
        numbers = _numbers(self.layers)
        object.__setattr__(self, "layers", numbers)
        if self.depth is not None and self.depth != len(numbers):
            raise InputError(
                f"FromTeacher: depth is {self.depth} and layers names {len(numbers)} blocks; leave "
                "depth out"
            )

    def __str__(self) -> str:
        """For messages."""
        if isinstance(self.layers, str):
            return f"FromTeacher({self.layers} {self.depth})"
        return f"FromTeacher({', '.join(map(str, self.layers))})"

    def blocks(self, of: int) -> tuple[int, ...]:
        """The chosen blocks of a teacher with `of` of them, 1..of.

        Raises:
            InputError: If the teacher has too few, or if the named ones do not ascend.
        """
        if not isinstance(self.layers, str):
            return _named(self.layers, of)
        depth = self.depth or 0
        if depth > of:
            raise InputError(
                f"FromTeacher: depth is {depth} and the teacher has {of} blocks; write a depth in "
                f"1..{of}"
            )
        if self.layers == "first":
            return tuple(range(1, depth + 1))
        if self.layers == "uniform":
            return tuple((2 * i * of + depth) // (2 * depth) for i in range(1, depth + 1))
        return tuple(1 + i * (of - 1) // max(depth - 1, 1) for i in range(depth))

    def resolve(self, teacher: PreTrainedConfig) -> PreTrainedConfig:
        """The teacher's config with fewer blocks, and which they are.

        Raises:
            InputError: If the teacher has too few blocks, or quantised weights.
        """
        if getattr(teacher, "quantization_config", None) is not None:
            raise InputError(
                "FromTeacher: the teacher's weights are quantised, and a student is trained in "
                f"{self.dtype}; take the checkpoint that it was quantised from as the teacher"
            )
        text = teacher.get_text_config(decoder=True)
        blocks = self.blocks(text.num_hidden_layers)
        made = cut(teacher, blocks)
        name = loading.shown(teacher.name_or_path or "") or str(text.model_type)
        Provenance(blocks, text.num_hidden_layers, name).write(made)
        return made

    def load(self, teacher: Teacher) -> PreTrainedModel:
        """The model, its weights copied from the teacher's.

        Raises:
            InputError: If the teacher has no weights here, or if they cannot be copied.
        """
        self.check_teacher(teacher)
        made = self.resolve(teacher.config)
        found = Provenance.read(made)
        assert found is not None
        return copied(cast("Local", teacher), made, found.blocks, self.dtype)

    def check_teacher(self, teacher: Teacher) -> None:
        """Refuse a teacher without weights here.

        Raises:
            InputError: Saying what to write.
        """
        if not isinstance(teacher, Local):
            raise InputError(
                f"{self}: the teacher is a {type(teacher).__name__}, whose weights are not here to "
                "be copied; write teacher: {Local: …}, or another student"
            )


def _check_word(word: str) -> None:
    """Refuse an unknown way of choosing."""
    if word not in get_args(Choice):
        raise InputError(
            f"FromTeacher: layers is {word!r}; write one of {', '.join(get_args(Choice))}, or the "
            "numbers of blocks such as [1, 4, 8, 12]"
        )


def _check_depth(depth: int | None) -> None:
    """Refuse a number of blocks that cannot be one."""
    if depth is None:
        raise InputError("FromTeacher: depth is missing; write how many blocks, such as depth: 4")
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise InputError(f"FromTeacher: depth is {depth!r}; write a number of blocks from 1 on")


def _numbers(layers: Sequence[int]) -> tuple[int, ...]:
    """What was given as numbers of blocks."""
    wrong = [n for n in layers if not isinstance(n, int) or isinstance(n, bool) or n == 0]
    if wrong or not layers:
        raise InputError(
            f"FromTeacher: layers is {list(layers)}; write numbers of blocks, which are counted "
            "from 1 or, negative, from the end: [1, 4, 8, -1]"
        )
    return tuple(layers)


def _named(layers: Sequence[int], of: int) -> tuple[int, ...]:
    """Numbers in 1..of of blocks that were named."""
    outside = [number for number in layers if not 1 <= abs(number) <= of]
    if outside:
        raise InputError(
            f"FromTeacher: layers names block {outside[0]} and the teacher has {of}; write numbers "
            f"in 1..{of}, or -{of}..-1 from the end"
        )
    found = tuple(number if number > 0 else of + 1 + number for number in layers)
    if any(one >= other for one, other in pairwise(found)):
        raise InputError(
            f"FromTeacher: layers is {list(layers)}, of {of} blocks {list(found)}; write each "
            f"once, in ascending order: {sorted(set(found))}"
        )
    return found
