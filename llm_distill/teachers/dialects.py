"""How vLLM and SGLang are asked what they think of given tokens, and how they tell it.

The forms were read in the sources of both: vLLM at commits cc139d8 and 002032e of 2026, its
`/v1/completions` with `prompt_logprobs`; SGLang at commit 001067f of 2026, its `/generate` with
`return_logprob`. Older sources of both have the same. Neither server was run here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Name = Literal["auto", "vllm", "sglang"]

PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Left out, a server takes what stands in the model's `generation_config.json`."""


class Asked(NamedTuple):
    """A sequence, and which of its predictions are wanted.

    Attributes:
        tokens: Without padding, up to the last one whose prediction is wanted.
        places: Positions that the wanted predictions are made at, ascending; the token of one more
            is the one that came.
    """

    tokens: list[int]
    places: list[int]


Told = list[dict[int, float]]
"""Log-probability by token, of each wanted prediction."""


@dataclass(frozen=True)
class Dialect:
    """One way of asking.

    Attributes:
        name: As a recipe names it.
        path: Where.
        body: (model, sequences, k) -> JSON of the request.
        read: (JSON of the answer, sequences) -> what is told of each; wrong shapes raise anything
            that Python raises, wrong contents a `ValueError` that says so.
        limit: How the server is started so that it tells more tokens.
    """

    name: str
    path: str
    body: Callable[[str, Sequence[Asked], int], dict[str, Any]]
    read: Callable[[Any, Sequence[Asked]], list[Told]]
    limit: str


def read(dialect: Dialect, answer: Any, asked: Sequence[Asked]) -> list[Told]:  # noqa: ANN401  any JSON
    """What an answer tells of each sequence.

    Raises:
        ValueError: If it is not in the form of this dialect, or about other tokens.
    """
    try:
        told = dialect.read(answer, asked)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"it is not in the form of {dialect.name} ({type(error).__name__}: {error})"
        ) from error
    return told


def _ask_vllm(model: str, asked: Sequence[Asked], k: int) -> dict[str, Any]:
    """One token is generated, the fewest that vLLM allows."""
    prompts = [sequence.tokens for sequence in asked]
    return {
        "model": model,
        "prompt": prompts,
        "max_tokens": 1,
        "prompt_logprobs": k,
        "add_special_tokens": False,
        **PLAIN,
    }


def _read_vllm(answer: Any, asked: Sequence[Asked]) -> list[Told]:  # noqa: ANN401  any JSON
    """For each token what was thought before it, itself among them: None for the first."""
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    _same(len(choices), len(asked), "sequences")
    return [_prompt(choice["prompt_logprobs"], a) for choice, a in zip(choices, asked, strict=True)]


def _prompt(told: Sequence[Any] | None, asked: Asked) -> Told:
    """Of one sequence."""
    if told is None:
        raise ValueError("it has no prompt_logprobs")
    _same(len(told), len(asked.tokens), "tokens")
    rows = []
    for place in asked.places:
        row = {int(t): float(entry["logprob"]) for t, entry in told[place + 1].items()}
        if asked.tokens[place + 1] not in row:
            raise ValueError(f"it does not tell of token {asked.tokens[place + 1]}, which was sent")
        rows.append(row)
    return rows


def _ask_sglang(model: str, asked: Sequence[Asked], k: int) -> dict[str, Any]:
    """A server has one model, so it is not named."""
    del model
    return {
        "input_ids": [sequence.tokens for sequence in asked],
        "sampling_params": {"max_new_tokens": 1, **PLAIN},
        "return_logprob": True,
        "logprob_start_len": [sequence.places[0] for sequence in asked],
        "top_logprobs_num": k,
    }


def _read_sglang(answer: Any, asked: Sequence[Asked]) -> list[Told]:  # noqa: ANN401  any JSON
    """From the first place on what was thought before each token: `[[logprob, token, text], ...]`.

    Nothing is told of the first of these tokens, also where it is not that of the sequence.
    """
    _same(len(answer), len(asked), "sequences")
    return [_input(one["meta_info"], a) for one, a in zip(answer, asked, strict=True)]


def _input(meta: Mapping[str, Any], asked: Asked) -> Told:
    """Of one sequence."""
    if meta.get("input_top_logprobs") is None:
        raise ValueError("it has no input_top_logprobs")
    first = asked.places[0]
    sent = asked.tokens[first:]
    there = [int(entry[1]) for entry in meta["input_token_logprobs"]]
    _same(len(there), len(sent), "tokens")
    for theirs, ours in zip(there, sent, strict=True):
        if theirs not in (ours, 0):  # some versions write 0 for the last token of the vocabulary
            raise ValueError(f"it tells of token {theirs} where {ours} was sent")
    rows = meta["input_top_logprobs"]
    _same(len(rows), len(sent), "tokens")
    return [
        {int(entry[1]): float(entry[0]) for entry in rows[place + 1 - first]}
        for place in asked.places
    ]


def _same(there: int, sent: int, what: str) -> None:
    """Refuse an answer to another question.

    Raises:
        ValueError: With both numbers.
    """
    if there != sent:
        raise ValueError(f"it tells of {there} {what} where {sent} were sent")


VLLM = Dialect("vllm", "/v1/completions", _ask_vllm, _read_vllm, "vllm serve … --max-logprobs {k}")
SGLANG = Dialect("sglang", "/generate", _ask_sglang, _read_sglang, "")

DIALECTS = {dialect.name: dialect for dialect in (VLLM, SGLANG)}
