"""One Parquet file: any reader opens it, any row group alone, and no flipped bit passes."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from llm_distill.cache.encoded import Encoded
from llm_distill.cache.shards import GROUP_ROWS, ShardReader, ShardWriter, most_bytes
from llm_distill.errors import InputError

COLUMNS = ("a", "b")
KEYS = [bytes([k] * 16) for k in range(7)]


def example(k: int, rows: int = 400) -> Encoded:
    noise = np.random.default_rng(k).integers(0, 256, rows * 3, dtype=np.uint8)
    return Encoded(rows, 3, {"a": noise, "b": np.full(rows, k, np.uint8)})


def read_all(path: Path) -> None:
    reader = ShardReader.open(path, COLUMNS)
    for group in range(3):
        reader.read(group)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "train-00000.parquet"
    with ShardWriter(path, COLUMNS, {"what": "a test"}) as writer:
        for k, key in enumerate(KEYS):
            writer.add(key, example(k))
    assert writer.rows == 7 * 400
    assert writer.places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    return path


def test_there_and_back(shard: Path) -> None:
    reader = ShardReader.open(shard, COLUMNS)
    assert reader.keys_by_group() == [KEYS[:3], KEYS[3:6], KEYS[6:]]
    group = reader.read(1)
    assert list(group.keys) == KEYS[3:6]
    assert group.size == 3 * 400 * 4
    for found, k in zip(group.examples, (3, 4, 5), strict=True):
        assert (found.rows, found.width) == (400, 3)
        for name in COLUMNS:
            assert (found.columns[name] == example(k).columns[name]).all()


def test_a_group_ends_with_the_example_that_fills_it(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", COLUMNS) as writer:
        writer.add(KEYS[0], example(0, GROUP_ROWS))
        writer.add(KEYS[1], example(1, 1))
    assert writer.places == [(0, 0), (1, 0)]


def test_a_group_ends_with_its_bytes_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_distill.cache.shards.GROUP_BYTES", 4 * 10 * 2)
    with ShardWriter(tmp_path / "x", COLUMNS) as writer:
        for k in range(5):
            writer.add(KEYS[k], example(k, 10))
    assert writer.places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_some_columns_alone(shard: Path) -> None:
    found = ShardReader.open(shard, ("b",)).read(1).examples[0]
    assert list(found.columns) == ["b"]
    assert (found.columns["b"] == 3).all()


def test_datasets_opens_it(shard: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(
        "parquet", data_files=str(shard), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["key"] == KEYS
    assert loaded[5]["b"] == example(5).columns["b"].tobytes()


def test_compressed_and_with_checksums(shard: Path) -> None:
    column = pq.ParquetFile(shard).metadata.row_group(0).column(4)
    assert column.compression == "ZSTD"
    assert column.total_compressed_size < 100  # equal bytes
    assert pq.ParquetFile(shard).schema_arrow.metadata[b"what"] == b"a test"


def test_a_flipped_bit_anywhere_in_the_pages_is_found(shard: Path) -> None:
    content = shard.read_bytes()
    meta = pq.ParquetFile(shard).metadata
    last = meta.row_group(2).column(4)
    end = last.data_page_offset + last.total_compressed_size
    for place in np.linspace(40, end - 1, 25, dtype=int).tolist():
        broken = bytearray(content)
        broken[place] ^= 4
        shard.write_bytes(bytes(broken))
        with pytest.raises(InputError, match=r"train-00000\.parquet cannot be read .*copy it anew"):
            read_all(shard)


def test_a_shard_cut_short(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        ShardReader.open(shard, COLUMNS)


def test_what_failed_meanwhile_is_raised(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x", COLUMNS)
    with pytest.raises(RuntimeError, match="the teacher fell over"), writer:
        raise RuntimeError("the teacher fell over")


@pytest.mark.parametrize("rows", [1, 64, 3000])
@pytest.mark.parametrize("columns", [1, 6, 40])
def test_room_for_noise(tmp_path: Path, columns: int, rows: int) -> None:
    """Values of all lengths, of which a compressor finds nothing: their bytes and a little more."""
    names, dice = tuple(f"column_{k}" for k in range(columns)), np.random.default_rng(0)
    path, content, examples = tmp_path / "it.parquet", 0, max(2, 4000 // rows)
    with ShardWriter(path, names) as writer:
        for _ in range(examples):
            widths = dice.integers(1, 9, columns)
            noise = {
                n: dice.integers(0, 256, rows * w, np.uint8)
                for n, w in zip(names, widths, strict=True)
            }
            content += sum(part.nbytes for part in noise.values())
            writer.add(dice.bytes(16), Encoded(rows, 0, noise))
    size, asked = path.stat().st_size, most_bytes(columns, rows * examples, examples, content)
    assert size <= asked <= 1.3 * size + most_bytes(columns, 0, 0, 0)
