import re
from pathlib import Path

import pytest

from llm_distill.data.files import (
    broken_json,
    data_files,
    is_hub_id,
    is_local,
    loader_of,
    missing,
    near,
    read_text_file,
    split_files,
)
from llm_distill.errors import InputError


@pytest.mark.parametrize(
    ("path", "local", "hub"),
    [
        ("squad", False, True),
        ("HuggingFaceH4/ultrachat_200k", False, True),
        ("me/data-1.5", False, True),
        ("data/train.jsonl", True, False),
        ("TEXT.TXT", True, False),
        ("./data", True, False),
        ("~/data", True, False),
        ("/data", True, False),
        ("my/own/data", True, False),
        ("data/", True, False),
        ("my data", False, False),
        ("hf://datasets/me", True, False),
        ("me:data", False, False),
    ],
)
def test_what_is_a_path_and_what_could_be_on_the_hub(path: str, local: bool, hub: bool) -> None:
    assert is_local(path) is local
    assert is_hub_id(path) is hub


def test_what_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("squad")
    Path("squad").mkdir()
    assert is_local("squad")


def test_the_suffix_gives_the_loader() -> None:
    assert [loader_of(Path(f"a{s}")) for s in (".txt", ".jsonl", ".JSON", ".parquet")] == [
        "text",
        "json",
        "json",
        "parquet",
    ]
    with pytest.raises(
        InputError,
        match=re.escape("'a.csv' has the suffix '.csv'; data can be read from .txt, .jsonl, .json"),
    ):
        loader_of(Path("a.csv"))


def test_the_files_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.jsonl", "sub/c.json", "a.jsonl", "README.md", ".git/d.jsonl", "state.json"):
        (tmp_path / name).touch()
    loader, files = data_files(tmp_path)
    assert loader == "json"
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "a.jsonl",
        "b.jsonl",
        "sub/c.json",
    ]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no .txt, .*file; it has nothing"):
        data_files(tmp_path)
    for n in range(7):
        (tmp_path / f"{n}.csv").touch()
    with pytest.raises(InputError, match=r"it has 0.csv, 1.csv, .*, 4.csv and 2 more"):
        data_files(tmp_path)


def test_a_folder_with_two_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(InputError, match=r"mixes .jsonl, .txt files; name one file, or a folder"):
        data_files(tmp_path)


def test_a_missing_file_is_named_with_those_like_it(tmp_path: Path) -> None:
    for name in ("train.jsonl", "trail.jsonl", "notes.md", ".hidden"):
        (tmp_path / name).touch()
    message = str(missing(str(tmp_path / "trian.jsonl")))
    assert message.startswith(f"no file or folder '{tmp_path}/trian.jsonl'; did you mean '")
    assert f"'{tmp_path}/train.jsonl'" in message
    assert "notes.md" not in message


def test_a_missing_file_with_none_like_it_lists_its_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    assert near(str(tmp_path / "train.jsonl")) == f"; '{tmp_path}' has notes.md"
    assert (
        near(str(tmp_path / "x" / "train.jsonl")) == f"; there is no folder '{tmp_path}/x' either"
    )


def test_text_files(tmp_path: Path) -> None:
    file = tmp_path / "a.jinja"
    file.write_bytes(b"\xef\xbb\xbfh\xc3\xa9")
    assert read_text_file(str(file)) == "hé"
    file.write_bytes(b"h\xe9")
    with pytest.raises(InputError, match=r"a.jinja' is not UTF-8 .*iconv -f LATIN1 -t UTF-8"):
        read_text_file(str(file))
    with pytest.raises(InputError, match=r"no file or folder '.*b.jinja'; did you mean"):
        read_text_file(str(tmp_path / "b.jinja"))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n{"a": 2}\n', "line 3: not JSON (Expecting value"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', "line 2: not UTF-8 (invalid continuation byte)"),
        ("a.jsonl", b'{"a": 1}\n"text"\n', "line 2: str, not an object like {...}"),
        ("a.json", b'{"a": 1}\n{"a": 1\n', "line 2: not JSON"),
    ],
)
def test_the_first_broken_line_is_named(
    tmp_path: Path, name: str, content: bytes, fault: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    error = broken_json([file])
    assert str(error).startswith(f"'{file}', {fault}")
    assert str(error).endswith("; correct or remove it")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}'),
        ("a.json", b'[\n{"a": 1},\n{"a": 2}\n]'),
        ("a.json", b'{"a": 1}\n{"a": 2}\n'),
    ],
)
def test_whole_files_have_no_broken_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert broken_json([tmp_path / name]) is None


def names(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    return {split: [Path(file).name for file in files] for split, files in splits.items()}


def test_files_are_sorted_into_splits_by_their_names(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert names(split_files(tmp_path, "json", None)) == {
        "train": ["train-0.jsonl", "train-1.jsonl"],
        "test": ["test.jsonl"],
    }


def test_files_beside_the_data_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for name in ("README.md", "NOTES.md", "a.png", "b.png", "x.csv"):
        (tmp_path / name).touch()
    assert names(split_files(tmp_path, "json", None)) == {"train": ["a.jsonl"]}


def test_a_copy_of_a_hub_dataset_has_its_configurations(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n"
        "- config_name: two\n  data_files: b.jsonl\n---\n"
    )
    assert names(split_files(tmp_path, "json", "two")) == {"train": ["b.jsonl"]}
    with pytest.raises(ValueError, match=r"Config name is missing[^']*'one', 'two'"):
        split_files(tmp_path, "json", None)
