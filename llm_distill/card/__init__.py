"""The model card of a distilled student: facts in, `README.md` out.

`metadata` makes the front matter, `body` the text. A card is public: absolute paths shrink to their
last part and tokens are blotted out, wherever they stand.
"""

from pathlib import Path

from llm_distill.card.body import body
from llm_distill.card.facts import (
    CardFacts,
    DataFacts,
    ModelFacts,
    ObjectiveFacts,
    origin_of,
    scrub,
)
from llm_distill.card.metadata import metadata

__all__ = ["CardFacts", "DataFacts", "ModelFacts", "ObjectiveFacts", "origin_of", "render", "write"]


def render(facts: CardFacts) -> str:
    """The whole card: front matter and text."""
    return scrub(f"---\n{metadata(facts).to_yaml()}\n---\n\n{body(facts)}", facts.names)


def write(facts: CardFacts, folder: Path) -> Path:
    """Write the card into a folder, in place of one that is there; where it stands."""
    path = folder / "README.md"
    path.write_text(render(facts), encoding="utf-8")
    return path
