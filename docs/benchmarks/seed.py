"""Hugging Face pipelines from the naive one to the fastest of its kind, one switch each: the rungs that ours stands on.

    python docs/benchmarks/seed.py '{"runs": [{"model": DIR, "pictures": DIR, "images": 64, "out": "vectors.npz"}],
        "batch": 32, "producers": 2, "threads": 2, "devices": ["cpu"], "sharing": "dynamic", "preprocess": "hf"}'

    producers    processes that read, decode and preprocess; 0: the one process does everything in turn
    threads      of the model on a CPU (OpenMP), for each of `devices`
    devices      one model each, "cpu" or "cuda:0", also several times (replicas); more than one need producers
    sharing      dynamic: one queue for all; static: each device its own, split by the speed of two batches done by all
                 at the same time, at the real batch size
    preprocess   hf: the PIL image processor of transformers; ours: the stages of pipeline.stages_cpu

It rebuilds the systems of a published study (parallel CLIP inference, producers and consumers, CPU and GPU) without
their faults: nothing is skipped, every batch is counted, GPUs are synchronised where a stage ends. Each run's clock
starts when its models are loaded and warm. Prints one JSON list; `seconds` of stages add up over processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import sys
import time
from pathlib import Path

import numpy as np

QUEUED_BATCHES = 4  # for each consumer; a batch of 32 is 19 MB
WARM_BATCHES = 2
STAGES = ("preprocess", "transfer", "forward")


class HfPreprocess:
    def __init__(self, model_dir: str) -> None:
        from transformers import AutoImageProcessor

        self.processor = AutoImageProcessor.from_pretrained(model_dir, backend="pil")

    def __call__(self, paths: list[Path]) -> np.ndarray:
        from PIL import Image

        pictures = [Image.open(path).convert("RGB") for path in paths]
        return self.processor(images=pictures, return_tensors="np")["pixel_values"]


class OurPreprocess:
    def __init__(self, model_dir: str) -> None:
        from engines.spec import find_artifact
        from pipeline.stages_cpu import CpuStages

        self.pre = find_artifact(model_dir).spec.preprocess
        self.stages = CpuStages(self.pre, threads=1)

    def __call__(self, paths: list[Path]) -> np.ndarray:
        from pipeline.batch import Batch

        pixels = np.empty((len(paths), 3, self.pre.size, self.pre.size), np.float32)
        batch = self.stages(Batch(np.arange(1, len(paths) + 1), [path.read_bytes() for path in paths]), pixels)
        assert not batch.failed, batch.failed
        return pixels


PREPROCESS = {"hf": HfPreprocess, "ours": OurPreprocess}


class Model:
    """CLIP on one device; `seconds` counts transfer and forward apart."""

    def __init__(self, model_dir: str, device: str, threads: int) -> None:
        import torch
        from transformers import CLIPModel

        torch.set_num_threads(threads)
        self.torch, self.device = torch, torch.device(device)
        self.model = CLIPModel.from_pretrained(model_dir).eval().to(self.device)
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        start_s = time.monotonic()
        with self.torch.inference_mode():
            there = self.torch.from_numpy(pixels).to(self.device)
            self._wait()
            moved_s = time.monotonic()
            emb = self.model.get_image_features(pixel_values=there).pooler_output
            emb = (emb / emb.norm(dim=-1, keepdim=True)).cpu().numpy()  # waits for the device
        self.seconds["transfer"] += moved_s - start_s
        self.seconds["forward"] += time.monotonic() - moved_s
        return emb

    def warm(self, batch: int) -> float:
        """Rows a second."""
        size = self.model.config.vision_config.image_size
        pixels = np.zeros((batch, 3, size, size), np.float32)
        start_s = time.monotonic()
        for _ in range(WARM_BATCHES):
            self(pixels)
        self.seconds = dict.fromkeys(STAGES, 0.0)
        return WARM_BATCHES * batch / (time.monotonic() - start_s)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)


def in_turn(config: dict, run: dict, batches: list[list[Path]]) -> tuple[list, dict, float]:
    """One process, one stage after the other."""
    preprocess = PREPROCESS[config["preprocess"]](run["model"])
    model = Model(run["model"], config["devices"][0], config["threads"])
    model.warm(min(config["batch"], 32))
    done, start_s = [], time.monotonic()
    for number, paths in enumerate(batches):
        began_s = time.monotonic()
        pixels = preprocess(paths)
        model.seconds["preprocess"] += time.monotonic() - began_s
        done.append((number, model(pixels)))
    return done, model.seconds, time.monotonic() - start_s


def produce(kind: str, model_dir: str, mine: list, queues: list, go, results) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    preprocess = PREPROCESS[kind](model_dir)
    results.put(("ready", os.getpid(), None, None))
    go.wait()
    for number, paths, owner in mine:
        start_s = time.monotonic()
        pixels = preprocess(paths)
        queues[owner].put((number, pixels, time.monotonic() - start_s))


def consume(model_dir: str, device: str, threads: int, batch: int, together, mine, results) -> None:
    model = Model(model_dir, device, threads)
    together.wait()  # all at once: what one does alone says nothing of what it does beside the others
    results.put(("speed", os.getpid(), model.warm(batch), None))
    while (item := mine.get()) is not None:
        number, pixels, seconds = item
        model.seconds["preprocess"] += seconds
        results.put(("batch", number, model(pixels), None))
    results.put(("end", os.getpid(), None, model.seconds))


def parallel(config: dict, run: dict, batches: list[list[Path]]) -> tuple[list, dict, float]:
    """Producers and consumers, each a process."""
    context, devices = multiprocessing.get_context("spawn"), config["devices"]
    static = config["sharing"] == "static"
    queues = [context.Queue(QUEUED_BATCHES * (1 if static else len(devices))) for _ in devices[: None if static else 1]]
    results, go, together = context.Queue(), context.Event(), context.Barrier(len(devices))
    consumers = [
        context.Process(
            target=consume, daemon=True,
            args=(
                run["model"], device, config["threads"], config["batch"], together, queues[at * static], results,
            ),
        )
        for at, device in enumerate(devices)
    ]  # fmt: skip
    for process in consumers:
        process.start()
    speeds = dict(take(results, consumers)[1:3] for _ in devices)
    owners = owners_by_speed(len(batches), [speeds[process.pid] for process in consumers]) if static else None
    work = [(number, paths, owners[number] if owners else 0) for number, paths in enumerate(batches)]
    producers = [
        context.Process(
            target=produce, daemon=True,
            args=(config["preprocess"], run["model"], work[first :: config["producers"]], queues, go, results),
        )
        for first in range(config["producers"])
    ]  # fmt: skip
    for process in producers:
        process.start()
    for _ in producers:
        take(results, producers)
    go.set()
    start_s, seconds, done = time.monotonic(), dict.fromkeys(STAGES, 0.0), []
    while len(done) < len(batches):
        done.append(take(results, consumers + producers)[1:3])
    elapsed_s = time.monotonic() - start_s
    for at in range(len(devices)):
        queues[at * static].put(None)
    for _ in devices:
        _, _, _, theirs = take(results, consumers)
        seconds = {stage: seconds[stage] + theirs[stage] for stage in STAGES}
    return done, seconds, elapsed_s


def take(results, processes: list) -> tuple:
    """The next result; a process that died ends everything, for its batches would never come."""
    while True:
        try:
            return results.get(timeout=1.0)
        except queue.Empty:
            if dead := [process.exitcode for process in processes if process.exitcode]:
                raise RuntimeError(f"a process ended with {dead[0]}") from None


def owners_by_speed(batches: int, speeds: list[float]) -> list[int]:
    """Which consumer gets each batch: neighbours in time go to different ones, each in proportion to its speed."""
    given, owners = [0] * len(speeds), []
    for _ in range(batches):
        owners.append(min(range(len(speeds)), key=lambda at: (given[at] + 1) / speeds[at]))
        given[owners[-1]] += 1
    return owners


def main() -> None:
    config = {"producers": 0, "threads": 1, "devices": ["cpu"], "sharing": "dynamic", "preprocess": "hf"}
    config |= json.loads(sys.argv[1])
    if len(config["devices"]) > 1 and not config["producers"]:
        raise SystemExit(f"{len(config['devices'])} devices need producers, there are none")
    told = []
    for run in config["runs"]:
        begun_s = time.monotonic()
        paths = sorted(path for path in Path(run["pictures"]).rglob("*") if path.is_file())[: run["images"]]
        batches = [paths[first : first + config["batch"]] for first in range(0, len(paths), config["batch"])]
        done, seconds, elapsed_s = (parallel if config["producers"] else in_turn)(config, run, batches)
        order = sorted(done, key=lambda one: one[0])
        np.savez(run["out"], emb_nd=np.concatenate([emb for _, emb in order]), batches=[at for at, _ in order])
        start_s = time.monotonic() - begun_s - elapsed_s
        images = sum(len(emb) for _, emb in order)
        told.append({"images": images, "seconds": elapsed_s, "start_s": start_s, "stages_s": seconds})
    print(json.dumps(told))


if __name__ == "__main__":
    main()
