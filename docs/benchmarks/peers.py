"""What users run today, timed on the same files: one contestant per process, embeddings on disk at the end.

    python docs/benchmarks/peers.py CONTESTANT MODEL_DIR PICTURES_DIR OUT.npy

    hf-one, hf-batched      transformers, one picture at a time and in batches of 32
    sentence-transformers   6.2.0 loads the same folder; pictures are opened by us
    fastembed/threads       0.9.1, on MODEL_DIR/model.onnx (vision tower, input `pixel_values`): ONNX Runtime's threads
    fastembed/processes     one process a core, each with a thread and a model of its own, loaded when pictures come:
                            only the difference between two numbers of pictures is without it
    clip-retrieval/N workers    2.45.0 with setuptools<=80.9.0 and transformers<5, batches of 64; N processes prepare

Needs nothing of ours. Prints one JSON line; its clock starts after imports and model load. clip-retrieval does not let
anybody in between: its own clock, from the first sample to the last, is taken.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH = 32
CLIP_RETRIEVAL_BATCH = 64


def hf(model_dir: str, paths: list[Path], batch: int) -> tuple[np.ndarray, float]:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, CLIPModel

    processor = AutoImageProcessor.from_pretrained(model_dir, backend="pil")
    model = CLIPModel.from_pretrained(model_dir).eval()
    start_s = time.monotonic()
    blocks = []
    with torch.inference_mode():
        for first in range(0, len(paths), batch):
            pictures = [Image.open(path).convert("RGB") for path in paths[first : first + batch]]
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
            emb = model.get_image_features(pixel_values=pixels).pooler_output
            blocks.append((emb / emb.norm(dim=-1, keepdim=True)).numpy())
    return np.concatenate(blocks), start_s


def sentence_transformers(model_dir: str, paths: list[Path]) -> tuple[np.ndarray, float]:
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_dir, device="cpu")
    start_s, blocks = time.monotonic(), []
    for first in range(0, len(paths), BATCH):  # all at once would hold all pictures in memory
        pictures = [Image.open(path).convert("RGB") for path in paths[first : first + BATCH]]
        blocks.append(model.encode(pictures, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False))
    return np.concatenate(blocks), start_s


def fastembed(model_dir: str, paths: list[Path], processes: bool) -> tuple[np.ndarray, float]:
    from fastembed import ImageEmbedding

    cores = int(os.environ["OMP_NUM_THREADS"])  # the budget that everybody has
    model = ImageEmbedding(
        "Qdrant/clip-ViT-B-32-vision", specific_model_path=model_dir, threads=cores,
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    start_s, parallel = time.monotonic(), cores if processes else None
    return np.stack(list(model.embed([str(path) for path in paths], batch_size=BATCH, parallel=parallel))), start_s


def without_cuda() -> None:
    """torchvision as pip brings it is built for CUDA: beside a CPU torch it misses two operators."""
    import torch

    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def clip_retrieval(model_dir: str, pictures_dir: str, workers: int) -> tuple[np.ndarray, float]:
    """(vectors of the pictures it embedded, its own seconds)."""
    without_cuda()
    from clip_retrieval import clip_inference

    with tempfile.TemporaryDirectory() as out:
        clip_inference(
            input_dataset=pictures_dir, output_folder=out, input_format="files", enable_text=False,
            clip_model=f"hf_clip:{Path(model_dir).resolve()}", use_jit=False, batch_size=CLIP_RETRIEVAL_BATCH,
            num_prepro_workers=workers, output_partition_count=1,
        )  # fmt: skip
        stats = json.loads((Path(out) / "stats" / "0.json").read_text())
        vectors = [np.load(path) for path in sorted((Path(out) / "img_emb").glob("*.npy"))]
    return np.concatenate(vectors), float(stats["total_duration"])


def main() -> None:
    contestant, model_dir, pictures_dir, out = sys.argv[1:5]
    paths = sorted(path for path in Path(pictures_dir).rglob("*") if path.is_file())
    tool, _, mode = contestant.partition("/")
    if tool == "clip-retrieval":
        emb_nd, seconds = clip_retrieval(model_dir, pictures_dir, int(mode.split()[0]))
    else:
        if tool == "fastembed":
            emb_nd, start_s = fastembed(model_dir, paths, mode == "processes")
        elif tool == "sentence-transformers":
            emb_nd, start_s = sentence_transformers(model_dir, paths)
        else:
            emb_nd, start_s = hf(model_dir, paths, 1 if contestant == "hf-one" else BATCH)
        seconds = time.monotonic() - start_s
    np.save(out, emb_nd.astype(np.float16))
    print()  # clip-retrieval leaves an unfinished line
    print(json.dumps({"contestant": contestant, "images": len(emb_nd), "seconds": seconds}))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__" and sys.argv[1].startswith("clip-retrieval"):  # its logger imports all of it again
    without_cuda()
