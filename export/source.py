"""Where weights come from: a directory as it is, or a hub id through the ordinary Hugging Face cache.

    source_dir("openai/clip-vit-base-patch32")   # the cached snapshot; downloaded only when it is not cached yet
    source_dir("/models/my-clip")                # the directory itself

A cached snapshot is used as it is and never refreshed behind the user's back: new weights would mean a new vector
space. Nothing here imports torch or transformers, so asking "has anything changed?" costs 0.1 s and not 5 s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engines.origin import CONFIG_FILES, SAFE_WEIGHTS, TORCH_WEIGHTS
from engines.spec import Preprocess

# What a model directory must hold: any one of the alternatives of each line, all files of that alternative.
PARTS: dict[str, list[tuple[str, ...]]] = {
    "the configuration": [("config.json",)],
    "weights": [(SAFE_WEIGHTS[0],), (f"{SAFE_WEIGHTS[0]}.index.json",), (TORCH_WEIGHTS[0],),
                (f"{TORCH_WEIGHTS[0]}.index.json",)],
    "the preprocessing": [("preprocessor_config.json",), ("processor_config.json",)],
    "the tokenizer": [("tokenizer.json",), ("vocab.json", "merges.txt")],
}  # fmt: skip
IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
BICUBIC = 3  # PIL's number for it, which is what preprocessor_config.json stores


class ExportError(Exception):
    """The model cannot be exported; one line that says what was found, what was expected, and the remedy."""


def source_dir(model: str) -> Path:
    """The directory that holds the files of `model`.

    Raises:
        ExportError: no such directory, the hub cannot be reached, or a file is missing.
    """
    if Path(model).is_dir():
        directory = Path(model).resolve()
    elif Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ExportError(
            f"{model!r} is not a directory. Give a model directory (config.json, weights, tokenizer, "
            "preprocessor_config.json) or a hub id such as openai/clip-vit-base-patch32"
        )
    else:
        directory = _snapshot(model)
    for part, alternatives in PARTS.items():
        if not _has(directory, alternatives):
            wanted = " or ".join(" + ".join(names) for names in alternatives)
            raise ExportError(
                f"{directory} lacks {part}: expected {wanted}. Save the model with save_pretrained, its processor too, "
                "or download the whole repository"
            )
    if (directory / "adapter_config.json").is_file():
        raise ExportError(
            f"{directory} holds an adapter (adapter_config.json), which only peft adds to the weights. Merge it into "
            "them (merge_and_unload, save_pretrained) and export what that gives"
        )
    return directory


def quiet_transformers() -> Any:
    """The library without its progress bars and advice: what matters in its warnings is an `ExportError` here."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON ({error}). Download it again") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds a {type(value).__name__}, expected a JSON object. Download it again")
    return value


def read_preprocess(directory: Path, image_size: int) -> Preprocess:
    """The preprocessing of the model, refused unless it is the one kind that every stage here reproduces exactly."""
    path = directory / "processor_config.json"  # how transformers 5 saves a whole processor; it reads it first
    raw = read_json(path).get("image_processor") if path.is_file() else None
    if raw is None:
        path = directory / "preprocessor_config.json"
        raw = read_json(path) if path.is_file() else {}
    factor = raw.get("rescale_factor", 1 / 255)
    size, crop = raw.get("size", 224), raw.get("crop_size", 224)
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type", IMAGE_PROCESSORS[0]))
    wanted_size = {"shortest_edge": size} if isinstance(size, int) else size
    crop_hw = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    checks = {
        "image_processor_type": (kind in IMAGE_PROCESSORS, kind, IMAGE_PROCESSORS[0]),
        "size": (wanted_size == {"shortest_edge": image_size}, size, {"shortest_edge": image_size}),
        "crop_size": (crop_hw == (image_size, image_size), crop, {"height": image_size, "width": image_size}),
        "resample": (raw.get("resample", BICUBIC) == BICUBIC, raw.get("resample"), f"{BICUBIC} (bicubic)"),
        "rescale_factor": (abs(factor * 255 - 1) < 1e-6, factor, 1 / 255),
        **{step: (raw.get(step, True) is True, raw.get(step), True) for step in steps},
        **{name: (len(raw.get(name) or ()) == 3, raw.get(name), "3 numbers") for name in ("image_mean", "image_std")},
    }
    for name, (right, found, expected) in checks.items():
        if not right:
            raise ExportError(
                f"{path}: {name} is {found!r}, expected {expected!r}. Only shortest edge, bicubic, square centre crop "
                f"to the {image_size} pixels of the model, mean and std is reproduced exactly; nothing is approximated"
            )
    mean, std = (tuple(float(value) for value in raw[name]) for name in ("image_mean", "image_std"))
    return Preprocess(size=image_size, mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))


def _has(directory: Path, alternatives: list[tuple[str, ...]]) -> bool:
    return any(all((directory / name).is_file() for name in names) for names in alternatives)


def _snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download

    def get(patterns: list[str], *, offline: bool = False) -> Path:
        return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=offline))

    try:
        cached = get(CONFIG_FILES, offline=True)
        if all(_has(cached, alternatives) for alternatives in PARTS.values()):
            return cached
    except (OSError, ValueError):
        pass  # not cached: ask the hub
    try:
        directory = get([*CONFIG_FILES, *SAFE_WEIGHTS])
        return directory if _has(directory, PARTS["weights"]) else get([*CONFIG_FILES, *TORCH_WEIGHTS])
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{model!r} is neither a directory nor a model that the hub gives us ({str(error).splitlines()[0]}). "
            "On a machine without the hub, copy the model directory there and give its path"
        ) from error
