"""What a run has to be so that a cached teacher can serve it, checked before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset as TorchStream

from llm_distill import binding, mapping
from llm_distill.cache import fingerprints
from llm_distill.errors import InputError
from llm_distill.losses.planning import plan
from llm_distill.losses.sparse import TopK
from llm_distill.naming import names_of
from llm_distill.objectives import HeadTerm, Logits
from llm_distill.teachers import Cached, Routed
from llm_distill.teachers.cached_source import refuse_layers
from llm_distill.vocabulary import find_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_distill.cache.estimator import Estimator
    from llm_distill.collation import RowCollator
    from llm_distill.naming import Named
    from llm_distill.objectives import Objective, Term
    from llm_distill.signals import ModelSpec


def caches(teacher: object, *, experts: bool = True) -> tuple[Cached, ...]:
    """A cache, and those among what a teacher is made of.

    Args:
        teacher: Any.
        experts: Those of a `Routed` too, which are asked about some examples alone.
    """
    if isinstance(teacher, Cached):
        return (teacher,)
    parts: Sequence[object] = ()
    if isinstance(teacher, Mapping):
        parts = tuple(teacher.values())
    elif isinstance(teacher, tuple | list):
        parts = teacher
    elif dataclasses.is_dataclass(teacher) and (experts or not isinstance(teacher, Routed)):
        # A teacher made of the student has none before it is told which.
        parts = tuple(vars(teacher).get(field.name) for field in dataclasses.fields(teacher))
    return tuple(cache for part in parts for cache in caches(part, experts=experts))


def check_objectives(
    estimator: Estimator,
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    student: ModelSpec,
    teacher: ModelSpec,
    held: Collection[int] = (),
) -> None:
    """Refuse what a cache cannot serve.

    Args:
        estimator: What a cache keeps.
        objectives: What is trained.
        terms: The same, bound.
        student: Of the run.
        teacher: Whose answers they are.
        held: Its layers whose hidden states are kept.

    Raises:
        InputError: Naming the objective and what to write.
    """
    for objective, (name, term) in zip(objectives, terms.items(), strict=True):
        asked = term.teacher | mapping.requests([objective], student, teacher)[1]
        try:
            asked = asked | binding.survey([objective], student, teacher)[1]
            refuse_layers(asked, name, estimator, held)
        except ValueError as error:
            raise InputError(str(error)) from error
    _check_terms(estimator, terms, student)


def _check_terms(estimator: Estimator, terms: Mapping[str, Term], student: ModelSpec) -> None:
    """Refuse terms on logits that need more of a row than is kept.

    Raises:
        InputError: Naming the term and what to write.
    """
    example = estimator.example()
    for name, term in terms.items():
        if example is None or not (isinstance(term, HeadTerm) and term.teacher.logits):
            continue
        try:
            plan([term.row], student.vocabulary, example)
        except ValueError as error:
            raise InputError(
                f"{name}: the cache keeps {estimator}; {error}; or cache with keep: topk, or "
                "keep: hidden"
            ) from error


def check(
    teacher: object,
    objectives: Sequence[Objective],
    terms: Mapping[str, Term],
    student: ModelSpec,
) -> None:
    """Refuse objectives that a cache, alone or among several teachers, cannot serve.

    Raises:
        InputError: Naming the objective or the signal, and what to write.
    """
    for cached in caches(teacher):
        manifest = cached.store.manifest
        if cached is teacher:
            held = () if manifest.layers is None else manifest.layers.layers
            check_objectives(manifest.estimator, objectives, terms, student, cached.spec, held)
        else:
            _check_terms(manifest.estimator, terms, student)
        if manifest.estimator.example() is not None and student.vocabulary < manifest.vocabulary:
            raise InputError(
                f"the cache {cached.path} was written for students of {manifest.vocabulary} tokens "
                f"and more, and {student.name} has {student.vocabulary}; write it anew with this "
                "recipe"
            )


def told(teacher: object, objectives: Sequence[Objective]) -> tuple[str, ...]:
    """What each cache is, for the lines before a training; nothing for any other teacher."""
    warm = [o for o in objectives if isinstance(o, Logits) and o.temperature != 1]
    said = []
    for cached in caches(teacher):
        kept = cached.store.manifest.estimator
        said.append(f"teacher: the cache {cached.path} of {cached.store.manifest}")
        if warm and isinstance(kept.example(), TopK):
            said.append(
                f"temperature {warm[0].temperature:g} on {kept}: the tail is tempered as one "
                "token, which is an approximation; keep: hidden is exact"
            )
    return tuple(said)


def check_data(
    teacher: object,
    tokenizer: PreTrainedTokenizerBase | None,
    datasets: Mapping[str, Any],
    collator: RowCollator,
    read: Callable[[Any], Any],
) -> None:
    """Refuse files, tokenizers and examples that are not those of a cache.

    A stream, and data of an expert, are looked up batch by batch alone.

    Args:
        teacher: Any; only caches are looked at, alone or among several teachers.
        tokenizer: Of the run.
        datasets: By the names of Trainer's arguments.
        collator: Of the run.
        read: Takes away the columns that Trainer does.

    Raises:
        InputError: Saying what differs.
    """
    for cached in caches(teacher):
        cached.check_files()
        if tokenizer is not None:
            _check_tokenizer(cached, tokenizer)
    everywhere = caches(teacher, experts=False)
    for name, dataset in datasets.items() if everywhere else ():
        parts = dataset if isinstance(dataset, Mapping) else {name: dataset}
        for part, content in parts.items():
            if isinstance(content, Sized) and not isinstance(content, TorchStream):
                label, found = f"{name}[{part}]", names_of(content, collator, read)
                for cached in everywhere:
                    _check_examples(cached, name if part == name else label, found)


def _check_tokenizer(teacher: Cached, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse another tokenizer or chat template than those that cut the cached examples."""
    manifest = teacher.store.manifest
    if manifest.tokenizer and fingerprints.of_tokenizer(tokenizer) != manifest.tokenizer:
        theirs = teacher.find_tokenizer()
        told = ""
        if theirs is not None:
            told = find_difference(tokenizer, theirs, ("of this run", f"of {manifest.teacher}"))
        raise InputError(
            f"the cache {teacher.path} was written with another tokenizer"
            + (f": {told}" if told else ", which cuts text otherwise")
            + "; take that of the cache, or write the cache anew"
        )
    if manifest.tokenizer and fingerprints.of_template(tokenizer) != manifest.template:
        raise InputError(
            f"the cache {teacher.path} was written with another chat template than the tokenizer's "
            "of this run; take the tokenizer of the cache, or write the cache anew"
        )


def _check_examples(teacher: Cached, name: str, found: Named) -> None:
    """Refuse examples that are not in the cache, with what differs."""
    kept = teacher.store.manifest.layers
    counts = found.lengths if kept is not None and kept.rows == "valid" else found.rows
    wanted = [k for k, count in enumerate(counts) if count]
    held = teacher.store.index.holds([found.keys[k] for k in wanted])
    missing = [k for k, there in zip(wanted, held.tolist(), strict=True) if not there]
    if not missing:
        return
    first, facts = missing[0], found.facts()
    known = teacher.store.manifest.data
    split = name.replace("_dataset", "")
    if split not in known:
        raise InputError(
            f"the cache {teacher.path} holds no {split} data ({', '.join(known)} alone); write it "
            "anew with this recipe"
        )
    words = {
        "examples": "{} examples",
        "rows": "{} supervised tokens",
        "longest": "at most {} long",
    }
    differ = [
        f"{text.format(f'{facts[key]:,}')} now, {known[split][key]:,} there"
        for key, text in words.items()
        if facts[key] != known[split][key]
    ]
    told = "; ".join(differ) or "there are as many, and as long ones, in the cache"
    raise InputError(
        f"{name}: {len(missing):,} of {len(wanted):,} examples are not in the cache "
        f"{teacher.path}, the first is number {first} ({found.lengths[first]} tokens, "
        f"{found.rows[first]} supervised); {told}. The data, their order in blocks, the chat "
        "template or max_length changed: write them as they were, or the cache anew"
    )
