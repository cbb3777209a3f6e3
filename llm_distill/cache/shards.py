"""A shard: one Parquet file, a row for each example, page checksums, zstd.

`datasets` and any other reader of Parquet opens it. A row group holds some thousand supervised
rows, so that a shuffled training reads little besides the example it wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm_distill.cache.encoded import Encoded
from llm_distill.errors import InputError
from llm_distill.keys import KEY_BYTES

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

GROUP_ROWS = 1024
"""Supervised rows of a row group, from which the next one begins."""

GROUP_BYTES = 8 << 20
"""The same in bytes, before they are compressed: a single example is read with its group."""

LEVEL = 3
"""Of zstd. More saves no percent."""

OF_EXAMPLE = 20.0
"""Bytes of an example besides its columns: its key, which is noise, and two numbers."""

OF_VALUE = 3.0
"""Bytes of a value besides its content: its length, compressed."""

OF_CHUNK = 160.0
"""Bytes of a column in a row group besides its values: page header, and its part of the footer."""

OF_FILE = 4096.0
"""Bytes of a file besides its row groups: schema and footer, and what a file system rounds up."""


@dataclass
class ShardWriter:
    """Writes one shard; what it holds is known when it is closed.

    Attributes:
        path: Of the file, which must not be there.
        columns: Of bytes.
        about: Text in the file's own metadata, for whoever finds the file alone.
        places: Row group and row inside it of each example, in the order they came.
        rows: Supervised rows.
    """

    path: Path
    columns: tuple[str, ...]
    about: Mapping[str, str] = field(default_factory=dict)
    places: list[tuple[int, int]] = field(default_factory=list)
    rows: int = 0

    def __enter__(self) -> ShardWriter:
        """Open the file."""
        fixed = [("key", pa.binary(KEY_BYTES)), ("rows", pa.int32()), ("width", pa.int32())]
        schema = pa.schema([*fixed, *((name, pa.binary()) for name in self.columns)])
        self._schema = schema.with_metadata(dict(self.about))
        self._held: list[tuple[bytes, Encoded]] = []
        self._groups = self._waiting = self._size = 0
        self._writer = pq.ParquetWriter(
            self.path,
            self._schema,
            compression="zstd",
            compression_level=LEVEL,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        return self

    def add(self, key: bytes, found: Encoded) -> None:
        """One example."""
        self.places.append((self._groups, len(self._held)))
        self._held.append((key, found))
        self.rows += found.rows
        self._waiting += found.rows
        self._size += sum(part.nbytes for part in found.columns.values())
        if self._waiting >= GROUP_ROWS or self._size >= GROUP_BYTES:
            self._flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is held, and the footer."""
        if kind is None and self._held:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        """One row group."""
        keys, found = zip(*self._held, strict=True)
        table: dict[str, Any] = {
            "key": pa.array(keys, pa.binary(KEY_BYTES)),
            "rows": pa.array([part.rows for part in found], pa.int32()),
            "width": pa.array([part.width for part in found], pa.int32()),
        }
        for name in self.columns:
            table[name] = pa.array([part.columns[name].tobytes() for part in found], pa.binary())
        self._writer.write_table(pa.table(table, schema=self._schema))
        self._held, self._waiting, self._size = [], 0, 0
        self._groups += 1


def most_bytes(columns: int, rows: int, examples: int, content: float) -> float:
    """Bytes of a shard, at most.

    Args:
        columns: Of bytes.
        rows: Supervised rows of all examples.
        examples: How many.
        content: Bytes of the columns, as a compressor leaves them.
    """
    # Content is counted in groups before it is compressed, which halves it at most.
    groups = 1 + rows // GROUP_ROWS + 2 * content // GROUP_BYTES
    besides = OF_FILE + (groups + 1) * OF_CHUNK * (columns + 3)
    return content + examples * (OF_EXAMPLE + OF_VALUE * columns) + besides


@dataclass(frozen=True)
class Group:
    """A row group in memory.

    Attributes:
        keys: Of its examples.
        examples: Their targets.
        size: Bytes.
    """

    keys: Sequence[bytes]
    examples: Sequence[Encoded]
    size: int


@dataclass(frozen=True)
class ShardReader:
    """An open shard.

    Attributes:
        path: Of the file, for messages.
        file: Mapped into memory.
        columns: Of bytes.
    """

    path: Path
    file: pq.ParquetFile
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, columns: tuple[str, ...]) -> ShardReader:
        """Read the footer.

        Raises:
            InputError: If it is no whole shard.
        """
        try:
            file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from error
        return cls(path, file, columns)

    def keys_by_group(self) -> list[list[bytes]]:
        """The keys of the examples of each row group."""
        return [
            self.file.read_row_group(group, columns=["key"])["key"].to_pylist()
            for group in range(self.file.num_row_groups)
        ]

    def read(self, group: int) -> Group:
        """One row group, its checksums verified.

        Raises:
            InputError: If a bit of it is not as it was written.
        """
        wanted = ["key", "rows", "width", *self.columns]
        try:
            table = self.file.read_row_group(group, columns=wanted, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise damaged(self.path, error) from error
        keys, rows, widths = (table[name].to_pylist() for name in wanted[:3])
        pieces = {name: _pieces(table[name]) for name in self.columns}
        examples = [
            Encoded(rows[k], widths[k], {name: pieces[name][k] for name in self.columns})
            for k in range(len(rows))
        ]
        size = sum(len(piece) for column in pieces.values() for piece in column)
        return Group(keys, examples, size)


def _pieces(column: pa.ChunkedArray) -> list[NDArray[np.uint8]]:
    """The values of a binary column, none copied."""
    found = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        content = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
        found += [content[start:end] for start, end in pairwise(ends.tolist())]
    return found


def damaged(path: Path, error: Exception) -> InputError:
    """What to do about a shard that cannot be read."""
    return InputError(
        f"{path} cannot be read ({str(error).splitlines()[0]}); it was changed or cut short since "
        "it was written; copy it anew, or write the cache anew: llm-distill cache recipe.yaml "
        "--overwrite"
    )
