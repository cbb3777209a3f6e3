"""Targets that are read where a batch is collated."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_distill.binding import make_batch
from llm_distill.cache.estimators import hidden, sampled
from llm_distill.cache.lookup import Lookup
from llm_distill.collation import RowCollator
from llm_distill.data import Collator
from llm_distill.errors import InputError
from llm_distill.keys import Examples
from llm_distill.losses.sparse import Counts, TopK
from tests import caches, tiny

ROWS = tiny.rows(32, empty=(3,))
KINDS: dict[str, tuple[Any, type]] = {
    "topk": (caches.TOP, TopK),
    "sampled": (sampled, Counts),
    "hidden": (hidden, Tensor),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        name: caches.written(tmp_path_factory.mktemp(name), keep)
        for name, (keep, _) in KINDS.items()
    }


def collator(path: str) -> RowCollator:
    return RowCollator(Collator(pad_token_id=0), shift=True, valid=False, lookup=Lookup(path))


@pytest.mark.parametrize("kind", list(KINDS))
class TestKinds:
    def test_beside_the_rows(self, paths: dict[str, str], kind: str) -> None:
        batch = collator(paths[kind])([ROWS[k] for k in (4, 3, 9)])
        told: Any = batch["told"]
        assert isinstance(told, KINDS[kind][1])
        assert len(batch["told"]) == len(batch["rows"])
        made = make_batch(batch, None, seed=0, epoch=0)
        assert "told" not in made.inputs
        assert "examples" not in made.inputs

    def test_the_first_sequences_alone(self, paths: dict[str, str], kind: str) -> None:
        batch = collator(paths[kind])([ROWS[k] for k in (4, 9)])
        made = make_batch(batch, None, seed=0, epoch=0, keep=1)
        assert made.told is not None
        assert len(made.told) == len(made.supervised) < len(batch["told"])
        moved = made.to("meta").told
        assert moved is not None
        tensor = moved if isinstance(moved, Tensor) else moved.ids
        assert tensor.device.type == "meta"

    def test_in_another_process_it_opens_its_own_files(
        self, paths: dict[str, str], kind: str
    ) -> None:
        lookup = Lookup(paths[kind])
        assert lookup.store is lookup.store
        again = pickle.loads(pickle.dumps(lookup))
        assert again == lookup
        assert not again._stores
        one, two = (collator(paths[kind])([ROWS[5]])["told"] for _ in range(2))
        values = (one, two) if isinstance(one, Tensor) else (one.ids, two.ids)
        assert torch.equal(*values)


def test_another_number_of_rows_than_the_index_says(paths: dict[str, str]) -> None:
    lookup = Lookup(paths["topk"])
    found = collator(paths["topk"])([ROWS[5]])["examples"]
    wrong = Examples(found.keys, (found.rows[0] + 1,), (1,), found.lengths)
    with pytest.raises(InputError, match="its index is of other shards"):
        lookup(wrong)


def test_a_flipped_bit_that_nobody_looked_for(tmp_path: Path) -> None:
    """Not verified at the start, it is still found, by the page's checksum."""
    path = Path(caches.written(tmp_path))
    for shard in path.glob("train-*.parquet"):
        content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
        content[200] ^= 1
        shard.write_bytes(content.tobytes())
    with pytest.raises(InputError, match=r"\.parquet cannot be read .*copy it anew"):
        collator(str(path))([ROWS[0]])
