"""What the local hub holds: repositories with their commits, and large files as they arrived."""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Blob:
    """A file: its bytes, or (by Xet) its hash in the store."""

    oid: str
    size: int
    content: bytes | None = None
    large: bool = True
    xet: str | None = None

    @classmethod
    def small(cls, content: bytes) -> "Blob":
        """A file kept by git itself."""
        return cls(
            hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            len(content),
            content,
            large=False,
        )

    def entry(self, path: str) -> dict[str, Any]:
        """How listings show it."""
        large = (
            {"lfs": {"oid": self.oid, "size": self.size, "pointerSize": 134}} if self.large else {}
        )
        xet = {"xetHash": self.xet} if self.xet else {}
        return {
            "type": "file",
            "path": path,
            "size": self.size,
            "oid": self.oid[:40],
            **large,
            **xet,
        }


Tree = dict[str, Blob]


@dataclass(frozen=True)
class Answer:
    """Status, body and headers."""

    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):  # noqa: N818 (an answer like any other, raised to be short)
    """An answer that says no."""

    def __init__(self, status: int, message: str, code: str = "", **more: object) -> None:
        super().__init__(message)
        headers = {
            "X-Error-Message": message.replace("\n", " "),
            **({"X-Error-Code": code} if code else {}),
        }
        self.answer = Answer(status, json.dumps({"error": message, **more}).encode(), headers)


class Repo:
    """Branches, and the trees of their commits."""

    def __init__(self) -> None:
        self.branches: dict[str, str] = {}
        self.commits: dict[str, Tree] = {}
        self.commit(
            {".gitattributes": Blob.small(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        )

    def commit(self, tree: Tree, branch: str = "main") -> str:
        """Put a tree on a branch; the new commit's id."""
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        return sha

    def at(self, revision: str) -> tuple[str, Tree]:
        """Commit id and tree of a branch or a commit."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]


@dataclass
class Store:
    """Everything that the hub holds."""

    user: str
    xet: Path | None
    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def repo(self, kind: str, name: str) -> Repo:
        """A repository that exists."""
        if (kind, name) not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[kind, name]

    def large(self, oid: str, path: str) -> Blob:
        """A large file that was uploaded before the commit that names it."""
        if oid in self.uploads:
            return Blob(oid, len(self.uploads[oid]), self.uploads[oid])
        for shard in self.xet.rglob("*.mdb") if self.xet else ():
            for sha256, xet, size in shard_files(shard.read_bytes()):
                if sha256 == oid:
                    return Blob(oid, size, xet=xet)
        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")


def shard_files(data: bytes) -> Iterator[tuple[str, str, int]]:
    """(sha256, Xet hash, size) of each file in a Xet metadata shard.

    After a header of 48 bytes come records of 48: a file (hash, flags, number of segments), its
    segments (length at byte 36), with flag 31 as many verification records, with flag 30 one with
    the sha256. A hash of ones is the end.
    """
    at = 48
    while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", data, at + 32)
        size = sum(
            struct.unpack_from("<I", data, at + 48 * i + 36)[0] for i in range(1, segments + 1)
        )
        extra = at + 48 * (1 + segments * (1 + (flags >> 31)))
        if flags >> 30 & 1:
            yield digest(data[extra : extra + 32]), digest(data[at : at + 32]), size
        at = extra + 48 * (flags >> 30 & 1)


def digest(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
