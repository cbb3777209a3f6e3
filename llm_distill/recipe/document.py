"""The YAML of a recipe: read without surprises, changed by overrides, written back."""

import re
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node

from llm_distill.errors import InputError

MOST_ALIASES = 20
MOST_CHARACTERS = 200_000

# YAML 1.2, core schema: `no`, `1:30` and `2024-01-01` are text, `1e-5` is a number.
_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF|nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


_PLAIN = {
    first: [(tag, re.compile(pattern)) for tag, pattern, firsts in _RESOLVERS if first in firsts]
    for first in {first for _, _, firsts in _RESOLVERS for first in firsts}
}
"""What plain words mean, by their first letter; the same when reading and when writing."""


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses keys that stand twice, loops, and a flood of aliases."""

    yaml_implicit_resolvers = _PLAIN

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = 0
        self._open: list[str] = []

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._aliases += 1
            if event.anchor in self._open or self._aliases > MOST_ALIASES:
                fault = "contains itself" if event.anchor in self._open else "is one alias too many"
                raise _fault(f"*{event.anchor} {fault}; write it out", event)
            return super().compose_node(parent, index)
        self._open.append(event.anchor or "")
        node = super().compose_node(parent, index)
        self._open.pop()
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002  PyYAML's signature
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                before = seen[key.value]
                raise _fault(f"{key.value!r} stands twice, here and in line {before}", key)
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would not read as text, and never writes an alias."""

    yaml_implicit_resolvers = _PLAIN

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ANN401  PyYAML's signature
        return True


def read(path: str | Path) -> dict[str, Any]:
    """The document in a file.

    Raises:
        InputError: If there is no such file, or it is no mapping in YAML.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        beside = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        near = get_close_matches(file.name, beside, n=1) or beside[:5]
        hint = f"; {file.parent} has {', '.join(near)}" if near else ""
        raise InputError(f"recipe {path} {what}{hint}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {path} is not UTF-8 text: {error.reason}") from error
    document = parse(text, f"recipe {path}")
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        raise InputError(f"recipe {path} is {kind}; it must be a mapping such as `student: …`")
    return document


def parse(text: str, what: str) -> Any:  # noqa: ANN401  any YAML
    """A value written in YAML.

    Raises:
        InputError: For what is no YAML, a key that stands twice, or one that is no word.
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{what} has {len(text):,} characters; that is no recipe")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{what}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{what}: {error}") from error
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    _check_keys(value, what)
    return value


def dump(document: Mapping[str, Any]) -> str:
    """The document as YAML that `parse` reads back unchanged."""
    return yaml.dump(
        dict(document),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
    )


def override(document: Mapping[str, Any], key: str, text: str) -> dict[str, Any]:
    """The document with one value changed.

    Args:
        document: Not changed itself.
        key: Where, with dots: `training.learning_rate`, `objectives.1.Logits.temperature`.
        text: The value, in YAML.

    Raises:
        InputError: If there is no such place, or the value is no YAML.
    """
    value = parse(text, f"--{key}")
    changed: dict[str, Any] = _changed(dict(document), key.split("."), value, key)
    return changed


def _changed(node: Any, path: Sequence[str], value: Any, key: str) -> Any:  # noqa: ANN401  any YAML
    """A copy of a node with the value at a path."""
    if not path:
        return value
    if isinstance(node, list):
        place = _entry(node, path[0], key)
        new = _changed(node[place], path[1:], value, key)
        return [new if i == place else old for i, old in enumerate(node)]
    if node is None or node == path[0]:  # an empty section, or a name that had no arguments
        node = {} if node is None else {node: None}
    if not isinstance(node, dict):
        raise InputError(
            f"--{key}: {path[0]!r} is looked for in {node!r}, which is no mapping; give the whole "
            "value instead, such as --student '{Local: {model: …}}'"
        )
    return {**node, path[0]: _changed(node.get(path[0]), path[1:], value, key)}


def _entry(entries: Sequence[Any], index: str, key: str) -> int:
    """The place in a list that a part of a key names."""
    if index.isdecimal() and int(index) < len(entries):
        return int(index)
    names = [next(iter(e), "") if isinstance(e, dict) else str(e) for e in entries]
    there = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
    raise InputError(f"--{key}: there is no entry {index!r}; there is {there}")


def _check_keys(value: Any, what: str) -> None:  # noqa: ANN401  any YAML
    """Refuse keys that are no words, at any depth."""
    if isinstance(value, list):
        for entry in value:
            _check_keys(entry, what)
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise InputError(f"{what}: the key {key!r} is no word; put it in quotes")
            _check_keys(entry, what)


def _fault(problem: str, at: Any) -> yaml.MarkedYAMLError:  # noqa: ANN401  an event or a node
    """An error with its line."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
