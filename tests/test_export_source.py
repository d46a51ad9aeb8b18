"""Promise: an export happens once per model, and a model that cannot be reproduced is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.spec import Artifact, find_artifact
from export import golden, source, to_onnx, towers
from export.__main__ import main
from export.random_model import byte_vocab, write_random_model
from export.source import ExportError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny", "tiny")


@pytest.fixture(scope="module")
def artifact(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return to_onnx.export_artifact(str(model_dir), tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "copy")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_half_precision_files_are_the_same_model_as_their_float32_copy(copied: Path, tmp_path: Path) -> None:
    hf = towers.load_towers(str(copied)).hf
    hf.half().save_pretrained(copied)
    hf.float().save_pretrained(tmp_path / "wide")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(copied / name, tmp_path / "wide")
    half, wide = towers.load_towers(str(copied)), towers.load_towers(str(tmp_path / "wide"))
    assert half.vision.position.dtype == torch.float32
    assert half.spec.weights_digest == wide.spec.weights_digest


def test_the_digest_sees_what_reaches_a_vector_and_nothing_else(model_dir: Path) -> None:
    loaded = towers.load_towers(str(model_dir))
    assert towers.load_towers(str(model_dir)).spec.weights_digest == loaded.spec.weights_digest
    loaded.hf.logit_scale += 1
    assert towers.weights_digest(loaded.hf) == loaded.spec.weights_digest
    loaded.hf.text_projection.weight[3, 4] += 1e-6
    assert towers.weights_digest(loaded.hf) != loaded.spec.weights_digest


def test_weights_in_pytorch_format_and_a_whole_processor_are_read(copied: Path, artifact: Artifact) -> None:
    import transformers

    loaded = towers.load_towers(str(copied))
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessorPil.from_pretrained(copied), loaded.tokenizer)
    (copied / "preprocessor_config.json").unlink()
    processor.save_pretrained(copied)
    assert (copied / "processor_config.json").is_file()
    assert not (copied / "preprocessor_config.json").exists()
    torch.save(loaded.hf.state_dict(), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    again = towers.load_towers(str(copied))
    assert again.spec.space == artifact.spec.space
    np.testing.assert_array_equal(golden.make_golden(again)["pixels"], np.load(artifact.golden_npz)["pixels"])


def test_second_export_does_nothing_and_does_it_without_torch(model_dir: Path, artifact: Artifact) -> None:
    before = {path: path.stat().st_mtime_ns for path in artifact.path.rglob("*")}
    code = (
        "import sys, pathlib; from export.to_onnx import export_artifact;"
        f"print(export_artifact({str(model_dir)!r}, pathlib.Path({str(artifact.path.parent)!r})).path);"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=5, check=True)
    assert done.stdout.strip() == str(artifact.path)
    assert {path: path.stat().st_mtime_ns for path in artifact.path.rglob("*")} == before
    assert find_artifact(str(model_dir), artifact.path.parent) == artifact


def test_touched_files_are_recognised_and_changed_ones_exported_again(copied: Path, tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    first = to_onnx.export_artifact(str(copied), root)
    os.utime(copied / "model.safetensors", ns=(1, 1))
    assert to_onnx.export_artifact(str(copied), root) == first
    assert json.loads((first.path / "source.json").read_text())["files"] == source.fingerprint(copied)
    edit_json(copied / "preprocessor_config.json", lambda raw: raw.update(image_mean=[0.5, 0.5, 0.5]))
    second = to_onnx.export_artifact(str(copied), root)
    assert second.path != first.path
    assert second.spec.space != first.spec.space
    assert find_artifact(str(copied), root) == second
    assert sorted(path.name for path in root.iterdir()) == sorted([first.path.name, second.path.name])


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def set_json(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / name, lambda raw: raw.update(values))


def drop_projection(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def other_eos(model: Path) -> None:
    edit_json(model / "config.json", lambda raw: raw["text_config"].update(eos_token_id=7))


def relu(model: Path) -> None:
    edit_json(model / "config.json", lambda raw: raw["vision_config"].update(hidden_act="relu"))


PRE = "preprocessor_config.json"
REFUSALS = [
    (remove("config.json"), r"lacks the configuration: expected config\.json"),
    (remove("model.safetensors"), r"lacks weights: expected model\.safetensors or"),
    (remove("tokenizer.json"), r"lacks the tokenizer: expected tokenizer\.json or vocab\.json \+ merges\.txt"),
    (remove(PRE), r"lacks the preprocessing: expected preprocessor_config\.json"),
    (set_json("config.json", model_type="siglip"), r"is not a CLIP: model_type in its .* is 'siglip', expected one of"),
    (set_json(PRE, size={"height": 32, "width": 32}), r"size is \{'height': 32.*expected \{'shortest_edge': 32\}"),
    (set_json(PRE, size=36), r"size is 36, expected"),
    (set_json(PRE, crop_size={"height": 32, "width": 30}), r"crop_size is"),
    (set_json(PRE, resample=2), r"resample is 2, expected '3 \(bicubic\)'"),
    (set_json(PRE, do_center_crop=False), r"do_center_crop is False, expected True"),
    (set_json(PRE, rescale_factor=1.0), r"rescale_factor is 1\.0"),
    (set_json(PRE, image_mean=None), r"image_mean is None, expected '3 numbers'"),
    (set_json(PRE, image_processor_type="SiglipImageProcessor"), r"image_processor_type is 'SiglipImageProcessor'"),
    (drop_projection, r"lack 1 tensors of a CLIPModel, the first is visual_projection\.weight"),
    (truncate_weights, r"the weights cannot be read \(.+\)\. Download the model again"),
    (other_eos, r"text_config\.eos_token_id is 7, the tokenizer ends a text with 513"),
    (relu, r"hidden_act is 'relu', expected one of"),
    (lambda model: (model / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    (lambda model: (model / "tokenizer.json").write_text("{}"), r"the tokenizer cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), REFUSALS)
def test_refusals_are_one_line_with_what_was_found(spoil: Callable[[Path], None], message: str, copied: Path) -> None:
    spoil(copied)
    with pytest.raises(ExportError, match=message) as refused:
        towers.load_towers(str(copied))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model", ["/no/such/folder", "./here", __file__, "nobody/nothing-at-all", "not a valid id!"])
def test_a_model_that_cannot_be_had(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["onnx", model, "--root", str(tmp_path / "artifacts")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert model in said
    assert not (tmp_path / "artifacts").exists()


def test_a_cached_snapshot_is_used_without_the_hub(
    copied: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(copied, repository / "snapshots" / ("0" * 40))
    loaded = towers.load_towers("somebody/tiny")
    assert loaded.spec.model == "somebody/tiny"
    assert loaded.spec.weights_digest == towers.load_towers(str(model_dir)).spec.weights_digest


def test_random_model_is_seeded_and_its_vectors_differ(model_dir: Path, tmp_path: Path, artifact: Artifact) -> None:
    again = write_random_model(tmp_path / "again", "tiny")
    other = write_random_model(tmp_path / "other", "tiny", seed=1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (model_dir, again, other)]
    assert weights[0] == weights[1] != weights[2]
    vectors = np.load(artifact.golden_npz)["image_vectors"]
    assert (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)].mean() < 0.9


def test_random_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merges = [("a", "b</w>"), ("c", "ab</w>")]
    (tmp_path / "vocab.json").write_text(json.dumps(byte_vocab(merges)))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    target = str(tmp_path / "model")
    assert main(["random", "--arch", "tiny", "--vocab", str(tmp_path), target]) == 0
    assert capsys.readouterr().out.strip() == target
    assert towers.load_towers(target).tokenizer("cab ab")["input_ids"] == [514, 513, 512, 515]
    assert main(["random", "--arch", "tiny", target]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["random", "--arch", "tiny", "--vocab", str(tmp_path / "no.gz"), str(tmp_path / "more")]) == 2
    assert "no vocabulary" in capsys.readouterr().err
