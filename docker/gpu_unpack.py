"""Verify, join and install the offline bundle on the GPU host. Standard library and pip only; nothing is fetched.

    python unpack.py --target /opt/nightjar-site [--parts FOLDER]
    export PYTHONPATH=/opt/nightjar-site

Parts may be carried one by one into FOLDER (default: where this file lies); run it after each, and it says what is
still missing. A package the host already has in a good enough version is left alone, so that the host's torch keeps
the versions it was built against. Exit 0: installed; 1: not yet, and why.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class NotReady(Exception):
    """The bundle cannot be installed as it is; the message says what to do."""


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_host(manifest: dict[str, Any]) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != manifest["python"]:
        raise NotReady(f"the bundle is for Python {manifest['python']}, this is {here}: run it with that version")
    if manifest["sm"] is None or (smi := shutil.which("nvidia-smi")) is None:
        return
    asked = subprocess.run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    other = {cap.strip() for cap in asked.stdout.splitlines()} - {f"{manifest['sm'] / 10:.1f}"}
    if asked.returncode == 0 and other:
        raise NotReady(f"the bundle is for SM {manifest['sm']} only, here are {sorted(other)}: make one without --sm")


def check_parts(manifest: dict[str, Any], folder: Path) -> None:
    """Every part there and as it was written, or an error that names those to carry (again)."""
    missing, corrupt = [], []
    for part in manifest["parts"]:
        path = folder / part["name"]
        if not path.is_file():
            missing.append(part["name"])
        elif path.stat().st_size != part["bytes"] or sha256(path) != part["sha256"]:
            corrupt.append(part["name"])
    words = [f"{kind}: {', '.join(names)}" for kind, names in (("missing", missing), ("corrupt", corrupt)) if names]
    if words:
        raise NotReady(f"{folder} is not complete ({len(manifest['parts'])} parts): {'; '.join(words)}")


def join(manifest: dict[str, Any], folder: Path, out: Path) -> list[Path]:
    """Lay the parts end to end and cut that into wheels again."""
    wheels = []
    with tempfile.TemporaryFile(dir=out) as joined:
        for part in manifest["parts"]:
            with (folder / part["name"]).open("rb") as stream:
                shutil.copyfileobj(stream, joined)
        joined.seek(0)
        for row in manifest["wheels"]:
            path = out / row["file"]
            path.write_bytes(joined.read(row["bytes"]))
            if sha256(path) != row["sha256"]:
                raise NotReady(f"{row['file']} is not what was bundled: MANIFEST.json and the parts are of two bundles")
            wheels.append(path)
    return wheels


def number(version: str) -> tuple[int, ...]:
    """The leading release numbers of a version: 13.0.3.post1 -> (13, 0, 3)."""
    return tuple(int(word) for word in re.match(r"\d+(\.\d+)*", version)[0].split("."))  # type: ignore[index]


def host_has(name: str, enough: str | None) -> str | None:
    """The version of `name` this Python already has, if it is at least `enough`."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if enough is not None and number(version) >= number(enough) else None


def unpack(folder: Path, target: Path) -> list[str]:
    """Install into `target` and return one line per package."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise NotReady(f"{folder / 'MANIFEST.json'} is missing or cut short ({error}): carry it first") from error
    check_host(manifest)
    check_parts(manifest, folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted, lines = [], []
        for row, wheel in zip(manifest["wheels"], join(manifest, folder, Path(scratch)), strict=True):
            if version := host_has(row["name"], row["host_enough"]):
                lines.append(f"host has  {row['name']} {version}")
            else:
                wanted.append(str(wheel))
                lines.append(f"installed {row['file']}")
        install(wanted, target)
    return lines


def install(wheels: Sequence[str], target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(target), *wheels]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotReady(f"pip install failed with {done.returncode}: {done.stderr.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="folder to install into, outside the checkout")
    parser.add_argument("--parts", type=Path, default=Path(__file__).resolve().parent, metavar="FOLDER")
    args = parser.parse_args()
    try:
        lines = unpack(args.parts, args.target)
    except NotReady as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines))
    print(f"export PYTHONPATH={args.target.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
