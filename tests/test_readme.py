"""README and docs/tree.md are true: the tree is the tree on disk, the commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from store_model import run

from pipeline.search import Index

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TREE = (ROOT / "docs" / "tree.md").read_text()


def test_tree_matches_the_disk() -> None:
    block = TREE.split("```")[1]
    listed = {line.split()[0] for line in block.strip().splitlines()}
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listing.stdout.splitlines()
    code = {path for path in tracked if path.endswith((".py", ".c", ".h")) and not path.endswith("__init__.py")}
    on_disk = {path for path in code if not path.startswith("tests/")} | {"tests/"}
    assert listed == on_disk


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert named <= targets


def test_an_index_is_read_as_shown_while_a_program_holds_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = next(part for part in README.split("```python\n")[1:] if part.startswith("import h5py")).split("```")[0]
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "inat2021-index", {"a.jpg": b"a"})
    with Index.open("inat2021-index"):
        exec(snippet)
    assert "(1, 8) a.jpg" in capsys.readouterr().out
