"""One vocabulary for both models: whose tokenizer it is, and whether it is really one."""

from __future__ import annotations

import logging
from itertools import zip_longest
from typing import TYPE_CHECKING

from llm_distill.errors import InputError
from llm_distill.students import FromConfig, Student, as_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_distill.signals import ModelSpec
    from llm_distill.teachers import Teacher

logger = logging.getLogger(__name__)

SAMPLE = "Don't panic: 12,345 naïve cafés — 東京, Ελλάδα!\n\tdef f(x): return x ** 2  # ok"
"""Cut by both tokenizers: one vocabulary may still come with other merges or normalisers."""


def settle_tokenizers(
    model: Student, teacher: Teacher, student: ModelSpec, given: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The student's tokenizer, known to be the teacher's as well; None where neither is known.

    Raises:
        InputError: For different tokenizers, or unknown ones with heads of different sizes.
    """
    theirs = teacher.find_tokenizer()
    ours = given
    if ours is None:
        ours = theirs if isinstance(model, FromConfig) else as_local(model).find_tokenizer()
    if ours is not None and theirs is not None:
        if ours is not theirs:
            check_vocabularies(ours, theirs, (student.name, teacher.spec.name))
    elif student.vocabulary != teacher.spec.vocabulary:
        raise InputError(
            f"the student {student.name} has {student.vocabulary} tokens, the teacher "
            f"{teacher.spec.name} "
            f"{teacher.spec.vocabulary}, and not both tokenizers are known; give them: "
            "DistillTrainer(processing_class=…, teacher=Local(model, tokenizer=…))"
        )
    else:
        logger.warning(
            "Nothing says that the student %s and the teacher %s share a tokenizer; both have %d "
            "tokens. To have it "
            "checked: Local(model, tokenizer=…) and processing_class=…",
            student.name,
            teacher.spec.name,
            student.vocabulary,
        )
    settled = ours if ours is not None else theirs
    size = 0 if settled is None else len(settled)
    for spec in (student, teacher.spec):
        if size > spec.vocabulary:
            raise InputError(
                f"the tokenizer has {size} tokens, {spec.name} only {spec.vocabulary}; run "
                "model.resize_token_embeddings(len(tokenizer)) first"
            )
    return settled


def check_vocabularies(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, names: tuple[str, str]
) -> None:
    """Refuse two tokenizers that do not give one text the same ids.

    Padding rows of the heads do not matter here, only the tokens.

    Raises:
        InputError: With both names and the first token that differs.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise InputError(
                f"the tokenizers differ: token {index} is {ours.get(index)!r} for the student "
                f"{names[0]} and "
                f"{theirs.get(index)!r} for the teacher {names[1]}; token-level distillation needs "
                "one vocabulary: choose a student and a teacher of one family, or give both the "
                "same tokenizer"
            )
    one, other = (list(t(SAMPLE).input_ids) for t in (student, teacher))
    if one != other:
        place = next(k for k, (a, b) in enumerate(zip_longest(one, other)) if a != b)
        raise InputError(
            f"the tokenizers of the student {names[0]} and the teacher {names[1]} have one "
            f"vocabulary and cut text differently: token {place} of {SAMPLE!r} is "
            f"{_token(student, one, place)} and {_token(teacher, other, place)}; give both the same"
        )


def _token(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int) -> str:
    """A token of an encoded text, for a message."""
    return repr(tokenizer.convert_ids_to_tokens(ids[place])) if place < len(ids) else "missing"
