"""What users run today, timed on the same files: one contestant per process, embeddings on disk at the end.

    python docs/benchmarks/peers.py {hf-one,hf-batched,fastembed} MODEL_DIR PICTURES_DIR OUT.npy

Needs nothing of ours. fastembed also needs MODEL_DIR/model.onnx (vision tower, input `pixel_values`) and
`pip install fastembed==0.9.1`. Prints one JSON line; its clock starts after imports and model load.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

BATCH = 32


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


def fastembed(model_dir: str, paths: list[Path]) -> tuple[np.ndarray, float]:
    from fastembed import ImageEmbedding

    model = ImageEmbedding(
        "Qdrant/clip-ViT-B-32-vision", specific_model_path=model_dir, threads=os.cpu_count(),
        providers=["CPUExecutionProvider"],
    )
    start_s = time.monotonic()
    return np.stack(list(model.embed([str(path) for path in paths], batch_size=BATCH))), start_s


def main() -> None:
    contestant, model_dir, pictures_dir, out = sys.argv[1:5]
    paths = sorted(path for path in Path(pictures_dir).rglob("*") if path.is_file())
    if contestant == "fastembed":
        emb_nd, start_s = fastembed(model_dir, paths)
    else:
        emb_nd, start_s = hf(model_dir, paths, 1 if contestant == "hf-one" else BATCH)
    np.save(out, emb_nd.astype(np.float16))
    print(json.dumps({"contestant": contestant, "images": len(emb_nd), "seconds": time.monotonic() - start_s}))


if __name__ == "__main__":
    main()
