"""What users run today, timed on the same files: one contestant per process, embeddings on disk at the end.

    python docs/benchmarks/peers.py CONTESTANT MODEL_DIR PICTURES_DIR OUT.npy    all of it
    python docs/benchmarks/peers.py CONTESTANT MODEL_DIR PICTURES_DIR            its two halves, apart from each other

    hf-one, hf-batched      transformers, one picture at a time and in batches of 32
    sentence-transformers   6.2.0 loads the same folder; pictures are opened by us
    fastembed/threads       0.9.1, on MODEL_DIR/model.onnx (vision tower, input `pixel_values`): ONNX Runtime's threads
    fastembed/processes     one process a core, each with a thread and a model of its own, loaded when pictures come:
                            only the difference between two numbers of pictures is without it
    clip-retrieval/NxB      2.45.0 with setuptools<=80.9.0 and transformers<5: N processes prepare, batches of B

Needs nothing of ours. Prints one JSON line; its clock starts after imports and model load. clip-retrieval does not let
anybody in between: its own clock, from the first sample to the last, is taken. Halves, in pictures a second: `prepared`
is from files to what the model takes, `encoded` from there to vectors; for fastembed/processes, of one process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from towers import rate  # beside this file

BATCH = 32
SECONDS = 2.0  # of each half


class Tool(NamedTuple):
    batch: int
    prepare: Callable[[list[Path]], Any]  # a batch of files -> what `encode` takes
    encode: Callable[[Any], np.ndarray]
    whole: Callable[[list[Path]], np.ndarray]


def in_batches(paths: list[Path], batch: int, embed: Callable[[list[Path]], np.ndarray]) -> np.ndarray:
    return np.concatenate([embed(paths[first : first + batch]) for first in range(0, len(paths), batch)])


def opened(paths: list[Path]) -> list[Any]:
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in paths]


def hf(model_dir: str, batch: int) -> Tool:
    import torch
    from transformers import AutoImageProcessor, CLIPModel

    processor = AutoImageProcessor.from_pretrained(model_dir, backend="pil")
    model = CLIPModel.from_pretrained(model_dir).eval()

    def prepare(paths: list[Path]) -> Any:
        return processor(images=opened(paths), return_tensors="pt")["pixel_values"]

    def encode(pixels: Any) -> np.ndarray:
        with torch.inference_mode():
            emb = model.get_image_features(pixel_values=pixels).pooler_output
            return (emb / emb.norm(dim=-1, keepdim=True)).numpy()

    return Tool(batch, prepare, encode, lambda paths: in_batches(paths, batch, lambda some: encode(prepare(some))))


def sentence_transformers(model_dir: str) -> Tool:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_dir, device="cpu")

    def encode(features: Any) -> np.ndarray:
        with torch.inference_mode():
            return model(dict(features))["sentence_embedding"].numpy()

    def whole(paths: list[Path]) -> np.ndarray:
        return model.encode(opened(paths), batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)

    # All pictures at once would hold all of them in memory.
    return Tool(
        BATCH, lambda paths: model.preprocess(opened(paths)), encode, lambda paths: in_batches(paths, BATCH, whole)
    )


def fastembed(model_dir: str, processes: bool) -> Tool:
    from fastembed import ImageEmbedding
    from PIL import Image

    cores = int(os.environ["OMP_NUM_THREADS"])  # the budget that everybody has
    embedding = ImageEmbedding(
        "Qdrant/clip-ViT-B-32-vision", specific_model_path=model_dir, threads=cores,
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    network, parallel = embedding.model, cores if processes else None

    def prepare(paths: list[Path]) -> np.ndarray:
        return np.array(network.processor([Image.open(path) for path in paths]))

    def encode(pixels: np.ndarray) -> np.ndarray:
        return network.model.run(None, {network.model.get_inputs()[0].name: pixels})[0]

    def whole(paths: list[Path]) -> np.ndarray:
        return np.stack(list(embedding.embed([str(path) for path in paths], batch_size=BATCH, parallel=parallel)))

    return Tool(BATCH, prepare, encode, whole)


def without_cuda() -> None:
    """torchvision as pip brings it is built for CUDA: beside a CPU torch it misses two operators."""
    import torch

    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def clip_retrieval(model_dir: str, pictures_dir: str, workers: int, batch: int) -> tuple[np.ndarray, float]:
    """(vectors of the pictures it embedded, its own seconds)."""
    without_cuda()
    from clip_retrieval import clip_inference

    with tempfile.TemporaryDirectory() as out:
        clip_inference(
            input_dataset=pictures_dir, output_folder=out, input_format="files", enable_text=False,
            clip_model=f"hf_clip:{Path(model_dir).resolve()}", use_jit=False, batch_size=batch,
            num_prepro_workers=workers, output_partition_count=1,
        )  # fmt: skip
        stats = json.loads((Path(out) / "stats" / "0.json").read_text())
        vectors = [np.load(path) for path in sorted((Path(out) / "img_emb").glob("*.npy"))]
    return np.concatenate(vectors), float(stats["total_duration"])


def clip_retrieval_halves(model_dir: str, pictures_dir: str, workers: int, batch: int) -> dict[str, float]:
    """Its reader over all pictures, and its mapper on one of the batches."""
    without_cuda()
    from all_clip import load_clip
    from clip_retrieval.clip_inference.mapper import ClipMapper
    from clip_retrieval.clip_inference.reader import FilesReader

    name = f"hf_clip:{Path(model_dir).resolve()}"
    _, preprocess, tokenizer = load_clip(clip_model=name, use_jit=False, warmup_batch_size=batch)
    reader = FilesReader(lambda keys: keys, preprocess, tokenizer, pictures_dir, batch, workers, enable_text=False)
    mapper = ClipMapper(True, False, False, False, name, False, "", warmup_batch_size=batch)
    start_s = time.monotonic()
    batches = list(reader)
    images = sum(len(one["image_filename"]) for one in batches)
    prepared_s = time.monotonic() - start_s
    first = batches[0]
    return {
        "prepared": images / prepared_s,
        "encoded": rate(lambda: mapper(first), len(first["image_filename"]), SECONDS),
    }


def halves(tool: Tool, paths: list[Path]) -> dict[str, float]:
    batches = [paths[first : first + tool.batch] for first in range(0, len(paths), tool.batch)]
    ready, turn = tool.prepare(batches[0]), 0

    def prepare_next() -> None:
        nonlocal turn
        tool.prepare(batches[turn % len(batches)])
        turn += 1

    return {
        "prepared": rate(prepare_next, tool.batch, SECONDS),
        "encoded": rate(lambda: tool.encode(ready), tool.batch, SECONDS),
    }


def load(contestant: str, model_dir: str) -> Tool:
    if contestant.startswith("fastembed"):
        return fastembed(model_dir, contestant.endswith("processes"))
    if contestant == "sentence-transformers":
        return sentence_transformers(model_dir)
    return hf(model_dir, 1 if contestant == "hf-one" else BATCH)


def main() -> None:
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    contestant, model_dir, pictures_dir, *out = sys.argv[1:]
    paths = sorted(path for path in Path(pictures_dir).rglob("*") if path.is_file())
    if contestant.startswith("clip-retrieval"):
        workers, batch = map(int, contestant.partition("/")[2].split("x"))
        if not out:
            found = clip_retrieval_halves(model_dir, pictures_dir, workers, batch)
        else:
            emb_nd, seconds = clip_retrieval(model_dir, pictures_dir, workers, batch)
    else:
        tool = load(contestant, model_dir)
        if not out:
            # A last batch that is smaller would count as whole.
            found = halves(tool, paths[: len(paths) // tool.batch * tool.batch])
        else:
            start_s = time.monotonic()
            emb_nd = tool.whole(paths)
            seconds = time.monotonic() - start_s
    if out:
        np.save(out[0], emb_nd.astype(np.float16))
        found = {"images": len(emb_nd), "seconds": seconds}
    print()  # clip-retrieval leaves an unfinished line
    print(json.dumps({"contestant": contestant, **found}))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__" and sys.argv[1].startswith("clip-retrieval"):  # its logger imports all of it again
    without_cuda()
