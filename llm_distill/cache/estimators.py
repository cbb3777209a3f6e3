"""What a cache can keep of a teacher: `keep` of `Cached`.

Each function says it with its settings, and is a name in a recipe: ``keep: {topk: {k: 64}}``; in
Python ``Cached(path, keep=partial(topk, k=64))``.

`topk`: the k likeliest tokens and the mass of the others, for every divergence. `sampled`: n drawn
tokens, right on average for `forward_kl` at temperature 1 alone. `hybrid`: the m likeliest and n
drawn from the others, for the same with less noise. `hidden`: the last hidden states, and the
teacher's head once, for everything on logits, exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_distill.cache.estimator import Estimator  # noqa: TC001  recipes read the hints
from llm_distill.cache.kinds import Drawn, Mixed, States, Top
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["hidden", "hybrid", "sampled", "topk"]


def topk(*, k: int = 64) -> Estimator:
    """The k likeliest tokens and the mass of all others, which serve every divergence.

    At a temperature other than 1 the others are tempered as one token: an approximation.
    Where the k hold little of the mass (`llm-distill cache` tells), the shape of the tail is not
    taught: take `sampled` or `hidden`.

    >>> str(topk(k=8))
    'top 8 and the tail'
    """
    return Top(k)


def sampled(*, n: int = 50) -> Estimator:
    """Tokens drawn with replacement, n a row: the gradient of `forward_kl` is right on average.

    Source: Anshumann et al. 2025 (RS-KD), arXiv 2503.16870.

    >>> str(sampled())
    '50 draws'
    """
    return Drawn(n)


def hybrid(*, m: int = 8, n: int = 42) -> Estimator:
    """The m likeliest tokens exactly and n draws from the others: unbiased, with less noise.

    >>> str(hybrid())
    'top 8 and 42 draws from the tail'
    """
    return Mixed(m, n)


def hidden() -> Estimator:
    """The last hidden states; the teacher's head lies beside them, once: everything is exact.

    >>> str(hidden())
    'last hidden states'
    """
    return States()


_KINDS: Mapping[str, Callable[..., Estimator]] = {
    "topk": topk,
    "sampled": sampled,
    "hybrid": hybrid,
    "hidden": hidden,
}


def written(estimator: Estimator) -> dict[str, Any]:
    """An estimator as a manifest has it.

    >>> written(hybrid(m=2))
    {'hybrid': {'m': 2, 'n': 42}}
    """
    return {estimator.name: dict(vars(estimator))}


def read(text: Mapping[str, Any]) -> Estimator:
    """What `written` wrote.

    Raises:
        InputError: If it is none.
    """
    ((name, settings),) = text.items()
    if name not in _KINDS:
        raise InputError(f"the cache keeps {name!r}, which this version does not know; update it")
    return _KINDS[name](**settings)
