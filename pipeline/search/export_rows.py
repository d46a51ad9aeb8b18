"""The rows of an index for other tools: Arrow batches, one Parquet file, a FAISS or a USearch index.

    from pipeline.search.export_rows import batches, to_faiss, to_parquet, to_usearch

    with Index.open(folder) as index:
        for batch in batches(index): ...                     # pyarrow.RecordBatch: row, key, mark, metadata, embedding
        to_parquet(index, Path("rows.parquet"), where=Where(taxon="Aves"))
        to_usearch(index, Path("rows.usearch"))              # its keys are rows of index.h5, as `row` says

Rows go through memory 65,536 at a time, whatever the size of the index; FAISS alone builds its index in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.search.index import Index
from pipeline.search.where import EVERYTHING, Where
from pipeline.store.files import commit_file, temporary
from pipeline.store.generation import COLUMN_PIECE
from pipeline.store.scan import Rows

_ARROW = {"text": pa.string(), "integer": pa.int64(), "real": pa.float64()}


def schema(index: Index) -> pa.Schema:
    """`row` of index.h5, `key`, `mark`, a struct `metadata` of what the index has, and `embedding`: d float16."""
    columns = index.generation.metadata_columns.items()
    metadata = pa.struct([pa.field(name, _ARROW[kind]) for name, (kind, _) in columns])
    fields = [("row", pa.int64()), ("key", pa.string()), ("mark", pa.string())]
    if metadata.num_fields:  # Parquet has no empty structs
        fields.append(("metadata", metadata))
    return pa.schema([*fields, ("embedding", pa.list_(pa.float16(), index.generation.dim))])


def batches(index: Index, where: Where = EVERYTHING, rows_max: int = COLUMN_PIECE) -> Iterator[pa.RecordBatch]:
    """All rows that pass, in the order of index.h5, at most `rows_max` in a batch. A value that is missing is null.

    Raises:
        QueryError: a filter that this index cannot answer.
    """
    layout = schema(index)
    for rows in _pieces(index, where, rows_max):
        columns: dict[str, Any] = {
            "row": pa.array(rows),
            "key": pa.array(index.generation.keys(rows)),
            "mark": pa.array(index.generation.marks(rows)),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(index.vectors(rows).ravel()), index.generation.dim),
        }
        if "metadata" in layout.names:
            columns["metadata"] = pa.array(index.generation.metadata(rows), layout.field("metadata").type)
        yield pa.RecordBatch.from_arrays([columns[name] for name in layout.names], schema=layout)


def to_parquet(index: Index, path: Path | str, where: Where = EVERYTHING) -> int:
    """Write one Parquet file, whole or not at all. Returns its number of rows."""
    path, written = Path(path), 0
    with pq.ParquetWriter(temporary(path), schema(index)) as writer:
        for batch in batches(index, where):
            writer.write_batch(batch)
            written += batch.num_rows
    commit_file(path)
    return written


def to_usearch(index: Index, path: Path | str, where: Where = EVERYTHING) -> int:
    """Write a USearch index of float16 by inner product, its keys the rows of index.h5. Returns its number of rows."""
    from pipeline.search.usearch_lib import Index as UsearchIndex

    made = UsearchIndex(ndim=index.generation.dim, metric="ip", dtype="f16")
    for rows in _pieces(index, where, COLUMN_PIECE):
        made.add(rows.astype(np.uint64), index.vectors(rows))
    path = Path(path)
    made.save(temporary(path))
    commit_file(path)
    return len(made)


def to_faiss(index: Index, path: Path | str, where: Where = EVERYTHING) -> int:
    """Write a FAISS index of float16 by inner product, its ids the rows of index.h5. Returns its number of rows.

    Raises:
        ModuleNotFoundError: faiss is not installed; `pip install faiss-cpu`.
    """
    import faiss

    flat = faiss.IndexScalarQuantizer(index.generation.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    made = faiss.IndexIDMap(flat)
    for rows in _pieces(index, where, COLUMN_PIECE):
        made.add_with_ids(index.vectors(rows).astype(np.float32), rows)
    path = Path(path)
    faiss.write_index(made, str(temporary(path)))
    commit_file(path)
    return int(made.ntotal)


def _pieces(index: Index, where: Where, rows_max: int) -> Iterator[Rows]:
    allowed = index.passing(where)
    for first in range(0, index.generation.rows, rows_max):
        rows = np.arange(first, min(first + rows_max, index.generation.rows))
        if allowed is not None:
            rows = rows[allowed[rows]]
        if len(rows):
            yield rows
