"""Where examples are, among many and among keys that nearly agree."""

from pathlib import Path

import numpy as np
import pytest

from llm_distill.cache.index import FILE, Index, Place
from llm_distill.errors import InputError

GENERATOR = np.random.default_rng(0)
KEYS = [GENERATOR.bytes(16) for _ in range(500)]
PLACES = [Place(k % 7, k // 7, k % 5) for k in range(500)]


def test_every_example_is_found_and_no_other() -> None:
    index = Index.of(KEYS, PLACES)
    assert len(index) == 500
    assert index.find(KEYS) == PLACES
    strangers = [GENERATOR.bytes(16) for _ in range(50)]
    assert index.find(strangers) == [None] * 50
    assert index.holds([KEYS[3], strangers[0], KEYS[4]]).tolist() == [True, False, True]


def test_keys_that_share_their_first_half() -> None:
    keys = [b"12345678" + bytes([0] * 7 + [k]) for k in (9, 3, 250, 0)]
    index = Index.of([*keys, *KEYS], [*(Place(1, 1, k) for k in range(4)), *PLACES])
    assert index.find(keys) == [Place(1, 1, k) for k in range(4)]
    assert index.find([b"12345678" + bytes([0] * 7 + [k]) for k in (1, 10, 255)]) == [None] * 3


def test_first_and_last_key_there_can_be() -> None:
    keys = [b"\xff" * 16, b"\0" * 16]
    index = Index.of(keys, PLACES[:2])
    assert index.find(keys) == PLACES[:2]
    assert index.find([b"\xff" * 15 + b"\xfe", b"\0" * 15 + b"\1"]) == [None, None]


def test_large_places() -> None:
    place = Place((1 << 24) - 1, (1 << 24) - 1, (1 << 16) - 1)
    assert Index.of([KEYS[0]], [place]).find([KEYS[0]]) == [place]


def test_nothing_in_it_and_nothing_asked() -> None:
    empty = Index.of([], [])
    assert empty.find([KEYS[0]]) == [None]
    assert empty.holds([KEYS[0]]).tolist() == [False]
    assert Index.of(KEYS, PLACES).find([]) == []


def test_from_a_file_it_stays_there(tmp_path: Path) -> None:
    Index.of(KEYS, PLACES).write(tmp_path)
    index = Index.read(tmp_path)
    assert isinstance(index.table, np.memmap)
    assert index.find(KEYS[:3]) == PLACES[:3]


def test_what_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"index\.npy cannot be read .*; copy it anew"):
        Index.read(tmp_path)
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"index\.npy cannot be read"):
        Index.read(tmp_path)
