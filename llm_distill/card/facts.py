"""What a card tells, as plain data, and how names may be shown to the public."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, by its docs

__all__ = ["CardFacts", "DataFacts", "ModelFacts", "ObjectiveFacts", "origin_of"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model, and where its weights came from.

    Attributes:
        name: A Hub id, a path, for random weights the architecture, for a student cut from its
            teacher which blocks.
        origin: Which of the four `name` is.
        licence: As its own card says it: `apache-2.0`, or a name of its own.
    """

    name: str
    origin: Literal["hub", "local", "random", "cut"]
    revision: str | None = None
    parameters: int | None = None
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """A dataset, and in words the `part` that was used: `split train`, `5% held out`."""

    name: str
    origin: Literal["hub", "local"]
    part: str | None = None


class ObjectiveFacts(NamedTuple):
    """A row of the table of objectives, as text; the losses that `detail` names are cited."""

    name: str
    weight: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells.

    Attributes:
        name: The student's own name: its Hub id, or a folder.
        data: What it was trained on.
        evaluation_data: What the figures were measured on.
        layer_map: The table of layers, as printed before training.
        tokens: Tokens seen in training.
        batch: Sequences of one optimizer step.
        evaluation: Figures by their names in the log: `eval_perplexity`, `eval_kl`, ...
        versions: Libraries and their versions.
        peft: Whether the saved weights are an adapter.
        tokenizer: A remark on it.
        quantised: How its teachers were quantised, and what that added, a line for each.
    """

    name: str
    student: ModelFacts
    teacher: ModelFacts
    objectives: tuple[ObjectiveFacts, ...]
    data: DataFacts | None = None
    evaluation_data: DataFacts | None = None
    layer_map: str | None = None
    steps: int | None = None
    tokens: int | None = None
    seed: int | None = None
    learning_rate: float | None = None
    batch: int | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    language: str | None = None
    peft: bool = False
    tokenizer: str | None = None
    quantised: tuple[str, ...] = ()
    task: Literal["text-generation", "fill-mask"] = "text-generation"

    @property
    def names(self) -> list[str]:
        """Every name that may be a path."""
        used = (self.student, self.teacher, self.data, self.evaluation_data)
        return [self.name, *(what.name for what in used if what is not None)]


TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
SEPARATOR = re.compile(r"[/\\]+")
# Where an absolute path begins: file:///x, ~/x, C:\x, \\host\x, /x. Not https://x, ./x, a/b, </b>.
ROOT = r"(?:file:/+|(?<!\w)~\w*[/\\]|(?<!\w)[A-Za-z]:[/\\]+|(?<![\w\\])\\{2,}|(?<![\w.:/<\\])/+)"
PATH = re.compile(ROOT + r"(?=[\w.~])([^\s\"'`()\[\]{}<>|,;*?]+)")


def origin_of(name: str) -> Literal["hub", "local"]:
    """Whether a name is a path on this machine, or can only be a Hub id.

    >>> origin_of("Qwen/Qwen3-0.6B"), origin_of("/data/model"), origin_of("./model")
    ('hub', 'local', 'local')
    """
    return "hub" if is_repo_id(name) and not Path(name).exists() else "local"


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name.

    >>> is_repo_id("gpt2"), is_repo_id("me/student"), is_repo_id("a/b/c"), is_repo_id("~/student")
    (True, True, False, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not TOKEN.search(name)


def is_linked(what: ModelFacts | DataFacts) -> bool:
    """Whether the Hub has a page for it. A path that is called a Hub id is not believed."""
    return what.origin == "hub" and is_repo_id(what.name)


def base(name: str) -> str:
    r"""The last part of a name or a path, on any system.

    >>> base("me/student"), base("/home/me/student/"), base(r"C:\Users\me\data.jsonl")
    ('student', 'student', 'data.jsonl')
    """
    parts = [part for part in SEPARATOR.split(name) if part not in ("", ".", "..")]
    return parts[-1] if parts else "unnamed"


def shown(what: ModelFacts | DataFacts) -> str:
    """A Hub id as it is, a path by its last part."""
    return what.name if is_linked(what) else base(what.name)


def slug(text: str) -> str:
    """A text in the letters of a Hub id; scrubbed first, because a path is no path afterwards.

    >>> slug("My corpus (v2).jsonl"), slug("...")
    ('My-corpus-v2-.jsonl', 'unnamed')
    """
    letters = re.sub(r"[^A-Za-z0-9._]+", "-", scrub(text))
    return re.sub(r"\.{2,}", ".", letters).strip("-._") or "unnamed"


def scrub(text: str, names: Iterable[str] = ()) -> str:
    """A text without tokens and absolute paths; `names` may be paths with blanks in them.

    >>> scrub("from /home/me/corpus.jsonl with hf_abcdefgh1234, see https://arxiv.org/abs/1503.02531")
    'from corpus.jsonl with hf_[redacted], see https://arxiv.org/abs/1503.02531'
    """
    for name in sorted(names, key=len, reverse=True):
        if PATH.match(name):
            text = text.replace(name, base(name))
    return TOKEN.sub("hf_[redacted]", PATH.sub(lambda found: base(found[1]), text))
