"""Every loss that a card can name has its paper."""

import re

import pytest

from llm_distill import losses
from llm_distill.card.citations import CITATIONS


def test_every_loss_has_a_citation() -> None:
    assert set(losses.__all__) <= set(CITATIONS)


@pytest.mark.parametrize("name", sorted(CITATIONS))
def test_a_citation_has_authors_year_title_and_a_link_to_itself(name: str) -> None:
    text = CITATIONS[name]
    found = re.fullmatch(r"[^(]+ \((19|20)\d\d\)\. \*[^*]+\*\. \[(\w+):(\S+)\]\((\S+)\)", text)
    assert found is not None, text
    kind, number, link = found.group(2, 3, 4)
    home = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}[kind]
    assert link == home + number
