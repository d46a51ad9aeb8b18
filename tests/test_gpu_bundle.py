"""The offline bundle arrives whole or says what is wrong; trimming leaves wheels that pip and the GPU still accept."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import json
import re
import struct
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def load(name: str) -> ModuleType:
    """`docker/` is a folder of files that run by themselves, not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_bundle, gpu_unpack = load("gpu_bundle"), load("gpu_unpack")


def program(sm: int, code: bytes, kind: int = 2) -> bytes:
    head = struct.pack("<HHIQ", kind, 0x101, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", sm)
    return head.ljust(64, b"\0") + code


def fatbin(*programs: bytes) -> bytes:
    body = b"".join(programs)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


SM80, SM90, PTX = program(80, b"a" * 512), program(90, b"b" * 256), program(120, b"p" * 128, kind=1)


def fake_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, data in files.items():
            wheel.writestr(file, data)
        wheel.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in files))
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two small packages in three parts, for the Python that runs this test."""
    (source := tmp_path / "source").mkdir()
    noise = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(200))  # does not compress
    wheels = {
        "alpha": fake_wheel(source, "alpha", {"alpha.py": b"ANSWER = 42\n", "alpha_data/noise.bin": noise}),
        "beta": fake_wheel(source, "beta", {"beta.py": b"import alpha\nANSWER = alpha.ANSWER\n"}),
    }
    pins = [gpu_bundle.Pin("alpha", "1.0", None, "test"), gpu_bundle.Pin("beta", "1.0", None, "test")]
    out = tmp_path / "bundle"
    gpu_bundle.write_bundle(pins, wheels, out, sm=None, python=HERE, part_bytes=3000)
    return out


def run_unpack(bundle: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(bundle / "unpack.py"), "--target", str(target)]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_arrives_whole_installs_and_imports(bundle: Path, tmp_path: Path) -> None:
    assert len(list(bundle.glob("part-*"))) >= 3
    assert all(path.stat().st_size <= 3000 for path in bundle.glob("part-*"))
    done = run_unpack(bundle, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert f"export PYTHONPATH={tmp_path / 'site'}" in done.stdout
    command = [sys.executable, "-c", "import beta; print(beta.ANSWER)"]
    shown = subprocess.run(command, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True)
    assert shown.stdout.strip() == b"42"


def test_missing_and_corrupt_parts_are_named_and_nothing_is_installed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "part-000").unlink()
    damaged = bytearray((bundle / "part-001").read_bytes())
    damaged[100] ^= 1
    (bundle / "part-001").write_bytes(damaged)
    done = run_unpack(bundle, tmp_path / "site")
    assert done.returncode == 1
    assert "missing: part-000; corrupt: part-001" in done.stderr
    assert "part-002" not in done.stderr
    assert not (tmp_path / "site").exists()


def test_a_part_cut_short_in_transit_is_corrupt(bundle: Path) -> None:
    path = bundle / "part-000"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(gpu_unpack.NotReady, match="corrupt: part-000"):
        gpu_unpack.check_parts(json.loads((bundle / "MANIFEST.json").read_text()), bundle)


def test_manifest_comes_first(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "MANIFEST.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(gpu_unpack.NotReady, match="carry it first"):
        gpu_unpack.unpack(bundle, tmp_path / "site")
    path.unlink()
    with pytest.raises(gpu_unpack.NotReady, match="carry it first"):
        gpu_unpack.unpack(bundle, tmp_path / "site")


def test_a_manifest_of_another_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "MANIFEST.json").read_text())
    manifest["wheels"][0]["sha256"] = "0" * 64
    with pytest.raises(gpu_unpack.NotReady, match="two bundles"):
        gpu_unpack.join(manifest, bundle, tmp_path)


def test_another_python_is_refused() -> None:
    with pytest.raises(gpu_unpack.NotReady, match=r"for Python 3\.8, this is"):
        gpu_unpack.check_host({"python": "3.8", "sm": None})


def test_joined_wheels_are_the_trimmed_wheels_bit_for_bit(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "MANIFEST.json").read_text())
    joined = gpu_unpack.join(manifest, bundle, tmp_path)
    assert [path.name for path in joined] == [row["file"] for row in manifest["wheels"]]
    assert b"".join(path.read_bytes() for path in joined) == b"".join(
        (bundle / part["name"]).read_bytes() for part in manifest["parts"]
    )


def test_host_keeps_its_own_only_when_it_is_new_enough() -> None:
    assert gpu_unpack.host_has("pytest", "8.4") is not None
    assert gpu_unpack.host_has("pytest", "999") is None
    assert gpu_unpack.host_has("pytest", None) is None, "a package marked 'always' is installed over the host's"
    assert gpu_unpack.host_has("no-such-distribution", "1") is None
    assert gpu_unpack.number("13.0.3.post1") == (13, 0, 3)
    assert gpu_unpack.number("2.11.0+cu130") > gpu_unpack.number("2.9")


def test_trimming_keeps_the_record_true(tmp_path: Path) -> None:
    files = {
        "pkg/__init__.py": b"",
        "pkg/_c.cpython-312-x86_64-linux-gnu.so": b"\x7fELF" + fatbin(SM80, SM90),
        "pkg/_c.cpython-313t-x86_64-linux-gnu.so": b"other Python",
        "nvidia/nvimgcodec/extensions/libnvtiff_ext.so.0.9.0": b"plugin without its library",
        "nvidia/nvimgcodec/extensions/libnvjpeg_ext.so.0.9.0": b"plugin we need",
    }
    gpu_bundle.trim(fake_wheel(tmp_path, "pkg", files), tmp_path / "trimmed.whl", sm=90)
    with zipfile.ZipFile(tmp_path / "trimmed.whl") as wheel:
        names = set(wheel.namelist())
        assert names & set(files) == set(files) - {
            "pkg/_c.cpython-313t-x86_64-linux-gnu.so",
            "nvidia/nvimgcodec/extensions/libnvtiff_ext.so.0.9.0",
        }
        rows = list(csv.reader(wheel.read("pkg-1.0.dist-info/RECORD").decode().splitlines()))
        assert {row[0] for row in rows} == names
        for name, digest, size in rows[:-1]:
            data = wheel.read(name)
            assert int(size) == len(data)
            assert base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=") == hashlib.sha256(data).digest()
        assert b"a" * 512 not in wheel.read("pkg/_c.cpython-312-x86_64-linux-gnu.so")


def test_only_the_code_of_other_gpus_goes() -> None:
    text = b"\x7fELF" + b"t" * 60 + b"\x50\xed\x55\xba" + b"no fat binary " * 9
    whole = fatbin(SM80, PTX)  # no code for SM 90: it may still run there through PTX
    before = text + fatbin(SM80, SM90, PTX) + whole + b"end"
    after = bytearray(before)
    assert gpu_bundle.keep_sm(after, 90) == 1
    assert len(after) == len(before)
    assert after.startswith(text + fatbin(SM90))
    assert after.endswith(whole + b"end")
    assert gpu_bundle.keep_sm(bytearray(after), 90) == 0, "trimming twice changes nothing"
    assert gpu_bundle.entries(before, len(text))[1][:2] == (2, 90)


def test_pins_agree_with_the_project() -> None:
    """A host version that the project would refuse must not keep the bundled one out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {}
    for line in project["dependencies"] + project["optional-dependencies"]["gpu-cu13"]:
        name, _, rest = re.match(r"([\w-]+)(\[\w+\])?(.*)", line).groups()  # type: ignore[union-attr]
        wanted[name] = rest
    for pin in gpu_bundle.PINS:
        rule = wanted.get(pin.name, "")
        if rule.startswith("=="):
            assert rule == f"=={pin.version}", f"{pin.name} is pinned differently in pyproject.toml"
        elif rule.startswith(">="):
            lowest = rule[2:].split(",")[0]
            assert gpu_unpack.number(pin.host_enough or pin.version) >= gpu_unpack.number(lowest), pin.name
