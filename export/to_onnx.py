"""A model into an artifact: ONNX graphs of both towers, tokenizer, golden vectors, spec.json.

    python -m export onnx openai/clip-vit-base-patch32 --root artifacts

Opset 18, batch dynamic, ids int32, output float32 of unit norm; every graph is one file below 2 GB. fp32 must give the
vectors of the Hugging Face model within 1e-5 or nothing is written; fp16 (weights and arithmetic; input, L2 norm and
output stay float32) within 1 % of the spread of the set. A second export of an unchanged model compares file times and
returns in 0.3 s without loading torch; where no weight but the tokenizer changed, graphs and engines stay. B/32 takes
25 s of CPU time, 2.5 GB of memory and 0.9 GB on disk; L/14 two minutes, 7.3 GB and 2.5 GB.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engines.origin import SourceFile, difference, read_source, source_files
from engines.plan import write_whole
from engines.spec import Artifact, Precision, Tower, canonical_model, digest_json, find_artifact, workplace
from export.source import ExportError, source_dir

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
    if kept := _kept(model, directory, root):
        return kept
    root.mkdir(parents=True, exist_ok=True)
    with workplace(root) as scratch:
        return _kept(model, directory, root) or _made(model, directory, root, scratch)


def _kept(model: str, directory: Path, root: Path) -> Artifact | None:
    """The artifact that was exported from just these files; from now on the one that is found under `model`."""
    name = canonical_model(model)
    for path in sorted(root.glob("*/source.json")):
        of_model, exporter, files = read_source(path.parent)
        spec_json = path.parent / "spec.json"
        if (of_model, exporter) != (name, EXPORTER) or not spec_json.is_file() or difference(directory, files):
            continue
        if files != (now := source_files(directory, files)):
            write_whole(path, _source_json(name, now))  # copied or touched: next time the bytes need not be read
        if find_artifact(model, root).path != path.parent:
            os.utime(spec_json)  # the model was another one in between, and is this one again
        return Artifact.open(path.parent)
    return None


def _made(model: str, directory: Path, root: Path, scratch: Path) -> Artifact:
    from export.towers import load_towers

    files = source_files(directory)
    towers = load_towers(model)
    if source_files(directory, files) != files:
        raise ExportError(f"{directory} was written to while it was read. Run the same command again")
    spec = towers.spec
    made, final = scratch / "artifact", root / f"{_name(model)}-{digest_json([spec.model, spec.space, EXPORTER])[:8]}"
    golden = _write_companions(towers, made)
    known = (final / "spec.json").is_file()
    if not known:
        _write_graphs(towers, golden, made)
    (made / "spec.json").write_text(spec.to_json())
    (made / "source.json").write_text(_source_json(spec.model, files))
    _sync(made)
    if known:  # every weight is the same; the tokenizer may be another
        for path in [*made.glob("*/*"), made / "spec.json", made / "source.json"]:
            os.replace(path, final / path.relative_to(made))
    else:
        try:
            os.replace(made, final)
        except OSError as error:
            raise ExportError(f"{final} exists but has no spec.json, so it is not an artifact. Remove it") from error
    return Artifact.open(final)


def _source_json(model: str, files: list[SourceFile]) -> str:
    return json.dumps({"model": model, "exporter": EXPORTER, "files": files}, indent=2) + "\n"


def _sync(folder: Path) -> None:
    """Else a power cut after the rename leaves an artifact with empty files, which nothing would make again."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


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


def _write_companions(towers: Towers, folder: Path) -> dict[str, npt.NDArray[Any]]:
    """Tokenizer and golden.npz, proven to agree; gives the arrays of golden.npz."""
    from tokenizers import Tokenizer

    from export.golden import make_golden

    for name in ("golden", "tokenizer"):
        (folder / name).mkdir(parents=True)
    golden = make_golden(towers)
    np.savez(folder / "golden" / "golden.npz", allow_pickle=False, **golden)
    write_tokenizer(towers.tokenizer, towers.spec.context_length, folder / "tokenizer")
    plain = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    for text, ids in zip(golden["texts"], golden["ids"], strict=True):
        if (got := plain.encode(str(text)).ids) != ids.tolist():
            raise ExportError(
                f"{towers.source}: tokenizer.json alone makes {got[:4]}... of {str(text)[:40]!r}, transformers makes "
                f"{ids[:4].tolist()}... of it. Padding and cutting on the right are expected (tokenizer_config.json)"
            )
    return golden


def _write_graphs(towers: Towers, golden: dict[str, npt.NDArray[Any]], folder: Path) -> None:
    (folder / "onnx").mkdir()
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
