"""Model directories with seeded random weights in real shapes: for benchmarks and tests, never for search quality.

    python -m export random --arch ViT-B-32 --vocab CLIP_VOCAB /models/random-b32

The directory is what `save_pretrained` would write (config.json, model.safetensors, preprocessor_config.json and the
tokenizer), so everything that reads a trained model reads it. Speed is that of a trained model of the shape; what the
vectors mean is noise. With Hugging Face's own initial weights different pictures have cosine 0.91 to 0.99, which hides
errors; at twice their scale it is 0.66 on the golden pictures, and biases and norms are random too, so that a lost one
shows.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from export.source import ExportError, quiet_transformers

Vocab: TypeAlias = tuple[dict[str, int], list[tuple[str, str]]]

DEMO_VOCAB = Path(__file__).parent / "demo"
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Merges that OpenAI's vocabulary file holds beyond its 49,408 tokens are not part of the model.
CLIP_TOKENS = 49_408
WEIGHT_SCALE = 2.0  # of Hugging Face's initial weights
VECTOR_NOISE = 0.05  # standard deviation added to biases and norms


@dataclass(frozen=True)
class Arch:
    width: int
    layers: int
    heads: int
    image: int
    patch: int
    text_width: int
    text_layers: int
    text_heads: int
    context: int
    dim: int


ARCHS = {
    "ViT-B-32": Arch(768, 12, 12, 224, 32, 512, 12, 8, 77, 512),
    "ViT-B-16": Arch(768, 12, 12, 224, 16, 512, 12, 8, 77, 512),
    "ViT-L-14": Arch(1024, 24, 16, 224, 14, 768, 12, 12, 77, 768),
    "ViT-L-14-336": Arch(1024, 24, 16, 336, 14, 768, 12, 12, 77, 768),
    "tiny": Arch(64, 2, 4, 32, 16, 48, 2, 3, 16, 32),  # exports in a second; needs no vocabulary file
}


def write_random_model(
    directory: Path, arch: str, *, vocab: Path | None = None, seed: int = 0, layers: int | None = None
) -> Path:
    """Write a CLIP model of shape `arch` with random weights; `layers` cuts both towers down.

    `vocab` is a folder with vocab.json and merges.txt, or OpenAI's bpe_simple_vocab_16e6.txt.gz; without it the demo
    vocabulary is used, and for "tiny" the bare bytes.
    """
    if arch not in ARCHS:
        raise ExportError(f"unknown architecture {arch!r}, expected one of {', '.join(ARCHS)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ExportError(f"{directory} exists and is not an empty folder. Name a new one, or remove it first")
    if vocab is None and arch == "tiny":
        tokens, merges = byte_vocab([]), list[tuple[str, str]]()
    else:
        tokens, merges = read_vocab(vocab or DEMO_VOCAB)
    directory.mkdir(parents=True, exist_ok=True)
    random_clip(ARCHS[arch], tokens, seed=seed, layers=layers).save_pretrained(directory)
    _write_companions(directory, ARCHS[arch], tokens, merges)
    return directory


def byte_vocab(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's vocabulary in CLIP's order: 256 bytes, the same at the end of a word, merges, start and end of text."""
    symbols = _byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    return {word: index for index, word in enumerate(words)}


def read_vocab(path: Path) -> Vocab:
    if path.suffix == ".gz" and path.is_file():
        merges = _merges(gzip.decompress(path.read_bytes()).decode())
        merges = merges[: CLIP_TOKENS - len(byte_vocab([]))]
        return byte_vocab(merges), merges
    files = path / "vocab.json", path / "merges.txt"
    for file in files:
        if not file.is_file():
            raise ExportError(
                f"no vocabulary: {file} is missing. Name a folder with vocab.json and merges.txt, or OpenAI's "
                "bpe_simple_vocab_16e6.txt.gz, with --vocab"
            )
    tokens: dict[str, int] = json.loads(files[0].read_text())
    return tokens, _merges(files[1].read_text())


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of GPT-2: printable ones stand for themselves, come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def _merges(text: str) -> list[tuple[str, str]]:
    pairs = [line.split() for line in text.splitlines()[1:] if line]  # the first line is a version
    return [(left, right) for left, right in pairs]


def random_clip(arch: Arch, tokens: dict[str, int], *, seed: int = 0, layers: int | None = None) -> Any:
    """A `CLIPModel` of that shape, in memory."""
    import torch

    transformers = quiet_transformers()
    vision = transformers.CLIPVisionConfig(
        hidden_size=arch.width,
        intermediate_size=4 * arch.width,
        num_hidden_layers=layers or arch.layers,
        num_attention_heads=arch.heads,
        image_size=arch.image,
        patch_size=arch.patch,
        initializer_factor=WEIGHT_SCALE,
        projection_dim=arch.dim,
    )
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=arch.text_width,
        intermediate_size=4 * arch.text_width,
        num_hidden_layers=layers or arch.text_layers,
        num_attention_heads=arch.text_heads,
        max_position_embeddings=arch.context,
        initializer_factor=WEIGHT_SCALE,
        projection_dim=arch.dim,
        bos_token_id=tokens[START],
        eos_token_id=tokens[END],
        pad_token_id=tokens[END],
    )
    config = transformers.CLIPConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=arch.dim
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config).requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += VECTOR_NOISE * torch.randn_like(parameter)
    return model.eval()


def _write_companions(directory: Path, arch: Arch, tokens: dict[str, int], merges: list[tuple[str, str]]) -> None:
    preprocess = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": arch.image},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": arch.image, "width": arch.image},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocess, indent=2) + "\n")
    tokenizer = quiet_transformers().CLIPTokenizer(vocab=tokens, merges=merges, model_max_length=arch.context)
    tokenizer.save_pretrained(directory)
