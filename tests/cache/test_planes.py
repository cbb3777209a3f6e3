"""Ids as planes of bytes: exact for every vocabulary, and smaller than packed bits."""

import numpy as np
import pyarrow as pa
import pytest

from llm_distill.cache.planes import MOST_TOKENS, join_ids, most_bytes, split_ids


@pytest.mark.parametrize("vocabulary", [2, 257, 32_000, 151_936, MOST_TOKENS])
def test_there_and_back(vocabulary: int) -> None:
    generator = np.random.default_rng(0)
    ids = np.sort(generator.integers(0, vocabulary, (40, 9)), axis=1)
    ids[0] = vocabulary - 1
    ids[1] = 0
    ids[2] = np.sort([0, 1, 255 % vocabulary, 256 % vocabulary, *[vocabulary - 1] * 5])
    planes = split_ids(ids)
    assert all(plane.dtype == np.uint8 and plane.shape == ids.shape for plane in planes.values())
    assert (join_ids(**planes) == ids).all()


def test_bytes_straight_from_a_file_may_be_read_only() -> None:
    planes = {name: plane.copy() for name, plane in split_ids(np.array([[3, 700_000]])).items()}
    for plane in planes.values():
        plane.flags.writeable = False
    assert join_ids(**planes).tolist() == [[3, 700_000]]


def test_no_rows() -> None:
    assert join_ids(**split_ids(np.zeros((0, 4), np.int64))).shape == (0, 4)


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 262_144])
@pytest.mark.parametrize("count", [1, 8, 64, 255])
def test_random_ids_take_what_is_reserved(vocabulary: int, count: int) -> None:
    """And no less than three quarters of it."""
    generator = np.random.default_rng(0)
    ids = np.sort(generator.integers(0, vocabulary, (2000, count)), axis=1)
    zstd = pa.Codec("zstd", compression_level=3)
    size = sum(len(zstd.compress(plane.tobytes())) for plane in split_ids(ids).values())
    asked = 2000 * most_bytes(count, vocabulary)
    assert size <= asked <= 1.3 * size + 100
