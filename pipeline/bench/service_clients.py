"""The clients of `pipeline.bench.service`: what they ask, and what each generation has to answer."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from pipeline.search import Index
from pipeline.sources import open_source

QUERIES = [
    f"{much} {what}"
    for much in ("one", "two", "many", "a small")
    for what in ("red circle", "bird", "blue star", "tree")
]
K, KNOWN = 9, 60
SCORE_TOLERANCE = 0.003  # float16 vectors of two batch sizes
PICTURES = 8


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Client:
    """One keep-alive connection; HTTP/1.1 with Content-Length, which is all the service speaks."""

    host: str
    port: int
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        head = {"host": self.host, "content-length": str(len(body)), **headers}
        await self.send(method, path, body, head)
        assert self.streams is not None
        reader, _ = self.streams
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        answered = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
        content = await reader.readexactly(int(answered.get("content-length", "0")))
        if answered.get("connection") == "close":
            self.close()
        return Reply(int(lines[0].split()[1]), answered, content)

    async def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port)
        lines = [
            f"{method} {path} HTTP/1.1",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        self.streams[1].write("\r\n".join([*lines, "", ""]).encode() + body)
        await self.streams[1].drain()

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


@dataclass
class Truth:
    """What one generation has to answer."""

    answers: dict[str, dict[str, float]] = field(default_factory=dict)  # query -> key -> cosine, best first
    vectors: dict[str, Any] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)  # id -> content hash
    pictures: dict[str, bytes] = field(default_factory=dict)  # key -> its bytes


def truth_of(index: Index) -> Truth:
    truth = Truth()
    for query in QUERIES:
        truth.vectors[query] = index.embed(query)
        found = index.search(truth.vectors[query], KNOWN, exact=True)
        truth.answers[query] = dict(zip(found.keys, found.scores.tolist(), strict=True))
        rows = found.rows[:PICTURES]
        ids, hashes = index.generation.ids(rows).tolist(), index.generation.content_hashes(rows)
        truth.hashes |= {number: content.hex() for number, content in zip(ids, hashes, strict=True)}
    for key, picture in zip(found.keys[:PICTURES], index.generation.pictures(rows), strict=True):
        source = open_source(picture.source.kind, picture.source.root, split=picture.source.options.get("split"))
        truth.pictures[key] = source.read(picture.locator, picture.size_bytes)
    return truth


@dataclass
class Load:
    """What the clients do, and what came of it."""

    host: str
    port: int
    truths: dict[int, Truth]
    upload_bytes_max: int = 20 << 20
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    search_s: list[float] = field(default_factory=list)

    async def client(self, seed: int, until_s: float) -> None:
        dice, client = random.Random(seed), Client(self.host, self.port)
        acts: list[tuple[int, Callable[[Client, random.Random], Awaitable[None]]]] = [
            (60, self.search), (12, self.thumb), (8, self.embed), (6, self.by_picture), (5, self.bad_upload),
            (2, self.oversized), (4, self.leave), (3, self.unknown),
        ]  # fmt: skip
        while time.monotonic() < until_s:
            (act,) = dice.choices([act for _, act in acts], [weight for weight, _ in acts])
            try:
                await act(client, dice)
            except (OSError, asyncio.IncompleteReadError) as error:
                client.close()
                # A server that refuses a body closes; then a write or read of the rest may fail.
                self.counts[f"connection lost in {act.__name__}"] += 1
                if act.__name__ not in ("oversized", "leave"):
                    self.wrong.append(f"{act.__name__}: {error!r}")
        client.close()

    async def check(self, reply: Reply, allowed: tuple[int, ...], what: str) -> bool:
        self.counts[f"{what} {reply.status}"] += 1
        if reply.status == 503 and "retry-after" in reply.headers:
            await asyncio.sleep(float(reply.headers["retry-after"]))
            return False
        if reply.status not in allowed:
            self.wrong.append(f"{what}: {reply.status} {reply.body[:200]!r}")
            return False
        return reply.status == 200

    async def search(self, client: Client, dice: random.Random) -> None:
        query, start_s = dice.choice(QUERIES), time.perf_counter()
        reply = await client.ask("GET", f"/api/search?q={quote(query)}&k={K}")
        self.search_s.append(time.perf_counter() - start_s)
        if await self.check(reply, (200,), "search"):
            page = json.loads(reply.body)
            self.compare(page, self.truths[page["generation"]].answers[query], f"{query!r}")

    def compare(self, page: Mapping[str, Any], truth: Mapping[str, float], what: str) -> None:
        """By score: of rows that are equally near, any may be shown."""
        expected = sorted(truth.values(), reverse=True)[:K]
        hits = [(hit["key"], hit["score"]) for hit in page["hits"]]
        known = all(abs(truth.get(key, math.inf) - score) <= SCORE_TOLERANCE for key, score in hits)
        near = len(hits) == len(expected) and all(
            abs(score - wanted) <= SCORE_TOLERANCE for (_, score), wanted in zip(hits, expected, strict=True)
        )
        if not (known and near):
            self.wrong.append(
                f"{what} in generation {page['generation']}: {hits[:3]}, expected {list(truth.items())[:3]}"
            )

    async def thumb(self, client: Client, dice: random.Random) -> None:
        number = dice.choice([number for truth in self.truths.values() for number in truth.hashes])
        path = dice.choice([f"/thumb/{number}?size=256", f"/thumb/{number}?size=512", f"/picture/{number}"])
        reply = await client.ask("GET", path)
        if await self.check(reply, (200, 404), "thumb"):  # 404: not in the other generation
            known = {truth.hashes.get(number) for truth in self.truths.values()}
            if reply.headers["etag"].strip('"').partition("-")[0] not in known or reply.body[:2] != b"\xff\xd8":
                self.wrong.append(f"{path}: {reply.headers}")

    async def embed(self, client: Client, dice: random.Random) -> None:
        queries = dice.sample(QUERIES, dice.randint(1, 12))
        body = json.dumps({"input": queries}).encode()
        reply = await client.ask("POST", "/v1/embeddings", body, content_type="application/json")
        if await self.check(reply, (200,), "embed"):
            got = np.array([one["embedding"] for one in json.loads(reply.body)["data"]])
            truth = next(iter(self.truths.values()))
            if np.abs(got - np.stack([truth.vectors[query] for query in queries])).max() > SCORE_TOLERANCE:
                self.wrong.append(f"embedding of {queries}")

    async def by_picture(self, client: Client, dice: random.Random) -> None:
        key, encoded = dice.choice([item for truth in self.truths.values() for item in truth.pictures.items()])
        body, headers = _form(encoded)
        reply = await client.ask("POST", f"/api/search?k={K}", body, **headers)
        if await self.check(reply, (200,), "picture"):
            page = json.loads(reply.body)
            here = key in self.truths[page["generation"]].pictures
            if here and page["hits"][0]["score"] < 1 - SCORE_TOLERANCE:
                self.wrong.append(f"picture {key}: {page['hits'][0]}")

    async def bad_upload(self, client: Client, dice: random.Random) -> None:
        encoded = dice.choice(list(next(iter(self.truths.values())).pictures.values()))
        broken = dice.choice(
            [b"", b"no picture", encoded[: len(encoded) // 2], dice.randbytes(3000), encoded[:2] * 999]
        )
        body, headers = _form(broken)
        if dice.random() < 0.3:
            body = body[: len(body) // 2]
        await self.check(await client.ask("POST", "/api/search", body, **headers), (400, 413, 415, 422), "bad upload")

    async def oversized(self, client: Client, dice: random.Random) -> None:
        head = {"host": self.host, "content-length": str(self.upload_bytes_max + 1)}
        await client.send("POST", "/api/search", b"x" * 1000, head)
        assert client.streams is not None
        lines = (await client.streams[0].readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        client.close()
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        await self.check(Reply(int(lines[0].split()[1]), headers, b""), (413,), "oversized")

    async def leave(self, client: Client, dice: random.Random) -> None:
        body, headers = _form(next(iter(next(iter(self.truths.values())).pictures.values())))
        await client.send("POST", "/api/search", body, {"host": self.host, "content-length": str(len(body)), **headers})
        await asyncio.sleep(dice.random() * 0.02)
        client.close()
        self.counts["left"] += 1

    async def unknown(self, client: Client, dice: random.Random) -> None:
        path = dice.choice(
            ["/nope", "/api/search?q=a&nope=1", "/thumb/999999999", "/thumb/../../etc/passwd", "/api/search"]
        )
        await self.check(await client.ask("GET", path), (400, 404), "unknown")


def _form(encoded: bytes) -> tuple[bytes, dict[str, str]]:
    head = b'--x\r\ncontent-disposition: form-data; name="picture"; filename="a"\r\n\r\n'
    return head + encoded + b"\r\n--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}
