"""`pipeline.verify` where it is harder: equal bits, devices, two models, a pinned generation, a read-only disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from pictures import write_folder
from runs import index, run_module, vectors_by_key
from test_verify import edit, flip, photos, shards, sign, sound, sql, verify, whats  # noqa: F401 - fixtures

from pipeline.store import show_generation
from pipeline.verify.command import DAMAGED, DONE


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:  # noqa: F811
    shutil.copytree(sound, tmp_path / "index", symlinks=True)
    return tmp_path / "index"


def nudge(file: h5py.File) -> None:
    """One component of one vector, by the least that float16 knows: within every bar."""
    bits = file["embeddings"][3].view(np.uint16)
    bits[0] ^= 1
    file["embeddings"][3] = bits.view(np.float16)


def test_the_engine_that_made_a_vector_must_give_its_bits_again(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = verify(capsys, "full", "--out", out)
    sample = report["sample"]
    assert (code, sample["bits_due"], sample["same_bits"]) == (DONE, 25, 25)
    edit(shards(out)[0], nudge)
    sign(out, shards(out)[0])
    code, report = verify(capsys, "full", "--out", out)
    assert (code, report["sample"]["off"]) == (DAMAGED, 1)
    assert "other bits of the same engine" in report["findings"][0]["found"]
    assert verify(capsys, "full", "--repair", "--out", out)[0] == DONE


@pytest.mark.parametrize("why", ["another decoder then", "no record", "another engine"])
def test_where_other_bits_may_come_the_contract_counts(out: Path, capsys: pytest.CaptureFixture[str], why: str) -> None:
    """A new release of a decoder must not turn every vector into damage."""
    edit(shards(out)[0], nudge)
    if why == "another engine":
        sql(out, "UPDATE shard SET engine = 'of another host'")
        for listing in out.glob("generations/*/generation.json"):
            content = json.loads(listing.read_text())
            for entry in content["files"]:
                entry["engine"] = "of another host"
            listing.write_text(json.dumps(content))
    sign(out, shards(out)[0])
    run = out / "runs" / "1.json"
    if why == "no record":
        run.unlink()
    elif why == "another decoder then":
        record = json.loads(run.read_text())
        record["versions"]["pillow"] = "0.1"
        run.write_text(json.dumps(record))
    code, report = verify(capsys, "full", "--out", out)
    assert (code, report["sample"]["same_bits"], report["sample"]["off"]) == (DONE, 24, 0), report["findings"]
    assert report["sample"]["bits_due"] in (0, 12)


def test_devices_are_those_of_index(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(capsys, "sample", "--rows", 3, "--devices", "cpu", "--out", out)[0] == DONE
    code, report = verify(capsys, "sample", "--devices", "gpu:77", "--out", out)
    assert code == 2
    assert "gpu:77" in report["error"]


def test_a_repair_leaves_readers_with_their_model(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sources, the second already on the way to another model: what both lost is embedded again, each with its
    own, and nobody sees the new one before it is complete."""
    from engines.build import main as make_engines
    from export.random_model import write_random_model

    second = write_random_model(tmp_path / "second", "tiny", seed=9)
    assert make_engines(["--model", str(second), "--runtime", "ort-cpu"]) == 0
    out = tmp_path / "index"
    for number, name in enumerate("ab"):
        write_folder(tmp_path / name, 6, first_seed=50 * number)
        assert index(tmp_path / name, out, "--model", tiny_model).code == 0
    before = vectors_by_key(out)
    assert index(tmp_path / "b", out, "--model", second).report["generation"] is None
    old, new = shards(out)[:2], shards(out)[2]
    assert len(old) == 2
    for path in (*old, new):
        path.unlink()
    code, report = verify(capsys, "--out", out)
    assert code == DAMAGED
    code, report = verify(capsys, "--repair", "--out", out)
    assert (code, report["findings"]) == (DONE, [])
    assert report["embedded"] == 6 + 6 + 6
    assert vectors_by_key(out) == before
    done = index(tmp_path / "b", out, "--model", second).report
    assert (done["embedded"], done["generation"]) == (0, None), "what the new model had is there again"


def test_a_pinned_generation_that_is_broken(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was chosen by a person: it is named with the way out, and a repair does not choose for them."""
    whole = vectors_by_key(out)
    show_generation(out, 1)
    first = vectors_by_key(out)
    (out / "generations/1/index.h5").unlink()
    code, report = verify(capsys, "--out", out)
    assert (code, whats(report)) == (DAMAGED, {"missing file"})
    assert "--show newest" in report["findings"][0]["remedy"]
    code, report = verify(capsys, "--repair", "--out", out)
    assert code == DAMAGED, "readers still see it"
    assert "--show newest" in report["findings"][0]["remedy"]
    assert run_module("pipeline.generations", "--out", out, "--show", "newest").code == 0
    code, report = verify(capsys, "--repair", "--out", out)
    assert (code, report["findings"]) == (DONE, [])
    assert vectors_by_key(out) == whole != first


@pytest.fixture
def frozen(out: Path) -> Iterator[Path]:
    """Mounted read-only where that is allowed, else without any right to write."""
    home = out.parent
    bind = subprocess.run(["mount", "--bind", str(home), str(home)], capture_output=True).returncode == 0
    if bind:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(home)], check=True)
        yield out
        subprocess.run(["umount", "--lazy", str(home)], check=True)
        return
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere, and may not mount here")
    paths = [out, *out.rglob("*")]
    for path in paths:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    yield out
    for path in paths:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)


def test_an_index_on_a_read_only_disk(frozen: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Looking, searching and verifying need no right to write; what does need it says so in one line."""
    with pytest.raises(OSError, match=r"Read-only|denied"):
        (frozen / "x").touch()
    for module, args in {
        "pipeline.status": (), "pipeline.generations": (), "pipeline.search": ("a text", "--json"),
        "pipeline.verify": ("full",),
    }.items():  # fmt: skip
        ran = run_module(module, *args, "--out", frozen)
        assert ran.code == 0, (module, ran.stderr)
    for module, args in {
        "pipeline.verify": ("--repair",), "pipeline.report": (),
        "pipeline.index": ("--source", "folder", "--root", "/tmp", "--model", tiny_model),
    }.items():  # fmt: skip
        ran = run_module(module, *args, "--out", frozen)
        assert ran.code == 1, (module, ran.stderr)
        assert "Traceback" not in ran.stderr, ran.stderr
        assert "ead-only" in ran.stderr or "denied" in ran.stderr, (module, ran.stderr)
