"""What a lane and the coordinator tell each other: msgpack, whose types are checked while it is read.

Never a pickle: decoders meet hostile bytes inside the lane, and whoever has taken a lane over must not get into the
process that holds the store. It is faster too: the rows of a chunk take .1 us each to write and .2 to read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec

from pipeline.store import ContentHash, Outcome, PendingItem, ShardInfo

MESSAGE_BYTES_MAX = 64 << 20  # a chunk of 16,384 rows takes 1.2 MB, and their words where they are quarantined


class Claim(msgspec.Struct, frozen=True, tag=True):
    """Which of these contents are new? Those become this chunk's to compute."""

    chunk: int
    hashes: Annotated[list[ContentHash], msgspec.Meta(min_length=1)]


class Done(msgspec.Struct, frozen=True, tag=True):
    """All rows of a chunk that have an outcome; rows without one (the run was stopped) stay pending."""

    chunk: int
    shard: ShardInfo | None
    outcomes: list[Outcome]
    decoders: dict[str, int]  # pictures by who decoded them


class Ready(msgspec.Struct, frozen=True, tag=True):
    engine: str  # runtime and precision in words
    rows_per_s: float  # as measured when the engine was built
    batch: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The lane cannot run here: no such engine or device, or a device that gives wrong pixels."""

    words: str


class Lost(msgspec.Struct, frozen=True, tag=True):
    """The lane's GPU failed under it; the lane may be started again."""

    words: str
    full_at: int = 0  # rows of the batch that did not fit in GPU memory; 0 where that is not what happened


class Broken(msgspec.Struct, frozen=True, tag=True):
    """A bug of ours; it ends the run with these words."""

    words: str


class Tick(msgspec.Struct, tag=True):
    """What one second looked like from inside the lane: the waits name the bound stage."""

    rows: int = 0
    read_wait_s: float = 0.0  # reader blocked because decode was busy
    decode_wait_s: float = 0.0  # decoder waiting for bytes
    slot_wait_s: float = 0.0  # decoder waiting for a free engine buffer
    encode_wait_s: float = 0.0  # engine waiting for pixels
    seconds: Annotated[float, msgspec.Meta(gt=0)] = 0.0  # when it is told

    @property
    def bound(self) -> str:
        """The stage everybody else waits for: the engine unless it waits itself more than a tenth of the time."""
        if self.encode_wait_s < 0.1 * self.seconds:
            return "engine"
        return "decode" if self.decode_wait_s < 0.5 * self.seconds else "read"


class Chunk(msgspec.Struct, frozen=True, tag=True):
    """The unit of scheduling: rows to do, and where their vectors go."""

    number: int
    shard_path: Path
    rows: list[PendingItem]


class Verdict(msgspec.Struct, frozen=True, tag=True):
    """Which of the contents of a `Claim` are the lane's to compute."""

    new: list[bool]


Message: TypeAlias = Claim | Done | Ready | Refused | Lost | Broken | Tick  # of a lane
Order: TypeAlias = Chunk | Verdict | None  # of the coordinator; None: all is done, leave


def _to_path(kind: type[Any], raw: bytes) -> Path:
    assert kind is Path, f"no message holds a {kind}"
    return Path(os.fsdecode(raw))


_encoder = msgspec.msgpack.Encoder(enc_hook=os.fsencode)  # a path, which may be no UTF-8
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order, dec_hook=_to_path)


def sayable(words: str) -> str:
    """Words of an error, which may hold a file's name that is not UTF-8."""
    return words.encode(errors="backslashreplace").decode()


def encode(message: Message | Order) -> bytes:
    return _encoder.encode(message)


def decode(raw: bytes) -> Message:
    """
    Raises:
        msgspec.DecodeError: this is no message, or a field of it has another type.
    """
    return _decoder.decode(raw)


def decode_order(raw: bytes) -> Order:
    return _order_decoder.decode(raw)
