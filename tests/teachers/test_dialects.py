"""What is sent to vLLM and SGLang, and what is made of recorded forms of their answers."""

from typing import Any

import pytest

from llm_distill.teachers.dialects import DIALECTS, PLAIN, SGLANG, VLLM, Asked, read

ONE, TWO = Asked([5, 6, 7, 8], [1, 2]), Asked([9, 4], [0])
"""Wanted: what is thought before tokens 7 and 8; before token 4."""


def entry(logprob: float, rank: int = 1) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": "é"}


def vllm() -> dict[str, Any]:
    """In the order in which sequences were done."""
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": "m",
        "choices": [
            {
                "index": 1,
                "text": "?",
                "prompt_logprobs": [None, {"4": entry(-0.2), "3": entry(-2.0, 2)}],
            },
            {
                "index": 0,
                "text": "!",
                "prompt_logprobs": [
                    None,
                    {"6": entry(-0.9), "2": entry(-1.0, 2)},
                    {"1": entry(-0.3), "7": entry(-9999.0, 40), "0": entry(-1.5, 2)},
                    {"8": entry(-0.4), "1": entry(-1.1, 2)},
                ],
            },
        ],
    }


def sglang() -> list[dict[str, Any]]:
    return [
        {
            "text": "!",
            "meta_info": {
                "input_token_logprobs": [[None, 6, None], [-9.0, 7, None], [-0.4, 8, None]],
                "input_top_logprobs": [
                    None,
                    [[-0.3, 1, None], [-1.5, 0, None]],
                    [[-0.4, 8, None], [-1.1, 1, None]],
                ],
            },
        },
        {
            "text": "?",
            "meta_info": {
                "input_token_logprobs": [[None, 9, None], [-0.2, 4, None]],
                "input_top_logprobs": [None, [[-0.2, 4, None], [-2.0, 3, None]]],
            },
        },
    ]


def test_names() -> None:
    assert list(DIALECTS) == ["vllm", "sglang"]


def test_what_vllm_is_sent() -> None:
    body = VLLM.body("m", [ONE, TWO], 2)
    assert body["prompt"] == [[5, 6, 7, 8], [9, 4]]
    assert (body["model"], body["prompt_logprobs"], body["max_tokens"]) == ("m", 2, 1)
    assert PLAIN.items() <= body.items()


def test_what_vllm_tells() -> None:
    assert read(VLLM, vllm(), [ONE, TWO]) == [
        [{1: -0.3, 7: -9999.0, 0: -1.5}, {8: -0.4, 1: -1.1}],
        [{4: -0.2, 3: -2.0}],
    ]


def test_what_sglang_is_sent() -> None:
    body = SGLANG.body("m", [ONE, TWO], 2)
    assert body["input_ids"] == [[5, 6, 7, 8], [9, 4]]
    assert body["logprob_start_len"] == [1, 0]
    assert (body["return_logprob"], body["top_logprobs_num"]) == (True, 2)
    assert PLAIN.items() <= body["sampling_params"].items()


def test_what_sglang_tells() -> None:
    expected = [[{1: -0.3, 0: -1.5}, {8: -0.4, 1: -1.1}], [{4: -0.2, 3: -2.0}]]
    assert read(SGLANG, sglang(), [ONE, TWO]) == expected


@pytest.mark.parametrize(("dialect", "answer"), [(VLLM, vllm()), (SGLANG, sglang())])
def test_places_that_are_not_wanted_are_left_out(dialect: Any, answer: Any) -> None:
    told = read(dialect, answer, [ONE._replace(places=[1]), TWO])
    assert told == [[pytest.approx(told[0][0])], [{4: -0.2, 3: -2.0}]]
    assert told[0][0][1] == -0.3


def test_sglang_may_write_0_for_the_last_token() -> None:
    answer = sglang()
    answer[1]["meta_info"]["input_token_logprobs"][1][1] = 0
    assert read(SGLANG, answer, [ONE, TWO])[1] == [{4: -0.2, 3: -2.0}]


def cut(answer: Any, *path: Any) -> Any:
    """The answer without the last entry of what lies at a path."""
    inner = answer
    for key in path:
        inner = inner[key]
    inner.pop()
    return answer


def put(answer: Any, value: Any, *path: Any) -> Any:
    """The answer with a value at a path."""
    inner = answer
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return answer


VLLM_CASES = [
    ({"choices": []}, "it tells of 0 sequences where 2 were sent"),
    (put(vllm(), None, "choices", 0, "prompt_logprobs"), "it has no prompt_logprobs"),
    (cut(vllm(), "choices", 1, "prompt_logprobs"), "it tells of 3 tokens where 4 were sent"),
    (
        put(vllm(), {"1": entry(-0.3), "0": entry(-1.5)}, "choices", 1, "prompt_logprobs", 2),
        "it does not tell of token 7, which was sent",
    ),
    ({"error": "no"}, r"not in the form of vllm \(KeyError: 'choices'\)"),
    (["x"], "not in the form of vllm"),
    (put(vllm(), 3, "choices", 1, "prompt_logprobs", 2), "not in the form of vllm"),
    (put(vllm(), {"7": -0.3}, "choices", 1, "prompt_logprobs", 2), "not in the form of vllm"),
    (put(vllm(), {"w": entry(-0.3)}, "choices", 1, "prompt_logprobs", 2), "invalid literal"),
    (put(vllm(), None, "choices", 1, "prompt_logprobs", 2), "not in the form of vllm"),
]

META = (0, "meta_info")
SGLANG_CASES = [
    (sglang()[:1], "it tells of 1 sequences where 2 were sent"),
    (put(sglang(), None, *META, "input_top_logprobs"), "it has no input_top_logprobs"),
    (cut(sglang(), *META, "input_top_logprobs"), "it tells of 2 tokens where 3 were sent"),
    (cut(sglang(), *META, "input_token_logprobs"), "it tells of 2 tokens where 3 were sent"),
    (
        put(sglang(), 3, *META, "input_token_logprobs", 1, 1),
        "it tells of token 3 where 7 was sent",
    ),
    (put(sglang(), None, *META, "input_top_logprobs", 1), "not in the form of sglang"),
    (vllm(), "it tells of 4 sequences where 2|not in the form of sglang"),
]


@pytest.mark.parametrize(("answer", "message"), VLLM_CASES)
def test_what_vllm_never_says(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(VLLM, answer, [ONE, TWO])


@pytest.mark.parametrize(("answer", "message"), SGLANG_CASES)
def test_what_sglang_never_says(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(SGLANG, answer, [ONE, TWO])
