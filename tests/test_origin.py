"""Promise: new vectors are those of the model that lies in its directory, or there are none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.build import build_engines
from engines.origin import current_artifact
from engines.spec import Artifact, ArtifactMissing, find_artifact
from export.random_model import write_random_model
from pipeline import index
from pipeline.tune import tuner


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model = write_random_model(tmp_path_factory.mktemp("models") / "tiny", "tiny")
    return build_engines(str(model), "ort-cpu", root=tmp_path_factory.mktemp("artifacts")).artifact


@pytest.fixture
def artifact(built: Artifact, tmp_path: Path) -> Artifact:
    """An artifact and its model, for a test to change both."""
    model = shutil.copytree(built.spec.model, tmp_path / "tiny")
    path = Path(shutil.copytree(built.path, tmp_path / "artifacts" / built.path.name))
    for name in ("spec.json", "source.json"):
        edit_json(path / name, lambda raw: raw.update(model=str(model)))
    return Artifact.open(path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def fine_tune(model: Path) -> None:
    """Other weights in a file of the same size."""
    tensors = load_file(model / "model.safetensors")
    tensors["visual_projection.weight"] += torch.ones_like(tensors["visual_projection.weight"])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def forget_digests(artifact: Artifact) -> None:
    edit_json(artifact.path / "source.json", lambda raw: raw.update(files=[row[:3] for row in raw["files"]]))


def touch(model: Path) -> None:
    for path in model.iterdir():
        os.utime(path, ns=(1, 1))


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (fine_tune, r"model\.safetensors has digest [0-9a-f]{8}, exported was [0-9a-f]{8}"),
    (lambda model: (model / "tokenizer.json").write_text("{}"), r"tokenizer\.json has 2 bytes, exported were [\d,]+"),
    (lambda model: (model / "processor_config.json").write_text("{}"), r"processor_config\.json is new"),
    (lambda model: (model / "tokenizer.json").unlink(), r"tokenizer\.json is gone"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_changed_model_computes_nothing(change: Callable[[Path], object], words: str, artifact: Artifact) -> None:
    model, root = artifact.spec.model, artifact.path.parent
    touch(Path(model))  # a copy: the bytes alone decide
    assert current_artifact(model, root) == artifact
    change(Path(model))
    with pytest.raises(ArtifactMissing, match=rf"{words}\. Run: make engines MODEL={model} ") as refused:
        current_artifact(model, root)
    assert "\n" not in str(refused.value)
    assert find_artifact(model, root) == artifact  # who searches or verifies follows the index


def test_an_index_is_asked_with_the_artifact_it_was_made_with(artifact: Artifact) -> None:
    """Of two under one name, once the model has changed; who names no space gets the newer one."""
    root, model = artifact.path.parent, artifact.spec.model
    newer = Path(shutil.copytree(artifact.path, root / "newer"))
    edit_json(newer / "spec.json", lambda raw: raw.update(weights_digest=raw["weights_digest"][::-1]))
    assert find_artifact(model, root) == Artifact.open(newer)
    assert find_artifact(model, root, artifact.spec.space) == artifact
    assert find_artifact(model, root, "nobody's") == Artifact.open(newer)


@pytest.mark.parametrize("command", [index.main, tuner.main])
def test_commands_that_compute_vectors_say_so_with_exit_2(
    command: Callable[[list[str]], int],
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NIGHTJAR_ARTIFACTS", str(artifact.path.parent))
    monkeypatch.chdir(tmp_path)
    fine_tune(Path(artifact.spec.model))
    (tmp_path / "pictures").mkdir()
    there = sorted(tmp_path.rglob("*"))
    assert command(["--source", "folder", "--root", "pictures", "--model", artifact.spec.model, "--json"]) == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["exit"] == 2
    assert f"make engines MODEL={artifact.spec.model}" in last["error"]
    assert sorted(tmp_path.rglob("*")) == there


def test_after_the_line_it_names_the_new_model_is_the_one(artifact: Artifact) -> None:
    model, root = artifact.spec.model, artifact.path.parent
    fine_tune(Path(model))
    made = build_engines(model, "ort-cpu", root=root).artifact
    assert current_artifact(model, root) == made
    assert made.spec.space != artifact.spec.space


def test_an_artifact_is_taken_where_its_model_is_gone(artifact: Artifact) -> None:
    model, root = Path(artifact.spec.model), artifact.path.parent
    (model / "model.safetensors").unlink()
    assert current_artifact(str(model), root) == artifact
    shutil.rmtree(model)
    assert current_artifact(str(model), root) == artifact


def test_a_hub_id_names_what_was_exported(artifact: Artifact) -> None:
    edit_json(artifact.path / "spec.json", lambda raw: raw.update(model="somebody/tiny"))
    fine_tune(Path(artifact.spec.model))
    assert current_artifact("somebody/tiny", artifact.path.parent).path == artifact.path


def test_without_digests_times_decide(artifact: Artifact) -> None:
    forget_digests(artifact)
    model, root = artifact.spec.model, artifact.path.parent
    assert current_artifact(model, root) == artifact
    touch(Path(model))
    with pytest.raises(ArtifactMissing, match=r"config\.json was written since, and the artifact is from before "):
        current_artifact(model, root)


def test_an_unreadable_artifact_is_named_with_what_to_do(artifact: Artifact) -> None:
    (artifact.path / "spec.json").write_text("")
    with pytest.raises(ArtifactMissing, match=r"spec\.json cannot be read \(JSONDecodeError: .*\)\. Move .* out of"):
        find_artifact(artifact.spec.model, artifact.path.parent)
