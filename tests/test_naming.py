"""Names of examples: the same from columns and from batches."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.naming import names_of
from tests import tiny

ROWS = tiny.rows(32, empty=(3,))


@pytest.mark.parametrize("shift", [True, False])
def test_names_from_columns_are_those_of_batches(shift: bool) -> None:
    collator = RowCollator(Collator(pad_token_id=0), shift=shift, valid=False)
    own = RowCollator(_pad, shift=shift, valid=False)
    for data in (ROWS, ROWS.select([5, 1, 30]), ROWS.remove_columns("labels")):
        ours, theirs = (names_of(data, c, dict) for c in (collator, own))
        assert ours == theirs
        assert ours.facts()["examples"] == len(data)


def _pad(examples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A collator that only does as ours."""
    return Collator(pad_token_id=0, padding_side="left")(examples)
