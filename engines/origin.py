"""What an artifact was exported from, and whether that is still what lies there.

    artifact = current_artifact("/models/my-clip")    # for whoever computes new vectors

`source.json` of an artifact holds name, size, time and BLAKE3 of every file the export read. A model directory whose
files differ from them holds another model under the same name, and its artifact is refused. Equal size and time count
as equal; where only the time differs (a copy, a touch) the bytes decide: 0.3 s for 600 MB. A hub id names what was
exported, whatever the cache of the hub holds since; so does a directory that is gone: artifacts are copied to hosts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from engines import file_digest
from engines.spec import Artifact, ArtifactMissing, find_artifact

# All that transformers reads of a CLIP; what a training leaves beside it (its state, its report) is no part of it.
CONFIG_FILES = [
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "adapter_config.json", "*.index.json",
]  # fmt: skip
SAFE_WEIGHTS = ["model.safetensors", "model-*.safetensors"]
TORCH_WEIGHTS = ["pytorch_model.bin", "pytorch_model-*.bin"]
WEIGHTS = [*SAFE_WEIGHTS, *TORCH_WEIGHTS]


class SourceFile(NamedTuple):
    """A row of `files` in source.json."""

    name: str
    size: int
    mtime_ns: int
    digest: str = ""  # BLAKE3; empty in artifacts made before digests were kept


def source_files(directory: Path, known: Iterable[SourceFile] = ()) -> list[SourceFile]:
    """Every file of a model directory that an export reads; those of `known` are not hashed again."""
    digests = {file[:3]: file.digest for file in known}
    files = []
    for path in _matching(directory, [*CONFIG_FILES, *WEIGHTS]):
        stat = path.stat()
        file = SourceFile(path.name, stat.st_size, stat.st_mtime_ns)
        files.append(file._replace(digest=digests.get(file[:3]) or file_digest(path)))
    return files


def read_source(artifact_path: Path) -> tuple[str, int, list[SourceFile]]:
    """Model, exporter and files of an artifact's source.json."""
    raw = json.loads((artifact_path / "source.json").read_text())
    return raw["model"], raw["exporter"], [SourceFile(*row) for row in raw["files"]]


def current_artifact(model: str, root: Path | None = None) -> Artifact:
    """`find_artifact`, refused where `model` is a directory whose files are not those that were exported.

    Raises:
        ArtifactMissing: none has been built, or none of the model as it is now; names a file that differs.
    """
    artifact = find_artifact(model, root)
    directory = Path(artifact.spec.model)  # absolute, or a hub id
    there = directory.is_absolute() and _matching(directory, WEIGHTS)
    if there and (words := difference(directory, read_source(artifact.path)[2])):
        raise ArtifactMissing(
            f"{directory} is not the model that {artifact.path} was exported from: {words}. Run: make engines "
            f"MODEL={directory} (it builds anew only what a change of the model asks for)"
        )
    return artifact


def difference(directory: Path, exported: list[SourceFile]) -> str:
    """The first file of a model directory that is not as it was exported, in words; empty where all are."""
    before = {file.name: file for file in exported}
    for path in _matching(directory, [*CONFIG_FILES, *WEIGHTS]):
        stat, file = path.stat(), before.pop(path.name, None)
        if file is None:
            return f"{path.name} is new"
        if stat.st_size != file.size:
            return f"{path.name} has {stat.st_size:,} bytes, exported were {file.size:,}"
        if stat.st_mtime_ns == file.mtime_ns:
            continue
        if not file.digest:
            return f"{path.name} was written since, and the artifact is from before digests were kept"
        if (digest := file_digest(path)) != file.digest:
            return f"{path.name} has digest {digest[:8]}, exported was {file.digest[:8]}"
    # Artifacts from before digests were kept list every *.json.
    gone = [name for name in before if any(fnmatch(name, pattern) for pattern in (*CONFIG_FILES, *WEIGHTS))]
    return f"{gone[0]} is gone" if gone else ""


def _matching(directory: Path, patterns: list[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})
