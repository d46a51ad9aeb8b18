"""What an artifact is, in JSON beside the files: `ModelSpec` for the model, `EngineCard` for each compiled engine.

    artifacts/<name>-<digest8>/
      spec.json             ModelSpec, written last: its existence means the export is complete
      source.json           the files it was exported from: see engines.origin
      tokenizer/            tokenizer.json (read by the `tokenizers` library, no torch needed) and its HF companions
      onnx/                 {vision,text}-{fp32,fp16}.onnx
      golden/golden.npz     pictures (encoded), reference pixels and vectors: what gate and verify compare with
      engines/<tower>-<runtime>-<precision>-<host>/{engine.*, card.json}

Nothing is ever read out of a file or folder name. This module needs nothing but the standard library.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

log = logging.getLogger(__name__)

Tower: TypeAlias = Literal["vision", "text"]
Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class Preprocess:
    """Shortest edge to `size` (bicubic, antialias, on uint8), centre crop, then (x/255 - mean) / std."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bicubic"] = "bicubic"
    exact_pixels_max: int = 64_000_000  # above: scaled decode where the format allows, and the row is marked

    @property
    def digest(self) -> str:
        return digest_json(asdict(self))


@dataclass(frozen=True)
class TowerSpec:
    layers: int
    width: int
    heads: int
    tokens: int  # sequence length the tower sees: patches + class token, or context length
    gflop: float  # multiply-adds x 2 of one forward pass of one row, in 1e9


@dataclass(frozen=True)
class ModelSpec:
    """Identity and interface of one exported model."""

    model: str  # hub id or directory as the user gave it
    family: str  # key of export.towers.FAMILIES
    weights_digest: str  # BLAKE3 over names, shapes, dtypes and bytes of the parameters that reach a vector
    dim: int  # width of the shared embedding space
    preprocess: Preprocess
    context_length: int
    logit_scale: float  # exp'd, i.e. what a cosine is multiplied with
    vision: TowerSpec
    text: TowerSpec
    pad_id: int  # tokenizer.json already pads and cuts to `context_length`; these are for whoever builds ids by hand
    eos_id: int
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def space(self) -> str:
        """Vectors are comparable only inside one space: same weights, same preprocessing."""
        return f"{self.weights_digest[:16]}-{self.preprocess.digest[:16]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        raw: dict[str, Any] = json.loads(text)
        pre = raw.pop("preprocess")
        pre["mean"], pre["std"] = tuple(pre["mean"]), tuple(pre["std"])
        vision, tower_text = TowerSpec(**raw.pop("vision")), TowerSpec(**raw.pop("text"))
        return cls(preprocess=Preprocess(**pre), vision=vision, text=tower_text, **raw)


@dataclass(frozen=True)
class EngineCard:
    """What one compiled engine is, what it may run on, and what was measured when it was built."""

    tower: Tower
    runtime: str  # key of engines.RUNTIMES
    precision: Precision
    host: str  # `host_id()`, or `GpuInfo.identity`, of where it was built; another host or GPU refuses it
    weights_digest: str
    file: str  # relative to the card; "../../onnx/..." for runtimes that compile at load
    file_digest: str
    batch: int  # rows of the input buffers; what it was measured with
    compiled_rows: int  # rows of one run of a compiled library, on a GPU the most; 0 where a run takes any batch
    threads: int  # OpenMP threads it was measured with
    input_name: str
    input_dtype: str  # numpy name: float32 for vision (float16 for fp16 on a GPU, but for `cuda`), int32 for text
    row_shape: tuple[int, ...]  # of one input row: (3, s, s) for vision, (context,) for text
    output_name: str
    dim: int
    versions: dict[str, str]
    parity: dict[str, float]  # see engines.gate: what was measured against golden vectors
    passed: bool  # False only with --allow-inaccurate, and then for ever
    rows_per_s: float
    gflop_per_s: float
    peak_share: float  # of the GEMM peak measured in the same run
    bytes: int
    recipe: int  # engines.build.RECIPE: raised when the same graph would be built differently
    verified: bool = True  # False: built for a GPU that was not there, so nothing was measured
    kernels: int = 0  # that one run launches on a GPU, where the compiler lists them
    fused_attention: int = 0  # of them, those that hold a whole attention

    @property
    def identity(self) -> str:
        """Runtime, precision and a digest of all that decides the bits of a vector, of nothing that was measured:
        `aoti-cpu int8 0a1b2c3d4e5f6a7b`. Stored with the vectors."""
        made_of = (self.tower, self.host, self.weights_digest, self.file_digest, self.compiled_rows, self.versions)
        return f"{self.runtime} {self.precision} {digest_json((self.runtime, self.precision, *made_of))[:16]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineCard:
        raw: dict[str, Any] = json.loads(text)
        return cls(row_shape=tuple(raw.pop("row_shape")), **raw)


class ArtifactMissing(Exception):
    """No artifact for a model; the message carries the `make engines` line that builds it."""


@dataclass(frozen=True)
class Artifact:
    path: Path
    spec: ModelSpec

    @classmethod
    def open(cls, path: Path) -> Artifact:
        return cls(path, ModelSpec.from_json((path / "spec.json").read_text()))

    def onnx(self, tower: Tower, precision: Precision) -> Path:
        return self.path / "onnx" / f"{tower}-{precision}.onnx"

    @property
    def tokenizer_json(self) -> Path:
        return self.path / "tokenizer" / "tokenizer.json"

    @property
    def golden_npz(self) -> Path:
        return self.path / "golden" / "golden.npz"

    def cards(self) -> list[tuple[Path, EngineCard]]:
        """Every finished engine: (path of card.json, card)."""
        found = sorted(self.path.glob("engines/*/card.json"))
        return [(path, EngineCard.from_json(path.read_text())) for path in found]


DEFAULT_MODEL = "openai/clip-vit-base-patch32"


def default_model() -> str:
    return os.environ.get("NIGHTJAR_MODEL") or DEFAULT_MODEL


def artifacts_root() -> Path:
    return Path(os.environ.get("NIGHTJAR_ARTIFACTS") or "artifacts")


def find_artifact(model: str, root: Path | None = None, space: str | None = None) -> Artifact:
    """The newest artifact recorded under `model` (hub id, or directory in any spelling); of `space` where one is there.

    Raises:
        ArtifactMissing: none has been built, or one there cannot be read; says how to build it.
    """
    root = root or artifacts_root()
    wanted = canonical_model(model)
    found = []
    for path in root.glob("*/spec.json"):
        try:
            found.append(Artifact.open(path.parent))
        except (ValueError, TypeError, KeyError) as error:  # no JSON, or of another version: it may be the one wanted
            raise ArtifactMissing(
                f"{path} cannot be read ({type(error).__name__}: {error}). Move {path.parent} out of {root} and run "
                f"make engines again"
            ) from error
    matching = [a for a in found if a.spec.model == wanted]
    if not matching:
        have = ", ".join(sorted({a.spec.model for a in found})) or "none"
        raise ArtifactMissing(f"no artifact for {model!r} in {root} (there: {have}). Run: make engines MODEL={model}")
    return max(matching, key=lambda a: (a.spec.space == space, (a.path / "spec.json").stat().st_mtime_ns))


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder` for what is being made there; rename it, or what it holds, when it is whole.

    One process at a time: another one waits. What a killed one left is removed.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process builds in %s; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        scratch = folder / ".making"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch)


def canonical_model(model: str) -> str:
    """A directory becomes its absolute path, a hub id stays as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def digest_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
