"""Promise: what the service answers is what the index holds, in every form a client may ask for it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from pictures import noisy_jpeg, write_folder
from PIL import Image
from runs import index as run_index
from service import PLENTY, Service, running
from starlette.requests import Request
from starlette.types import Message

from pipeline.search import Index, Where
from pipeline.serve import app
from pipeline.serve.forms import read_file, read_form
from pipeline.serve.metrics import Metrics
from pipeline.serve.parameters import SEARCH, SIMILAR
from pipeline.serve.settings import parse_serve

SCRIPT = b"<script>alert(1)</script><svg onload=alert(2)>"
HUGE_PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
)  # fmt: skip
NEAR = 2e-3  # of float16 vectors made in runs of one and of eight rows


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, 40)
    (folder / "polyglot.jpg").write_bytes(noisy_jpeg(900, 300, 200) + SCRIPT)
    (folder / "same.jpg").write_bytes(noisy_jpeg(900, 300, 200))  # other bytes, equal pixels
    turned = Image.open(io.BytesIO(noisy_jpeg(901, 400, 200)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(folder / "turned.jpg", exif=exif)
    return folder


@pytest.fixture(scope="module")
def index(photos: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "index"
    assert run_index(photos, out, "--model", tiny_model).code == 0
    return out


@pytest.fixture(scope="module")
def service(index: Path) -> Iterator[Service]:
    with running(index, *PLENTY) as started:
        yield started
        assert started.stop() == 0, started.log
        assert "Traceback" not in started.log, started.log


@pytest.fixture(scope="module")
def opened(index: Path) -> Iterator[Index]:
    with Index.open(index) as held:
        yield held


def id_of(opened: Index, key: str) -> int:
    rows = np.arange(opened.generation.rows)
    return int(opened.generation.ids(rows[[name == key for name in opened.generation.keys(rows)]])[0])


def test_a_text_gets_the_answer_of_the_index(service: Service, opened: Index) -> None:
    page = service.http.get("/api/search", params={"q": "a red bird", "k": 7, "offset": 3}).json()
    found = opened.search("a red bird", 10)
    assert [hit["key"] for hit in page["hits"]] == found.keys[3:]
    assert [hit["metadata"] for hit in page["hits"]] == found.metadata[3:]
    assert [hit["id"] for hit in page["hits"]] == opened.generation.ids(found.rows[3:]).tolist()
    np.testing.assert_allclose([hit["score"] for hit in page["hits"]], found.scores[3:], atol=NEAR)
    assert (page["generation"], page["total"], page["offset"]) == (opened.generation.number, opened.generation.rows, 3)


def test_filters_and_weights_are_those_of_the_index(service: Service, opened: Index) -> None:
    query, where = '"a bird" - 0.5 * key:"odd/00003.jpg"', Where(label="odd", key="*1.jpg")
    asked = {"q": query, "label": "odd", "key": "*1.jpg", "facets": "label", "k": 3, "offset": 1, "mmr": 0.5}
    page = service.http.get("/api/search", params=asked).json()
    found = opened.search(query, 3, offset=1, where=where, mmr=0.5)
    assert [hit["key"] for hit in page["hits"]] == found.keys
    np.testing.assert_allclose([hit["score"] for hit in page["hits"]], found.scores, atol=NEAR)
    np.testing.assert_allclose([hit["relevance"] for hit in page["hits"]], found.relevance, atol=0.05)
    assert page["total"] == found.total == 4
    assert page["facets"] == {"label": [["odd", 4]]}
    nothing = service.http.get("/api/search", params={"q": "a bird", "label": "evn"}).json()
    assert (nothing["total"], nothing["hits"]) == (0, [])
    assert "near it: even" in nothing["note"]
    about = service.http.get("/api/about").json()
    assert about["facets"] == opened.facet_fields == ["label"]
    assert about["filters"] == opened.filter_fields == ["label", "key"]


@pytest.mark.parametrize("mmr", [{}, {"mmr": 0.5}])
def test_more_like_this_is_narrowed_like_any_question(service: Service, opened: Index, mmr: dict[str, float]) -> None:
    """The picture that is the question is neither answered nor counted, whether it passes the filters or not."""
    number = id_of(opened, "odd/00003.jpg")
    for label, total in (("odd", 19), ("even", 20)):
        asked = {"label": label, "facets": "label", "k": 7, **mmr}
        pages = [service.http.get(f"/api/similar/{number}", params={**asked, "offset": at}).json() for at in (0, 7, 14)]
        keys = [hit["key"] for page in pages for hit in page["hits"]]
        assert (len(keys), len(set(keys))) == (total, total)
        assert all(key.startswith(f"{label}/") and key != "odd/00003.jpg" for key in keys)
        assert [page["total"] for page in pages] == [total] * 3
        assert pages[0]["facets"] == {"label": [[label, total]]}
    assert "near it: even" in service.http.get(f"/api/similar/{number}?label=evn").json()["note"]


@pytest.mark.parametrize("mmr", [None, 0.5])
def test_near_duplicates_come_as_one_answer(service: Service, opened: Index, mmr: float | None) -> None:
    """Every picture comes once over all pages."""
    asked = {"q": "a bird", "group": "true", "k": 2, **({} if mmr is None else {"mmr": mmr})}
    told: list[int] = []
    sizes: list[int] = []
    for offset in range(0, opened.generation.rows, 2):
        hits = service.http.get("/api/search", params={**asked, "offset": offset}).json()["hits"]
        found = opened.search("a bird", 2, offset=offset, group=True, mmr=mmr)
        groups = [[hit["id"], *hit["copies"]] for hit in hits]
        assert groups == [opened.generation.ids(rows).tolist() for rows in found.groups or []]
        told += [number for group in groups for number in group]
        sizes += map(len, groups)
    assert sorted(sizes) == [1] * (len(sizes) - 1) + [2]
    assert len(told) == len(set(told)) == opened.generation.rows
    alike = service.http.get(f"/api/similar/{told[0]}", params={"group": "true", "k": 100}).json()["hits"]
    assert sum(1 + len(hit["copies"]) for hit in alike) == opened.generation.rows - 1, "all but itself"
    assert "copies" not in service.http.get("/api/search", params={"q": "a bird"}).json()["hits"][0]


def test_no_upload_touches_the_disk() -> None:
    encoded = b"x" * 3_000_000
    body = b'--x\r\ncontent-disposition: form-data; name="picture"; filename="a"\r\n\r\n' + encoded + b"\r\n--x--\r\n"

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def main() -> None:
        scope = {"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=x")]}
        async with read_form(Request(scope, receive), len(body)) as form:
            assert form["picture"]._in_memory  # type: ignore[union-attr]
            assert await read_file(form, "picture") == encoded

    asyncio.run(main())


def test_a_threshold_leaves_out_what_is_below(service: Service) -> None:
    everything = service.http.get("/api/search", params={"q": "x", "k": 40}).json()["hits"]
    limit = everything[10]["score"]
    above = service.http.get("/api/search", params={"q": "x", "k": 40, "threshold": limit - 1e-6}).json()["hits"]
    assert above == [hit for hit in everything if hit["score"] >= limit - 1e-5]


def test_a_picture_finds_itself_and_more_like_it_finds_others(service: Service, photos: Path, opened: Index) -> None:
    encoded = (photos / "even" / "00006.jpg").read_bytes()
    found = service.http.post("/api/search", params={"k": 3}, files={"picture": encoded}).json()["hits"]
    assert found[0]["key"] == "even/00006.jpg"
    assert found[0]["score"] == pytest.approx(1, abs=NEAR)
    alike = service.http.get(f"/api/similar/{found[0]['id']}", params={"k": 41}).json()
    rows = opened.search(encoded, 42).keys
    assert [hit["key"] for hit in alike["hits"]] == [key for key in rows if key != "even/00006.jpg"]


@pytest.mark.parametrize(
    ("encoded", "status"),
    [(b"", 422), (b"hello", 415), (noisy_jpeg(1)[:900], 422), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
     (HUGE_PNG, 413)],
    ids=["empty", "text", "truncated", "svg", "10,000 megapixels"],
)
def test_what_is_no_whole_picture_is_refused_in_words(service: Service, encoded: bytes, status: int) -> None:
    reply = service.http.post("/api/search", files={"picture": encoded})
    assert reply.status_code == status
    assert len(reply.json()["error"]) > 10


@pytest.mark.parametrize(
    "path", ["/api/search", "/api/search?q=a&k=0", "/api/search?q=a&k=9999", "/api/search?q=a&offset=-1",
             "/api/search?q=a&colour=red", "/api/search?q=a&q=b", "/api/search?q=a&threshold=nan", "/thumb/1?size=9",
             "/api/search?q=a&date_from=soon", "/api/search?q=a&box=1,2",
             "/api/search?q=a&threshold=2", "/api/search?q=%20", "/api/search?q=a&mmr=2",
             "/api/search?q=a&taxon=Aves", "/api/search?q=a&facets=colour",
             '/api/search?q="a" b', '/api/search?q="a" - "a"', '/api/search?q=file:"/etc/passwd"',
             '/api/search?q="a"' + ' - "b"' * 16],
)  # fmt: skip
def test_a_question_that_is_misspelt_is_not_answered_otherwise(service: Service, path: str) -> None:
    reply = service.http.get(path)
    assert reply.status_code == 400, reply.text
    assert "error" in reply.json()


@pytest.mark.parametrize(("accept", "kind"), [("image/jpeg", "JPEG"), ("image/webp,*/*", "WEBP")])
def test_a_thumbnail_is_small_upright_and_known_again(service: Service, opened: Index, accept: str, kind: str) -> None:
    path = f"/thumb/{id_of(opened, 'turned.jpg')}?size=100"
    reply = service.http.get(path, headers={"accept": accept})
    picture = Image.open(io.BytesIO(reply.content))
    assert (reply.status_code, picture.format, picture.size) == (200, kind, (64, 128))
    again = service.http.get(path, headers={"accept": accept, "if-none-match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_no_byte_of_an_original_is_passed_on(service: Service, opened: Index) -> None:
    number = id_of(opened, "polyglot.jpg")
    for path in (f"/thumb/{number}?size=512", f"/picture/{number}"):
        reply = service.http.get(path)
        assert reply.headers["content-type"] == "image/jpeg"
        assert b"<s" not in reply.content
        assert Image.open(io.BytesIO(reply.content)).size == (300, 200)


@pytest.mark.parametrize(
    "path", ["/thumb/999999", "/thumb/../../etc/passwd", "/thumb/%2e%2e%2fetc%2fpasswd", "/picture/even/00000.jpg",
             "/page/app.js", "/..%2fapp.py", "/app.py", "//etc/passwd", "/thumb/9999999999999999999",
             "/thumb/99999999999999999999999999", f"/api/similar/{'9' * 5000}"],
)  # fmt: skip
def test_only_indexed_pictures_are_served(service: Service, path: str) -> None:
    assert service.http.get(path).status_code == 404


def test_a_picture_that_changed_or_left_is_not_shown(index: Path, photos: Path, opened: Index, tmp_path: Path) -> None:
    changed, gone = photos / "odd" / "00001.jpg", photos / "odd" / "00003.jpg"
    for path in (changed, gone):
        shutil.copy2(path, tmp_path / path.name)
    encoded = changed.read_bytes()
    changed.write_bytes(noisy_jpeg(1234) + bytes(len(encoded))[: max(0, len(encoded) - len(noisy_jpeg(1234)))])
    gone.unlink()
    try:
        with running(index) as service:
            for path in (changed, gone):
                reply = service.http.get(f"/thumb/{id_of(opened, f'odd/{path.name}')}")
                assert reply.status_code == 404, reply.content[:80]
    finally:
        for path in (changed, gone):
            shutil.copy2(tmp_path / path.name, path)


def test_embeddings_are_those_of_the_index_in_the_order_asked(service: Service, photos: Path, opened: Index) -> None:
    encoded = (photos / "even" / "00004.jpg").read_bytes()
    text64 = base64.b64encode(encoded).decode()
    inputs = ["a bird", f"data:image/jpeg;base64,{text64}", {"text": "a heron"}, {"image": text64}, *["x"] * 35]
    body = {"input": inputs, "model": "any", "encoding_format": "float"}
    floats = service.http.post("/v1/embeddings", json=body).json()["data"]
    packed = service.http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"]
    expected = [opened.embed(query) for query in ("a bird", encoded, "a heron", encoded, *["x"] * 35)]
    assert [row["index"] for row in floats] == list(range(39))
    np.testing.assert_allclose([row["embedding"] for row in floats], expected, atol=NEAR)
    unpacked = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in packed]
    np.testing.assert_allclose(unpacked, expected, atol=NEAR)
    form = service.http.post("/v1/embeddings", files={"picture": encoded}, data={"text": "a bird"}).json()["data"]
    rows = sorted((row["embedding"] for row in form), key=lambda row: abs(row[0] - float(expected[0][0])))
    np.testing.assert_allclose(rows, [expected[0], expected[1]], atol=NEAR)


@pytest.mark.parametrize(
    "body", [{}, {"input": []}, {"input": [[1, 2]]}, {"input": ["a"] * 300}, {"input": {"image": "http://127.0.0.1/"}},
             {"input": "a", "encoding_format": "int8"}, {"input": "a", "dimensions": 3}, {"input": " "}, [], "a",
             {"input": ["a bird", "half of a character: \ud800"]}, {"input": {"text": "\udfff"}}],
)  # fmt: skip
def test_a_wrong_embedding_request_is_told_as_openai_tells_it(service: Service, body: object) -> None:
    reply = service.http.post("/v1/embeddings", content=json.dumps(body))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert len(error["message"]) > 10
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)


def test_what_a_client_sends_as_null_is_left_out(service: Service) -> None:
    """And what OpenAI's own one sends besides, such as `user`, changes nothing."""
    body = {"input": "a bird", "encoding_format": None, "dimensions": None, "user": "somebody"}
    rows = [service.http.post("/v1/embeddings", json=one).json()["data"] for one in (body, {"input": "a bird"})]
    assert rows[0] == rows[1]


def test_the_description_is_made_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(app, "document", lambda: made.append(1) or {"paths": {}})
    service = app.Service(parse_serve(["--out", str(index)]), Metrics())
    replies = [asyncio.run(service.describe(Request({"type": "http"}))) for _ in range(3)]
    assert [reply.body for reply in replies] == [b'{"paths":{}}'] * 3
    assert len(made) == 1
    service.following.close()
    service.threads.close()
    service.decoders.close()


def test_each_engine_is_named_once_in_the_log(service: Service) -> None:
    assert [service.log.count(f"{tower} engine:") for tower in ("text", "vision")] == [1, 1]


def test_the_description_names_every_address_and_parameter(service: Service) -> None:
    paths = service.http.get("/openapi.json").json()["paths"]
    for path, call in paths.items():
        at = path.replace("{id}", "1")
        assert service.http.request("POST" if "get" not in call else "GET", at).status_code not in (404, 405, 500), path
    named = {one["name"] for one in paths["/api/search"]["get"]["parameters"] if one["in"] == "query"}
    assert named == {parameter.name for parameter in SEARCH}
    named = {one["name"] for one in paths["/api/similar/{id}"]["get"]["parameters"] if one["in"] == "query"}
    assert named == {parameter.name for parameter in SIMILAR}


def test_metrics_count_and_tell_no_question(service: Service) -> None:
    service.http.get("/api/search", params={"q": "mysecretquestion"})
    text = service.http.get("/metrics").text
    assert 'nightjar_serve_requests_total{code="200",route="api"}' in text
    assert "nightjar_serve_embedding_run_rows_bucket" in text
    assert "mysecretquestion" not in text + service.log


def test_the_page_and_about(service: Service, opened: Index) -> None:
    reply = service.http.get("/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    about = service.http.get("/api/about").json()
    assert (about["rows"], about["generation"]) == (opened.generation.rows, opened.generation.number)
    assert "/" not in json.dumps(about["sources"])  # no folder of this host
    assert service.http.get("/healthz").json() == {"status": "ok"}


def test_a_body_of_unknown_length_or_too_large_is_not_read(service: Service) -> None:
    assert service.http.post("/api/search", content=iter([b"x"])).status_code == 411
    with httpx2.Client(base_url=service.url) as http:
        reply = http.post("/api/search", content=b"x" * ((20 << 20) + 1))
    assert reply.status_code == 413
    assert "20,971,520" in reply.json()["error"]
