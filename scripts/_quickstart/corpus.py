"""Real English that every Python ships: its language reference, and the docstrings of its library.

Only prose is kept: code, tables and headings are not English. The text is split by document and no
paragraph occurs twice, so nothing that is held out was read in training.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Documents = dict[str, tuple[str, ...]]

HELD_OUT = 12  # One document in so many.
LEAST_CHARACTERS = 150_000  # Less than the language reference alone: something is missing.

_FOREIGN = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
_CODE = ("::", ">>>", " = ", "==", "->", ":param", "@", "__(", "{", "\\")
_MARKER = re.compile(r"^(?:[*+-]|\(?\d+[.)])\s+")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2}|`{1,2})([^*`]+?)\1(?![\w*])")
_SENTENCES = re.compile(r"[\"'(]*[A-Z].*[.!?][\"')]*")
# Typographic quotes, dashes and the ellipsis, as the docstrings write them.
_PLAIN = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
    }
)


class NoTextError(Exception):
    """This Python comes without its documentation."""


@dataclass(frozen=True)
class Corpus:
    """Text to train on, and text of other documents to measure on.

    Attributes:
        train: All training documents.
        held_out: All others.
    """

    train: str
    held_out: str

    def write(self, train: Path, held_out: Path) -> None:
        """Write both; a file that holds the same already stays as it is."""
        for path, text in ((train, self.train), (held_out, self.held_out)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")


def read_corpus() -> Corpus:
    """Collect, clean and split the text of this Python.

    Raises:
        NoTextError: If this Python comes without its documentation.
    """
    corpus = split(language_reference() | library_docstrings(Path(sysconfig.get_path("stdlib"))))
    found = len(corpus.train) + len(corpus.held_out)
    if found < LEAST_CHARACTERS:
        raise NoTextError(
            f"this Python has {found:,} characters of documentation, and the quickstart trains on "
            f"{LEAST_CHARACTERS:,} or more; pydoc_data and the sources of the standard library are "
            "missing. Use a Python with both (on Debian: apt install libpython3-stdlib), or your "
            "own text with a recipe"
        )
    return corpus


def language_reference() -> Documents:
    """The prose of each topic of `pydoc_data.topics`; nothing where it is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"reference/{name}": tuple(prose(text)) for name, text in sorted(topics.items())}


def library_docstrings(root: Path) -> Documents:
    """The prose in the docstrings of each module below a folder; nothing is imported."""
    found: Documents = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _FOREIGN.isdisjoint(name.parts) and (docs := tuple(_docstrings(path))):
            found[f"library/{name.as_posix()}"] = tuple(p for text in docs for p in prose(text))
    return found


def prose(text: str) -> Iterator[str]:
    r"""Paragraphs of whole sentences, one line each.

    >>> list(prose("Title\n=====\n\nOne line\n   goes *on* and on here.\n\n   >>> x = 1"))
    ['One line goes on and on here.']
    """
    for block in re.split(r"\n\s*\n", text.expandtabs().translate(_PLAIN)):
        line = _MARKER.sub("", " ".join(block.split()))
        line = _EMPHASIS.sub(r"\2", line)
        if _is_prose(line):
            yield line


def split(documents: Mapping[str, Iterable[str]]) -> Corpus:
    """Hold out one document in `HELD_OUT`, by its name; keep each paragraph at its first place.

    Held-out documents come first: a paragraph that stands in both (the reference has chapters and
    their sections) is not trained on.
    """
    held = {name for name in documents if zlib.crc32(name.encode()) % HELD_OUT == 0}
    ordered = sorted(documents, key=lambda name: (name not in held, name))
    texts: dict[bool, list[str]] = {True: [], False: []}
    seen: set[str] = set()
    for name in ordered:
        fresh = [line for line in dict.fromkeys(documents[name]) if _key(line) not in seen]
        seen.update(map(_key, fresh))
        if fresh:
            texts[name in held].append("\n".join(fresh))
    return Corpus(*("\n\n".join(texts[side]) + "\n" for side in (False, True)))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Old modules have escapes that Python now dislikes.
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # Templates and broken files are no loss.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _is_prose(line: str) -> bool:
    if len(line.split()) < 6 or any(sign in line for sign in _CODE):
        return False
    letters = sum(character.isalpha() or character == " " for character in line)
    return letters > 0.85 * len(line) and _SENTENCES.fullmatch(line) is not None


def _key(line: str) -> str:
    """The letters of a paragraph: two that differ in punctuation only are one."""
    return re.sub(r"[\W\d_]+", " ", line).strip().lower()
