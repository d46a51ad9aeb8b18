"""Pictures in tar and parquet files: each is found with its metadata, read alone, and no break passes in silence."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web_server import WebServer, serving

from pipeline.batch import BadImage, Item
from pipeline.sources import Container, Damage, Entry, Source, SourceError, open_source, parquet_rows
from pipeline.sources.containers import ContainerSource
from pipeline.sources.keys import decode_key


def tar_bytes(members: dict[str, bytes], style: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def picture(name: str) -> bytes:
    return b"\xff\xd8\xff picture " + name.encode() * 100 + b"\xff\xd9"


def entries(source: Source, known: set[str] = frozenset()) -> list[Entry]:  # type: ignore[assignment]
    def unchanged(uri: str, size_bytes: int, etag: str) -> bool:
        return uri.rpartition("/")[2] in known

    assert isinstance(source, ContainerSource)
    return list(source.list_by(source.list_container, unchanged))  # without the child process of `list`


def items(source: Source) -> dict[str, Item]:
    return {entry.key: entry for entry in entries(source) if isinstance(entry, Item)}


MEMBERS = {
    "0.jpg": picture("0"),
    "0.json": b'{"url": "u", "width": 5, "exif": {}, "ok": true}',
    "0.txt": "a käse\n".encode(),
    "1.cls": b"7\n",
    "1.png": picture("1"),
    "1.mp3": b"sound",
    "deep/2.left.jpg": picture("2l"),
    "deep/2.left.json": b'{"side": "left"}',
    "deep/2.json": b'{"both": 1}',
    "deep/2.right.jpg": picture("2r"),
    "deep/2.right.json": b"{no json",
}


def test_tar_members_have_their_metadata_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a%.tar").write_bytes(tar_bytes(MEMBERS))
    source = pickle.loads(pickle.dumps(open_source("tar", str(tmp_path))))
    found = items(source)
    prefix = "train/a%25.tar/"
    assert {key.removeprefix(prefix): dict(item.metadata) for key, item in found.items()} == {
        "0.jpg": {"url": "u", "width": 5, "ok": 1, "caption": "a käse"},
        "1.png": {"label": "7"},
        "deep/2.left.jpg": {"side": "left", "both": 1},
        "deep/2.right.jpg": {"both": 1},
    }
    for key, item in found.items():
        assert source.read(item.locator, item.size_bytes) == MEMBERS[key.removeprefix(prefix)]
    last = entries(source)[-1]
    assert isinstance(last, Container)
    assert (last.key_prefix, last.unchanged) == (prefix, False)


def test_tar_names_survive(tmp_path: Path) -> None:
    names = ["🐦\n.jpg", "x" * 300 + ".jpg", "%41.jpg", "bad\udcff.jpg", "./a.jpg", "x/" * 120 + "é.jpg"]
    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        (tmp_path / "a.tar").write_bytes(tar_bytes({name: picture("x") for name in names}, style))
        found = items(open_source("tar", str(tmp_path / "a.tar")))
        wanted = [b"a.tar/" + name.encode(errors="surrogateescape") for name in names]
        assert [decode_key(key) for key in found] == wanted


def test_an_unchanged_container_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar_bytes(MEMBERS))
    source = open_source("tar", str(tmp_path))
    seen = {entry.uri: (entry.size_bytes, entry.etag) for entry in entries(source) if isinstance(entry, Container)}
    (tmp_path / "b.tar").write_bytes(tar_bytes(dict(reversed(MEMBERS.items()))))
    again = list(source.list(lambda uri, size_bytes, etag: seen[uri] == (size_bytes, etag)))
    assert again[0] == Container(f"{tmp_path}/a.tar", "a.tar/", *seen[f"{tmp_path}/a.tar"], unchanged=True)
    assert [entry.key for entry in again[1:3] if isinstance(entry, Item)][:1] == ["b.tar/deep/2.right.jpg"]
    assert isinstance(again[-1], Container)
    assert not again[-1].unchanged


def test_a_tar_cut_anywhere_gives_what_came_before_and_tells(tmp_path: Path) -> None:
    whole = tar_bytes({f"{number}.jpg": picture(str(number)) for number in range(5)}, tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    source = open_source("tar", str(path))
    ends = [item.size_bytes + int(item.locator.split(b":")[1]) for item in items(source).values()]
    content_end = len(whole.rstrip(b"\0")) + 1
    for cut in [*range(0, content_end, 256), content_end, *ends]:
        path.write_bytes(whole[:cut])
        found = entries(source)
        assert any(isinstance(entry, Damage) for entry in found), cut
        assert not any(isinstance(entry, Container) for entry in found)
        assert sum(isinstance(entry, Item) for entry in found) >= sum(end <= cut for end in ends)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"no tar" * 200, "ReadError"),
        (tar_bytes({"a.jpg": b"1"}) + tar_bytes({"b.jpg": b"2"}), "several tars joined"),
        (tar_bytes({"a.jpg": b"1"})[:1024] + b"torn header " * 100, "no valid header at byte 1024"),
        (tar_bytes({"a.jpg": b"1"})[:1024], "end mark"),
    ],
)
def test_a_damaged_tar_says_how(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "b.tar").write_bytes(tar_bytes({"a.jpg": b"1"}))
    found = entries(open_source("tar", str(tmp_path)))
    damage = next(entry for entry in found if isinstance(entry, Damage))
    assert damage.key_prefix == "a.tar/"
    assert words in damage.words
    assert isinstance(found[-1], Container)


def test_a_name_that_comes_twice_is_told(tmp_path: Path) -> None:
    joined = tar_bytes({"a.jpg": b"old"}).rstrip(b"\0").ljust(1024, b"\0") + tar_bytes({"a.jpg": b"new"})
    (tmp_path / "a.tar").write_bytes(joined)
    damage, item = entries(open_source("tar", str(tmp_path)))
    assert isinstance(damage, Damage)
    assert isinstance(item, Item)
    assert damage.words == "member 'a.jpg' comes twice; only the first counts"
    assert open_source("tar", str(tmp_path)).read(item.locator, item.size_bytes) == b"old"


def test_members_with_endless_names_are_told_once_and_cost_nothing_else(tmp_path: Path) -> None:
    """Names of 250 KB, which tar can hold: every one of them would stand in the manifest and in each index."""
    endless = {f"{'deep/' * 50_000}{number}.jpg": picture("x") for number in range(20)}
    odd = {f"{number}.{'odd' * 80_000}": b"0" for number in range(20)}
    longest = "n" * 4092 + ".jpg"
    (tmp_path / "a.tar").write_bytes(tar_bytes({"0.jpg": picture("0"), **endless, **odd, longest: picture("1")}))
    *found, damage, last = entries(open_source("tar", str(tmp_path)))
    assert isinstance(damage, Damage)
    assert "has a name of more than 4,096 bytes (and 19 more)" in damage.words
    assert len(damage.words) < 300
    assert [entry.key for entry in (*found, last) if isinstance(entry, Item)] == ["a.tar/0.jpg", f"a.tar/{longest}"]


def test_what_a_log_says_of_a_tar_does_not_grow_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {f"{number}.{'odd' * 1_000}{number}": b"0" for number in range(50)}
    (tmp_path / "a.tar").write_bytes(tar_bytes({"0.jpg": picture("0"), "._0.jpg": b"a fork", "0.mp3": b"0", **members}))
    with caplog.at_level(logging.INFO):
        assert list(items(open_source("tar", str(tmp_path)))) == ["a.tar/0.jpg"]
    assert "left out, neither pictures nor their metadata in a.tar: 50 other, 1 jpg, 1 mp3" in caplog.text


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_container_replaced_since_it_was_listed_is_a_read_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"

    def fill(name: str) -> None:
        if kind == "tar":
            path.write_bytes(tar_bytes({"a.jpg": picture(name)}))
        else:
            pq.write_table(pa.table({"image": [picture(name)]}), path)

    fill("0")
    source = open_source(kind, str(path))
    [item] = items(source).values()
    fill("1")
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadImage, match=r"read_error.*changed since it was listed"):
        source.read(item.locator, item.size_bytes)
    with pytest.raises(BadImage, match="read_error: locator"):
        source.read(b"nonsense", 1)


def test_roots_of_containers(tmp_path: Path) -> None:
    for name in ("x/a-0.tar", "x/a-1.tar", "x/b.tar", "[c].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar_bytes({"0.jpg": b"0"}))
    expected = {
        "": ["[c].tar", "x/a-0.tar", "x/a-1.tar", "x/b.tar"],
        "/x": ["a-0.tar", "a-1.tar", "b.tar"],
        "/x/b.tar": ["b.tar"],
        "/[c].tar": ["[c].tar"],
        "/*/a-*.tar": ["x/a-0.tar", "x/a-1.tar"],
    }
    for end, names in expected.items():
        assert list(items(open_source("tar", f"{tmp_path}{end}"))) == [f"{name}/0.jpg" for name in names], end
    for end, words in {"/no.tar": "is not there", "/y*.tar": "quoted glob", "/a.tar.gz": "gunzip"}.items():
        with pytest.raises(SourceError, match=words):
            open_source("tar", f"{tmp_path}{end}")


def test_what_lies_beside_containers_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(MEMBERS))
    for name in ("1.jpg", "2.JPG", "table.csv", "x.what", "._a.tar", ".b.tar", "c.tar.part"):
        (tmp_path / name).write_bytes(b"0")
    with caplog.at_level(logging.INFO):
        assert len(items(open_source("tar", str(tmp_path)))) == 4
    assert "left out, no .tar files by their names: 2 tar, 2 jpg, 1 part, 1 csv, 1 other" in caplog.text


def test_containers_behind_urls(tmp_path: Path) -> None:
    content = tar_bytes(MEMBERS)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/shards/a.tar", content)
    memory.pipe_file("/shards/cut.tar", content[:3000])
    with serving(WebServer({"shards/a.tar": content})) as server:
        for root in ("memory://shards", "memory://shards/*.tar", f"{server.url}/shards/a.tar"):
            source = open_source("tar", root)
            whole = {key: item for key, item in items(source).items() if key.startswith("a.tar/")}
            assert list(whole) == ["a.tar/0.jpg", "a.tar/1.png", "a.tar/deep/2.left.jpg", "a.tar/deep/2.right.jpg"]
            for key, item in whole.items():
                assert source.read(item.locator, item.size_bytes) == MEMBERS[key.removeprefix("a.tar/")]
        assert any(asked and asked.startswith("bytes=") for _, asked in server.requests)
    assert any(isinstance(entry, Damage) for entry in entries(open_source("tar", "memory://shards")))


def hugging_face(rows: int) -> pa.Table:
    images = [{"bytes": picture(str(row)), "path": f"{row}.jpg"} for row in range(rows)]
    return pa.table(
        {
            "image": images, "text": [f"t{row}" for row in range(rows)], "score": [row / 2 for row in range(rows)],
            "tags": [["a"]] * rows, "day": [date(2021, 5, 4)] * rows, "vector": [[0.0] * 4] * rows,
        }
    )  # fmt: skip


def test_parquet_rows_have_metadata_and_bytes(tmp_path: Path) -> None:
    pq.write_table(hugging_face(500), tmp_path / "a.parquet", row_group_size=200)
    source = pickle.loads(pickle.dumps(open_source("parquet", str(tmp_path))))
    found = list(items(source).items())
    assert [key for key, _ in found] == [f"a.parquet/{row:08d}" for row in range(500)]
    assert dict(found[3][1].metadata) == {"path": "3.jpg", "text": "t3", "score": 1.5, "day": "2021-05-04"}
    assert 0 < found[3][1].size_bytes < 2000
    for row, (_, item) in enumerate(found):
        assert source.read(item.locator, item.size_bytes) == picture(str(row))


def test_parquet_rows_in_any_order_and_from_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(hugging_face(600), tmp_path / "a.parquet", row_group_size=300)
    source = open_source("parquet", str(tmp_path))
    found = list(enumerate(items(source).values()))
    opened: list[object] = []
    rewind = parquet_rows._Cursor._rewind
    monkeypatch.setattr(parquet_rows._Cursor, "_rewind", lambda cursor: (opened.append(cursor), rewind(cursor))[1])

    def right(numbered: tuple[int, Item]) -> bool:
        return source.read(numbered[1].locator, 0) == picture(str(numbered[0]))

    generator = random.Random(0)
    nearly_in_order = sorted(found, key=lambda numbered: numbered[0] + generator.uniform(0, 40))
    assert all(right(numbered) for numbered in nearly_in_order)
    assert len(opened) == 2  # each row group is decoded once, although decode threads overtake each other
    generator.shuffle(found)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, found[:60]))


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"png": [b"x"], "mask": [b"y"]}, "png"),
        ({"blob": [b"x"], "caption": ["t"]}, "blob"),
        ({"photo": [{"bytes": b"x", "path": None}], "bytes": [b"y"]}, "photo.bytes"),
        ({"Image": pa.array([b"x"], pa.large_binary())}, "Image"),
    ],
)
def test_the_picture_column_is_found(columns: dict[str, Any], wanted: str) -> None:
    assert parquet_rows.bytes_column(pa.table(columns).schema) == wanted


@pytest.mark.parametrize(
    ("columns", "words"), [({"a": [1]}, "no column .* a: int64"), ({"a": [b""], "b": [b""]}, "several columns")]
)
def test_a_parquet_file_without_pictures_says_what_it_has(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pq.write_table(hugging_face(1), tmp_path / "b.parquet")
    damage, item, container = entries(open_source("parquet", str(tmp_path)))
    assert isinstance(damage, Damage)
    assert damage.key_prefix == "a.parquet/"
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(damage.words)
    assert (type(item), type(container)) == (Item, Container)


def test_empty_rows_and_broken_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", None, b""]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    source = open_source("parquet", str(tmp_path))
    first, nothing, zero = items(source).values()
    assert (source.read(first.locator, 1), source.read(zero.locator, 1)) == (b"x", b"")
    with pytest.raises(BadImage, match="empty: row 1"):
        source.read(nothing.locator, 1)
    assert [entry.key_prefix for entry in entries(source) if isinstance(entry, Damage)] == ["b.parquet/"]


def test_parquet_behind_a_url() -> None:
    buffer = io.BytesIO()
    pq.write_table(hugging_face(10), buffer)
    with serving(WebServer({"a.parquet": buffer.getvalue()})) as server:
        source = open_source("parquet", f"{server.url}/a.parquet")
        found = list(items(source).values())
        encoded = [source.read(item.locator, item.size_bytes) for item in found]
    assert encoded == [picture(str(row)) for row in range(10)]


def test_json_of_a_shard_is_plain_data(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"a.jpg": b"1", "a.json": json.dumps(["no", "record"]).encode()}))
    [item] = items(open_source("tar", str(tmp_path))).values()
    assert dict(item.metadata) == {}
