"""What a loss between hidden states needs: how many rows, of what, how wide and how normalised.

A loss is called with the rows of one group at a time. These are its defaults; an objective that is
told otherwise does what it is told.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from llm_distill.losses.contrastive import info_nce
from llm_distill.losses.energy import attention_transfer
from llm_distill.losses.features import cosine, huber, mse
from llm_distill.losses.neurons import nst
from llm_distill.losses.relations import cka, pkt, rkd_angle, rkd_distance

__all__ = ["Items", "Needs", "needs"]

Items = Literal["token", "sequence", "pooled"]
"""Groups: all tokens of a batch; the tokens of one sequence; one mean vector for each sequence."""


@dataclass(frozen=True)
class Needs:
    """What a loss needs of the groups it is called with.

    Attributes:
        least: Rows in a group below which it says nothing: it is 0 there.
        most: Rows of a group that are taken by default, which is what memory allows; None: all.
        items: How rows are grouped by default.
        same_width: Whether student and teacher must be equally wide, so that a projector is needed.
        normalize: What the rows go through by default. `none` for relations: they centre and scale
            themselves, and layer normalisation would make the energies of all rows equal.
    """

    least: int = 1
    most: int | None = None
    items: Items = "token"
    same_width: bool = True
    normalize: Literal["none", "layer", "l2"] = "layer"


_relation = partial(Needs, same_width=False, normalize="none")

_TABLE: tuple[tuple[Callable[..., Tensor], Needs], ...] = (
    (mse, Needs()),
    (cosine, Needs()),
    (huber, Needs()),
    (attention_transfer, _relation(least=2, items="sequence")),
    (nst, _relation(least=2, most=256, items="sequence")),
    (pkt, _relation(least=3, most=512)),
    (rkd_distance, _relation(least=3, most=512)),
    (rkd_angle, _relation(least=3, most=64)),
    (cka, _relation(least=4, most=1024)),
    (info_nce, Needs(least=2, most=1024)),
)


def needs(loss: Callable[..., Tensor]) -> Needs:
    """What a loss needs, with its settings in a `partial` or without; functions of one's own: rows.

    >>> needs(partial(mse)).same_width
    True
    """
    while isinstance(loss, partial):
        loss = loss.func
    return next((known for function, known in _TABLE if function is loss), Needs())
