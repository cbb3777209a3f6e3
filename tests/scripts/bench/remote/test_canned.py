"""The canned server answers as the dialects are read, about the tokens that are sent."""

import pytest

from llm_distill.teachers.client import Client
from llm_distill.teachers.dialects import DIALECTS, Asked, read
from llm_distill.teachers.targets import top_k
from scripts.bench.remote.canned import PATHS, Form, serving


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_answers_are_read_as_those_of_a_real_one(dialect: str) -> None:
    form = Form(dialect, length=12, k=5, vocabulary=100)
    kind = DIALECTS[dialect]
    assert PATHS[dialect] == kind.path
    asked = [Asked(form.tokens(), list(range(11)))] * 3
    with serving(form) as url:
        client = Client(url, key=None, timeout=10, concurrency=1)
        told = read(kind, client.ask(kind.path, kind.body("m", asked, 5), patience=5), asked)
        client.close()
    assert len(told) == 3
    assert told[0] == told[1] == told[2]
    made = top_k(told[0], 5, 100)
    assert (made.log_probs.exp().sum(1) < 1).all()
    assert len(made) == 11
