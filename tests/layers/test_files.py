"""Files that are no map."""

from pathlib import Path

import pytest

from llm_distill.errors import InputError
from llm_distill.layers.files import COMMENTS, read, write


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "map.yaml"
    write(file, {"origin": "größer: than"}, [{"student": 1, "teacher": {2: 1e-9}}])
    assert file.read_text(encoding="utf-8").startswith(COMMENTS)
    assert read(file) == {
        "origin": "größer: than",
        "rows": [{"student": 1, "teacher": {2: 1e-9}}],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a layer map has student_depth, teacher_depth and rows"),
        (b"- 1", "is a list; a layer map has student_depth"),
        (b"rows: [1", r"map.yaml, line 1: expected ',' or '\]'"),
        (b"a: 1\na: 2", r"map.yaml, line 2: 'a' stands twice"),
        (b"rows: [{teacher: {5: 0.5, 5: 0.5}}]", r"map.yaml, line 1: '5' stands twice"),
        (b"rows: !!python/object:os.system {}", "could not determine a constructor"),
        (b"\xff\xfe\xfa", "is not UTF-8 text"),
        (b"a: \x07", "special characters are not allowed"),
    ],
)
def test_what_is_no_map_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(file)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match=r"there is no layer map at .*llm-distill map recipe"):
            read(path)
