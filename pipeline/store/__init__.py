"""The store: what exists, what is published. `Store` writes (one process), `Generation` reads (any number)."""

from pipeline.store.ann import Turn
from pipeline.store.files import Locked, NoIndex, StoreDamaged, StoreError, content_hash
from pipeline.store.generation import Block, Generation, Picture
from pipeline.store.listing import Container, Observed, Preview, Scope
from pipeline.store.shards import ShardInfo, map_embeddings, write_shard
from pipeline.store.store import (
    Committed,
    ContentHash,
    Counts,
    Outcome,
    PendingItem,
    Quarantine,
    Store,
    show_generation,
)

__all__ = [
    "Block",
    "Committed",
    "Container",
    "ContentHash",
    "Counts",
    "Generation",
    "Locked",
    "NoIndex",
    "Observed",
    "Outcome",
    "PendingItem",
    "Picture",
    "Preview",
    "Quarantine",
    "Scope",
    "ShardInfo",
    "Store",
    "StoreDamaged",
    "StoreError",
    "Turn",
    "content_hash",
    "map_embeddings",
    "show_generation",
    "write_shard",
]
