"""Promise: it lasts. Queues are bounded, whoever leaves frees the place, generations change under requests unseen."""

from __future__ import annotations

import asyncio
import email
import json
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import uvicorn
from pictures import noisy_jpeg, write_folder
from runs import index as run_index
from runs import run_module
from service import PLENTY, running
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from pipeline.serve import connections, decoders
from pipeline.serve.batcher import BUDGET_S, ROWS_MAX, Batcher
from pipeline.serve.decoders import Decoders
from pipeline.serve.errors import Refusal
from pipeline.serve.lifeline import Lifeline
from pipeline.serve.metrics import Metrics
from pipeline.serve.settings import ServeConfig, parse_serve


@pytest.fixture(scope="module")
def two_nights(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with two generations, the second without a third of the pictures."""
    folder = tmp_path_factory.mktemp("nights")
    paths = write_folder(folder / "photos", 120)
    assert run_index(folder / "photos", folder / "index", "--model", tiny_model).code == 0
    for path in paths[::3]:
        path.rename(folder / path.name)
    assert run_index(folder / "photos", folder / "index", "--max-deleted", "100", "--model", tiny_model).code == 0
    for path in paths[::3]:
        (folder / path.name).rename(path)
    return folder / "index"


def test_under_load_every_answer_is_right(two_nights: Path, tmp_path: Path) -> None:
    """The ten-second version of the figure in docs/benchmarks."""
    args = ("--index", two_nights, "--clients", 40, "--seconds", 10, "--out", tmp_path)
    ran = run_module("pipeline.bench.service", *args)
    result = json.loads((tmp_path / "serve.json").read_text())
    assert result["wrong"] == 0, result["first_wrong"]
    assert result["exit"] == 0, ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    assert result["switches"] >= 3
    assert result["counts"]["search 200"] > 50


def copy_of(index: Path, tmp_path: Path) -> Path:
    shutil.copytree(index, tmp_path / "index", symlinks=True)
    return tmp_path / "index"


def point_at(index: Path, number: int) -> None:
    (index / "next").symlink_to(f"generations/{number}")
    (index / "next").rename(index / "current")


def wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    until_s = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until_s, "it did not happen"
        time.sleep(0.05)


def test_old_generations_are_let_go(two_nights: Path, tmp_path: Path) -> None:
    index = copy_of(two_nights, tmp_path)
    with running(index, *PLENTY) as service:
        process = psutil.Process(service.process.pid)
        service.http.get("/api/search?q=a")
        held = []
        for turn in range(8):
            number = 1 + turn % 2
            point_at(index, number)
            wait_for(lambda number=number: service.http.get("/api/about").json()["generation"] == number)
            service.http.get("/api/search?q=a")
            held.append((len(os.listdir(f"/proc/{process.pid}/fd")), process.num_threads()))
        assert held[-1][0] <= held[1][0] + 2, held
        assert held[-1][1] <= held[1][1] + 3, held


def test_a_generation_that_cannot_be_opened_changes_nothing(two_nights: Path, tmp_path: Path) -> None:
    index = copy_of(two_nights, tmp_path)
    shutil.copytree(index / "generations" / "1", index / "generations" / "3", symlinks=True)
    (index / "generations" / "3" / "generation.json").write_text("{}")
    with running(index, *PLENTY) as service:
        point_at(index, 3)
        wait_for(lambda: "nightjar_serve_generation_behind 1.0" in service.http.get("/metrics").text)
        assert service.http.get("/api/search?q=a").json()["generation"] == 2
        assert "generation 2 goes on being shown" in service.log
        point_at(index, 1)
        wait_for(lambda: service.http.get("/api/search?q=a").json()["generation"] == 1, 40)


def test_sigterm_answers_what_is_open_and_exits_with_0(two_nights: Path) -> None:
    body = b'{"input": ["a bird", "a tree"]}'
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    with running(two_nights, *PLENTY) as service:
        url = httpx2.URL(service.url)
        clients = [socket.create_connection((url.host, url.port or 0), timeout=30) for _ in range(12)]
        for client in clients:
            client.sendall(head + body[:9])
        wait_for(lambda: "nightjar_serve_questions_in_hand 12.0" in service.http.get("/metrics").text)
        service.process.terminate()
        wait_for(lambda: socket.socket().connect_ex((url.host, url.port or 0)) != 0)
        for client in clients:
            client.sendall(body[9:])
        assert [client.recv(12) for client in clients] == [b"HTTP/1.1 200"] * 12
        for client in clients:
            client.close()
        assert service.process.wait(30) == 0


def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    monkeypatch.setattr(connections.Connection, "limit", 3)

    async def main() -> None:
        settings = uvicorn.Config(slow_app(0.6, []), http=connections.Connection, log_config=None)
        settings.load()
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: connections.Connection(settings, state, {}), "127.0.0.1", 0
        )
        port = server.sockets[0].getsockname()[1]
        silent, _ = await asyncio.open_connection("127.0.0.1", port)
        slow, to_slow = await asyncio.open_connection("127.0.0.1", port)
        to_slow.write(b"GET / HTTP/1.1\r\nhost: ")
        busy, to_busy = await asyncio.open_connection("127.0.0.1", port)
        to_busy.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await asyncio.sleep(0.1)
        fourth, _ = await asyncio.open_connection("127.0.0.1", port)
        refused = await fourth.read()
        head, _, body = refused.partition(b"\r\n\r\n")
        status, _, lines = head.partition(b"\r\n")
        headers = email.message_from_bytes(lines)
        assert status.startswith(b"HTTP/1.1 503")
        assert "too many connections" in json.loads(body)["error"]
        assert (headers["content-length"], headers["retry-after"]) == (str(len(body)), "1")
        assert headers["x-content-type-options"] == "nosniff", "as every other answer"
        async with asyncio.timeout(5):
            assert await silent.read() == b""
            assert await slow.read() == b""
            assert (await busy.readline()).startswith(b"HTTP/1.1 200")  # an answer may take as long as it takes
        server.close()

    asyncio.run(main())


# ---- back-pressure, without a network --------------------------------------------------------------------------------


def config(*args: str) -> ServeConfig:
    return parse_serve(["--out", "none", *args])


async def request(
    app: Any, body: bytes = b"", *, leave: asyncio.Event | None = None, path: str = "/api/search", **headers: str
) -> list[Message]:
    sent: list[Message] = []
    todo: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if todo:
            return todo.pop()
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    named = {"content-length": str(len(body)), **{name.replace("_", "-"): text for name, text in headers.items()}}
    scope = {
        "type": "http", "path": path, "method": "POST", "state": {},
        "headers": [(name.encode(), text.encode()) for name, text in named.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


def slow_app(seconds: float, log: list[str]) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        log.append("answered")
        await JSONResponse({})(scope, receive, send)

    return app


def status(sent: list[Message]) -> int:
    return int(sent[0]["status"]) if sent else 0


def test_what_is_too_much_is_told_at_once() -> None:
    async def main() -> None:
        log: list[str] = []
        app = Lifeline(slow_app(0.2, log), config("--queue", "3"), Metrics())
        replies = await asyncio.gather(*(request(app) for _ in range(8)))
        assert sorted(map(status, replies)) == [200] * 3 + [503] * 5
        refused = next(sent for sent in replies if status(sent) == 503)
        assert (b"retry-after", b"1") in refused[0]["headers"]
        assert status(await request(app)) == 200  # the places are free again

    asyncio.run(main())


def test_a_deadline_ends_the_work() -> None:
    async def main() -> None:
        log: list[str] = []
        app = Lifeline(slow_app(30, log), config("--deadline", "0.2"), Metrics())
        sent = await request(app, path="/v1/embeddings")
        assert status(sent) == 503
        error = json.loads(sent[1]["body"])["error"]
        assert "before the deadline" in error["message"]
        assert error["type"] == "server_error"
        app = Lifeline(slow_app(30, log), config(), Metrics())
        assert status(await request(app, x_timeout_ms="50")) == 503
        assert status(await request(app, x_timeout_ms="soon")) == 400
        assert log == ["cancelled", "cancelled"]

    asyncio.run(main())


def test_who_leaves_frees_the_place() -> None:
    async def main() -> None:
        log: list[str] = []
        app, leave = Lifeline(slow_app(30, log), config("--queue", "1"), Metrics()), asyncio.Event()
        left = asyncio.create_task(request(app, leave=leave))
        await asyncio.sleep(0.05)
        assert status(await request(app)) == 503
        leave.set()
        assert await left == []
        assert log == ["cancelled"]
        app._app = slow_app(0, log)
        assert status(await request(app)) == 200

    asyncio.run(main())


def test_uploads_in_hand_are_bounded_in_bytes() -> None:
    async def main() -> None:
        app = Lifeline(slow_app(0.2, []), config("--upload-mb", "1"), Metrics())
        replies = await asyncio.gather(*(request(app, b"x" * (1 << 20)) for _ in range(14)))
        assert sorted(map(status, replies)) == [200] * 12 + [503] * 2
        assert status(await request(app, b"x" * ((1 << 20) + 1))) == 413
        assert status(await request(app, transfer_encoding="chunked")) == 411

    asyncio.run(main())


# ---- batches ---------------------------------------------------------------------------------------------------------


class Computer:
    """Rows are numbers; a negative one breaks its run."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.runs: list[list[int]] = []
        self.seconds = seconds

    def __call__(self, rows: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float16]]:
        self.runs.append(list(rows))
        time.sleep(self.seconds)
        if min(rows) < 0:
            raise ValueError("negative")
        return np.array([[row, row] for row in rows], np.float16)


def test_rows_of_many_requests_share_runs_and_come_back_to_their_own() -> None:
    async def main() -> None:
        computer = Computer()
        batcher = Batcher("test", computer, lambda rows, seconds: None)
        asked = [list(range(10 * number, 10 * number + number % 4 + 1)) for number in range(20)]
        answers = await asyncio.gather(*(batcher(rows) for rows in asked))
        for rows, emb_nd in zip(asked, answers, strict=True):
            assert emb_nd[:, 0].tolist() == rows
        assert len(computer.runs) < len(asked)
        assert max(map(len, computer.runs)) <= ROWS_MAX

    asyncio.run(main())


def test_a_lone_query_waits_for_nobody_and_not_behind_a_long_request() -> None:
    async def main() -> None:
        computer = Computer()
        batcher = Batcher("test", computer, lambda rows, seconds: None)
        long = asyncio.create_task(batcher(list(range(200))))
        await asyncio.sleep(0.005)
        await batcher([777])
        assert not long.done()
        assert sum(map(len, computer.runs)) < 100
        assert len(await long) == 200

    asyncio.run(main())


def test_a_run_keeps_to_the_budget_from_the_first_one_on() -> None:
    async def main() -> None:
        took_s: list[float] = []
        per_row = lambda rows: (time.sleep(0.02 * len(rows)), np.zeros((len(rows), 2), np.float16))[1]  # noqa: E731
        batcher = Batcher("test", per_row, lambda rows, seconds: took_s.append(seconds))
        assert (await batcher(list(range(40)))).shape == (40, 2)
        assert max(took_s) < 1.5 * BUDGET_S
        assert len(took_s) < 20, "and no shorter than needed"

    asyncio.run(main())


def test_a_cancelled_request_is_not_computed_and_an_error_is_its_own_runs() -> None:
    async def main() -> None:
        computer = Computer()
        batcher = Batcher("test", computer, lambda rows, seconds: None)
        first = asyncio.create_task(batcher([1]))
        await asyncio.sleep(0.005)
        cancelled = asyncio.create_task(batcher([2, 3]))
        await asyncio.sleep(0)
        cancelled.cancel()
        await first
        with pytest.raises(ValueError, match="negative"):
            await batcher([-1])
        assert (await batcher([4])).tolist() == [[4, 4]]
        assert computer.runs == [[1], [-1], [4]]

    asyncio.run(main())


# ---- decoders --------------------------------------------------------------------------------------------------------


def decoder_children() -> list[psutil.Process]:
    """Of this process, which may have children of other tests."""
    return [child for child in psutil.Process().children() if "pipeline.serve.decoder_process" in child.cmdline()]


def test_a_decoder_that_dies_or_hangs_costs_one_picture(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    from engines.spec import find_artifact

    pre, ended = find_artifact(str(tiny_model)).spec.preprocess, []
    monkeypatch.setattr(decoders, "PICTURE_S", 1.0)

    async def main() -> None:
        pool = Decoders(1, ended.append)
        encoded = noisy_jpeg(3)
        assert (await pool.pixels(encoded, pre)).shape == (3, pre.size, pre.size)
        (worker,) = decoder_children()
        worker.suspend()
        with pytest.raises(Refusal, match="within 1 s"):
            await pool.pixels(encoded, pre)
        await pool.pixels(encoded, pre)
        decoder_children()[0].kill()
        with pytest.raises(Refusal, match="SIGKILL"):
            await pool.pixels(encoded, pre)
        await pool.pixels(encoded, pre)
        assert ended == ["timeout", "crash"]
        pool.close()

    asyncio.run(main())
