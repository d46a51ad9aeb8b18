"""A model into an artifact: ONNX graphs of both towers, tokenizer, golden vectors, spec.json.

    python -m export onnx openai/clip-vit-base-patch32 --root artifacts

Opset 18, batch dynamic, ids int32, output float32 of unit norm; every graph is one file below 2 GB. fp32 must give the
vectors of the Hugging Face model within 1e-5 or nothing is written; fp16 (weights and arithmetic; input, L2 norm and
output stay float32) within 1 % of the spread of the set. A second export of an unchanged model compares file times and
returns in 0.3 s without loading torch. B/32 takes 25 s of CPU time, 2.5 GB of memory and 0.9 GB on disk; L/14 two
minutes, 7.3 GB and 2.5 GB.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engines.spec import Artifact, Precision, Tower, canonical_model, digest_json
from export.source import ExportError, fingerprint, source_dir

if TYPE_CHECKING:
    from torch import nn

    from export.towers import Towers

# Raise it when the exported files change for the same weights: artifacts of another exporter are made again.
EXPORTER = 2
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
FP32_ERROR_MAX = 1e-5  # largest difference of one component of a unit vector
FP16_SPREAD_ERROR_MAX = 0.01  # mean distance to the fp32 vectors, in units of the spread of the set
PROTOBUF_BYTES_MAX = 2**31 - 2**24  # a larger graph keeps its weights in a file beside it


def export_artifact(model: str, root: Path) -> Artifact:
    """The artifact of `model` under `root`, made only when the model or the exporter has changed.

    Raises:
        ExportError: the model cannot be had or reproduced.
    """
    directory = source_dir(model)
    source = {"model": canonical_model(model), "exporter": EXPORTER, "files": fingerprint(directory)}
    for path in root.glob("*/source.json"):
        if json.loads(path.read_text()) == source and (path.parent / "spec.json").is_file():
            return Artifact.open(path.parent)

    from export.towers import load_towers

    towers = load_towers(model)
    spec = towers.spec
    identity = digest_json([spec.model, spec.space, EXPORTER])[:8]
    final = root / f"{_name(model)}-{identity}"
    source_text = json.dumps(source, indent=2) + "\n"
    if (final / "spec.json").is_file():  # the files were touched, their content is the same
        renewed = final / f".source-{os.getpid()}"
        renewed.write_text(source_text)
        os.replace(renewed, final / "source.json")
        return Artifact.open(final)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".export-") as scratch:
        made = Path(scratch) / final.name
        _write(towers, made)
        (made / "source.json").write_text(source_text)
        (made / "spec.json").write_text(spec.to_json())
        try:
            os.replace(made, final)
        except OSError as error:  # there by now: fine when another export of the same model was faster
            if not (final / "spec.json").is_file():
                raise ExportError(
                    f"{final} exists but has no spec.json, so it is not an artifact. Remove it"
                ) from error
    return Artifact.open(final)


def save_graph(tower: nn.Module, precision: Precision, dim: int, path: Path) -> None:
    """Write one checked ONNX file; above protobuf's 2 GB the weights go to a file beside it."""
    import onnx

    from export.graph import onnx_model

    model = onnx_model(tower, precision, dim)
    external = sum(tensor.ByteSize() for tensor in model.graph.initializer) > PROTOBUF_BYTES_MAX
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")
    onnx.checker.check_model(str(path), full_check=True)


def run_graph(path: Path, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Vectors of a graph on the CPU, four rows at a time so that L/14 at 336 pixels fits in memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: inputs[i : i + 4]})[0] for i in range(0, len(inputs), 4)])


def check_vectors(what: str, got: npt.NDArray[Any], want: npt.NDArray[Any], precision: Precision) -> float:
    """Refuse vectors that are not those of the original model; gives the error in the measure of the precision."""
    with np.errstate(invalid="ignore"):  # what overflowed is refused below
        distance = np.abs(got.astype(np.float64) - want)
    if precision == "fp32":
        measure, error, allowed = "the largest difference of a component", float(distance.max()), FP32_ERROR_MAX
    else:
        spread = np.linalg.norm(want - want.mean(0), axis=1).mean()
        measure, allowed = "the mean error relative to the spread of the set", FP16_SPREAD_ERROR_MAX
        error = float(np.linalg.norm(distance, axis=1).mean() / spread)
    if not error <= allowed:  # written so that NaN fails too
        raise ExportError(
            f"{what} {precision} does not give the vectors of the original model: {measure} is {error:.2e}, allowed "
            f"{allowed:g}. Nothing was written; report the model, its exact versions and this number"
        )
    return error


def _write(towers: Towers, folder: Path) -> None:
    from export.golden import make_golden

    for name in ("onnx", "golden", "tokenizer"):
        (folder / name).mkdir(parents=True)
    golden = make_golden(towers)
    np.savez(folder / "golden" / "golden.npz", allow_pickle=False, **golden)
    write_tokenizer(towers.tokenizer, towers.spec.context_length, folder / "tokenizer")
    artifact = Artifact(folder, towers.spec)
    work: list[tuple[Tower, nn.Module, npt.NDArray[Any], npt.NDArray[Any]]] = [
        ("vision", towers.vision, golden["pixels"], golden["image_vectors"]),
        ("text", towers.text, golden["ids"], golden["text_vectors"]),
    ]
    for tower, module, inputs, vectors in work:
        for precision in PRECISIONS:
            path = artifact.onnx(tower, precision)
            save_graph(module, precision, towers.spec.dim, path)
            check_vectors(f"the {tower} tower in", run_graph(path, inputs), vectors, precision)


def write_tokenizer(tokenizer: Any, length: int, folder: Path) -> None:
    """Hugging Face's files; tokenizer.json also cuts and pads, so that `encode(text).ids` is all it takes."""
    tokenizer.save_pretrained(folder)
    plain = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    plain.enable_truncation(length)
    plain.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    plain.save(str(folder / "tokenizer.json"))


def _name(model: str) -> str:
    """The last part of a hub id or path, kept to letters that are safe in every file system."""
    last = canonical_model(model).rstrip("/").rsplit("/", 1)[-1]
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in last)
