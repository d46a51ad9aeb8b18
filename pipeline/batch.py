"""The one data type that flows through a run: an `Item` is listed, a `Batch` of items is turned into vectors.

A stage fills the next slot of a `Batch` and drops the one it has consumed. A row that fails moves to `failed` with a
reason and keeps its place, so that neighbours never shift. This module imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Reason: TypeAlias = Literal[
    "empty",  # zero bytes
    "truncated",  # the end of the picture is missing
    "corrupt",  # a picture by its first bytes, but it does not decode, or no finite vector comes of it
    "not_an_image",  # no decoder knows the first bytes
    "unsupported_format",  # a valid picture of a kind no decoder here reads
    "too_large",  # more pixels than memory allows and no scaled decode for the format
    "read_error",  # the bytes could not be read, or changed while being read (transient: retried every run)
    "decoder_crash",  # the decoder took its process down (retried alone before it counts)
    "timeout",  # the decoder did not come back in time (retried alone before it counts)
]
Mark: TypeAlias = Literal["", "damaged", "scaled"]
"""What a reader of an embedded row should know: decoded from damaged data, or decoded at reduced size."""

MetadataValue: TypeAlias = str | int | float


class Item(msgspec.Struct, frozen=True, gc=False):
    """One picture as listed by a source, before anybody read it. 0.15 us to make; a frozen dataclass takes 1.7."""

    key: str  # valid UTF-8, unique within the source; see sources.keys for the reversible escapes
    locator: bytes  # what `Source.read` needs: raw path bytes, or container + offset
    size_bytes: int
    mtime_ns: int = 0
    etag: str = ""
    metadata: Mapping[str, MetadataValue] = msgspec.field(default_factory=dict)


class Failure(NamedTuple):
    reason: Reason
    words: str  # the decoder's own


class BadImage(Exception):
    """A picture that gives no pixels. Data, not an accident: it becomes a row of the quarantine ledger.

    `passing`: the same read may work a moment later.
    """

    def __init__(self, reason: Reason, words: str, *, passing: bool = False) -> None:
        super().__init__(f"{reason}: {words}")
        self.failure, self.passing = Failure(reason, words), passing


class Posted(Protocol):
    """Where a worker says which row it has in hand, so that a crash or a hang can be blamed."""

    def start(self, worker: int, row_id: int, deadline_s: float) -> None: ...
    def finish(self, worker: int) -> None: ...


class DeviceUnavailable(Exception):
    """A device cannot be had, or gives wrong pictures; the message says why and what to do."""


@dataclass(slots=True)
class Batch:
    """Up to one engine batch of rows. Slots are `None` before their stage has run and after the next one has."""

    ids: npt.NDArray[np.int64]  # (n,) ids of the manifest
    encoded: list[bytes] | None = None  # host; b"" where the row failed; dropped by decode
    pixels_rows: int = 0  # rows [0, n) of the engine's input buffer that hold normalised pixels
    slot: int = -1  # which of the engine's rotating buffers holds them
    emb_nd: npt.NDArray[np.float16] | None = None  # (n, d) host, unit norm
    marks: dict[int, Mark] = field(default_factory=dict)  # row -> mark
    failed: dict[int, Failure] = field(default_factory=dict)  # row -> reason
    decoders: dict[str, int] = field(default_factory=dict)  # decoder name -> rows it decoded

    def __post_init__(self) -> None:
        if self.encoded is not None and len(self.encoded) != len(self.ids):
            raise ValueError(
                f"ids has {len(self.ids)} rows but encoded has {len(self.encoded)}; every row needs its bytes, "
                'or b"" and an entry in failed'
            )
