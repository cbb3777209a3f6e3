from __future__ import annotations

import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest

from scripts._quickstart import corpus
from scripts._quickstart.corpus import Corpus, language_reference, library_docstrings, prose, split

if TYPE_CHECKING:
    from pathlib import Path


def sentences(*names: str) -> tuple[str, ...]:
    return tuple(f"A whole sentence that only {name} has in it." for name in names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A line of text that\n    goes on here.", ["A line of text that goes on here."]),
        ("* This item of a list is a sentence.", ["This item of a list is a sentence."]),
        ("2. This item of a list is a sentence.", ["This item of a list is a sentence."]),
        (
            "The *name* and **the other** mean ``some thing`` here.",
            ["The name and the other mean some thing here."],
        ),
        ("A *block and *args do stay as they are.", ["A *block and *args do stay as they are."]),
        (
            "It\u2019s \u201cplain\u201d in the text \u2014 as always.",
            ["It's \"plain\" in the text - as always."],
        ),
        ("Two paragraphs are in this text.\n\n   \nThis is the other one of them.",
         ["Two paragraphs are in this text.", "This is the other one of them."]),
    ],
)  # fmt: skip
def test_prose_is_one_line_per_paragraph(text: str, expected: list[str]) -> None:
    assert list(prose(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Naming and binding\n==================",
        "Too short a sentence.",
        "    for x in range(10):\n        print(x)",
        ">>> An example that looks a bit like prose to us.",
        "Then x = 1 is what the rest of this line says.",
        "| a table | of words | and more words | than one line |.",
        "a sentence that has no capital at its beginning.",
        "No full stop at the end of this line of text",
    ],
)
def test_what_is_no_english_is_left_out(text: str) -> None:
    assert list(prose(text)) == []


def test_no_paragraph_is_on_both_sides_or_twice() -> None:
    documents = {f"doc{i}": sentences("every", f"no{'x' * i}", f"no{'x' * i}") for i in range(60)}
    made = split(documents)
    train, held_out = made.train.split(), made.held_out.split()
    assert train
    assert held_out
    lines = [line for text in (made.train, made.held_out) for line in text.splitlines() if line]
    assert len(lines) == len(set(lines)) == 61
    assert sentences("every")[0] in made.held_out


def test_paragraphs_that_differ_in_signs_only_are_one() -> None:
    lines = "New in version 3.8 of all this.", "New in version 3.9, of all this."
    made = split({"a": lines[:1], "b": lines[1:]})
    assert (made.train + made.held_out).count("New in") == 1


def test_a_document_is_wholly_on_one_side() -> None:
    documents = {f"doc{i}": sentences(*(f"x{'y' * i} {word}" for word in "abc")) for i in range(40)}
    made = split(documents)
    for lines in documents.values():
        inside = [line in made.train for line in lines]
        assert all(inside) or not any(inside)


def test_the_order_of_documents_does_not_matter() -> None:
    documents = {f"doc{i}": sentences(f"x{'y' * i}") for i in range(30)}
    assert split(documents) == split(dict(reversed(documents.items())))


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(
        '"""The module says what it does here."""\n'
        'raise SystemExit("imported")\n'
        "class A:\n"
        '    """The class says what it does here."""\n'
        "    def f(self):\n"
        '        """The method says what it does here."""\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "old.py").write_text('"""A bad escape does not stop the reader here."""\n"\\d"\n')
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text(
        '"""This is not of the library at all."""'
    )
    found = library_docstrings(tmp_path)
    assert list(found) == ["library/good.py", "library/old.py"]
    assert found["library/good.py"] == tuple(
        f"The {what} says what it does here." for what in ("module", "class", "method")
    )


def test_this_python_has_a_language_reference() -> None:
    found = language_reference()
    assert found["reference/naming"] or found["reference/execmodel"]
    assert sum(map(len, found.values())) > 500


def test_missing_language_reference_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert language_reference() == {}


def test_python_without_documentation_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(
        corpus.NoTextError, match=r"has 2 characters .* 150,000 or more; pydoc_data"
    ):
        corpus.read_corpus()


def test_writing_the_same_again_changes_nothing(tmp_path: Path) -> None:
    paths = tmp_path / "new" / "train.txt", tmp_path / "new" / "eval.txt"
    Corpus("some \u00e9 text\n", "other text\n").write(*paths)
    assert paths[0].read_text(encoding="utf-8") == "some \u00e9 text\n"
    before = [path.stat().st_mtime_ns for path in paths]
    Corpus("some \u00e9 text\n", "changed\n").write(*paths)
    assert paths[0].stat().st_mtime_ns == before[0]
    assert paths[1].read_text(encoding="utf-8") == "changed\n"
