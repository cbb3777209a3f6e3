"""The manifest: what a cache holds, of which teacher, for which data. It is written last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from llm_distill.cache import estimators
from llm_distill.cache.fingerprints import compared
from llm_distill.cache.layers import Layers
from llm_distill.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from llm_distill.cache.estimator import Estimator

FORMAT = 1
FILE = "manifest.json"
UNFINISHED = "unfinished.json"
"""The same before the last shard is there, without what shards add."""

ADDED: dict[str, Any] = {"states": None, "frames": "", "maps": {}, "lost": {}, "files": {}}
"""What caches were written without, of logits alone and before files were looked at."""

WORDS = {
    "teacher": "the teacher",
    "revision": "the revision of the teacher",
    "weights": "the weights of the teacher",
    "dtype": "the dtype of the teacher",
    "quantised": "how the teacher is quantised",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "keep": "what is kept",
    "states": "the kept hidden states",
    "vocabulary": "the number of tokens",
    "shift": "causal or masked models",
    "data": "the data",
}
"""What has to be the same where writing goes on, in words."""


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        file: Its name.
        split: Whose examples it holds.
        examples: How many.
        rows: Supervised rows of them.
        bytes: Of the file.
        sha256: Of the file.
    """

    file: str
    split: str
    examples: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that has to be known of a cache.

    Attributes:
        teacher: Its id, or the last part of its path.
        revision: The commit it was resolved to, where it came from the Hub.
        weights: Fingerprint of its weights, as far as they were in memory.
        files: Fingerprints of the files that it was loaded from; empty for a model that was given.
        dtype: Of its weights.
        quantised: How they were as they were loaded; None: not at all.
        spec: `ModelSpec` of the teacher; its vocabulary is that of the targets.
        tokenizer: Fingerprint of what cut the data.
        template: Fingerprint of its chat template.
        keep: The estimator, as a recipe writes it.
        temperature: Of the teacher's distribution: 1, since objectives temper what they read.
        shift: Whether a position predicts the next token.
        vocabulary: Tokens of the targets.
        head: Scale and soft cap of the teacher's head, where hidden states are kept.
        states: Which hidden states of layers are kept besides (`Layers`); None: none.
        frames: SHA-256 of what they are measured from.
        maps: Layer maps that the data decided, by the names of their objectives: the strategy, as a
            recipe writes it, and the map.
        lost: What the kept states lost, by layer: the mean over tokens, and the worst token.
        data: Examples, rows, longest example and a fingerprint of all keys of each split.
        shards: The files, by their numbers.
        index: SHA-256 of the index.
        fidelity: What was measured when it was written.
        versions: Of the libraries that wrote it.
        format: Of these files.
    """

    teacher: str
    revision: str | None
    weights: str
    dtype: str
    spec: Mapping[str, Any]
    tokenizer: str
    template: str
    keep: Mapping[str, Any]
    shift: bool
    vocabulary: int
    data: Mapping[str, Mapping[str, Any]]
    temperature: float = 1.0
    head: Mapping[str, Any] | None = None
    states: Mapping[str, Any] | None = None
    frames: str = ""
    maps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    index: str = ""
    fidelity: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT
    quantised: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def estimator(self) -> Estimator:
        """What is kept."""
        return estimators.read(self.keep)

    @property
    def layers(self) -> Layers | None:
        """The hidden states of layers that are kept; None: none."""
        return None if self.states is None else Layers.read(self.states)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of its shards."""
        return self.estimator.columns + (() if self.layers is None else self.layers.columns)

    @property
    def rows(self) -> int:
        """Supervised rows of all examples."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def __str__(self) -> str:
        """One line for people."""
        size = self.bytes / max(self.rows, 1)
        examples = sum(shard.examples for shard in self.shards)
        told = "" if self.quantised is None else f" in {self.quantised}"
        layers = "" if self.layers is None else f", {self.layers}"
        return (
            f"{self.teacher}{told}, {self.estimator}{layers}: {examples:,} examples, {self.rows:,} "
            f"supervised tokens, {size:,.1f} bytes each"
        )

    def differences(self, other: Manifest) -> list[str]:
        """What a cache that is being written has to agree on, and does not, in words."""
        found = []
        for name, words in WORDS.items():
            ours, theirs = (getattr(m, name) for m in (self, other))
            if name == "revision" and ours is None:
                continue  # caches were written without it
            if json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
                shown = name in ("teacher", "revision", "dtype", "quantised", "keep", "vocabulary")
                found.append(f"{words} ({ours} there, {theirs} now)" if shown else words)
        if found:
            return found
        # Weights that are not in memory are known by their files alone; cut into other files they
        # may be the same.
        both = {name: other.files.get(name, told) for name, told in self.files.items()}
        return [f"the teacher's {told}" for told in compared(self.files, both)]

    def begun(self) -> Manifest:
        """Without what shards add."""
        return replace(self, shards=(), index="", fidelity={}, lost={})

    def write(self, path: Path) -> None:
        """Into a file that is whole or not there."""
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """From a file.

        Raises:
            InputError: If it is none, or of a newer version.
        """
        try:
            # There were caches before teachers were quantised here.
            content = {"quantised": None} | json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise InputError(
                    f"{path}: format {content['format']}, and this version reads {FORMAT}; write "
                    "the cache anew, or install the version that wrote it"
                )
            content = ADDED | content
            if content["temperature"] != 1:
                raise InputError(
                    f"{path}: the teacher's distribution at temperature {content['temperature']}, "
                    "and this version reads what was kept at 1; write the cache anew"
                )
            known = {name: content[name] for name in (f.name for f in fields(cls))}
            shards = tuple(Shard(**shard) for shard in content["shards"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no manifest of a cache ({type(error).__name__}: {error}); copy it "
                "anew, or write the cache anew"
            ) from error
        return cls(**{**known, "shards": shards})


def find(folder: Path) -> Manifest:
    """The manifest of a finished cache.

    Raises:
        InputError: If there is none, with what to do.
    """
    if (folder / FILE).is_file():
        return Manifest.read(folder / FILE)
    if (folder / UNFINISHED).is_file():
        raise InputError(
            f"{folder} holds a cache that was not written to its end; run llm-distill cache "
            "recipe.yaml again, which goes on where it stopped"
        )
    there = "holds no cache" if folder.is_dir() else "is not there"
    raise InputError(
        f"{folder} {there} ({FILE} is missing); write it first: llm-distill cache recipe.yaml"
    )
