"""The manifest is written for what was written here, and for nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_distill.cache.manifest import FILE, UNFINISHED
from llm_distill.caching import write_cache
from llm_distill.caching.asking import write_shard
from llm_distill.errors import InputError
from tests import caches


def other_shard(folder: Path) -> None:
    """A shard of another length."""
    (folder / "train-00000.parquet").write_bytes(b"of another process")


def other_note(folder: Path) -> None:
    """The note of another shard."""
    shutil.copy(folder / "train-00001.parquet.json", folder / "train-00000.parquet.json")


def other_manifest(folder: Path) -> None:
    """A manifest of another teacher."""
    text = (folder / UNFINISHED).read_text()
    (folder / UNFINISHED).write_text(text.replace('"float32"', '"bfloat16"'))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_shard, "train-00000.parquet"),
        (other_note, "train-00000.parquet"),
        (other_manifest, r"a cache that differs in the dtype of the teacher \(bfloat16 there"),
    ],
)
def test_somebody_else_wrote_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    what: str,
) -> None:
    """On a disk where a lock does not hold, such as that of two machines with different clocks."""
    made = caches.capture(tmp_path)

    def watched(*args: Any) -> Any:
        shard = write_shard(*args)
        if args[1].number == len(made.parts) - 1:
            change(made.folder)
        return shard

    monkeypatch.setattr("llm_distill.caching.writing.write_shard", watched)
    with pytest.raises(InputError, match=f"another process wrote {what}.*run the same command"):
        write_cache(made)
    assert not (made.folder / FILE).exists()
