"""Hostile bytes, names, archives and tables: each ends as a row of the ledger or as damage, in bounded time and memory.

docs/security.md says what is hostile, what protects, and what does not.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace
from pictures import noisy_jpeg
from runs import index, quarantine, run_module, vectors_by_key

sys.path.insert(0, str(Path(__file__).parent / "faults"))

from fuzz import TARGETS, in_process

from pipeline.batch import Item
from pipeline.lanes import Board, Lane, LaneSpec
from pipeline.messages import (
    MESSAGE_BYTES_MAX,
    Broken,
    Chunk,
    Claim,
    Done,
    Lost,
    Message,
    Tick,
    Verdict,
    decode_order,
    encode,
    sayable,
)
from pipeline.sources import Damage, Entry, SourceError, open_source
from pipeline.sources.keys import MAX_FIELDS, MAX_TEXT, clean_metadata
from pipeline.sources.places import words_of
from pipeline.store import Outcome, PendingItem, ShardInfo

REPO = Path(__file__).resolve().parents[1]
BOMB_S, BOMB_MB = 20.0, 700  # of one picture on a busy host; the budget of all decoders is 448 MB
FUZZ_S = 1.0  # of each target; `make soak` takes longer

# ---- bytes ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, chunks: bytes = b"", packed: bytes = zlib.compress(bytes(16 * 49))) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def packed_zeros(size_bytes: int) -> bytes:
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(size_bytes >> 20)), packer.flush()])


def tiff(entries: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + rest


def grey_tiff(width: int, height: int, strips: int, *, compression: int = 1) -> list[tuple[int, int, int, int]]:
    shape = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]
    return [*shape, (273, 4, strips, 8), (278, 4, 1, max(1, height // strips)), (279, 4, strips, 256)]


def directory_that_repeats(tags: int, size_bytes: int) -> bytes:
    """A TIFF directory whose every tag claims the same bytes: `tags` times the size of the file in memory."""
    at = 10 + 12 * tags + 4
    return tiff([(700 + tag, 7, size_bytes, at) for tag in range(tags)], bytes(size_bytes))


def gif(width: int, height: int, frames: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6) + frame * frames + b"\x3b"


def jpeg_with(segment: bytes) -> bytes:
    jpeg = noisy_jpeg(1)
    return jpeg[:2] + segment + jpeg[2:]


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_2000(width: int, height: int, tile: int, components: int = 3) -> bytes:
    size = struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, tile, tile, 0, 0, components) + b"\7\1\1" * components
    code, quant = b"\0\0\0\1\0\5\4\4\0\0", b"\x40" * 17
    parts = ((b"\xff\x51", size), (b"\xff\x52", code), (b"\xff\x5c", quant))
    head = b"".join(name + struct.pack(">H", len(part) + 2) + part for name, part in parts)
    return b"\xff\x4f" + head + b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 14, 0, 1) + b"\xff\x93\xff\xd9"


def icon(width: int, height: int) -> bytes:
    bitmap = struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(100)
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(bitmap), 22) + bitmap


def bitmap_in_runs(width: int, height: int) -> bytes:
    runs = b"\0\2\xff\xff" * 40_000 + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + head + bytes(1024) + runs


BOMBS: dict[str, Callable[[], bytes]] = {
    "60,000 x 60,000 PNG": lambda: png(60_000, 60_000),
    "8,000 x 8,000 of nothing": lambda: png(8000, 8000, packed=packed_zeros(192 << 20)),
    "text of 256 MB": lambda: png(16, 16, chunk(b"zTXt", b"a\0\0" + packed_zeros(256 << 20))),
    "XMP of 256 MB": lambda: png(16, 16, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed_zeros(256 << 20))),
    "profile of 256 MB": lambda: png(16, 16, chunk(b"iCCP", b"a\0\0" + packed_zeros(256 << 20))),
    "EXIF that repeats itself": lambda: png(16, 16, chunk(b"eXIf", directory_that_repeats(5000, 60_000))),
    "two hundred thousand chunks": lambda: png(16, 16, chunk(b"tIME", b"1234567") * 200_000),
    "256 MB behind the pixels": lambda: png(16, 16, packed=packed_zeros(256 << 20)),
    "2^31 strips": lambda: tiff(grey_tiff(16, 67_000_000, 2**31 - 1)),
    "67 million strips": lambda: tiff(grey_tiff(1, 60_000_000, 60_000_000, compression=5), bytes(1000)),
    "a TIFF that repeats itself": lambda: directory_that_repeats(20_000, 1 << 20),
    "a TIFF of one huge tile": lambda: tiff(
        [*grey_tiff(16, 16, 1, compression=5)[:5], (322, 4, 1, 1 << 20), (323, 4, 1, 1 << 20), (324, 4, 1, 8)]
    ),
    "GIF of 65,535 squared": lambda: gif(65_535, 65_535, 1),
    "GIF of 100,000 frames": lambda: gif(7000, 7000, 100_000),
    "profile of 16 MB": lambda: jpeg_with(jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)) * 255),
    "EXIF of 4 MB": lambda: jpeg_with(
        jpeg_segment(0xE1, b"Exif\0\0" + directory_that_repeats(5000, 4000)[:65_000]) * 64
    ),
    "two million segments": lambda: jpeg_with(jpeg_segment(0xFE, b"") * 2_000_000),
    "JPEG 2000 in tiles of 4 billion": lambda: jpeg_2000(4900, 4900, 0xFFFFFFFF),
    "JPEG 2000 in tiles of 1": lambda: jpeg_2000(4900, 4900, 1),
    "JPEG 2000 of 16,384 components": lambda: jpeg_2000(1000, 1000, 1000, 16_384),
    "an icon of 20,000 x 8,000": lambda: icon(20_000, 8000),
    "runs over 64 Mpixel": lambda: bitmap_in_runs(8000, 8000),
    "a PPM without pixels": lambda: b"P6\n60000 60000\n255\n",
}

DECODE = """
import json, os, resource, sys, time, types
from pipeline.batch import BadImage
from pipeline.decode_cpu import decode
pre = types.SimpleNamespace(exact_pixels_max=64_000_000)
def one(path):
    encoded = open(path, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    start_s, start_mb = time.monotonic(), peak_mb()
    try:
        end = "decoded" + str(decode(encoded, pre).image_hwc.shape)
    except BadImage as bad:
        end = bad.failure.reason
    return {"end": end, "s": time.monotonic() - start_s, "mb": peak_mb() - start_mb}
def peak_mb():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
for path in sys.argv[1:]:
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print(json.dumps(one(path)), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(json.dumps({"end": "died", "s": 0, "mb": 0}), flush=True)
"""


def test_bombs_cost_little_time_and_memory(tmp_path: Path) -> None:
    """Decoded alone, each in a process of its own: an outcome of ours, in seconds, in the memory of a large photo."""
    paths = []
    for number, make in enumerate(BOMBS.values()):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DECODE, *map(str, paths)], capture_output=True, text=True, cwd=REPO
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(BOMBS), done.stderr[-2000:]
    for name, answer in zip(BOMBS, answers, strict=True):
        assert answer["end"] != "died", (name, done.stderr[-2000:])
        assert answer["s"] < BOMB_S, (name, answer)
        assert answer["mb"] < BOMB_MB, (name, answer)
    ends = {name: answer["end"] for name, answer in zip(BOMBS, answers, strict=True)}
    assert ends["60,000 x 60,000 PNG"] == ends["GIF of 65,535 squared"] == "too_large"
    assert ends["two million segments"] == "corrupt"


def test_no_memory_for_a_good_picture_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`too_large` would keep it out for ever; what the host lacks tonight is a read error, which every run retries."""
    from types import SimpleNamespace

    from pipeline import decode_cpu
    from pipeline.batch import BadImage

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    pre: Any = SimpleNamespace(exact_pixels_max=64_000_000)
    monkeypatch.setattr(decode_cpu.simplejpeg, "decode_jpeg", no_memory)
    monkeypatch.setattr(decode_cpu, "_rgb", no_memory)
    for encoded in (noisy_jpeg(1), png(16, 16)):
        with pytest.raises(BadImage) as bad:
            decode_cpu.decode(encoded, pre)
        assert bad.value.failure.reason == "read_error"


# ---- names, archives, tables ------------------------------------------------------------------------------------


def listed(kind: str, root: Path, **options: Any) -> list[Entry]:
    return list(open_source(kind, str(root), **options).list(lambda *_: False))


def keys(entries: list[Entry]) -> list[str]:
    return [entry.key for entry in entries if isinstance(entry, Item)]


def damages(entries: list[Entry]) -> str:
    return "; ".join(entry.words for entry in entries if isinstance(entry, Damage))


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, io.BytesIO]) -> None:
    with tarfile.open(path, "w") as archive:
        for info, content in members:
            archive.addfile(info, content)


def test_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    """A member's name is a label: its picture is read at an offset of the tar, whatever the name says."""
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"secret")
    root = tmp_path / "tars"
    root.mkdir()
    write_tar(
        root / "a.tar",
        member("../outside.jpg", b"one"), member(str(outside), b"two"), member("a/./b/../c.jpg", b"three"),
        member("link.jpg", type=tarfile.SYMTYPE, linkname=str(outside)),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="../outside.jpg"),
        member("device.jpg", type=tarfile.CHRTYPE), member("pipe.jpg", type=tarfile.FIFOTYPE),
        member("twice.jpg", b"4"), member("twice.jpg", b"5"),
    )  # fmt: skip
    source = open_source("tar", str(root))
    entries = list(source.list(lambda *_: False))
    pictures = [entry for entry in entries if isinstance(entry, Item)]
    assert [source.read(item.locator, item.size_bytes) for item in pictures] == [b"one", b"two", b"three", b"4"]
    assert keys(entries) == ["a.tar/../outside.jpg", f"a.tar/{outside}", "a.tar/a/./b/../c.jpg", "a.tar/twice.jpg"]
    assert "comes twice" in damages(entries)
    assert outside.read_bytes() == b"secret"


def test_links_of_a_folder_are_followed_and_said_so(tmp_path: Path) -> None:
    """The policy: a folder's links belong to who arranged it, as with `find -L`; docs/security.md says what to do."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(b"there")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    assert keys(listed("folder", root)) == ["link/a.jpg"]
    assert "links" in (REPO / "docs" / "security.md").read_text()


def header_that_claims(size: int, kind: bytes, content: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type = kind
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


ENDLESS = {
    "a header of 8 GB": header_that_claims(8 << 30, tarfile.XHDTYPE, b""),
    "a name of 1 MB": header_that_claims(1 << 20, tarfile.GNUTYPE_LONGNAME, b"a" * (1 << 20)),
    "a number that never ends": header_that_claims(200_000, tarfile.XHDTYPE, b"1" * 200_000),
    "a size below zero": header_that_claims(0, tarfile.REGTYPE, b"") + header_that_claims(-1024, tarfile.REGTYPE, b""),
    "a header below zero": header_that_claims(-1536, tarfile.XHDTYPE, b""),
    "headers of headers": header_that_claims(5, tarfile.GNUTYPE_LONGNAME, b"a.jpg") * 5000,
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", ENDLESS)
def test_a_hostile_tar_header_is_damage(tmp_path: Path, what: str) -> None:
    """tarfile would read it into memory, search it for hours, or go round in circles. What came before is listed."""
    write_tar(tmp_path / "a.tar", member("good.jpg", b"good"))
    before = (tmp_path / "a.tar").read_bytes()[:1024]
    (tmp_path / "a.tar").write_bytes(before + ENDLESS[what] + bytes(1024))
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(1 << 34)  # 16 GB that take no space
    entries = listed("tar", tmp_path)
    assert keys(entries) == ["a.tar/good.jpg"]
    assert damages(entries)


def test_json_bombs_beside_a_picture_cost_its_metadata_alone(tmp_path: Path) -> None:
    members = []
    for name, text in {
        "deep": "[" * 100_000, "deeper": '{"a":' * 100_000, "digits": "1" * 100_000, "words": "not json",
        "wide": json.dumps({f"field {number}": number for number in range(20_000)}),
        "name": json.dumps({"n" * 100_000: 1, "label": "kept"}), "text": json.dumps({"label": "t" * 1_000_000}),
    }.items():  # fmt: skip
        members += [member(f"{name}.jpg", b"picture " + name.encode()), member(f"{name}.json", text.encode())]
    write_tar(tmp_path / "a.tar", *members)
    entries = listed("tar", tmp_path)
    assert not damages(entries)
    found = {entry.key: entry.metadata for entry in entries if isinstance(entry, Item)}
    assert len(found) == 7
    assert len(found["a.tar/wide.jpg"]) == MAX_FIELDS
    assert found["a.tar/name.jpg"] == {"label": "kept"}
    assert len(str(found["a.tar/text.jpg"]["label"])) == MAX_TEXT
    assert clean_metadata({"é" * 200: 1, "é": 2}) == {"é": 2}, "HDF5 counts bytes"


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"images":' + "[" * 100_000, '{"images": [3]}', '{"images": [{"id": [1], "file_name": "x"}]}',
     '{"images": [{"id": 99999999999999999999, "file_name": "x"}]}', '{"images": [{"id": 1, "file_name": 7}]}',
     '{"categories": [{"id": {}, "name": 3}]}', '{"annotations": [{"image_id": 1e400, "category_id": 1}]}',
     '{"licenses": 7}', '{"images": [{"id": 1, "file_name": "\\ud800"}]}'],
)  # fmt: skip
def test_an_annotation_file_of_wrong_types_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    picture = tmp_path / "val" / "00001_a" / "x.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"x")
    (tmp_path / "val.json").write_text(text)
    with pytest.raises(SourceError, match=r"val\.json cannot be used"):
        listed("inat2021", tmp_path, split="val")


def test_a_parquet_file_that_claims_too_much_is_damage(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    many = pa.table({"image": pa.array([None] * 3_000_000, pa.binary())})
    pq.write_table(many, tmp_path / "a.parquet", row_group_size=3_000_000)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    assert "claims 3,000,000 rows" in damages(listed("parquet", tmp_path))


def test_columns_of_a_parquet_file_are_bounded(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {f"c{number}": [number] for number in range(MAX_FIELDS + 50)}
    pq.write_table(pa.table({**columns, "image": [b"x" * 9]}), tmp_path / "a.parquet")
    (item,) = [entry for entry in listed("parquet", tmp_path) if isinstance(entry, Item)]
    assert len(item.metadata) == MAX_FIELDS


# ---- secrets, code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "root",
    ["s3://AKIA:hunter2@bucket/photos", "https://user:hunter2@example.org/photos", "ftp://u:hunter2@h", "sftp://:hunter2@h/x",
     "https://example.org/a.tar?X-Amz-Signature=hunter2", "az://c/x?sv=1&sig=hunter2"],
)  # fmt: skip
def test_a_password_in_a_root_is_refused_and_not_repeated(root: str) -> None:
    """A root is printed, logged and stored in every generation."""
    for kind in ("folder", "tar", "parquet", "inat2021"):
        with pytest.raises(SourceError, match="stored in the index") as refused:
            open_source(kind, root)
        assert "hunter2" not in str(refused.value)


def test_a_refused_password_is_nowhere_on_disk_or_screen(tmp_path: Path, tiny_model: Path) -> None:
    ran = run_module(
        "pipeline.index", "--source", "folder", "--root", "https://user:hunter2@example.org/x", "--model", tiny_model,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert ran.code == 2
    assert "hunter2" not in ran.stdout + ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("root", ["https://user:hunter2@example.org/x", "s3://bucket/x?X-Amz-Signature=hunter2"])
def test_a_night_with_a_password_in_a_root_does_not_tell_it(tmp_path: Path, root: str) -> None:
    """Neither the screen, nor log, metrics or webhook: it is refused before any of them is told of it."""
    (tmp_path / "nightly.toml").write_text(
        f'[index]\nout = "{tmp_path}/out"\n[report]\nlog = "{tmp_path}/log"\nmetrics = "{tmp_path}/metrics"\n'
        f'[[source]]\nkind = "folder"\nroot = "{root}"\n'
    )
    for args in ((), ("--check",)):
        ran = run_module("pipeline.nightly", "--config", tmp_path / "nightly.toml", *args)
        assert ran.code == 2
        assert "one without secrets" in ran.stderr
        assert "hunter2" not in ran.stdout + ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["nightly.toml"]


def test_an_address_that_a_server_signed_is_not_told() -> None:
    error = ValueError("403, message='Forbidden', url='https://cdn.example.org/a.jpg?Signature=hunter2&Expires=9'")
    assert words_of(error) == "ValueError: 403, message='Forbidden', url='https://cdn.example.org/a.jpg?***'"


def test_nothing_that_runs_code_is_loaded() -> None:
    """No pickle, no eval, no shell; numpy and torch files as data only."""
    wrong = []
    for path in sorted(
        found for folder in ("pipeline", "engines", "export") for found in (REPO / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = [
                name
                for name in names
                if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml")
            ]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                bad += [called] if called in ("eval", "exec", "os.system", "os.popen", "pickle.loads") else []
                bad += ["allow_pickle"] if given.get("allow_pickle", "False") != "False" else []
                bad += ["shell"] if given.get("shell", "False") != "False" else []
                bad += ["recv"] if called.endswith(".recv") else []  # of a pipe: it unpickles
                bad += ["torch.load"] if called == "torch.load" and given.get("weights_only") != "True" else []
            wrong += [f"{path.relative_to(REPO)}: {name}" for name in bad]
    assert not wrong


# ---- lanes ---------------------------------------------------------------------------------------------------------


class Exploit:
    """Unpickled, it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


CHUNK = Chunk(7, Path("index/shards/000007.h5"), [PendingItem(number, f"{number}.jpg", b"", 1) for number in (3, 4)])
SHARD = ShardInfo("shards/000007.h5", 1, 8, 100, "00" * 16, 64)
DONE = Done(7, SHARD, [Outcome(3, "embedded", bytes(16)), Outcome(4, "copied", bytes(16))], {"cpu": 2})
SAID: dict[str, Callable[[Path], bytes]] = {
    "a pickle": lambda made: pickle.dumps(Exploit(made)),
    "nothing": lambda _: b"",
    "no end": lambda _: encode(DONE)[:-1],
    "too much": lambda _: bytes(MESSAGE_BYTES_MAX + 1),
    "another chunk": lambda _: encode(replace(DONE, chunk=8)),
    "a claim for another chunk": lambda _: encode(Claim(8, [bytes(16)])),
    "half a hash": lambda _: encode(Claim(7, [bytes(8)])),
    "a claim for nothing": lambda _: encode(Claim(7, [])),
    "half a hash of an outcome": lambda _: encode(replace(DONE, outcomes=[Outcome(4, "copied", bytes(8))])),
    "another's row": lambda _: encode(replace(DONE, outcomes=[Outcome(5, "copied", bytes(16))])),
    "a row twice": lambda _: encode(replace(DONE, outcomes=[DONE.outcomes[1]] * 2)),
    "another file": lambda _: encode(replace(DONE, shard=dataclasses.replace(SHARD, name="shards/000006.h5"))),
    "a file elsewhere": lambda _: encode(replace(DONE, shard=dataclasses.replace(SHARD, name="../000007.h5"))),
    "another status": lambda _: encode(DONE).replace(b"copied", b"gopied"),
    "no time": lambda _: encode(Tick(rows=5)),
    "another type": lambda _: encode(replace(DONE, decoders={"cpu": "2"})),  # type: ignore[dict-item]
}


def hear(said: bytes) -> Message:
    """What the coordinator makes of these bytes from a lane that holds CHUNK."""
    ours, theirs = Pipe()
    lane = Lane(cast(LaneSpec, SimpleNamespace(name="cpu")), None, ours, cast(Board, None), chunks={7: CHUNK})

    def say() -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens to the end of what is too long
            theirs.send_bytes(said)

    threading.Thread(target=say, daemon=True).start()  # a pipe does not take it all at once
    return lane.hear()


@pytest.mark.parametrize("said", SAID)
def test_a_lane_that_is_taken_over_counts_as_lost(tmp_path: Path, said: str) -> None:
    assert isinstance(hear(SAID[said](tmp_path / "made")), Lost)
    assert not (tmp_path / "made").exists()


def test_a_lane_is_heard_about_its_own_chunk() -> None:
    for message in (DONE, Claim(7, [bytes(16)]), Tick(5, seconds=1.0), Broken("words"), replace(DONE, outcomes=[])):
        assert hear(encode(message)) == message
    assert hear(encode(Broken(sayable(os.fsdecode(b"caf\xe9.jpg"))))) == Broken("caf\\udce9.jpg")


def test_an_order_arrives_as_it_was_given() -> None:
    rows = [PendingItem(3, "caf%E9.jpg", b"caf\xe9.jpg", 1), PendingItem(2**62, "b.jpg", b"", 2**40)]
    for order in (Chunk(7, Path(os.fsdecode(b"caf\xe9/000007.h5")), rows), Verdict([True, False]), None):
        assert decode_order(encode(order)) == order


# ---- whole runs ---------------------------------------------------------------------------------------------------


def test_hostile_pictures_leave_the_good_ones_alone(tmp_path: Path, tiny_model: Path) -> None:
    """Bombs, odd names and a file that is no picture, between good pictures, through the real command."""
    photos, out = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    bombs = ("60,000 x 60,000 PNG", "a PPM without pixels", "GIF of 65,535 squared", "JPEG 2000 in tiles of 4 billion")
    for number, name in enumerate(bombs):
        (photos / f"bomb{number}.jpg").write_bytes(BOMBS[name]())
    odd = [
        b"new\nline.jpg",
        b"'; DROP TABLE input; --.jpg",
        b"\xff\xfe.jpg",
        b"..jpg.jpg",
        b"%00.jpg",
        "\u202egpj.jpg".encode(),
    ]
    for number, raw in enumerate(odd):
        Path(os.fsdecode(os.fsencode(photos) + b"/" + raw)).write_bytes(noisy_jpeg(number))
    ran = index(photos, out, "--model", tiny_model)
    assert ran.code == 0, ran.stderr
    assert ran.report["embedded"] == len(odd)
    assert quarantine(out) == {
        "bomb0.jpg": "too_large", "bomb1.jpg": "too_large", "bomb2.jpg": "too_large", "bomb3.jpg": "corrupt",
    }  # fmt: skip
    assert "'; DROP TABLE input; --.jpg" in vectors_by_key(out)


# ---- fuzz -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_give_only_the_errors_we_promise(
    target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pictures = small_pictures(request.getfixturevalue("shared_data")) if target == "decode" else []
    found = in_process(target, FUZZ_S, 1, tmp_path, pictures)
    assert int(str(found["tried"])) > 10


def small_pictures(data: Path) -> list[Path]:
    paths = [path for path in sorted(data.rglob("*")) if path.is_file() and path.suffix not in (".tsv", ".md")]
    return random.Random(0).sample(paths, min(len(paths), 60))
