"""Rows as they are, from local files or the Hub, and what to say when they cannot be had."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from transformers import PreTrainedTokenizerBase

from llm_distill.data.blocks import block_dataset
from llm_distill.data.files import (
    broken_json,
    data_files,
    is_hub_id,
    is_local,
    loader_of,
    missing,
    near,
    split_files,
)
from llm_distill.data.spec import Data
from llm_distill.errors import InputError

_WORD = re.compile(r"\w+")
_HUB = "https://huggingface.co/datasets"


def read(
    data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Dataset | IterableDataset:
    """Read the rows that a recipe names; of text files, blocks of `max_length` tokens.

    Raises:
        InputError: If there is no such data, or if it cannot be read.
    """
    if data.path is None:
        raise InputError(
            "data.path is missing; write a Hub id, a file (.txt, .jsonl, .json, .parquet) or a "
            "folder of such files"
        )
    with explained(data):
        if is_local(data.path):
            return _read_local(data, tokenizer, max_length)
        if not is_hub_id(data.path):
            raise InputError(
                f"data.path: '{data.path}' is no file or folder{near(data.path)}; and it is no Hub "
                "id, which looks like 'owner/name'"
            )
        return load_dataset(
            data.path,
            data.name,
            split=data.split,
            revision=data.revision,
            streaming=data.streaming,
        )


@contextmanager
def explained(data: Data) -> Iterator[None]:
    """Turn what goes wrong while rows are read into an `InputError` that says what to do."""
    try:
        yield
    except InputError:
        raise
    # StopIteration: what `datasets` makes of a file without a row.
    except (OSError, ValueError, RuntimeError, TypeError, DatasetsError, StopIteration) as error:
        raise _explain(error, data) from error


def _read_local(
    data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Dataset | IterableDataset:
    loader, files = _local_files(data)
    if not any(Path(file).stat().st_size for group in files.values() for file in group):
        raise InputError(f"{data.where} is empty")
    # Only what is asked for: other splits may have other columns. A split may be `train[:10%]`.
    asked = {split: files[split] for split in _WORD.findall(data.split) if split in files}
    if not asked or (loader == "text" and data.split not in asked):
        raise InputError(_no_split(data, list(files)))
    if loader != "text":
        return load_dataset(loader, data_files=asked, split=data.split, streaming=data.streaming)
    if max_length is None:
        raise InputError(
            f"data.max_length is null, but {data.where} is text to be cut into blocks; write how "
            "many tokens a block shall have"
        )
    return block_dataset(
        files[data.split], tokenizer, max_length, streaming=data.streaming, limit=data.limit
    )


def _local_files(data: Data) -> tuple[str, Mapping[str, list[str]]]:
    path = Path(data.path or "").expanduser()
    if not path.exists():
        raise missing(data.path or "")
    if path.is_dir():
        loader = data_files(path)[0]
        return loader, split_files(path, loader, data.name)
    if data.name is not None:
        raise InputError(
            f"data.name: '{data.name}' is a configuration, which a single file has not; remove it"
        )
    return loader_of(path), {"train": [str(path)]}


def _no_split(data: Data, splits: list[str]) -> str:
    return (
        f"{data.where} has no split '{data.split}'; it has {', '.join(splits)}. (The files of a "
        "folder are sorted into splits by their names; a single file is all 'train'.)"
    )


def _explain(error: BaseException, data: Data) -> InputError:
    cause = error.__cause__
    if isinstance(cause, InputError):
        return cause
    local = is_local(data.path or "")
    if local and (broken := _broken(data)):
        return broken
    if isinstance(error, StopIteration):
        return InputError(f"{data.where} holds no examples")
    if not local and (explanation := _hub(error, data)):
        return InputError(explanation)
    reason = " ".join(str(cause or error).split()) or type(error).__name__
    return InputError(f"{data.where} cannot be read as split '{data.split}': {reason}")


def _broken(data: Data) -> InputError | None:
    path = Path(data.path or "").expanduser()
    files = [path] if path.is_file() else data_files(path)[1]
    return broken_json(file for file in files if loader_of(file) == "json")


def _hub(error: BaseException, data: Data) -> str | None:
    told = str(error)
    if "gated" in told.lower():
        return (
            f"{data.where} is gated on the Hub; accept its terms at {_HUB}/{data.path}, then log "
            "in: hf auth login"
        )
    if isinstance(error, DatasetNotFoundError) and told.startswith("Revision"):
        return f"data.revision: {data.where} has no revision '{data.revision}' on the Hub"
    if isinstance(error, DatasetNotFoundError):
        return (
            f"{data.where} is not on the Hub, or it is private (then log in: hf auth login), and "
            f"it is no local path{near(data.path or '')}"
        )
    if isinstance(error, ConnectionError):
        return (
            f"{data.where} is no local path{near(data.path or '')}; and the Hub cannot be reached "
            f"for it ({told}). Check the network and HF_HUB_OFFLINE, or give a local file"
        )
    return None
