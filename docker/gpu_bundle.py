"""Make the offline bundle for an air-gapped GPU host (Python 3.12, x86-64, CUDA 13) that has torch cu130 and numpy.

    python docker/gpu_bundle.py bundle/             # runs on every GPU the wheels support
    python docker/gpu_bundle.py bundle/ --sm 90     # half the size, runs on that compute capability only

Then carry part-*, MANIFEST.json and unpack.py to the host, one by one if need be, and run there
`python unpack.py --target DIR` (docs/gpu.md).

Wheels are downloaded, freed of what this kind of host cannot use (modules for other Python versions, plugins whose
library is not in the bundle; with `--sm`, machine code for other GPUs), and laid end to end in parts. Sizes are in
docs/gpu.md.
TensorRT's libraries are not in it: they come from NVIDIA's own index only.
The same wheels give the same parts, byte for byte, so an interrupted carry goes on after the bundle is made again.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux{p}_x86_64" for p in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "2010", "1"))
# 56 MiB: a courier that takes 64 MiB at a time then has room for the checkout beside a part.
PART_BYTES = 56 << 20


class Pin(NamedTuple):
    name: str
    version: str
    host_enough: str | None  # a host with this version or newer keeps its own; None: always installed
    why: str


# No torch, numpy (the host's own are the ones its CUDA libraries match), no pyarrow (50 MB, for one source only), no
# TensorRT (see above). What only tests, measurements and model making need comes last.
PINS = (
    Pin("onnxruntime-gpu", "1.31.1", None, "runs the engines; cuBLAS, cuDNN, cudart and cuRAND come from the host"),
    Pin("cvcuda-cu13", "0.19.0", None, "resize, crop, normalise"),
    Pin("nvidia-nvimgcodec-cu13", "0.9.0.20", None, "decode"),
    Pin("nvidia-nvjpeg", "13.3.2.43", None, "what nvImageCodec decodes JPEG with; absent, it falls to the CPU unasked"),
    Pin("cuda-bindings", "13.0.3", "13.0", "events and streams without torch"),
    Pin("cuda-pathfinder", "1.9.0", "1.3", "needed by cuda-bindings"),
    Pin("simplejpeg", "1.9.0", "1.8", "CPU decode of JPEG"),
    Pin("pillow", "13.0.0", "13.0", "CPU decode of the rest"),
    Pin("pillow-heif", "1.8.1", "1.1", "CPU decode of HEIC"),
    Pin("blake3", "1.0.11", "1.0.8", "content hashes"),
    Pin("h5py", "3.16.0", "3.14", "shards"),
    Pin("fsspec", "2026.9.0", "2026.1", "sources"),
    Pin("msgspec", "0.22.0", "0.20", "what lanes tell the coordinator"),
    Pin("numkong", "7.8.6", "7.8", "exact search"),
    Pin("usearch", "2.26.6", "2.26", "rows exported for it"),
    Pin("jinja2", "3.1.6", "3.1", "the page about a run"),
    Pin("markupsafe", "3.0.4", "2.0", "needed by jinja2"),
    Pin("tokenizers", "0.23.3", "0.23.1", "text queries"),
    Pin("psutil", "7.2.2", "7.0", "cores and memory"),
    Pin("rich", "15.0.0", "14", "progress"),
    Pin("prometheus-client", "0.26.0", "0.22", "metrics of a night"),
    Pin("markdown-it-py", "4.3.0", "2.2", "needed by rich"),
    Pin("mdurl", "0.1.2", "0.1", "needed by markdown-it-py"),
    Pin("pygments", "2.21.0", "2.13", "needed by rich"),
    Pin("flatbuffers", "25.12.19", "2", "needed by onnxruntime-gpu"),
    Pin("packaging", "26.3", "20", "needed by onnxruntime-gpu"),
    Pin("protobuf", "7.36.2", "6.31.1", "needed by onnxruntime-gpu and onnx"),
    Pin("pytest", "9.2.0", "8.4", "the GPU tests"),
    Pin("pytest-timeout", "2.4.0", "2.4", "the GPU tests"),
    Pin("pluggy", "1.7.0", "1.6", "needed by pytest"),
    Pin("iniconfig", "2.3.1", "2", "needed by pytest"),
    Pin("opencv-python-headless", "5.0.0.93", "4.10", "the baseline of the measurements"),
    Pin("matplotlib", "3.11.2", "3.9", "plots of the measurements"),
    Pin("contourpy", "1.4.0", "1.0.1", "needed by matplotlib"),
    Pin("cycler", "0.12.1", "0.10", "needed by matplotlib"),
    Pin("fonttools", "4.68.0", "4.28.2", "needed by matplotlib"),
    Pin("kiwisolver", "1.5.1", "1.3.1", "needed by matplotlib"),
    Pin("pyparsing", "3.3.3", "3", "needed by matplotlib"),
    Pin("python-dateutil", "4.0.0", "2.7", "needed by matplotlib"),
    Pin("tzdata", "2026.6", "2025", "needed by python-dateutil"),
    Pin("transformers", "5.23.0", "5.20", "makes the random models that are measured, and their reference vectors"),
    Pin("onnx", "1.23.2", "1.20", "writes their graphs"),
    Pin("ml-dtypes", "0.6.0", "0.5.4", "needed by onnx"),
    Pin("safetensors", "0.8.0", "0.8", "needed by transformers"),
    Pin("regex", "2026.11.15", "2025.10.22", "needed by transformers"),
    Pin("pyyaml", "6.0.3", "5.1", "needed by transformers"),
    Pin("tqdm", "4.70.1", "4.60", "needed by transformers"),
    Pin("huggingface-hub", "2.4.0", "1.31", "needed by transformers"),
    Pin("hf-xet", "1.8.0", "1.6", "needed by huggingface-hub"),
    Pin("httpx2", "2.16.2", "2.0", "needed by huggingface-hub"),
    Pin("httpcore2", "2.16.2", "2.16.2", "needed by httpx2"),
    Pin("h11", "0.16.0", "0.16", "needed by httpcore2"),
    Pin("truststore", "0.10.5", "0.10", "needed by httpx2"),
    Pin("anyio", "4.16.0", "4.10", "needed by httpx2"),
    Pin("idna", "3.20", "3.18", "needed by httpx2"),
    Pin("click", "8.5.1", "8.4.2", "needed by huggingface-hub"),
    Pin("filelock", "4.2.11", "3.10", "needed by huggingface-hub"),
    Pin("typing-extensions", "4.16.0", "4.16", "needed by anyio and pydantic"),
    Pin("typer", "0.29.2", "0.20", "needed by transformers"),
    Pin("shellingham", "1.5.4", "1.3", "needed by typer"),
    Pin("annotated-doc", "0.0.7", "0.0.2", "needed by typer"),
    Pin("pydantic", "2.14.3", "2.5.3", "needed by typer"),
    Pin("pydantic-core", "2.50.4", "2.14.6", "needed by pydantic, which checks that they fit"),
    Pin("annotated-types", "0.8.0", "0.6", "needed by pydantic"),
    Pin("typing-inspection", "0.4.5", "0.4.4", "needed by pydantic"),
)


def download(pins: Sequence[Pin], cache: Path) -> dict[str, Path]:
    """Fetch the wheel of every pin into `cache`; what is already there is not fetched again."""
    wanted = [f"{pin.name}=={pin.version}" for pin in pins]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "--dest", str(cache), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip download failed with {done.returncode}:\n{done.stderr.strip()}")
    found = {}
    for pin in pins:
        matching = sorted(cache.glob(f"{pin.name.replace('-', '_')}-{pin.version}-*.whl"))
        if len(matching) != 1:
            raise RuntimeError(f"{cache} holds {len(matching)} wheels of {pin.name} {pin.version}, expected one")
        found[pin.name] = matching[0]
    return found


def entries(code: bytes | bytearray, start: int) -> list[tuple[int, int, int, int]]:
    """The (kind, SM, offset, bytes) of each program in the CUDA fat binary at `start`; empty if it is none.

    Layout: u32 magic, u16 version, u16 header bytes, u64 body bytes; then programs, each u16 kind (1 PTX, 2 machine
    code), u16 version, u32 header bytes, u64 body bytes, ..., u32 SM at 28.
    """
    version, header, body = struct.unpack_from("<HHQ", code, start + 4)
    at, end = start + header, start + header + body
    if (version, header) != (1, 16) or end > len(code):
        return []
    found = []
    while at + 32 <= end:
        kind, _, head, size = struct.unpack_from("<HHIQ", code, at)
        if kind not in (1, 2) or head < 32:
            return []
        found.append((kind, struct.unpack_from("<I", code, at + 28)[0], at, head + size))
        at += head + size
    return found if at == end else []


def keep_sm(code: bytearray, sm: int) -> int:
    """Leave only the machine code for `sm` in each fat binary that has some; return how many binaries that changed.

    A fat binary stays where it is (its address is compiled in) and becomes shorter, as if built for `sm` alone; on
    another GPU the driver then says that it has no kernel image. One without code for `sm` stays whole: it may hold PTX
    or code of the same major version that runs there.
    """
    changed, at = 0, code.find(b"\x50\xed\x55\xba")
    while at >= 0:
        programs = entries(code, at) if at + 16 <= len(code) else []
        kept = [code[p : p + size] for kind, arch, p, size in programs if kind == 2 and arch == sm]
        if kept and len(kept) < len(programs):
            (body,) = struct.unpack_from("<Q", code, at + 8)
            joined = b"".join(kept)
            struct.pack_into("<Q", code, at + 8, len(joined))
            code[at + 16 : at + 16 + body] = joined.ljust(body, b"\0")
            changed += 1
        at = code.find(b"\x50\xed\x55\xba", at + 4)
    return changed


def useless(name: str) -> bool:
    """True for a module only another Python version can load, or a plugin whose library is not in the bundle."""
    tag = re.search(r"\.cpython-(\d+t?)-[^/]*\.so$", name)
    # JPEG 2000 and TIFF then decode on the CPU, as they would anyway, without an error line at every start.
    plugin = re.search(r"nvimgcodec/extensions/lib(nvjpeg2k|nvtiff)_ext\.so", name)
    return plugin is not None or (tag is not None and tag[1] != PYTHON.replace(".", ""))


def trim(wheel: Path, out: Path, sm: int | None) -> None:
    """Write `wheel` to `out` without what the host cannot use, with a RECORD that says what is in it."""
    lines = []
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        (record,) = [n for n in old.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", n)]
        for info in old.infolist():
            if info.is_dir() or info.filename == record or useless(info.filename):
                continue
            data = bytearray(old.read(info))
            if sm is not None and data.startswith(b"\x7fELF"):
                keep_sm(data, sm)
            info.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(info, bytes(data))
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{_csv(info.filename)},sha256={digest},{len(data)}\n")
        new.writestr(old.getinfo(record), "".join(lines) + f"{_csv(record)},,\n")


def _csv(name: str) -> str:
    return f'"{name}"' if "," in name else name


def write_parts(wheels: Sequence[Path], out: Path, part_bytes: int) -> list[dict[str, Any]]:
    """Lay `wheels` end to end in part-000, part-001, ... of at most `part_bytes`; one row of the manifest for each."""
    parts = []
    for number, data in enumerate(_blocks(wheels, part_bytes)):
        path = out / f"part-{number:03d}"
        path.write_bytes(data)
        parts.append({"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return parts


def _blocks(wheels: Sequence[Path], size: int) -> Iterator[bytes]:
    waiting = io.BytesIO()
    for wheel in wheels:
        with wheel.open("rb") as stream:
            while data := stream.read(size - waiting.tell()):
                waiting.write(data)
                if waiting.tell() == size:
                    yield waiting.getvalue()
                    waiting = io.BytesIO()
    if waiting.tell():
        yield waiting.getvalue()


def write_bundle(
    pins: Sequence[Pin], wheels: dict[str, Path], out: Path, *, sm: int | None, python: str = PYTHON,
    part_bytes: int = PART_BYTES,
) -> dict[str, Any]:  # fmt: skip
    """Trim, join and split `wheels` into `out`; MANIFEST.json is written last, so its existence means complete."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in (out / "MANIFEST.json", *out.glob("part-*")):  # never the whole folder: it is the user's
        stale.unlink(missing_ok=True)
    trimmed = out / "wheels"
    trimmed.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for pin in pins:
        path = trimmed / wheels[pin.name].name
        trim(wheels[pin.name], path, sm)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(
            {"file": path.name, "bytes": path.stat().st_size, "sha256": digest, "name": pin.name}
            | {"host_enough": pin.host_enough, "bytes_downloaded": wheels[pin.name].stat().st_size}
        )
    parts = write_parts([trimmed / row["file"] for row in rows], out, part_bytes)
    shutil.rmtree(trimmed)
    shutil.copy(Path(__file__).with_name("gpu_unpack.py"), out / "unpack.py")
    manifest = {"schema": 1, "python": python, "sm": sm, "wheels": rows, "parts": parts}
    (out / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; OUT/downloads keeps what was fetched")
    parser.add_argument("--sm", type=int, metavar="N", help="one compute capability without its dot: 90 for 9.0")
    args = parser.parse_args()
    cache = args.out / "downloads"
    cache.mkdir(parents=True, exist_ok=True)
    manifest = write_bundle(PINS, download(PINS, cache), args.out, sm=args.sm)
    for row in manifest["wheels"]:
        print(f"{row['bytes_downloaded'] / 1e6:8.1f} MB -> {row['bytes'] / 1e6:6.1f} MB  {row['file']}")
    total = sum(part["bytes"] for part in manifest["parts"])
    print(f"{total / 1e6:.1f} MB in {len(manifest['parts'])} parts: {args.out}/part-*, MANIFEST.json, unpack.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
