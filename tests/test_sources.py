"""Every picture of a folder, local or remote, comes up once, in the same order, under a name that survives."""

from __future__ import annotations

import csv
import json
import logging
import os
import pickle
import resource
import shutil
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch import BadImage, Item
from pipeline.sources import Damage, Source, SourceError, open_source, place_local, place_remote
from pipeline.sources.keys import clean_metadata, decode_key, encode_key

JPEG = b"\xff\xd8\xff\xe0 not decoded here \xff\xd9"
NASTY = [
    "a b (1).jpg", "café_鸟.jpg", "cafe\u0301.jpg", "🐦‍⬛.jpg", "ציפור.jpg", "line1\nline2.jpg", "a\tb\r.jpg",
    "100%25 %s.jpg", "%41.jpg", "A.jpg", "a.jpg", "[a]*?.jpg", "-rf.jpg", ".hidden.jpg", "a#b?c=d.jpg",
    "back\\slash.jpg", "x" * 251 + ".jpg",
]  # fmt: skip
NASTY_BYTES = [*map(str.encode, NASTY), b"bad\xff\xfename.jpg", b"caf\xe9.jpg", b"\xed\xa0\x80.jpg"]


def listed(source: Source) -> list[Item]:
    entries = list(source.list(lambda uri, size_bytes, etag: False))
    assert all(isinstance(entry, Item) for entry in entries), entries
    return [entry for entry in entries if isinstance(entry, Item)]


def keys(root: Path | str) -> list[str]:
    return [item.key for item in listed(open_source("folder", str(root)))]


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)


@given(st.binary(), st.binary())
def test_keys_are_utf8_reversible_and_differ_when_names_do(one: bytes, other: bytes) -> None:
    key = encode_key(one)
    assert b"\0" not in key.encode()
    assert decode_key(key) == one
    assert (encode_key(other) == key) == (other == one)


@given(st.text(st.characters(exclude_characters="%\0", exclude_categories=["Cs"])))
def test_a_name_that_is_valid_utf8_stays_as_it_is(name: str) -> None:
    assert encode_key(name.encode()) == name


@pytest.mark.parametrize("key", ["%", "%4", "%zz.jpg", "%ff"])
def test_a_key_we_cannot_have_made_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="0-9A-F"):
        decode_key(key)


def test_metadata_keeps_scalars_in_what_the_store_can_hold() -> None:
    record = {"a": True, "b": 2**70, "c": 1.5, "d": "x\0y\ud800", "e": None, "f": [1], "g": {"h": 1}, "i": b"x"}
    assert clean_metadata(record) == {"a": 1, "b": str(2**70), "c": 1.5, "d": "xy?"}


def test_nasty_names_survive(tmp_path: Path) -> None:
    for name in NASTY_BYTES:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(JPEG + name)
    source = pickle.loads(pickle.dumps(open_source("folder", str(tmp_path))))
    items = listed(source)
    assert sorted(decode_key(item.key) for item in items) == sorted(NASTY_BYTES)
    assert all(source.read(item.locator, item.size_bytes) == JPEG + decode_key(item.key) for item in items)
    json.dumps([item.key for item in items], ensure_ascii=False).encode()


def test_names_of_the_recipe_survive(shared_data: Path, tmp_path: Path) -> None:
    recipe = json.loads((shared_data / "bad" / "make_names.json").read_bytes())
    wanted = {case["target"].encode(): case["source"] for case in recipe["files"]}
    wanted |= {bytes.fromhex(case["target_hex"]): case["source"] for case in recipe["raw_byte_names_hex"]}
    for name, origin in wanted.items():
        shutil.copyfile(os.fsencode(shared_data / origin), os.fsencode(tmp_path) + b"/" + name)
    source = open_source("folder", str(tmp_path))
    items = listed(source)
    assert sorted(decode_key(item.key) for item in items) == sorted(wanted)
    for item in items:
        assert source.read(item.locator, item.size_bytes) == (shared_data / wanted[decode_key(item.key)]).read_bytes()


def test_every_picture_of_the_manifest_is_listed_and_no_table(shared_data: Path) -> None:
    with (shared_data / "MANIFEST.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = {f"{part}/{key}" for part in ("photo", "size", "format", "bad") for key in keys(shared_data / part)}
    assert len(found) > 900
    assert found == {row["path"] for row in rows if row["expect"] != "data"}


def test_order_is_that_of_the_raw_names_whatever_the_file_system_does(tmp_path: Path) -> None:
    names = ["b/1.jpg", "a.jpg", "a/2.jpg", "a-1.jpg", "a/1/x.jpg", "a0.jpg", "Z.jpg", "dir.jpg/é.jpg"]
    write(tmp_path, *names)
    assert keys(tmp_path) == sorted(names, key=str.encode)
    again = tmp_path / "again"
    write(again, *reversed(names))
    assert keys(again) == sorted(names, key=str.encode)


def test_label_is_the_folder_a_picture_lies_in(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "birds/wren/b.jpg")
    assert [dict(item.metadata) for item in listed(open_source("folder", str(tmp_path)))] == [{}, {"label": "wren"}]


def test_sidecars_are_left_out_by_content_not_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "picture.txt", ".hidden.jpg", "noext", "strange.xyz", "a.jpg", ".git/objects.jpg")
    for name in ("a.json", "a.txt", "films.MP4", ".DS_Store", "._a.jpg"):
        (tmp_path / name).write_bytes(b"BM is no picture either")
    (tmp_path / "bad.jpg").write_bytes(b"no picture, but it says so: the ledger shall tell")
    with caplog.at_level(logging.INFO):
        assert keys(tmp_path) == [".hidden.jpg", "a.jpg", "bad.jpg", "noext", "picture.txt", "strange.xyz"]
    assert "2 hidden" in caplog.text
    assert "left out 1 hidden folders\n" in caplog.text  # and nothing about pipes, of which there are none


def test_what_is_still_being_written_is_no_picture_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whole pictures by their bytes, but whoever writes them has not given them their names."""
    unfinished = ["a.jpg.part", "b.PARTIAL", "c.jpg.crdownload", "d.tmp", "e.jpg~", "f.jpg.filepart", "g.incomplete"]
    hidden = [".a.jpg.Xa93kQ", ".syncthing.b.jpg.tmp", "._c.jpg", ".nfs0001"]  # rsync, Syncthing, macOS, NFS
    write(tmp_path, *unfinished, *hidden, "part.jpg", "tmp/d.jpg", "~e.jpg", ".f.jpg", "partial", "g.part.jpg")
    with caplog.at_level(logging.INFO):
        assert keys(tmp_path) == [".f.jpg", "g.part.jpg", "part.jpg", "partial", "tmp/d.jpg", "~e.jpg"]
    assert "7 unfinished, 4 hidden" in caplog.text
    (tmp_path / "a.jpg.part").rename(tmp_path / "a.jpg")
    assert "a.jpg" in keys(tmp_path), "the next run finds it whole"


def test_an_index_below_the_root_is_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.jpg", "idx/lock", "idx/manifest.sqlite", "idx/manifest.sqlite-wal", "idx/generations/1/ann.npy")
    write(tmp_path, "b/generations/c.jpg", "b/manifest.sqlite.jpg")
    with caplog.at_level(logging.INFO):
        assert keys(tmp_path) == ["a.jpg", "b/generations/c.jpg", "b/manifest.sqlite.jpg"]
    assert caplog.text.count("it is an index") == 1
    assert f"{tmp_path}/idx/ is left out" in caplog.text


def test_links_pipes_and_circles(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, "real.jpg", "sub/deep/x.jpg")
    write(tmp_path, "elsewhere/y.jpg")
    (root / "link.jpg").symlink_to("real.jpg")
    (root / "nowhere.jpg").symlink_to("gone.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "sub" / "up").symlink_to(root)
    (root / "out").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "pipe.jpg")
    source = open_source("folder", str(root))
    items = {item.key: item for item in listed(source)}
    assert sorted(items) == ["link.jpg", "nowhere.jpg", "out/y.jpg", "real.jpg", "self.jpg", "sub/deep/x.jpg"]
    assert source.read(items["link.jpg"].locator, len(JPEG)) == JPEG
    for name, words in {b"nowhere.jpg": "No such file", b"self.jpg": "symbolic links", b"pipe.jpg": "regular"}.items():
        with pytest.raises(BadImage, match=f"read_error.*{words}"):
            source.read(name, 0)


def test_a_deep_tree_needs_few_descriptors(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "x.jpg").write_bytes(JPEG)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        assert keys(tmp_path) == ["d/" * 300 + "x.jpg"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_unreadable_folder_is_told_and_the_rest_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a/1.jpg", "b%/1.jpg", "b%/sub/2.jpg", "c/1.jpg")
    names_in = place_local._names_in

    def refuse(path: bytes) -> list[bytes]:
        if path.endswith(b"b%/"):
            raise PermissionError(13, "Permission denied")
        return names_in(path)

    monkeypatch.setattr(place_local, "_names_in", refuse)
    entries = list(open_source("folder", str(tmp_path)).list(lambda *_: False))
    assert [entry.key if isinstance(entry, Item) else entry for entry in entries] == [
        "a/1.jpg", Damage("b%25/", "Permission denied"), "c/1.jpg",
    ]  # fmt: skip


def test_a_file_that_changes_while_it_is_read_is_a_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.jpg")
    source = open_source("folder", str(tmp_path))
    read_at = place_local._read_at

    def read_and_grow(file: int, start: int, count: int) -> bytes:
        encoded = read_at(file, start, count)
        with (tmp_path / "a.jpg").open("ab") as growing:
            growing.write(b"more")
        return encoded

    assert source.read(b"a.jpg", 0) == JPEG
    monkeypatch.setattr(place_local, "_read_at", read_and_grow)
    with pytest.raises(BadImage, match="read_error: the file changed"):
        source.read(b"a.jpg", len(JPEG))


def test_vanished_empty_and_huge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.jpg")
    (tmp_path / "empty.jpg").touch()
    source = open_source("folder", str(tmp_path))
    assert source.read(b"empty.jpg", 0) == b""
    with pytest.raises(BadImage, match="read_error: No such file"):
        source.read(b"gone.jpg", 10)
    monkeypatch.setattr(place_local, "MAX_READ_BYTES", 5)
    with pytest.raises(BadImage, match="too_large"):
        source.read(b"a.jpg", 1)


def test_no_permission_is_a_read_error(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    (tmp_path / "a.jpg").chmod(0)
    if os.access(tmp_path / "a.jpg", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(BadImage, match="read_error: Permission denied"):
        open_source("folder", str(tmp_path)).read(b"a.jpg", 1)


def test_an_empty_folder_is_allowed_and_a_missing_one_is_not(tmp_path: Path) -> None:
    assert keys(tmp_path) == []
    with pytest.raises(SourceError, match="below it"):
        open_source("folder", str(tmp_path / "no"))


@pytest.mark.parametrize(
    ("kind", "root", "words"),
    [
        ("flickr", "x", "one of folder, inat2021, parquet, tar"),
        ("folder", None, "needs --root"),
        ("folder", "nowhere://x", "Protocol not known"),
        ("folder", os.fsdecode(b"/tmp/\xff"), "UTF-8"),
    ],
)
def test_what_cannot_be_opened_says_why(kind: str, root: str | None, words: str) -> None:
    with pytest.raises(SourceError, match=words) as raised:
        open_source(kind, root)
    assert "\n" not in str(raised.value)


def test_split_and_download_belong_to_inat2021(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--split"):
        open_source("folder", str(tmp_path), split="val")
    with pytest.raises(SourceError, match="--download"):
        open_source("folder", str(tmp_path), download=True)


@pytest.fixture
def memory_root() -> str:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    for name in ("b/1.jpg", "a.jpg", "a/2.jpg", "a/2.txt", "100%.jpg", ".cache/x.jpg"):
        memory.pipe_file(f"/pile/{name}", JPEG + name.encode())
    return "memory://pile"


def test_a_remote_folder_gives_the_same_keys_as_a_local_one(memory_root: str, tmp_path: Path) -> None:
    write(tmp_path, "b/1.jpg", "a.jpg", "a/2.jpg", "100%.jpg")
    source = pickle.loads(pickle.dumps(open_source("folder", memory_root)))
    items = listed(source)
    assert [item.key for item in items] == keys(tmp_path) == ["100%25.jpg", "a.jpg", "a/2.jpg", "b/1.jpg"]
    assert source.read(items[2].locator, items[2].size_bytes) == JPEG + b"a/2.jpg"
    with pytest.raises(BadImage, match="read_error"):
        source.read(b"gone.jpg", 3)
    with pytest.raises(BadImage, match="23 were listed"):
        source.read(items[2].locator, 23)
    with pytest.raises(SourceError, match="below it"):
        open_source("folder", "memory://no-such")


def test_a_remote_change_of_equal_size_changes_the_etag(memory_root: str) -> None:
    source = open_source("folder", memory_root)
    before = listed(source)
    assert before == listed(source)
    fsspec.filesystem("memory").pipe_file("/pile/a.jpg", JPEG + b"A.jpg")
    changed = [new.key for old, new in zip(before, listed(source), strict=True) if old != new]
    assert changed == ["a.jpg"]


def test_a_server_without_etags_means_reading_again(memory_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place_remote, "_EVIDENCE", ("ETag",))
    source = open_source("folder", memory_root)
    assert all(old.etag != new.etag for old, new in zip(listed(source), listed(source), strict=True))


def test_a_remote_folder_that_fails_is_told(memory_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type(fsspec.filesystem("memory"))
    ls = memory.ls

    def refuse(self: object, path: str, **options: object) -> object:
        if path.endswith("/a"):
            raise RuntimeError("throttled")
        return [*ls(self, path, **options), {"name": path, "size": 0, "type": "file"}]  # as S3 lists a folder's marker

    source = open_source("folder", memory_root)
    monkeypatch.setattr(memory, "ls", refuse)
    entries = list(source.list(lambda *_: False))
    assert Damage("a/", "RuntimeError: throttled") in entries
    assert [entry.key for entry in entries if isinstance(entry, Item)] == ["100%25.jpg", "a.jpg", "b/1.jpg"]


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    [item] = listed(open_source("folder", f"file://{tmp_path}/"))
    assert (item.size_bytes, item.mtime_ns) == (len(JPEG), (tmp_path / "a.jpg").stat().st_mtime_ns)
