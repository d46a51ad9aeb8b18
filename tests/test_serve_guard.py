"""Promise: the service is safe as it comes: who may not ask gets nothing, and the token is nowhere to be found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from pictures import write_folder
from runs import index as run_index
from runs import run_module
from service import PLENTY, Service, running

from pipeline.config import UsageError
from pipeline.serve.errors import Refusal
from pipeline.serve.guard import BURST_S, Shares, client_of
from pipeline.serve.settings import parse_serve
from pipeline.serve.tokens import is_session, new_session, session_cookie

TOKEN = "correct-horse-battery-staple"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def index(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    write_folder(folder / "photos", 6)
    assert run_index(folder / "photos", folder / "index", "--model", tiny_model).code == 0
    return folder / "index"


@pytest.fixture(scope="module")
def guarded(index: Path) -> Iterator[Service]:
    with running(index, *PLENTY, env={"NIGHTJAR_TOKEN": TOKEN}) as started:
        yield started
        assert started.stop() == 0
        assert TOKEN not in started.log


@pytest.fixture
def browser(guarded: Service) -> Iterator[httpx2.Client]:
    """Without the cookies of other tests."""
    with httpx2.Client(base_url=guarded.url, timeout=30) as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/api/search?q=a", "/api/about", "/api/similar/1", "/thumb/1", "/picture/1", "/metrics", "/openapi.json",
             "/app.js", "/v1/embeddings", "/nope"],
)  # fmt: skip
def test_nothing_is_told_without_the_token(browser: httpx2.Client, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"cookie": f"nightjar={TOKEN}"}):
        assert browser.get(path, headers=headers).status_code == 401
    assert browser.get(path, headers=BEARER).status_code != 401


def test_openais_clients_are_told_in_their_form(browser: httpx2.Client) -> None:
    error = browser.post("/v1/embeddings", json={"input": "a"}).json()["error"]
    assert error["message"].startswith("a token is needed")
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")


def test_a_browser_logs_in_once(browser: httpx2.Client) -> None:
    assert browser.get("/").headers["location"] == "login"
    assert "<form" in browser.get("/login").text
    assert browser.get("/style.css").headers["content-type"] == "text/css; charset=utf-8", "which makes it readable"
    assert browser.post("/login", data={"token": "wrong"}).status_code == 401
    reply = browser.post("/login", data={"token": TOKEN})
    cookie = reply.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    assert TOKEN not in cookie
    assert browser.get("/api/about").status_code == 200


def test_a_link_with_the_token_becomes_a_cookie(browser: httpx2.Client) -> None:
    assert browser.get("/", params={"token": "wrong"}).status_code == 401
    reply = browser.get("/", params={"token": TOKEN, "q": "a bird"})
    assert (reply.status_code, reply.headers["location"]) == (303, "./?q=a+bird")
    assert browser.get("/api/about").status_code == 200


def test_a_session_ends_and_cannot_be_made_up() -> None:
    cookie = session_cookie(TOKEN, https=True).partition(";")[0]
    assert is_session(cookie, TOKEN)
    assert not is_session(cookie, TOKEN + "x")
    end, _, proof = new_session(TOKEN).partition(".")
    assert not is_session(f"nightjar={int(end) + 1}.{proof}", TOKEN)
    for odd in ("", "nightjar", "nightjar=", "nightjar=.", "nightjar=9" * 99, 'nightjar="\\377.\\377"'):
        assert not is_session(odd, TOKEN)


def test_an_old_session_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cookie = f"nightjar={new_session(TOKEN)}"
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 31 * 24 * 3600)
    assert not is_session(cookie, TOKEN)


def test_the_token_is_in_no_other_process(guarded: Service, browser: httpx2.Client) -> None:
    browser.get("/thumb/1", headers=BEARER)
    children = psutil.Process(guarded.process.pid).children()
    assert children
    for child in children:
        assert TOKEN not in str(child.environ()) + str(child.cmdline())


def test_health_needs_no_token_and_tells_nothing(browser: httpx2.Client) -> None:
    assert browser.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("path", ["/", "/healthz", "/nope", "/api/search?q=a", "/thumb/1", "/api/search"])
def test_every_answer_carries_the_security_headers(browser: httpx2.Client, path: str) -> None:
    for headers in ({}, BEARER):
        reply = browser.get(path, headers=headers)
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "unsafe-inline" not in reply.headers["content-security-policy"]
        assert reply.headers["content-security-policy"].startswith("default-src 'self'")
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert "server" not in reply.headers


@pytest.mark.parametrize(
    ("args", "words"),
    [(["--address", "0.0.0.0"], "a token is needed"), (["--address", "::"], "a token is needed"),
     (["--address", "example.org"], "a token is needed"), (["--queue", "0"], "above 0"),
     (["--token-file", "/nonexistent"], "cannot be read")],
)  # fmt: skip
def test_it_does_not_start_open_to_others(args: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_serve(["--out", "none", *args])


def test_a_port_that_is_none_is_a_usage_error(index: Path) -> None:
    for port in ("80000", "-1"):
        ran = run_module("pipeline.serve", "--out", index, f"--port={port}")
        assert ran.code == 2
        assert ran.stderr.endswith(f"error: --port is {port}; it is 1 to 65535, or 0 for a free one\n")


def test_a_short_token_is_refused_and_not_repeated(index: Path) -> None:
    ran = run_module("pipeline.serve", "--out", index, env={"NIGHTJAR_TOKEN": "sesame"})
    assert ran.code == 2
    assert "sesame" not in ran.stderr


def test_a_foreign_name_of_the_loopback_is_not_answered(index: Path) -> None:
    with running(index, "--rate", "5") as service:
        assert service.http.get("/api/about", headers={"host": "evil.example"}).status_code == 421
        assert service.http.get("/api/about", headers={"host": "localhost:1"}).status_code == 200
        answers = [service.http.get("/api/search?q=a&k=1") for _ in range(150)]
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1


def test_shares_refill_and_are_each_clients_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    shares = Shares(10)
    shares.take("a", 10 * BURST_S)
    with pytest.raises(Refusal, match="try again in 1 s"):
        shares.take("a", 1)
    shares.take("b", 1)
    now_s += 0.2
    shares.take("a", 2)
    with pytest.raises(Refusal):
        shares.take("a", 1)
    now_s += 60
    shares.take("a", 1000)  # more than a full bucket: possible, and owed
    now_s += 50
    with pytest.raises(Refusal):
        shares.take("a", 1)


def test_an_ipv6_client_is_its_network() -> None:
    assert client_of({"client": ("2001:db8::1", 1)}) == client_of({"client": ("2001:db8::ffff", 1)})
    assert client_of({"client": ("10.0.0.1", 1)}) != client_of({"client": ("10.0.0.2", 1)})
