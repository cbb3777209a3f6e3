"""What a server is, and whether it can teach: asked at the start, before weights load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from llm_distill.errors import InputError, ServerError
from llm_distill.loading import SAMPLE
from llm_distill.teachers.client import Client, RefusedError
from llm_distill.teachers.dialects import DIALECTS, VLLM, Asked, Dialect, Name, read
from llm_distill.teachers.targets import top_k

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HASTE = 10.0
"""Seconds of trying again at the start, where somebody waits and the url may be wrong."""

PROBE = 8
"""Tokens that a server is asked about first."""


@dataclass(frozen=True)
class Served:
    """What a server says of itself.

    Attributes:
        dialect: How it is asked.
        longest: Tokens of a prompt; None where it does not say.
    """

    dialect: Dialect
    longest: int | None


def find(client: Client, model: str, dialect: Name) -> Served:
    """The model among those that are served.

    Raises:
        InputError: If nobody answers, or the model is not there.
    """
    path = "/v1/models"
    try:
        answer = client.ask(path, patience=HASTE, timeout=HASTE)
    except RefusedError as error:
        raise InputError(f"{error}{_key_hint(error)}") from error
    except ServerError as error:
        raise InputError(f"{error}; is it started? Such as: vllm serve {model}") from error
    cards = _cards(answer)
    if cards is None:
        raise InputError(
            f"{client.url}{path}: this is no list of models; Remote asks servers of vLLM and SGLang"
        )
    if model not in cards:
        near = get_close_matches(model, cards, n=1) or sorted(cards)[:1]
        instead = f"; write model: {near[0]}" if near else ""
        there = ", ".join(sorted(cards)) or "no model"
        raise InputError(f"{client.url} serves {there}, and not {model!r}{instead}")
    card = cards[model]
    owner = str(card.get("owned_by", ""))
    kind = DIALECTS.get(owner, VLLM) if dialect == "auto" else DIALECTS[dialect]
    length = card.get("max_model_len")
    # One token of the answer has to fit as well.
    return Served(kind, length - 1 if isinstance(length, int) and length > 1 else None)


def check(client: Client, served: Served, model: str, k: int, vocabulary: int) -> None:
    """Ask about a few tokens: they come back, with k likeliest ones each, normalised.

    Raises:
        InputError: Saying what does not.
    """
    dialect = served.dialect
    count = min(PROBE, served.longest or PROBE)
    tokens = [token % vocabulary for token in range(1, count + 1)]
    asked = [Asked(tokens, list(range(count - 1)))]
    where = f"{client.url}{dialect.path}"
    try:
        answer = client.ask(dialect.path, dialect.body(model, asked, k), patience=HASTE)
    except RefusedError as error:
        raise InputError(_limited(error, dialect, k)) from error
    except ServerError as error:
        raise InputError(str(error)) from error
    try:
        (told,) = read(dialect, answer, asked)
        top_k(told, k, vocabulary)
    except ValueError as error:
        raise InputError(
            f"{where}: the answer is of no use: {error}. Remote needs log-probabilities of the "
            "prompt at temperature 1, as vLLM and SGLang (dialect: sglang) give them"
        ) from error


def compare(client: Client, model: str, tokenizer: PreTrainedTokenizerBase, of: str) -> bool:
    """Cut a text on the server and here.

    Returns:
        Whether it was compared: not every server cuts texts.

    Raises:
        InputError: With the first token that differs.
    """
    body = {"model": model, "prompt": SAMPLE, "add_special_tokens": False}
    try:
        answer = client.ask("/tokenize", body, patience=HASTE, timeout=HASTE)
        theirs = [int(token) for token in answer["tokens"]]
    except (ServerError, KeyError, TypeError, ValueError):
        return False
    ours = list(tokenizer(SAMPLE, add_special_tokens=False).input_ids)
    if theirs == ours:
        return True
    place = next((k for k, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
    place = min(len(theirs), len(ours)) if place is None else place
    raise InputError(
        f"{client.url} has another tokenizer than {of}: token {place} of {SAMPLE!r} is "
        f"{_shown(theirs, place)} there and {_shown(ours, place)} here; write of: the Hub id or "
        "the path of what is served"
    )


def _cards(answer: Any) -> dict[str, dict[str, Any]] | None:  # noqa: ANN401  any JSON
    """Models by their ids; None for something else."""
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        return None
    return {str(entry.get("id")): entry for entry in entries if isinstance(entry, dict)}


def _limited(error: RefusedError, dialect: Dialect, k: int) -> str:
    """A refusal, with the way out where it is the number of tokens."""
    found = re.search(r"greater than max allowed: (\d+)", error.said)
    if found is None:
        return f"{error}{_key_hint(error)}"
    most = found.group(1)
    way = f"start it with {dialect.limit.format(k=k)}, or " if dialect.limit else ""
    return (
        f"the server tells at most {most} tokens of a row, and top_k is {k}; {way}write top_k: "
        f"{most}"
    )


def _key_hint(error: RefusedError) -> str:
    """How to give a key, where that is what is missing."""
    if error.status not in (401, 403):
        return ""
    return (
        "; a key is read from the environment: put it into OPENAI_API_KEY, or write key_from: the "
        "name of another variable"
    )


def _shown(tokens: list[int], place: int) -> str:
    """A token of a cut text, for a message."""
    return str(tokens[place]) if place < len(tokens) else "missing"
