"""Reading a cache: verified once, then any example at any time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from llm_distill.cache import fingerprints, frames, manifest
from llm_distill.cache.index import FILE as INDEX
from llm_distill.cache.index import Index, Place
from llm_distill.cache.shards import Group, ShardReader
from llm_distill.errors import InputError
from llm_distill.signals import Head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_distill.cache.encoded import Encoded

HEAD = "head.safetensors"
TEACHER = "teacher"
"""Folder with the teacher's config and tokenizer."""

MOST_BYTES = 64 << 20
"""Of row groups that are kept in memory, decompressed."""

MOST_FILES = 64
"""Shards that are open at a time."""


@dataclass(frozen=True)
class Store:
    """A finished cache.

    Attributes:
        folder: Where it is.
        manifest: What it holds.
        columns: What is read of each example.
    """

    folder: Path
    manifest: manifest.Manifest
    columns: tuple[str, ...]
    _seen: set[str] = field(default_factory=set, repr=False)
    _groups: OrderedDict[tuple[int, int], Group] = field(default_factory=OrderedDict, repr=False)
    _files: OrderedDict[int, ShardReader] = field(default_factory=OrderedDict, repr=False)

    @classmethod
    def open(cls, folder: Path, columns: Sequence[str] | None = None) -> Store:
        """Read the manifest.

        Args:
            folder: Of the cache.
            columns: What is to be read of each example; None: everything.

        Raises:
            InputError: If there is none.
        """
        there = manifest.find(folder)
        return cls(folder, there, there.columns if columns is None else tuple(columns))

    @property
    def verified(self) -> bool:
        """Whether all files were compared with the manifest."""
        return INDEX in self._seen

    @cached_property
    def index(self) -> Index:
        """Where each example is."""
        return Index.read(self.folder)

    def check_there(self) -> None:
        """See that every file is there, and none cut short; no more than their sizes is read.

        Raises:
            InputError: Naming the file.
        """
        told = self.manifest
        for shard in told.shards:
            _check_size(self.folder / shard.file, shard.bytes)
        own = {HEAD: told.head is not None, frames.FILE: told.layers is not None}
        tensors = [name for name, kept in own.items() if kept]
        for name in (INDEX, f"{TEACHER}/config.json", *tensors):
            if not (self.folder / name).is_file():
                raise _missing(self.folder / name)
        Index.read(self.folder)
        for name in tensors:
            _check_tensors(self.folder / name)

    def verify(self, *, shown: bool = False) -> None:
        """Compare every file with the manifest.

        Args:
            shown: Whether there is a bar.

        Raises:
            InputError: Naming the file that is missing or not as it was written.
        """
        self.check_there()
        columns = TextColumn("checking the cache"), BarColumn(), DownloadColumn()
        bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not shown,
        )
        with bar:
            task = bar.add_task("", total=self.manifest.bytes)
            for shard in self.manifest.shards:
                found = fingerprints.of_file(
                    self.folder / shard.file, lambda n: bar.advance(task, n)
                )
                _check_digest(self.folder / shard.file, found, shard.sha256)
        _check_file(self.folder / INDEX, self.manifest.index)
        self._seen.add(INDEX)

    def head(self) -> Head | None:
        """The teacher's head, where hidden states are kept.

        Raises:
            InputError: If it is not as it was written.
        """
        told = self.manifest.head
        if told is None:
            return None
        _check_file(self.folder / HEAD, str(told["sha256"]))
        tensors = load_file(self.folder / HEAD)
        return Head(
            tensors["weight"],
            tensors.get("bias"),
            scale=float(told["scale"]),
            softcap=told["softcap"],
        )

    def frames(self) -> dict[int, frames.Frame]:
        """What the kept hidden states are measured from, by layer; none where none are kept.

        Raises:
            InputError: If they are not as they were written.
        """
        if self.manifest.layers is None:
            return {}
        _check_file(self.folder / frames.FILE, self.manifest.frames)
        return frames.load(self.folder)

    def fetch(self, keys: Sequence[bytes]) -> list[Encoded]:
        """The targets of examples.

        Raises:
            InputError: If one is not there, or cannot be read.
        """
        places = self.index.find(keys)
        missing = [k for k, place in enumerate(places) if place is None]
        if missing:
            raise InputError(
                f"{len(missing)} of the {len(keys)} examples of this batch are not in the cache "
                f"{self.folder}, the first of them is number {missing[0]}; it holds other data, or "
                "the same data cut otherwise: write it anew with this recipe"
            )
        return [self._read(place) for place in places if place is not None]

    def _read(self, place: Place) -> Encoded:
        """One example; its row group stays for a while."""
        at = place.shard, place.group
        if at not in self._groups:
            self._groups[at] = self._file(place.shard).read(place.group)
            while len(self._groups) > 1 and self._held > MOST_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(at)
        return self._groups[at].examples[place.row]

    @property
    def _held(self) -> int:
        """Bytes in memory."""
        return sum(group.size for group in self._groups.values())

    def _file(self, number: int) -> ShardReader:
        """An open shard."""
        if number not in self._files:
            path = self.folder / self.manifest.shards[number].file
            self._files[number] = ShardReader.open(path, self.columns)
            while len(self._files) > MOST_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(number)
        return self._files[number]


def save_head(folder: Path, head: Head) -> dict[str, object]:
    """Write the teacher's head; what the manifest says of it."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    save_file(tensors, folder / HEAD)
    digest = fingerprints.of_file(folder / HEAD)
    dtype = str(head.weight.dtype).removeprefix("torch.")
    return {"scale": head.scale, "softcap": head.softcap, "dtype": dtype, "sha256": digest}


def _check_size(path: Path, expected: int) -> None:
    """Refuse a file that is missing or cut short, before others are read to their end."""
    if not path.is_file():
        raise _missing(path)
    found = path.stat().st_size
    if found != expected:
        raise InputError(
            f"{path} has {found:,} bytes and was written with {expected:,}; copy it anew"
        )


def _check_tensors(path: Path) -> None:
    """Refuse tensors that are cut short."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read ({error}); copy it anew") from error


def _check_file(path: Path, expected: str) -> None:
    """Refuse a small file that is missing, or has other content."""
    if not path.is_file():
        raise _missing(path)
    _check_digest(path, fingerprints.of_file(path), expected)


def _check_digest(path: Path, found: str, expected: str) -> None:
    """Refuse a file with other content."""
    if found != expected:
        raise InputError(
            f"{path} is not as it was written: its SHA-256 is {found[:12]}…, the manifest says "
            f"{expected[:12]}…; copy it anew"
        )


def _missing(path: Path) -> InputError:
    """A file is not there."""
    return InputError(f"{path} is missing; copy the cache anew")
