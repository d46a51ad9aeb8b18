"""The embedded demo model: a tiny but real CLIP, trained on generated pictures in minutes on two cores.

    python -m export.demo_model train export/demo           # about 10 minutes on 2 cores
    python -m export.demo_model evaluate export/demo

It is an ordinary `transformers.CLIPModel` directory with a CLIP tokenizer of its own, so everything that works on it
works on the published models. Trade-off: under a million parameters and 64-pixel input are enough for shapes, colours,
sizes, places and counts (numbers in docs/LOG.md), and know nothing else.

Evaluation is on pictures the training never drew, in one gallery of 1,080 with every pair of colour and shape:
R@1  share of full captions whose first picture agrees with the caption in every attribute;
P@9  of the first nine pictures for a short text, the share it means; only texts that mean at least nine count.
Both are given for combinations of colour, shape and background that training drew (`seen`) and never drew (`unseen`).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from export.demo_captions import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    OPENINGS,
    POSITIONS,
    SHAPES,
    SIZES,
    Attributes,
    Query,
    full_query,
    relevance,
    retrieval_scores,
    short_query,
)
from export.demo_pictures import encode_picture, held_out_gallery, make_picture, training_attributes
from export.random_model import CLIP_MEAN, CLIP_STD, END, START, byte_vocab
from export.source import quiet_transformers

log = logging.getLogger(__name__)

IMAGE_SIZE, PATCH, CONTEXT, DIM = 64, 16, 32, 64
STEPS, BATCH, POOL = 900, 96, 20_000
SHORT_TEXTS = 1  # per picture and step, beside its full caption
NAMING_WEIGHT = 0.5  # of the loss of naming each attribute; without it shapes are still half guessed after 1,500 steps
LEARNING_RATE = 2e-3
THREADS = 1  # fixed, because sums differ in their last bits with the number of threads


# --- tokenizer ---------------------------------------------------------------------------------------------------


def demo_words() -> list[str]:
    """Every word a caption can hold, the frequent ones first."""
    nouns = [*SHAPES, "shape"]
    plurals = [noun + ("es" if noun.endswith("s") else "s") for noun in nouns]
    glue = [*OPENINGS, "one in at the middle center corner on background"]
    names = [*COLOURS, *nouns, *plurals, *BACKGROUNDS, *SIZES, *POSITIONS, *COUNTS.values(), *glue]
    return list(dict.fromkeys(" ".join(names).split()))


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in spelled for pair in pairwise(parts)):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        for parts in spelled:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
    return merges


def write_tokenizer(folder: Path) -> Any:
    """vocab.json and merges.txt as CLIP has them, and what `transformers` derives from them."""
    merges = learn_merges(demo_words())
    vocabulary = byte_vocab(merges)  # the end token is the last: both pooling rules of the text tower find it
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    tokenizer = quiet_transformers().CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


# --- model -------------------------------------------------------------------------------------------------------


def new_model(vocabulary_size: int) -> Any:
    transformers = quiet_transformers()
    end = vocabulary_size - 1
    tower = {"projection_dim": DIM, "hidden_act": "quick_gelu"}
    text = {"vocab_size": vocabulary_size, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": end - 1,
            "eos_token_id": end, "pad_token_id": end, **tower}  # fmt: skip
    vision = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
              "image_size": IMAGE_SIZE, "patch_size": PATCH, **tower}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
    model = transformers.CLIPModel(config)
    # As large as what a patch adds: at the usual 0.02 places drown, and corners are still a guess after 600 steps.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
    return model


def image_processor() -> Any:
    return quiet_transformers().CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=Image.Resampling.BICUBIC,
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )


# --- training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Training pictures as the model sees them before normalisation."""

    pixels: npt.NDArray[np.uint8]  # (n, 3, s, s)
    attributes: list[Attributes]


def draw_some(seed: int, start: int, count: int) -> Pool:
    pixels = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    attributes = []
    for i in range(count):
        rng = np.random.default_rng([seed, start + i])
        # Short edges to 256 only: larger pictures look the same at 64 pixels and cost ten times as much.
        picture = make_picture(rng, training_attributes(rng), int(rng.integers(64, 257)))
        content, _ = encode_picture(picture.image, rng)
        pixels[i] = shrink(Image.open(io.BytesIO(content)).convert("RGB"))
        attributes.append(picture.attributes)
    return Pool(pixels, attributes)


def shrink(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Shortest edge to the model's size, centre crop: the reference preprocessing on uint8."""
    short = min(image.size)
    width, height = (int(IMAGE_SIZE * edge / short) for edge in image.size)
    left, top = (width - IMAGE_SIZE) // 2, (height - IMAGE_SIZE) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))).transpose(2, 0, 1)


def draw_pool(size: int, seed: int, workers: int = 2) -> Pool:
    """The same pool whatever the number of workers: every picture has a seed of its own."""
    share = 500
    starts = range(0, size, share)
    counts = [min(share, size - start) for start in starts]
    with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        parts = list(executor.map(draw_some, [seed] * len(counts), starts, counts))
    return Pool(np.concatenate([part.pixels for part in parts]), [a for part in parts for a in part.attributes])


def normalise(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def tokenise(tokenizer: Any, queries: Sequence[Query]) -> torch.Tensor:
    ids: torch.Tensor = tokenizer([query.text for query in queries], padding=True, truncation=True,
                                  max_length=CONTEXT, return_tensors="pt")["input_ids"]  # fmt: skip
    return ids


def contrastive_loss(
    image_emb: torch.Tensor, text_emb: torch.Tensor, scale: torch.Tensor, relevant: npt.NDArray[np.bool_]
) -> torch.Tensor:
    """Divergence from the truth, both ways: a text that means several pictures shares itself equally among them."""
    truth = torch.from_numpy(relevant).float()
    logits = scale * text_emb @ image_emb.T
    by_text = F.kl_div(F.log_softmax(logits, 1), truth / truth.sum(1, keepdim=True), reduction="none").sum(1)
    by_image = F.kl_div(F.log_softmax(logits, 0), truth / truth.sum(0, keepdim=True), reduction="none").sum(0)
    return (by_text.mean() + by_image.mean()) / 2


class Naming(torch.nn.Module):
    """One linear reader per attribute over the image features: tells each feature what to be, long before texts can."""

    def __init__(self, attributes: Sequence[Attributes]) -> None:
        super().__init__()
        values: dict[str, tuple[object, ...]] = {
            "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS, "count": (1, *COUNTS), "size": ("", *SIZES),
            "position": ("", *POSITIONS),
        }  # fmt: skip
        self.answers = {k: torch.tensor([v.index(getattr(a, k)) for a in attributes]) for k, v in values.items()}
        self.readers = torch.nn.ModuleDict({k: torch.nn.Linear(DIM, len(v)) for k, v in values.items()})

    def forward(self, features_nd: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        wrong = [F.cross_entropy(reader(features_nd), self.answers[k][rows]) for k, reader in self.readers.items()]
        return torch.stack(wrong).sum()


def train(model: Any, tokenizer: Any, pool: Pool, *, steps: int, batch: int, seed: int) -> list[float]:
    """Loss of every step. Each picture comes with its full caption and some short texts that are true of it."""
    rng = np.random.default_rng([seed, 3])
    naming = Naming(pool.attributes)  # only for training: it is not saved
    parameters = [*model.parameters(), *naming.parameters()]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))
    warm = max(1, steps // 12)
    model.train()
    losses, began = [], time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            rise = min(1.0, (step + 1) / warm)
            group["lr"] = LEARNING_RATE * rise * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))
        rows = rng.choice(len(pool.attributes), batch, replace=False)
        shown = [pool.attributes[row] for row in rows]
        queries = [full_query(a, rng) for a in shown]
        queries += [short_query(a, rng) for a in shown for _ in range(SHORT_TEXTS)]
        output = model(input_ids=tokenise(tokenizer, queries), pixel_values=normalise(pool.pixels[rows]))
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(output.image_embeds, output.text_embeds, scale, relevance(queries, shown))
        loss = loss + NAMING_WEIGHT * naming(output.vision_model_output.pooler_output, rows)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % 100 == 99 or step == steps - 1:
            log.info("step %d/%d  loss %.3f  scale %.1f  %.0f s", step + 1, steps, np.mean(losses[-100:]),
                     float(scale.detach()), time.monotonic() - began)  # fmt: skip
    with torch.no_grad():
        model.logit_scale.clamp_(max=float(np.log(100)))
    return losses


def build(folder: Path, *, steps: int = STEPS, batch: int = BATCH, pool: int = POOL, seed: int = 0) -> list[float]:
    """Train from nothing and save the model directory; the losses of every step."""
    torch.set_num_threads(THREADS)
    began = time.monotonic()
    pictures = draw_pool(pool, seed)
    log.info("%d pictures drawn in %.0f s", pool, time.monotonic() - began)
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder)
    model = new_model(len(tokenizer))
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    losses = train(model, tokenizer, pictures, steps=steps, batch=batch, seed=seed)
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return losses


# --- evaluation --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(folder: Path, seed: int = 1000) -> dict[str, dict[str, float]]:
    """The held-out scores, from files through the reference preprocessing, on Hugging Face alone."""
    transformers = quiet_transformers()
    model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        gallery = held_out_gallery(Path(scratch) / "gallery", seed=seed)
        embedded = []
        for record in gallery.records:
            with Image.open(gallery.folder / record.file) as image:
                pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            embedded.append(model.get_image_features(pixel_values=pixels).pooler_output)
    image_emb = F.normalize(torch.cat(embedded), dim=-1).numpy()
    shown = [record.attributes for record in gallery.records]
    scores = {}
    for name, queries in gallery.queries.items():
        text_emb = F.normalize(model.get_text_features(input_ids=tokenise(tokenizer, queries)).pooler_output, dim=-1)
        scores[name] = retrieval_scores(image_emb, text_emb.numpy(), relevance(queries, shown))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m export.demo_model", description="Train or score the demo model.",
                                     epilog="example: python -m export.demo_model evaluate export/demo")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train from nothing and save the model directory")
    training.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="same seed, same model (default %(default)s)")
    scoring = commands.add_parser("evaluate", help="print the held-out scores as JSON")
    for command in (training, scoring):
        command.add_argument("folder", type=Path, metavar="DIR", help="model directory")
    args = parser.parse_args()
    if args.command == "train":
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        build(args.folder, steps=args.steps, seed=args.seed)
    print(json.dumps(evaluate(args.folder), indent=2))


if __name__ == "__main__":
    main()
