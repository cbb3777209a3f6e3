import json
import re
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerFast

from llm_distill.data import Data
from llm_distill.data import source as module
from llm_distill.data.source import explained, read
from llm_distill.errors import InputError

ROWS = [{"text": "hello"}, {"text": "world"}]


def write(file: Path, rows: list[dict[str, str]] = ROWS) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_files(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str, streaming: bool
) -> None:
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write(file)
    elif suffix == ".json":
        file.write_text(json.dumps(ROWS, indent=2))
    else:
        Dataset.from_list(ROWS).to_parquet(file)
    rows = read(Data(path=str(file), streaming=streaming), tokenizer, 8)
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert list(rows) == ROWS


def test_a_folder_and_its_splits(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", [{"other": "columns"}])
    folder = str(tmp_path)
    assert list(read(Data(path=folder), tokenizer, 8)) == ROWS
    assert list(read(Data(path=folder, split="test"), tokenizer, 8)) == [{"other": "columns"}]
    assert list(read(Data(path=folder, split="train[:50%]"), tokenizer, 8)) == ROWS[:1]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_comes_in_blocks(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, streaming: bool
) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    (tmp_path / "b.txt").write_text("the cat")
    for path, text in ((tmp_path / "a.txt", "hello world</s>"), (tmp_path, "hello world</s>the")):
        rows = read(Data(path=str(path), streaming=streaming), tokenizer, 4)
        assert tokenizer.decode(next(iter(rows))["input_ids"]) == text


def test_a_home_folder_is_found(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl")
    assert list(read(Data(path="~/a.jsonl"), tokenizer, 8)) == ROWS


def test_a_changed_file_is_read_again(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = Data(path=write(tmp_path / "a.jsonl"))
    assert len(list(read(data, tokenizer, 8))) == 2
    write(tmp_path / "a.jsonl", [{"text": "other"}])
    assert list(read(data, tokenizer, 8)) == [{"text": "other"}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "data.path is missing; write a Hub id, a file (.txt, .jsonl, .json, .parquet) or a"),
        ({"path": "b.jsonl"}, "no file or folder 'b.jsonl'; did you mean 'a.jsonl'"),
        ({"path": "./b"}, "no file or folder './b'; "),
        ({"path": "a.csv"}, "'a.csv' has the suffix '.csv'; data can be read from .txt, .jsonl"),
        (
            {"path": "my data!"},
            "data.path: 'my data!' is no file or folder; '.' has a.csv, a.jsonl, empty.jsonl, "
            "long.txt; and it is no Hub id, which looks like 'owner/name'",
        ),
        ({"path": "a.jsonl", "split": "test"}, "'a.jsonl' has no split 'test'; it has train. (The"),
        ({"path": "long.txt", "split": "train[:1%]"}, "'long.txt' has no split 'train[:1%]'"),
        ({"path": "a.jsonl", "name": "b"}, "data.name: 'b' is a configuration, which a single"),
        ({"path": "empty.jsonl"}, "'empty.jsonl' is empty"),
        ({"path": "empty.jsonl", "streaming": True}, "'empty.jsonl' is empty"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"))
    Path("a.csv").touch()
    Path("empty.jsonl").touch()
    Path("long.txt").write_text("hello")
    with pytest.raises(InputError, match=re.escape(message)):
        read(Data(**fields), tokenizer, 8)  # type: ignore[arg-type]  # strings, but for streaming


def test_text_needs_a_length(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    data = Data(path=str(tmp_path / "a.txt"), max_length=None)
    with pytest.raises(InputError, match=r"data.max_length is null, but .* cut into blocks; write"):
        read(data, tokenizer, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_json_is_named_with_its_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, streaming: bool
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    for path in (tmp_path / "a.jsonl", tmp_path):
        data = Data(path=str(path), streaming=streaming)
        with pytest.raises(InputError, match=r"a.jsonl', line 2: not JSON \(.*correct or remove"):
            list_rows(data, tokenizer)


def list_rows(data: Data, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = read(data, tokenizer, 8)
    with explained(data):
        list(rows)


def test_blank_lines_alone_are_no_examples(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"a.jsonl' (holds no examples|cannot be read)"):
        list_rows(Data(path=str(tmp_path / "a.jsonl")), tokenizer)


def test_a_broken_parquet_file_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(
        InputError, match=r"a.parquet' cannot be read as split 'train': .*[Pp]arquet"
    ):
        list_rows(Data(path=str(tmp_path / "a.parquet")), tokenizer)


def test_text_that_is_not_utf8_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    for streaming in (False, True):
        with pytest.raises(InputError, match=r"a.txt' is not UTF-8"):
            list_rows(Data(path=str(tmp_path / "a.txt"), streaming=streaming), tokenizer)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'me/data' is a gated dataset on the Hub."),
            "'me/data' is gated on the Hub; accept its terms at "
            "https://huggingface.co/datasets/me/data, then log in: hf auth login",
        ),
        (
            DatasetNotFoundError("Revision 'v2' doesn't exist for dataset 'me/data' on the Hub."),
            "data.revision: 'me/data' has no revision 'v2' on the Hub",
        ),
        (
            DatasetNotFoundError("Dataset 'me/data' doesn't exist on the Hub."),
            "'me/data' is not on the Hub, or it is private (then log in: hf auth login), and it is "
            "no local path; there is no folder 'me' either",
        ),
        (
            ConnectionError("Couldn't reach 'me/data' on the Hub (LocalEntryNotFoundError)"),
            "the Hub cannot be reached for it (Couldn't reach 'me/data' on the Hub "
            "(LocalEntryNotFoundError)). Check the network and HF_HUB_OFFLINE, or give a local",
        ),
        (
            ValueError("Config name is missing. Please pick one among: ['a', 'b']"),
            "'me/data' cannot be read as split 'train': Config name is missing. Please pick one",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found data.py"),
            "'me/data' cannot be read as split 'train': Dataset scripts are no longer supported",
        ),
    ],
)
def test_what_the_hub_says_is_explained(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_dataset", fail)
    with pytest.raises(InputError, match=re.escape(message)):
        read(Data(path="me/data", revision="v2"), tokenizer, 8)


def test_the_hub_is_asked_for_what_the_recipe_says(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def note(*args: object, **kwargs: object) -> Dataset:
        asked.extend([args, kwargs])
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(module, "load_dataset", note)
    read(
        Data(path="me/data", name="big", split="test", revision="v2", streaming=True), tokenizer, 8
    )
    assert asked == [
        ("me/data", "big"),
        {"split": "test", "revision": "v2", "streaming": True},
    ]


def test_an_offline_hub_is_said_with_the_real_client(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'me/data' is no local path.* the Hub cannot be reached"):
        read(Data(path="me/data"), tokenizer, 8)
