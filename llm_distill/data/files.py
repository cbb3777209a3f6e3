"""Local files: which there are, what is in them, and what to say when one is missing or broken."""

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from llm_distill.errors import InputError

LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_local(path: str) -> bool:
    """Whether a path is one on this machine, or must have been meant as one."""
    return Path(path).expanduser().exists() or _written_as_path(path)


def is_hub_id(path: str) -> bool:
    """Whether a path could be the id of a dataset on the Hub: ``name`` or ``owner/name``."""
    return _HUB_ID.fullmatch(path) is not None and ".." not in path and not _written_as_path(path)


def loader_of(file: Path) -> str:
    """The name `datasets` has for the loader of a file.

    Raises:
        InputError: If there is none for its suffix.
    """
    if file.suffix.lower() not in LOADERS:
        raise InputError(
            f"'{file}' has the suffix '{file.suffix}'; data can be read from {', '.join(LOADERS)}, "
            "or a folder of such files"
        )
    return LOADERS[file.suffix.lower()]


def data_files(folder: Path) -> tuple[str, list[Path]]:
    """The loader for a folder, and its files in order of their names.

    Raises:
        InputError: If there are none, or files for different loaders.
    """
    inside = (file for file in sorted(folder.rglob("*")) if file.is_file())
    files = [file for file in inside if _is_data(file.relative_to(folder))]
    loaders = sorted({loader_of(file) for file in files})
    if not loaders:
        raise InputError(
            f"folder '{folder}' has no {', '.join(LOADERS)} file; it has {_listing(folder)}"
        )
    if len(loaders) > 1:
        suffixes = ", ".join(sorted({file.suffix.lower() for file in files}))
        raise InputError(
            f"folder '{folder}' mixes {suffixes} files; name one file, or a folder with one kind"
        )
    return loaders[0], files


def missing(path: str) -> InputError:
    """Say that a path does not exist, with the names that are most like it."""
    return InputError(f"no file or folder '{path}'{near(path)}")


def near(path: str) -> str:
    """What is beside a missing path, most alike first; empty if there is nothing."""
    wanted = Path(path).expanduser()
    folder = wanted.parent
    if not folder.is_dir():
        return f"; there is no folder '{folder}' either"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    alike = get_close_matches(wanted.name, names, n=3, cutoff=0.5)
    if not alike:
        return f"; '{folder}' has {_listing(folder)}"
    return "; did you mean " + " or ".join(f"'{folder / name}'" for name in alike) + "?"


def read_text_file(path: str) -> str:
    """Read a whole text file.

    Raises:
        InputError: If there is no such file, or if it is not UTF-8.
    """
    if not Path(path).expanduser().is_file():
        raise missing(path)
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def not_utf8(path: str, error: UnicodeDecodeError) -> InputError:
    """Say that a file is not UTF-8."""
    return InputError(
        f"'{path}' is not UTF-8 ({error.reason}); convert it: "
        f"iconv -f LATIN1 -t UTF-8 '{path}' > fixed.txt, with the encoding that it has"
    )


def broken_json(files: Iterable[Path]) -> InputError | None:
    """Find the first line that is no JSON object, and name its file and number."""
    for file in files:
        if file.suffix.lower() == ".json" and _parses(file):
            continue
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and (fault := _fault(line)):
                    return InputError(f"'{file}', line {number}: {fault}; correct or remove it")
    return None


def split_files(folder: Path, loader: str, name: str | None) -> dict[str, list[str]]:
    """The data files of a folder by split, as `datasets` sorts them by their names.

    Args:
        folder: A folder with files for one loader, which may be a copy of a Hub dataset.
        loader: The loader.
        name: Which configuration, where the folder's README.md describes several.
    """
    from datasets import load_dataset_builder

    if name is not None or _describes_itself(folder):
        builder = load_dataset_builder(str(folder), name=name)
    else:
        # By its loader: left to guess it, `datasets` may choose that of the other files beside.
        builder = load_dataset_builder(loader, data_dir=str(folder))
    found = {
        str(split): [file for file in files if _is_data(Path(file).relative_to(folder.resolve()))]
        for split, files in builder.config.data_files.items()
    }
    return {split: files for split, files in found.items() if files}


def _describes_itself(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")


def _written_as_path(path: str) -> bool:
    return (
        Path(path).suffix.lower() in LOADERS
        or path.startswith((".", "/", "~"))
        or path.endswith("/")
        or path.count("/") > 1
    )


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return file.suffix.lower() in LOADERS and file.name not in _NOT_DATA and not hidden


def _listing(folder: Path, *, most: int = 5) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _parses(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def _fault(line: bytes) -> str | None:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason})"
    except ValueError as error:
        return f"not JSON ({error})"
    return None if isinstance(row, dict) else f"{type(row).__name__}, not an object like {{...}}"
