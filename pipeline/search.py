"""`python -m pipeline.search "text"`: the pictures of an index that fit a text, or another picture, best.

Exact: every live vector is scored, memory-mapped as float16 and read by a kernel made for it (5 GB/s on one core, 1
through a float32 copy). A text query imports no torch. Only the published generation is read.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numkong
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer

from engines import EngineUnavailable, open_engine
from engines.spec import Artifact, ArtifactMissing, find_artifact
from pipeline.batch import BadImage, Batch
from pipeline.config import SearchConfig, UsageError, parse_search
from pipeline.contact_sheet import Cell, contact_sheet
from pipeline.exits import DONE, FAILED, USAGE
from pipeline.sources import SourceError, open_source
from pipeline.store import Block, Generation, NoIndex, StoreError

BLOCK_ROWS = 65_536  # scores of one step: 0.25 MB per query, whatever the size of the index
DIGEST_CHECK_BYTES = 1 << 30  # a first read of 1 GB takes 0.3 s from the page cache; above, sizes alone are checked


@dataclass(frozen=True)
class Hit:
    key: str
    score: float  # cosine
    mark: str
    metadata: dict[str, str | int | float]
    row: int  # of index.h5


def embed_texts(artifact: Artifact, texts: list[str]) -> npt.NDArray[np.float16]:
    """(n, d) unit-norm vectors; longer texts are cut to the model's context, the end token kept."""
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_json))  # pads and cuts to the context by itself
    engine = open_engine(artifact, "text", batch=1)
    blocks = []
    for encoding in tokenizer.encode_batch(texts):
        engine.input(0)[0] = encoding.ids
        engine.launch(0, 1)
        blocks.append(engine.result(0))
    return np.concatenate(blocks)


def embed_picture(artifact: Artifact, encoded: bytes) -> npt.NDArray[np.float16]:
    """(1, d) unit-norm vector, through the same stages as every indexed picture.

    Raises:
        BadImage: it does not decode.
    """
    from pipeline.stages_cpu import CpuStages  # decoders: not for text queries

    engine = open_engine(artifact, "vision", "ort-cpu", batch=1)
    batch = CpuStages(artifact.spec.preprocess, threads=1)(Batch(np.array([1]), [encoded]), engine.input(0))
    if batch.failed:
        raise BadImage(*batch.failed[0])
    engine.launch(0, 1)
    return engine.result(0)


def top_k(
    generation: Generation, query_d: npt.NDArray[np.float16], k: int, threshold: float | None = None
) -> list[Hit]:
    """The k best live rows by cosine, best first; ties by row, so that the answer is the same every time."""
    if query_d.shape != (generation.dim,):
        raise ValueError(f"the query has shape {query_d.shape}, the index holds vectors of {generation.dim}")
    rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for block in generation.blocks():
        found_rows, found_scores = _score(block, query_d)
        rows, scores = np.concatenate([rows, found_rows]), np.concatenate([scores, found_scores])
        best = np.lexsort((rows, -scores))[:k]
        rows, scores = rows[best], scores[best]
    if threshold is not None:
        rows, scores = rows[scores >= threshold], scores[scores >= threshold]
    described = zip(
        generation.keys(rows), scores.tolist(), generation.marks(rows), generation.metadata(rows), rows.tolist(),
        strict=True,
    )
    return [Hit(*hit) for hit in described]


def _score(block: Block, query_d: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows of index.h5 and cosines of one data file's live vectors."""
    scores = np.empty(len(block.emb_nd), np.float32)
    for first in range(0, len(scores), BLOCK_ROWS):
        part = block.emb_nd[first : first + BLOCK_ROWS]
        scores[first : first + len(part)] = np.asarray(numkong.cdist(part, query_d[None], "inner"))[:, 0]
    rows = block.index_rows
    live = rows >= 0
    return rows[live], scores[live]


def open_checked(index: Path) -> Generation:
    """The current generation; small ones are checked byte by byte, large ones by the sizes of their files.

    Raises:
        NoIndex, StoreDamaged: with what was expected and what to run. Never zeros in place of vectors.
    """
    generation = Generation.open(index)
    if sum(block.emb_nd.nbytes for block in generation.blocks()) <= DIGEST_CHECK_BYTES:
        generation.close()
        generation = Generation.open(index, "digest")
    return generation


def artifact_of(generation: Generation, model: str | None) -> Artifact:
    """The artifact whose vectors this index holds.

    Raises:
        ArtifactMissing, UsageError: it is not here, or `model` names another one.
    """
    artifact = find_artifact(model or str(generation.spec["model"]))
    if artifact.spec.space != generation.space:
        raise UsageError(
            f"the index holds vectors of {generation.spec['model']} in space {generation.space}, the artifact of "
            f"{artifact.spec.model} makes space {artifact.spec.space}: their vectors cannot be compared"
        )
    return artifact


def search(cfg: SearchConfig) -> list[Hit]:
    with open_checked(cfg.out) as generation:
        artifact = artifact_of(generation, cfg.model)
        if cfg.text is not None:
            query_d = embed_texts(artifact, [cfg.template.replace("{}", cfg.text)])[0]
        else:
            assert cfg.image is not None
            query_d = embed_picture(artifact, cfg.image.read_bytes())[0]
        hits = top_k(generation, query_d, cfg.k, cfg.threshold)
        if cfg.grid:
            read = zip(_read(generation, hits), hits, strict=True)
            cells = [Cell(encoded, _label(hit), hit.score) for encoded, hit in read]
            contact_sheet(cfg.text or str(cfg.image), cells).save(cfg.grid)
    return hits


def _read(generation: Generation, hits: list[Hit]) -> list[bytes | None]:
    """The pictures' bytes from where they were indexed; None for one that has gone since."""
    found: list[bytes | None] = []
    for picture in generation.pictures(np.array([hit.row for hit in hits], np.int64)):
        try:
            source = open_source(picture.source.kind, picture.source.root, split=picture.source.options.get("split"))
            found.append(source.read(picture.locator, picture.size_bytes))
        except (SourceError, BadImage) as error:
            logging.getLogger("nightjar").warning("a picture cannot be shown: %s", error)
            found.append(None)
    return found


def _label(hit: Hit) -> str:
    for column in ("common_name", "label", "caption"):
        if value := hit.metadata.get(column):
            return str(value)
    return hit.key


def show(cfg: SearchConfig, hits: list[Hit]) -> None:
    if cfg.json:
        print(json.dumps({"query": cfg.text or str(cfg.image), "hits": [asdict(hit) for hit in hits]}))
        return
    table = Table("#", "score", "label", Column("key", overflow="fold"), box=None, pad_edge=False)
    for number, hit in enumerate(hits, 1):
        note = f"  ({hit.mark})" if hit.mark else ""
        table.add_row(str(number), f"{hit.score:.4f}", _label(hit), hit.key + note)
    console = Console()
    console.print(table if hits else f"nothing at or above --threshold {cfg.threshold:g}")
    if cfg.grid:
        console.print(f"contact sheet: {cfg.grid}")


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        cfg = parse_search(argv)
        hits = search(cfg)
    except (UsageError, ArtifactMissing, EngineUnavailable, NoIndex, BadImage) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    show(cfg, hits)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
