"""Parquet files with a column of encoded pictures, as Hugging Face datasets write them or plain binary.

The key is `<file>/<row number>`; the other scalar columns become metadata. Listing reads those columns only, so
`size_bytes` is the mean of the row group. Reading moves a cursor forward through a row group, 16 rows at a time:
each process decodes a page once (40 us a picture of 30 KB), and memory stays at about three pages of the file however
large its row groups are: 95 MB where a page holds 1,024 such pictures.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.batch import BadImage, Item
from pipeline.sources import Damage
from pipeline.sources.containers import ContainerSource
from pipeline.sources.keys import MAX_FIELDS, clean_metadata, encode_key
from pipeline.sources.places import MAX_READ_BYTES, Found, Place, digest_of, place_at, words_of

# Names of a binary column that holds pictures, the likeliest first.
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content")
ROWS_AT_ONCE = 16
# Decode threads of a lane ask slightly out of order: the last batches stay at hand, so none turns the cursor back.
BATCHES_KEPT = 4
# Two, because around the end of a row group a lane reads from both.
CURSORS_KEPT = 2


@dataclass(frozen=True)
class ParquetRows(ContainerSource):
    kind: ClassVar[str] = "parquet"
    ending: ClassVar[str] = ".parquet"

    def list_one(self, place: Place, container: Found) -> Iterator[Item | Damage]:
        import pyarrow.parquet as pq

        with place.open(container.name) as file, pq.ParquetFile(file, pre_buffer=False) as table:
            if table.metadata.num_rows > container.size_bytes:
                raise ValueError(f"it claims {table.metadata.num_rows:,} rows in {container.size_bytes:,} bytes")
            column = bytes_column(table.schema_arrow)
            scalars = _scalar_columns(table.schema_arrow, column)
            shard = encode_key(container.name)
            digest = digest_of(container.etag)
            number = 0
            for group in range(table.num_row_groups):
                size_bytes = _mean_bytes(table.metadata.row_group(group))
                for row, record in enumerate(_records(table, group, scalars)):
                    yield Item(
                        key=f"{shard}/{number:08d}",
                        locator=b"%b:%d:%d:%b" % (digest, group, row, container.name),
                        size_bytes=size_bytes,
                        etag=container.etag,
                        metadata=clean_metadata(record),
                    )
                    number += 1

    def read(self, locator: bytes, size_bytes: int) -> bytes:
        try:
            etag_digest, group_text, row_text, name = locator.split(b":", 3)
            group, row = int(group_text), int(row_text)
        except ValueError as error:
            raise BadImage("read_error", f"locator {locator!r} is none of a parquet source") from error
        try:
            encoded = _CURSORS.read(self.folder, name, etag_digest, group, row)
        except BadImage:
            raise
        except Exception as error:  # pyarrow's own types, and whatever a remote file raises
            raise BadImage("read_error", words_of(error)) from error
        if encoded is None:
            raise BadImage("empty", f"row {row} of row group {group} has no bytes")
        if len(encoded) > MAX_READ_BYTES:
            raise BadImage("too_large", f"{len(encoded)} bytes; at most {MAX_READ_BYTES} are read")
        return encoded

    def container_of(self, locator: bytes) -> bytes:
        return locator.split(b":", 3)[-1]


def bytes_column(schema: Any) -> str:
    """The path of the column that holds pictures: `image.bytes` of a struct, or a binary column with a usual name.

    Raises:
        ValueError: none, or several and none of a usual name.
    """
    import pyarrow.types as types

    found = []
    for field in schema:
        if types.is_struct(field.type):
            found += [f"{field.name}.bytes" for part in field.type if part.name == "bytes" and _is_binary(part.type)]
        elif _is_binary(field.type):
            found.append(field.name)
    usual = [name for usual in IMAGE_COLUMNS for name in found if name.removesuffix(".bytes").lower() == usual]
    if len(found) == 1 or usual:
        return (usual or found)[0]
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise ValueError(
        f"{'several columns' if found else 'no column'} of binary data; expected one called {', '.join(IMAGE_COLUMNS)} "
        f"or a struct with `bytes`; columns are {columns}"
    )


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _scalar_columns(schema: Any, bytes_path: str) -> list[str]:
    """Columns of text, numbers and dates, and the file name that stands beside the bytes of a struct."""
    import pyarrow.types as types

    def is_scalar(kind: Any) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        texts = types.is_string(kind) or types.is_large_string(kind)
        numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)
        return bool(texts or numbers or types.is_timestamp(kind) or types.is_date(kind))

    columns = [field.name for field in schema if is_scalar(field.type)]
    struct, dot, _ = bytes_path.rpartition(".")
    if dot and any(part.name == "path" and is_scalar(part.type) for part in schema.field(struct).type):
        columns.append(f"{struct}.path")
    return columns[:MAX_FIELDS]  # each is a page in memory


def _records(table: Any, group: int, columns: list[str]) -> Iterator[dict[str, object]]:
    if not columns:
        yield from ({} for _ in range(table.metadata.row_group(group).num_rows))
        return
    for batch in table.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
        for record in batch.to_pylist():
            for struct in [name for name, value in record.items() if isinstance(value, dict)]:
                record.setdefault("path", record.pop(struct)["path"])
            yield record


def _mean_bytes(row_group: Any) -> int:
    """Of all columns, pictures being nearly all of it. Asking for one column's share takes the process down where its
    statistics are broken (Arrow 26)."""
    return max(0, int(row_group.total_byte_size)) // max(int(row_group.num_rows), 1)


class _Cursor:
    """A forward reader of one row group's pictures; it turns back only for a row it no longer holds."""

    def __init__(self, folder: str, name: bytes, etag_digest: bytes, group: int) -> None:
        import pyarrow.parquet as pq

        place = place_at(folder)
        if digest_of(place.find(name).etag) != etag_digest:
            raise BadImage("read_error", "the file that holds it has changed since it was listed")
        self._file = place.open(name)
        self._table = pq.ParquetFile(self._file, pre_buffer=False, buffer_size=1 << 20)
        self._column = bytes_column(self._table.schema_arrow)
        self._group = group
        self._rewind()

    def _rewind(self) -> None:
        self._kept: deque[tuple[int, Any]] = deque(maxlen=BATCHES_KEPT)
        self._next_row = 0
        self._batches = self._table.iter_batches(
            batch_size=ROWS_AT_ONCE, row_groups=[self._group], columns=[self._column], use_threads=False
        )

    def close(self) -> None:
        self._file.close()

    def read(self, row: int) -> bytes | None:
        if row < self._next_row and (not self._kept or row < self._kept[0][0]):
            self._rewind()
        while row >= self._next_row:
            batch = next(self._batches, None)
            if batch is None:
                raise BadImage("read_error", f"row group {self._group} has {self._next_row} rows, so none is {row}")
            pictures = batch.column(0)
            if "." in self._column:
                pictures = pictures.field("bytes")
            self._kept.append((self._next_row, pictures))
            self._next_row += len(pictures)
        start, pictures = next(kept for kept in reversed(self._kept) if kept[0] <= row)
        encoded: bytes | None = pictures[row - start].as_py()
        return encoded


class _Cursors:
    """The few open cursors of this process. One lock: decode threads share them, and arrow's work is short."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, bytes, bytes, int], _Cursor] = OrderedDict()

    def read(self, folder: str, name: bytes, etag_digest: bytes, group: int, row: int) -> bytes | None:
        key = (folder, name, etag_digest, group)
        with self._lock:
            if key not in self._open:
                self._open[key] = _Cursor(*key)
                if len(self._open) > CURSORS_KEPT:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(key)
            try:
                return self._open[key].read(row)
            except Exception:
                self._open.pop(key).close()  # a cursor that failed is not in a known state
                raise


_CURSORS = _Cursors()
