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
from tokenizers import Tokenizer

from engines.origin import read_source, source_files
from engines.spec import Artifact, find_artifact
from export import golden, to_onnx, towers
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


def test_touched_files_are_recognised_by_their_bytes_alone(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "artifacts"
    first = to_onnx.export_artifact(str(copied), root)
    with monkeypatch.context() as patch:
        patch.setattr(towers, "load_towers", lambda model: pytest.fail(f"{model} was read again"))
        os.utime(copied / "model.safetensors", ns=(1, 1))
        (copied / "trainer_state.json").write_text("{}")  # what a training leaves is no part of the model
        assert to_onnx.export_artifact(str(copied), root) == first
    assert read_source(first.path)[2] == source_files(copied)
    assert sorted(path.name for path in root.iterdir()) == [".lock", first.path.name]


def test_a_changed_model_is_exported_again_and_found_for_as_long_as_it_is_there(copied: Path, tmp_path: Path) -> None:
    root, was = tmp_path / "artifacts", (copied / "preprocessor_config.json").read_text()
    first = to_onnx.export_artifact(str(copied), root)
    edit_json(copied / "preprocessor_config.json", lambda raw: raw.update(image_mean=[0.5, 0.5, 0.5]))
    second = to_onnx.export_artifact(str(copied), root)
    assert second.path != first.path
    assert second.spec.space != first.spec.space
    assert find_artifact(str(copied), root) == second
    (copied / "preprocessor_config.json").write_text(was)
    assert to_onnx.export_artifact(str(copied), root) == first
    assert find_artifact(str(copied), root) == first
    assert sorted(path.name for path in root.iterdir()) == sorted([".lock", first.path.name, second.path.name])


def test_a_mended_tokenizer_replaces_the_old_one_and_no_graph(copied: Path, tmp_path: Path) -> None:
    first = to_onnx.export_artifact(str(copied), tmp_path)
    graphs = {path: path.stat().st_mtime_ns for path in first.path.glob("onnx/*")}
    before = np.load(first.golden_npz)
    edit_json(copied / "tokenizer.json", lambda raw: raw["model"]["vocab"].update(p=78, o=79))  # they were swapped
    second = to_onnx.export_artifact(str(copied), tmp_path)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in first.path.glob("onnx/*")} == graphs
    after, tokenizer = np.load(second.golden_npz), Tokenizer.from_file(str(second.tokenizer_json))
    row = list(after["texts"]).index("Passer domesticus")
    assert tokenizer.encode("Passer domesticus").ids == after["ids"][row].tolist() != before["ids"][row].tolist()
    assert np.abs(after["text_vectors"][row] - before["text_vectors"][row]).max() > 0.01
    np.testing.assert_array_equal(after["image_vectors"], before["image_vectors"])


def test_an_artifact_from_before_digests_were_kept_gets_them(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = to_onnx.export_artifact(str(copied), tmp_path)
    (copied / "other.json").write_text("{}")
    rows = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(copied.iterdir())]
    edit_json(first.path / "source.json", lambda raw: raw.update(files=rows))
    monkeypatch.setattr(towers, "load_towers", lambda model: pytest.fail(f"{model} was read again"))
    assert to_onnx.export_artifact(str(copied), tmp_path) == first
    assert read_source(first.path)[2] == source_files(copied)
    assert {len(file.digest) for file in source_files(copied)} == {64}


def test_a_model_that_is_written_to_while_it_is_read_is_refused(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = towers.load_towers

    def written_to(model: str) -> towers.Towers:
        loaded = load(model)
        os.utime(copied / "model.safetensors", ns=(1, 1))
        return loaded

    monkeypatch.setattr(towers, "load_towers", written_to)
    with pytest.raises(ExportError, match="was written to while it was read"):
        to_onnx.export_artifact(str(copied), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", copied.name]


KILLED = """
import os, pathlib, sys
from export import to_onnx
to_onnx.check_vectors = lambda *_: os.kill(os.getpid(), 9)  # the first graph is there
to_onnx.export_artifact(sys.argv[1], pathlib.Path(sys.argv[2]))
"""


def test_what_a_killed_export_left_is_removed_and_two_at_once_make_one(copied: Path, tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    killed = subprocess.run([sys.executable, "-c", KILLED, copied, root], capture_output=True, check=False)
    assert killed.returncode == -9
    assert list(root.rglob("*.onnx"))
    assert not list(root.glob("*/spec.json"))  # nothing that any command would take
    command = [sys.executable, "-m", "export", "onnx", str(copied), "--root", str(root)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (line,) = said
    assert sorted(path.name for path in root.iterdir()) == [".lock", Path(line.strip()).name]


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def set_json(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / name, lambda raw: raw.update(values))


def drop_projection(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def edit_weights(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Names with __ for the dots."""
    from safetensors.torch import load_file, save_file

    def edit(model: Path) -> None:
        added = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(load_file(model / "model.safetensors") | added, model / "model.safetensors", {"format": "pt"})

    return edit


def other_processor(model: Path) -> None:
    """transformers reads the processor of processor_config.json first; it must not be passed over here."""
    raw = json.loads((model / PRE).read_text())
    (model / "processor_config.json").write_text(json.dumps({"image_processor": raw | {"resample": 2}}))


def truncate_weights(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def other_eos(model: Path) -> None:
    edit_json(model / "config.json", lambda raw: raw["text_config"].update(eos_token_id=7))


def relu(model: Path) -> None:
    edit_json(model / "config.json", lambda raw: raw["vision_config"].update(hidden_act="relu"))


PRE, TOKENIZER = "preprocessor_config.json", "tokenizer_config.json"
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
    (set_json(PRE, size={"shortest_edge": 32, "longest_edge": 40}), r"size is \{.*'longest_edge': 40\}"),
    (other_processor, r"processor_config\.json: resample is 2"),
    (set_json("config.json", auto_map={"AutoModel": "its.Own"}), r"config\.json has auto_map"),
    (set_json("config.json", quantization_config={"quant_method": "x"}), r"config\.json has quantization_config"),
    (set_json("config.json", projection_dim=31), r"has the shape \(32, 48\) .* asks for \(31, 48\)"),
    (lambda model: (model / "adapter_config.json").write_text("{}"), r"holds an adapter"),
    (edit_weights(vision_model__embeddings__patch_embedding__bias=torch.ones(64)), r"no place for 1 tensors .*bias"),
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


# What only shows in what is made of the golden pictures and texts.
UNLIKE = [
    (set_json(TOKENIZER, padding_side="left"), r"tokenizer\.json alone makes .* of 'a photo of a cat', transformers"),
    (set_json(TOKENIZER, truncation_side="left"), r"tokenizer\.json alone makes .* of 'a red circle "),
    (set_json(PRE, size=32, default_to_square=True), r"makes other pixels than .* largest difference \d\.\d\de[+-]00"),
    (set_json(PRE, do_pad=True, pad_size={"height": 40, "width": 40}), r"shape \(3, 40, 40\), expected \(3, 32, 32\)"),
]


@pytest.mark.parametrize(("spoil", "message"), UNLIKE)
def test_what_would_be_done_otherwise_here_is_refused(
    spoil: Callable[[Path], None], message: str, copied: Path, tmp_path: Path
) -> None:
    spoil(copied)
    with pytest.raises(ExportError, match=message):
        to_onnx.export_artifact(str(copied), tmp_path / "artifacts")
    assert not list((tmp_path / "artifacts").glob("*/*"))


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
