"""Names of what a cache keeps, as a recipe writes them and a manifest keeps them."""

import pytest

from llm_distill.cache import estimators
from llm_distill.cache.estimator import Estimator
from llm_distill.errors import InputError

EVERY = [
    estimators.topk(k=5),
    estimators.sampled(n=7),
    estimators.hybrid(m=2, n=3),
    estimators.hidden(),
]


@pytest.mark.parametrize("kind", EVERY, ids=str)
def test_a_manifest_gives_back_what_it_was_given(kind: Estimator) -> None:
    text = estimators.written(kind)
    assert list(text) == [kind.name]
    assert kind.name in estimators.__all__
    assert estimators.read(text) == kind


def test_what_a_newer_version_kept() -> None:
    with pytest.raises(InputError, match="the cache keeps 'topp', which this version does not"):
        estimators.read({"topp": {"p": 0.9}})
