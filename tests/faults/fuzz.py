"""Mutated files of every kind we read, in a process of its own: only the errors we promise, in bounded time and memory.

    python fuzz.py TARGET SECONDS SEED FOLDER [PICTURES]      prints one JSON line; FOLDER/input is what it died of

A target that raises anything else, takes longer than `HANG_S`, or more memory than `MEMORY_MB`, has failed; so has one
that kills the process.
"""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import os
import random
import resource
import struct
import subprocess
import sys
import tarfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HANG_S = 30
MEMORY_MB = dict.fromkeys(("decode", "tar", "json", "config"), 1_000)
MEMORY_MB["parquet"] = 2_300  # a page may claim 2 GB: Arrow 26 takes and clears them before it looks at the file
SEED_BYTES_MAX = 30_000
NASTY = [
    struct.pack(order + kind, number & (256 ** struct.calcsize(kind) - 1))
    for order in "<>"
    for kind in "HIQ"
    for number in (0, 1, -1, 0x7FFFFFFF, 0x80000000, 0xFFFF, 60_000)
]
NASTY += [
    b"\0",
    b"\xff",
    b"99999999999999999999",
    b"-1",
    b"[" * 5000,
    b'{"a":' * 3000,
    b"../",
    b"\xed\xa0\x80",
    b"1e999",
]

Try = Callable[[bytes], str]  # what came of it; raises what must not come


def decode_target(folder: Path) -> Try:
    from pipeline.batch import BadImage
    from pipeline.decode_cpu import decode

    pre = types.SimpleNamespace(exact_pixels_max=4_000_000)

    def one(content: bytes) -> str:
        try:
            return decode(content, pre).mark or "decoded"  # type: ignore[arg-type]
        except BadImage as bad:
            return bad.failure.reason

    return one


def listed_here(source: Any) -> Iterator[Any]:
    """Not in a child process, so that a crash is found."""
    if hasattr(source, "list_by"):
        return source.list_by(source.list_container, lambda *_: False)
    return source.list(lambda *_: False)


def source_target(kind: str, name: str) -> Callable[[Path], Try]:
    """One container in a folder: it is listed, and the first pictures of it are read."""

    def target(folder: Path) -> Try:
        from pipeline.batch import BadImage, Item
        from pipeline.sources import Damage, SourceError, open_source
        from pipeline.store.records import pack_metadata

        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "inat2021":
            picture = folder / "root" / "val" / "00001_a_b_c_d_e_f_g" / "x.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(b"x")

        def one(content: bytes) -> str:
            path.write_bytes(content)
            source = open_source(kind, str(folder / "root"), split="val" if kind == "inat2021" else None)
            items = damages = 0
            try:
                for entry in listed_here(source):
                    damages += isinstance(entry, Damage)
                    if isinstance(entry, Item):
                        items += 1
                        entry.key.encode()
                        pack_metadata(entry.metadata)
                        if items < 4:
                            try:
                                source.read(entry.locator, entry.size_bytes)
                            except BadImage:
                                damages += 1
            except SourceError:
                return "refused"
            return "damaged" if damages else "listed"

        return one

    return target


def config_target(folder: Path) -> Try:
    from pipeline.nightly.config import UsageError, load

    path = folder / "nightly.toml"

    def one(content: bytes) -> str:
        path.write_bytes(content)
        try:
            load(path)
        except UsageError:
            return "refused"
        return "loaded"

    return one


TARGETS: dict[str, Callable[[Path], Try]] = {
    "decode": decode_target,
    "tar": source_target("tar", "a.tar"),
    "parquet": source_target("parquet", "a.parquet"),
    "json": source_target("inat2021", "val.json"),
    "config": config_target,
}


def seeds(target: str, pictures: Iterable[Path]) -> list[bytes]:
    if target == "decode":
        small = [path.read_bytes() for path in pictures if path.stat().st_size <= SEED_BYTES_MAX]
        return small + generated_pictures()
    if target == "tar":
        return [tar(format_) for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]
    if target == "parquet":
        return [parquet(**options) for options in ({}, {"compression": "zstd"}, {"use_dictionary": False})]
    if target == "json":
        return [INAT_JSON.encode()]
    return [CONFIG.encode()]


ROTATED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06"


def generated_pictures() -> list[bytes]:
    from PIL import Image

    picture = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    found = []
    for kind, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True, "exif": ROTATED}),
        ("PNG", {}), ("GIF", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("ICO", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_adobe_deflate"}), ("JPEG2000", {}),
        ("AVIF", {}), ("PPM", {}),
    ):  # fmt: skip
        out = io.BytesIO()
        picture.save(out, kind, **options)
        found.append(out.getvalue())
    return found


def tar(format_: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        for name, content in (
            ("a.jpg", b"picture"), ("a.json", b'{"caption": "x", "n": [1, {"b": 2}], "f": 1.5}'),
            ("b/c.jpg", b"2" * 700), ("b/c.txt", b"words"), ("b/" + "long" * 40 + ".jpg", b"3"),
            ("a/../../d.cls", b"4"),
        ):  # fmt: skip
            if format_ == tarfile.USTAR_FORMAT and len(name) > 99:
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if format_ == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "é" * 9}
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def parquet(**options: object) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({
        "image": [{"bytes": b"picture %d" % row, "path": f"{row}.jpg"} for row in range(50)],
        "label": list(range(50)), "text": [None, "words"] * 25, "score": [0.5] * 50,
    })  # fmt: skip
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=20, **options)
    return out.getvalue()


INAT_JSON = json.dumps({
    "info": {"year": 2021}, "images": [{"id": 7, "file_name": "val/00001_a_b_c_d_e_f_g/x.jpg", "license": 1,
    "rights_holder": "somebody", "date": "2020-01-01", "latitude": 1.5, "longitude": None}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 3}],
    "categories": [{"id": 3, "name": "f g", "common_name": "x", "supercategory": "Birds", "kingdom": "a",
    "image_dir_name": "00001_a_b_c_d_e_f_g"}], "licenses": [{"id": 1, "name": "CC", "url": "http://example.org"}],
})  # fmt: skip
CONFIG = """index = "nights"
model = "tiny"
budget = "6h"
max_deleted = 20.0
[[sources]]
kind = "folder"
root = "/data/photos"
[webhook]
url = "http://127.0.0.1:9"
"""


def mutate(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(found) + 1)
        match chance.randrange(8):
            case 0 | 1:
                for _ in range(chance.choice((1, 3, 10))):
                    if found:
                        found[chance.randrange(len(found))] = chance.randrange(256)
            case 2:
                nasty = chance.choice(NASTY)
                found[at : at + len(nasty)] = nasty
            case 3:
                found[at:at] = chance.choice(NASTY)
            case 4:
                del found[at : at + chance.choice((1, 4, 50, 1000))]
            case 5:
                found[at:at] = found[at : at + chance.choice((4, 50, 600))] * chance.choice((1, 2, 50))
            case 6:
                other = chance.choice(others)
                start = chance.randrange(len(other) + 1)
                found[at : at + 40] = other[start : start + chance.choice((8, 100, 4000))]
            case 7:
                del found[chance.choice((at, len(found) - 1, len(found) // 2)) :]
    return bytes(found[: 1 << 20])


def run(target: str, seconds: float, seed: int, folder: Path, pictures: list[Path]) -> dict[str, object]:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    one, chance, ended = TARGETS[target](folder), random.Random(seed), Counter[str]()
    population = seeds(target, pictures)
    for content in population:
        one(content)
    start_mb, slowest_s, tried = peak_mb(), 0.0, 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        content = mutate(chance.choice(population), population, chance)
        (folder / "input").write_bytes(content)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        start_s = time.monotonic()
        ended[one(content)] += 1
        slowest_s, tried = max(slowest_s, time.monotonic() - start_s), tried + 1
        assert peak_mb() - start_mb < MEMORY_MB[target], f"it takes {peak_mb() - start_mb:.0f} MB"
    faulthandler.cancel_dump_traceback_later()
    return {
        "tried": tried,
        "ended": dict(ended),
        "slowest_s": round(slowest_s, 2),
        "more_mb": round(peak_mb() - start_mb),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(target: str, seconds: float, seed: int, folder: Path, pictures: list[Path]) -> dict[str, object]:
    """Raises AssertionError with the words of the process that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pictures").write_text("\n".join(map(str, pictures)))
    command = [sys.executable, str(HERE / "fuzz.py"), target, str(seconds), str(seed), str(folder)]
    path = os.pathsep.join(map(str, [HERE.parents[1], HERE]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, f"{target}, seed {seed}, code {done.returncode}: {folder}/input\n{done.stderr[-3000:]}"
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[4])
    listed = [Path(line) for line in (folder / "pictures").read_text().splitlines()]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps(run(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), folder, listed)))
