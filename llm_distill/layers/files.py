"""The YAML file of a layer map: read strictly, written so that a person can edit it."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode

from llm_distill.errors import InputError

COMMENTS = """\
# A layer map of llm_distill: which layer of the student learns from which layers of the teacher.
# Layers are numbered as hidden_states of transformers: 0 is the embedding, k the output of block k;
# -1 is the last. `teacher` is one layer, or shares that sum to 1: {5: 0.25, 6: 0.75}. `weight` (1
# if left out) is what a row counts against the others. Edit what you like; a recipe takes it with
# layers: {saved: {path: this file}}. `evidence` is only printed.
"""


def write(path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a map with the comments that say what it is, a row in each line.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "map.yaml"
    >>> write(file, {"student_depth": 1}, [{"student": 1, "teacher": 2}])
    >>> print(file.read_text().removeprefix(COMMENTS), end="")
    student_depth: 1
    rows:
    - {student: 1, teacher: 2}
    """
    lines = [yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True), "rows:\n"]
    for row in rows:
        flow = yaml.safe_dump(dict(row), sort_keys=False, default_flow_style=True, width=2**20)
        lines.append(f"- {flow}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(COMMENTS + "".join(lines), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The document in a file.

    Raises:
        InputError: If there is no such file, or it is no mapping in YAML.
    """
    if not path.is_file():
        raise InputError(
            f"layers: there is no layer map at {path}; `llm-distill map recipe.yaml` writes one, "
            "and LayerMap.save"
        )
    try:
        document = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        raise InputError(
            f"{path} is {kind}; a layer map has student_depth, teacher_depth and rows "
            "(LayerMap.save writes one)"
        )
    return document


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses keys that stand twice: PyYAML would keep the last in silence."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002  PyYAML's signature
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)
