"""Reading a finished cache: verified, any example in any order, little memory."""

from pathlib import Path

import pytest
import torch

from llm_distill.cache import store as stores
from llm_distill.cache.estimators import hidden
from llm_distill.cache.store import HEAD, Store, save_head
from llm_distill.errors import InputError
from llm_distill.signals import Head
from tests import caches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(caches.written(tmp_path))


def keys_of(store: Store) -> list[bytes]:
    return [
        key
        for shard in range(len(store.manifest.shards))
        for group in store._file(shard).keys_by_group()
        for key in group
    ]


def test_every_example_in_any_order(folder: Path) -> None:
    store = Store.open(folder)
    assert len(store.manifest.shards) > 4
    keys = keys_of(store)
    assert len(keys) == sum(shard.examples for shard in store.manifest.shards)
    forward = store.fetch(keys)
    backward = store.fetch(keys[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        assert one.rows == other.rows
        assert all((one.columns[name] == other.columns[name]).all() for name in one.columns)


def test_little_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MOST_BYTES", 1)
    monkeypatch.setattr(stores, "MOST_FILES", 2)
    store = Store.open(folder)
    keys = keys_of(store)
    store.fetch(keys)
    assert len(store._groups) == 1
    assert len(store._files) == 2
    assert [part.rows for part in store.fetch(keys)] == [
        part.rows for part in Store.open(folder).fetch(keys)
    ]


def test_what_is_not_there(folder: Path) -> None:
    store = Store.open(folder)
    keys = keys_of(store)
    message = "1 of the 3 examples of this batch are not in the cache .* the first of them is num"
    with pytest.raises(InputError, match=message):
        store.fetch([keys[0], keys[1], b"x" * 16])


class TestVerifying:
    def test_a_whole_cache(self, folder: Path) -> None:
        store = Store.open(folder)
        assert not store.verified
        store.verify(shown=True)
        assert store.verified

    @pytest.mark.parametrize("name", ["train-00001.parquet", "index.npy"])
    def test_a_flipped_bit(self, folder: Path, name: str) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))
        with pytest.raises(InputError, match=f"{name} is not as it was written: its SHA-256 is"):
            Store.open(folder).verify()

    def test_a_shard_cut_short(self, folder: Path) -> None:
        path = folder / "train-00001.parquet"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"train-00001\.parquet has .* bytes and was written"):
            Store.open(folder).verify()

    @pytest.mark.parametrize("name", ["train-00001.parquet", "index.npy"])
    def test_a_missing_file(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(InputError, match=f"{name} is missing; copy"):
            Store.open(folder).verify()


class TestHead:
    def test_none_where_logits_are_kept(self, folder: Path) -> None:
        assert Store.open(folder).head() is None

    def test_there_and_back(self, tmp_path: Path) -> None:
        folder = Path(caches.written(tmp_path, hidden))
        store = Store.open(folder)
        head = store.head()
        assert head is not None
        assert head.weight.shape == (128, 64)
        (folder / HEAD).write_bytes((folder / HEAD).read_bytes()[:-1] + b"!")
        with pytest.raises(InputError, match=r"head\.safetensors is not as it was written"):
            store.head()
        (folder / HEAD).unlink()
        with pytest.raises(InputError, match=r"head\.safetensors is missing"):
            store.head()

    def test_with_everything_a_head_has(self, tmp_path: Path) -> None:
        given = Head(torch.randn(5, 3), torch.randn(5), scale=0.5, softcap=30.0)
        told = save_head(tmp_path, given)
        assert (told["scale"], told["softcap"]) == (0.5, 30.0)
