"""Whose tokenizers they are: one vocabulary for both models, or two where nothing pairs tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from llm_distill import mapping
from llm_distill.data.retokenize import Retokenizer
from llm_distill.errors import InputError
from llm_distill.loading import SAMPLE
from llm_distill.students import FromTeacher, Made, Student, as_local
from llm_distill.teachers import Itself, leaves

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_distill.objectives import Objective, Term
    from llm_distill.signals import ModelSpec
    from llm_distill.teachers import Teacher

logger = logging.getLogger(__name__)


MEMBERS = ("member", "member")
"""What two of several teachers are called."""


@dataclass(frozen=True)
class Tokenizers:
    """Those of a run.

    Attributes:
        ours: Of the data and of the student; None where neither model's is known.
        theirs: The teacher's, where it is another one.
        difference: Where the two part, in words.
    """

    ours: PreTrainedTokenizerBase | None = None
    theirs: PreTrainedTokenizerBase | None = None
    difference: str = ""

    @property
    def told(self) -> tuple[str, ...]:
        """What it means that there are two, before the training."""
        if self.theirs is None:
            return ()
        return (
            f"{self.difference}; nothing compares the two models token by token, so there is no KL "
            "and no agreement",
        )

    def positions(self, student: ModelSpec, teacher: ModelSpec) -> int | None:
        """Tokens that a sequence of the data may have; None where no model has a limit."""
        models = (student, teacher) if self.theirs is None else (student,)
        return min((m.positions for m in models if m.positions), default=None)

    def translator(self, teacher: ModelSpec) -> Retokenizer | None:
        """From the student's tokens to the teacher's, where the two differ."""
        if self.ours is None or self.theirs is None:
            return None
        return Retokenizer(ours=self.ours, theirs=self.theirs, positions=teacher.positions)


def settle_tokenizers(
    model: Student, teacher: Teacher, student: ModelSpec, given: PreTrainedTokenizerBase | None
) -> Tokenizers:
    """Find both models' tokenizers, and whether they are one.

    Raises:
        InputError: For unknown tokenizers with heads of different sizes, heads smaller than their
            tokenizers, or another tokenizer for a student that was cut from its teacher.
    """
    _check_members(teacher)
    ours, theirs = _of_both(model, teacher, given)
    difference = ""
    if ours is not None and theirs is not None:
        if ours is not theirs:
            difference = find_difference(ours, theirs, (student.name, teacher.spec.name))
    else:
        _check_unknown(student, teacher)
    if difference and isinstance(model, FromTeacher):
        raise InputError(
            f"{difference}; a student cut from its teacher has the embeddings of the teacher's "
            "tokens: leave processing_class out"
        )
    settled = ours if ours is not None else theirs
    for spec, its in ((student, settled), (teacher.spec, theirs if difference else settled)):
        size = 0 if its is None else len(its)
        if size > spec.vocabulary:
            raise InputError(
                f"the tokenizer has {size} tokens, {spec.name} only {spec.vocabulary}; run "
                "model.resize_token_embeddings(len(tokenizer)) first"
            )
    return Tokenizers(settled, theirs, difference) if difference else Tokenizers(settled)


def check_alignment(
    found: Tokenizers,
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    *,
    causal: bool,
) -> None:
    """Refuse different tokenizers where something compares the models token by token.

    Args:
        found: The tokenizers.
        objectives: What is trained.
        terms: The same, bound.
        causal: Whether the models predict the next token.

    Raises:
        InputError: Naming the first objective, the first difference, and what to write.
    """
    if found.theirs is None:
        return
    family = "choose a student and a teacher of one family, or give both the same tokenizer"
    for name in (name for name, term in terms.items() if term.aligned):
        raise InputError(
            f"{found.difference}; {name} compares the models token by token, which needs one "
            f"vocabulary: {family}; or keep to what does without: CrossEntropy, and HiddenStates "
            "(without blockwise) and Contrastive with items: pooled, rows: valid"
        )
    if not causal:
        raise InputError(
            f"{found.difference}; masked language models need one vocabulary, since a masked token "
            f"has no text: {family}"
        )
    if "race" in mapping.undecided(objectives):
        raise InputError(
            f"{found.difference}; auto_race judges maps by the KL of the two models' tokens, which "
            "needs one vocabulary: write layers: auto"
        )


def find_difference(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    names: tuple[str, str],
    roles: tuple[str, str] = ("student", "teacher"),
) -> str:
    """Where two tokenizers do not give one text the same ids; empty where they do.

    Padding rows of the heads do not matter here, only the tokens.

    Returns:
        Both names and the first token that differs.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            return (
                f"the tokenizers differ: token {index} is {ours.get(index)!r} for the {roles[0]} "
                f"{names[0]} and {theirs.get(index)!r} for the {roles[1]} {names[1]}"
            )
    one, other = (list(t(SAMPLE).input_ids) for t in (student, teacher))
    if one == other:
        return ""
    place = next(k for k, (a, b) in enumerate(zip_longest(one, other)) if a != b)
    return (
        f"the tokenizers of the {roles[0]} {names[0]} and the {roles[1]} {names[1]} have one "
        f"vocabulary and cut text differently: token {place} of {SAMPLE!r} is "
        f"{_token(student, one, place)} and {_token(teacher, other, place)}"
    )


def _check_members(teacher: Teacher) -> None:
    """Refuse several teachers that do not share a tokenizer: each row is one token to all of them.

    Raises:
        InputError: Naming two of them and the first token that differs, or heads of other sizes
            where a tokenizer is not known.
    """
    first, *others = leaves(teacher)
    for other in others:
        one, two = first.find_tokenizer(), other.find_tokenizer()
        names = first.spec.name, other.spec.name
        difference = ""
        if one is not None and two is not None:
            difference = "" if one is two else find_difference(one, two, names, MEMBERS)
        elif first.spec.vocabulary != other.spec.vocabulary:
            sizes = f"{first.spec.vocabulary} and {other.spec.vocabulary}"
            difference = f"{names[0]} and {names[1]} have {sizes} tokens, and not both tokenizers"
            difference += " are known"
        if difference:
            raise InputError(
                f"{teacher.spec.name}: {difference}; several teachers need one tokenizer: take "
                "models of one family"
            )


def _of_both(
    model: Student, teacher: Teacher, given: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]:
    """The student's tokenizer and the teacher's, which may be the student itself."""
    if isinstance(teacher, Itself):
        own = given if given is not None else teacher.find_tokenizer()
        return own, own
    theirs = teacher.find_tokenizer()
    if given is not None:
        return given, theirs
    return theirs if isinstance(model, Made) else as_local(model).find_tokenizer(), theirs


def _check_unknown(student: ModelSpec, master: Teacher) -> None:
    """Take equal heads for one vocabulary where not both tokenizers are known, and say so.

    Raises:
        InputError: If the heads differ.
    """
    teacher = master.spec
    if isinstance(master, Itself):
        return
    if student.vocabulary != teacher.vocabulary:
        raise InputError(
            f"the student {student.name} has {student.vocabulary} tokens, the teacher "
            f"{teacher.name} {teacher.vocabulary}, and not both tokenizers are known; give them: "
            "DistillTrainer(processing_class=…, teacher=Local(model, tokenizer=…))"
        )
    logger.warning(
        "Nothing says that the student %s and the teacher %s share a tokenizer; both have %d "
        "tokens. To have it checked: Local(model, tokenizer=…) and processing_class=…",
        student.name,
        teacher.name,
        student.vocabulary,
    )


def _token(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int) -> str:
    """A token of an encoded text, for a message."""
    return repr(tokenizer.convert_ids_to_tokens(ids[place])) if place < len(ids) else "missing"
