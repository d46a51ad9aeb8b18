"""Both towers of a model in transformers, apart from each other: pictures and texts prepared and encoded a second.

    python docs/benchmarks/towers.py MODEL_DIR PICTURES_DIR SECONDS BATCH [BATCH ...]

Random texts of 12 words, padded to the context as the model wants them. Every figure is a rate over SECONDS, after one
call to warm up. Prints one JSON list, one row for each batch; needs nothing of ours. PICTURES_DIR of "-": texts alone.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np


def rate(call, rows: int, seconds: float) -> float:
    call()
    start_s, calls = time.monotonic(), 0
    while time.monotonic() - start_s < seconds:
        call()
        calls += 1
    return calls * rows / (time.monotonic() - start_s)


def main() -> None:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model_dir, pictures, seconds, batches = sys.argv[1], sys.argv[2], float(sys.argv[3]), list(map(int, sys.argv[4:]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = CLIPModel.from_pretrained(model_dir).eval().to(device), AutoTokenizer.from_pretrained(model_dir)
    context = model.config.text_config.max_position_embeddings
    words = [f"word{number}" for number in np.random.default_rng(0).integers(0, 999, 12 * max(batches))]
    texts = [" ".join(words[12 * row : 12 * row + 12]) for row in range(max(batches))]
    paths = sorted(Path(pictures).rglob("*.jpg"))[:32] if pictures != "-" else []
    processor = AutoImageProcessor.from_pretrained(model_dir, backend="pil") if paths else None

    def prepare_texts(count: int):
        options = {"padding": "max_length", "max_length": context, "truncation": True, "return_tensors": "pt"}
        return tokenizer(texts[:count], **options)["input_ids"]

    def prepare_pictures():
        opened = [Image.open(path).convert("RGB") for path in paths]
        return processor(images=opened, return_tensors="pt")["pixel_values"]

    found = []
    with torch.inference_mode():
        for batch in batches:
            ids = prepare_texts(batch).to(device)
            row = {
                "runtime": "transformers", "precision": "fp32", "device": device, "batch": batch,
                "texts preprocessed": rate(lambda: prepare_texts(batch), batch, seconds),  # noqa: B023
                "texts encoded": rate(lambda: model.get_text_features(ids).pooler_output.cpu(), batch, seconds),  # noqa: B023
            }  # fmt: skip
            if paths:
                pixels = torch.zeros((batch, *prepare_pictures().shape[1:]), device=device)
                row["images preprocessed"] = rate(prepare_pictures, len(paths), seconds)
                row["images encoded"] = rate(
                    lambda: model.get_image_features(pixels).pooler_output.cpu(), batch, seconds  # noqa: B023
                )
            found.append(row)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
