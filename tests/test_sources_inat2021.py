"""iNaturalist 2021: every picture with its taxa and licence, and a download that ends right or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
from web_server import WebServer, serving

from pipeline.batch import Item
from pipeline.sources import SourceError, inat_json, open_source
from pipeline.sources.download import ARCHIVES, Archive, DownloadError, download_inat2021

JPEG = b"\xff\xd8\xff\xe0 not decoded here \xff\xd9"
CHUKAR = "00023_Animalia_Chordata_Aves_Galliformes_Phasianidae_Alectoris_chukar"
DIRECTORY_TAXA = {
    "label": "Alectoris chukar", "species": "Alectoris chukar", "category_id": 23, "kingdom": "Animalia",
    "phylum": "Chordata", "class": "Aves", "order": "Galliformes", "family": "Phasianidae", "genus": "Alectoris",
}  # fmt: skip


def coco(*names: str, split: str = "train_mini") -> dict[str, Any]:
    images = [
        {"id": number, "width": 5, "height": 4, "file_name": f"{split}/{name}", "license": 1, "rights_holder": "Zoë",
         "date": "2013-07-16 00:00:00+00:00", "latitude": 38.5, "longitude": None, "location_uncertainty": -80}
        for number, name in enumerate(names, 7)
    ]  # fmt: skip
    category = {
        "id": 23, "name": "Alectoris chukar", "common_name": "Chukar", "supercategory": "Birds", "kingdom": "Animalia",
        "phylum": "Chordata", "class": "Aves", "order": "Galliformes", "family": "Phasianidae", "genus": "Alectoris",
        "specific_epithet": "chukar", "image_dir_name": CHUKAR,
    }  # fmt: skip
    return {
        "info": {"year": 2021}, "images": images, "categories": [category],
        "annotations": [{"id": image["id"], "image_id": image["id"], "category_id": 23} for image in images],
        "licenses": [{"id": 1, "name": "CC BY", "url": "https://creativecommons.org/by"}],
    }  # fmt: skip


def tree(root: Path, *names: str, split: str = "train_mini", table: object = None) -> str:
    for name in names:
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEG + name.encode())
    if table is not None:
        (root / f"{split}.json").write_text(json.dumps(table))
    return str(root)


def rows(root: str, split: str | None = None) -> dict[str, dict[str, Any]]:
    entries = list(open_source("inat2021", root, split=split).list(lambda *_: False))
    assert all(isinstance(entry, Item) for entry in entries), entries
    keys = [entry.key for entry in entries if isinstance(entry, Item)]
    assert keys == sorted(keys)
    return {entry.key: dict(entry.metadata) for entry in entries if isinstance(entry, Item)}


def test_birds_have_taxa_and_licences(shared_data: Path) -> None:
    found = rows(str(shared_data / "photo" / "birds_cc0"))
    assert len(found) == 55
    for key, row in found.items():
        assert row["genus"] in key
        assert {"species", "common_name", "family", "license", "rights_holder"} <= row.keys()


def test_the_json_gives_every_column(tmp_path: Path) -> None:
    root = tree(tmp_path, f"{CHUKAR}/a.jpg", table=coco(f"{CHUKAR}/a.jpg"))
    assert rows(root) == {
        f"train_mini/{CHUKAR}/a.jpg": {
            **DIRECTORY_TAXA, "common_name": "Chukar", "supercategory": "Birds", "image_id": 7, "license": "CC BY",
            "license_url": "https://creativecommons.org/by", "rights_holder": "Zoë", "latitude": 38.5,
            "date": "2013-07-16 00:00:00+00:00",
        }
    }  # fmt: skip


def test_disk_and_json_may_differ_but_not_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = [f"{CHUKAR}/{name}.jpg" for name in ("z", "b", "0")]
    root = tree(tmp_path, f"{CHUKAR}/a.jpg", f"{CHUKAR}/b.jpg", "odd/c.jpg", table=coco(*named))
    found = rows(root)
    assert [key.removeprefix("train_mini/") for key in found] == [f"{CHUKAR}/a.jpg", f"{CHUKAR}/b.jpg", "odd/c.jpg"]
    only_on_disk, in_both, odd = found.values()
    assert only_on_disk["common_name"] == "Chukar"
    assert "license" not in only_on_disk
    assert in_both["license"] == "CC BY"
    assert odd == {"label": "odd"}
    assert f"names 2 pictures that are not there, such as train_mini/{CHUKAR}/0.jpg" in caplog.text
    assert "lacks 2 pictures" in caplog.text


def test_without_json_the_folder_names_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, f"{CHUKAR}/a.jpg", "00023_Aves_chukar/b.jpg", "x_1_2_3_4_5_6_7/c.jpg", split="val")
    assert list(rows(root, "val").values()) == [
        DIRECTORY_TAXA, {"label": "00023_Aves_chukar"}, {"label": "x_1_2_3_4_5_6_7"},
    ]  # fmt: skip
    assert "val.json is not there" in caplog.text


def test_public_test_is_flat_and_has_no_labels(tmp_path: Path) -> None:
    table = coco("1.jpg", split="public_test")
    del table["annotations"]
    root = tree(tmp_path, "1.jpg", "2.jpg", split="public_test", table=table)
    first, second = rows(root, "public_test").values()
    assert first["rights_holder"] == "Zoë"
    assert "label" not in first
    assert second == {}


@pytest.mark.parametrize("window", [1, 3, 64, 1 << 20])
def test_records_of_a_long_json_are_those_of_a_short_one(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"number": 123456, **coco("é/1.jpg", "2.jpg"), "empty": [], "text": 'a"]}\\', "numbers": [1, 22, -3.5e7]}
    monkeypatch.setattr(inat_json, "READ_BYTES", window)
    for text in (json.dumps(table, ensure_ascii=False, indent=1), json.dumps(table, separators=(",", ":"))):
        found: dict[str, Any] = {name: [] for name, value in table.items() if isinstance(value, list)}
        for section, record in inat_json.records(io.BytesIO(text.encode())):
            if isinstance(table[section], list):
                found[section].append(record)
            else:
                found[section] = record
        assert found == table


def test_a_broken_json_is_an_error_and_no_loss_of_metadata(tmp_path: Path) -> None:
    root = tree(tmp_path, f"{CHUKAR}/a.jpg")
    text = json.dumps(coco(f"{CHUKAR}/a.jpg"))
    for broken in ("", "[]", "{", text[:-1], text[: len(text) // 2], text.replace('"id": 7', '"id": 7 7'), text[1:]):
        (tmp_path / "train_mini.json").write_text(broken)
        with pytest.raises(SourceError, match="take it away"):
            rows(root)


def test_a_torn_record_does_not_pull_the_file_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inat_json, "LONGEST_VALUE", 1000)
    monkeypatch.setattr(inat_json, "READ_BYTES", 100)
    file = io.BytesIO(b'{"images": [{"id": "' + b"x" * 100_000)
    with pytest.raises(ValueError, match="no JSON value begins with"):
        list(inat_json.records(file))
    assert file.tell() < 2000


def test_a_missing_root_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTJAR_DATA", str(tmp_path / "here"))
    with pytest.raises(SourceError) as raised:
        open_source("inat2021", None, split="val")
    for words in (f"{tmp_path}/here/val/<category>", "--download", "val.tar.gz (8.4GB)", "non-commercial", "forbid"):
        assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    source = open_source("inat2021", None, download=True)
    assert (source.root, dict(source.options)) == (str(tmp_path / "here"), {"split": "train_mini"})
    with pytest.raises(SourceError, match="train, train_mini, val, public_test"):
        open_source("inat2021", str(tmp_path), split="test")


def gzipped_tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


PICTURES = gzipped_tar(**{f"val/{CHUKAR}/{number}.jpg": JPEG + bytes(range(256)) * number for number in range(20)})
TABLE = gzipped_tar(**{"val.json": json.dumps(coco(f"{CHUKAR}/0.jpg", split="val")).encode()})


def fetch(server: WebServer, root: Path, pictures: bytes = PICTURES) -> None:
    archives = {
        "val": (
            Archive("val.tar.gz", "val", hashlib.md5(pictures).hexdigest(), "tiny", 1.05),
            Archive("val.json.tar.gz", "val.json", hashlib.md5(TABLE).hexdigest(), "tiny", 10.0),
        )
    }
    download_inat2021(str(root), "val", base_url=server.url, archives=archives, first_wait_s=0.001)


def both(**options: Any) -> WebServer:
    return WebServer({"val.tar.gz": PICTURES, "val.json.tar.gz": TABLE}, **options)


def test_a_download_is_complete_and_done_once(tmp_path: Path) -> None:
    with serving(both()) as server:
        fetch(server, tmp_path)
        assert len(rows(str(tmp_path), "val")) == 20
        asked = len(server.requests)
        fetch(server, tmp_path)
        assert len(server.requests) == asked == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"val", "val.json", ".val.tar.gz.md5", ".val.json.tar.gz.md5"}


def test_a_broken_line_is_resumed(tmp_path: Path) -> None:
    third = len(PICTURES) // 3
    with serving(both(break_after=[len(TABLE), third, third, 0], refuse=[503])) as server:
        fetch(server, tmp_path)
    ranges = [asked for path, asked in server.requests if path == "val.tar.gz"]
    assert ranges == [None, f"bytes={third}-", f"bytes={2 * third}-", f"bytes={2 * third}-"]
    assert (tmp_path / "val" / CHUKAR / "19.jpg").read_bytes() == JPEG + bytes(range(256)) * 19


def test_a_server_without_ranges_starts_over(tmp_path: Path) -> None:
    with serving(both(ranges=False, break_after=[len(TABLE), len(PICTURES) // 2])) as server:
        fetch(server, tmp_path)
    assert len(rows(str(tmp_path), "val")) == 20


def test_a_stopped_download_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / ".val.tar.gz.part").write_bytes(PICTURES[:100])
    (tmp_path / ".val.json.tar.gz.part").write_bytes(TABLE)  # stopped between the last byte and the check
    (tmp_path / ".val.tar.gz.unpacking" / "val").mkdir(parents=True)
    with serving(both()) as server:
        fetch(server, tmp_path)
    assert ("val.tar.gz", "bytes=100-") in server.requests
    assert len(rows(str(tmp_path), "val")) == 20


def test_wrong_bytes_leave_nothing_behind(tmp_path: Path) -> None:
    with serving(both()) as server:
        server.files["val.tar.gz"] = PICTURES[:-1] + b"?"
        with pytest.raises(DownloadError, match="expected"):
            fetch(server, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"val.json", ".val.json.tar.gz.md5"}
    with pytest.raises(SourceError):
        open_source("inat2021", str(tmp_path), split="val")


def test_an_archive_that_leads_outside_is_refused(tmp_path: Path) -> None:
    evil = gzipped_tar(**{"val/a.jpg": JPEG, "../outside.jpg": JPEG})
    with serving(WebServer({"val.tar.gz": evil, "val.json.tar.gz": TABLE})) as server:
        with pytest.raises(DownloadError, match="outside"):
            fetch(server, tmp_path / "root", evil)
    assert not (tmp_path / "outside.jpg").exists()
    assert not (tmp_path / "root" / "val").exists()


def test_a_dead_server_a_missing_file_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(both(refuse=[404])) as server:
        with pytest.raises(DownloadError, match="404"):
            fetch(server, tmp_path)
        assert len(server.requests) == 1
        server.refuse[:] = [503] * 8
        with pytest.raises(DownloadError, match=r"503 .* 8 times in a row"):
            fetch(server, tmp_path)
    with pytest.raises(DownloadError, match="8 times in a row"):
        fetch(server, tmp_path)  # nobody listens any more
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with serving(both()) as server:
        with pytest.raises(DownloadError, match="GB free"):
            fetch(server, tmp_path)


def test_pictures_from_elsewhere_are_not_overwritten(tmp_path: Path) -> None:
    tree(tmp_path, f"{CHUKAR}/mine.jpg", split="val")
    with serving(both()) as server:
        with pytest.raises(DownloadError, match="move it away"):
            fetch(server, tmp_path)
    assert [path.name for path in (tmp_path / "val" / CHUKAR).iterdir()] == ["mine.jpg"]


def test_progress_counts_to_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, int, int]] = []
    archive = Archive("val.tar.gz", "val", hashlib.md5(PICTURES).hexdigest(), "tiny", 1.05)
    with serving(both()) as server, caplog.at_level(logging.INFO):
        download_inat2021(
            str(tmp_path), "val", base_url=server.url, archives={"val": (archive,)},
            progress=lambda name, done, total: seen.append((name, done, total)),
        )  # fmt: skip
    assert ("val.tar.gz", len(PICTURES), len(PICTURES)) in seen


def test_the_official_archives_are_the_published_ones() -> None:
    names = [archive.name for pair in ARCHIVES.values() for archive in pair]
    assert len(set(names)) == 8
    assert all(len(archive.md5) == 32 for pair in ARCHIVES.values() for archive in pair)
    assert ARCHIVES["train_mini"][0].md5 == "db6ed8330e634445efc8fec83ae81442"
